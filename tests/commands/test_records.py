"""Records that are read again, on a disk that is full and after one was."""

import resource
from contextlib import contextmanager

import pytest

from torchtune_lce.commands.shared import records


@contextmanager
def room_for(size: int):
    """As on a disk that is full: no file can grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_record_that_was_there(tmp_path):
    path = tmp_path / "made.json"
    records.write({"rows": 3}, path)
    with pytest.raises(OSError, match="too large"), room_for(5):
        records.write({"rows": 4}, path)
    assert records.read(path) == {"rows": 3}
    assert list(tmp_path.iterdir()) == [path]
    records.write({"rows": 4}, path)
    assert records.read(path) == {"rows": 4}


@pytest.mark.parametrize("content", [None, b"", b'{"rows": ', b"\xff"])
def test_what_is_no_whole_record_counts_as_none(tmp_path, content):
    if content is not None:
        (tmp_path / "made.json").write_bytes(content)
    assert records.read(tmp_path / "made.json") is None
