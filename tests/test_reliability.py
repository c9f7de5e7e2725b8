"""docs/reliability.md names tests that exist, and that run where it says."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "reliability.md").read_text()


def test_every_test_that_it_names_is_there():
    named = re.findall(r"(slow|gpu)?(?:: | and with [\w,]+ tokens )?`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT)
    assert len(named) > 40
    for mode, path, name in named:
        source = (ROOT / path).read_text()
        if name:
            found = re.search(rf"((?:^@.*\n)*)^def {name}\(", source, re.MULTILINE)
            assert found, f"{path} has no {name}"
            marks = set(re.findall(r"@pytest\.mark\.(slow|gpu)", found[1]))
            assert not mode or mode in marks, f"{path}::{name} is not {mode}"


def test_every_file_that_it_names_is_there():
    for path in re.findall(r"`((?:scripts|docs)/[\w/.]+)`", TEXT):
        assert (ROOT / path).is_file(), path
