"""Shared by the tests of hostile files: a good checkpoint."""

import pytest
from hostile import open_checkpoint
from small_model import write_checkpoint


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A good checkpoint, of which each example rewrites a file."""
    directory = write_checkpoint(tmp_path_factory.mktemp("hostile") / "model")
    open_checkpoint(directory)  # imports what there is, which is not to count as an example's time
    return directory
