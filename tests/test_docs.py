"""Examples in docs/ run as they stand there, one block after the other."""

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def run_blocks(name):
    """The namespace that a page's Python blocks leave."""
    namespace = {}
    for block in re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, name, "exec"), namespace)
    return namespace


def test_look_inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    page = run_blocks("look_inside.md")
    assert page["out"]["text"] == "214 + 382 = 596"
    assert (tmp_path / "logit_lens.png").read_bytes().startswith(b"\x89PNG")
    assert page["right"].shape == (3, len(page["out"]["token_ids"]))
    assert page["right"][-1].min() > 0.9  # the last layer's lens is the model itself
    assert page["right"][:2].mean() < 0.3 < 0.9 < page["right"][-1].mean()
    assert page["added"] == 10
    assert page["subtracted"] >= 9
