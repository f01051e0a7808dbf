"""The order in which processes are started, and that none is left."""

import subprocess
import sys

import pytest

from torchtune_lce.commands.shared.process_queue import ProcessQueue


def waiting() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_none_is_left_where_the_next_one_does_not_start():
    started = []

    def first():
        started.append(waiting())
        return started[0]

    def second():
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"), ProcessQueue({"first": first, "second": second}, True) as queue:
        queue.take("first")
    try:
        assert started[0].poll() is not None
    finally:
        started[0].kill()
        started[0].communicate()
