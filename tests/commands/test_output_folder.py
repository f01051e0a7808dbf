"""Folders that a command writes into, and who else is there."""

import subprocess
import sys
from pathlib import Path

import pytest

from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.output_folder import claim

CLAIM = """\
import sys
from pathlib import Path
from torchtune_lce.commands.shared.output_folder import claim

claim(Path(sys.argv[1]), ".marker", "an earlier one's")
print("claimed", flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="nobody looks there")
def test_one_process_at_a_time(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(CommandError, match=f"another process is at work in --output {tmp_path}"):
            claim(tmp_path, ".marker", "an earlier one's")
    finally:
        other.kill()
        other.communicate()
    # However it ended; and its own again.
    for _ in range(2):
        assert claim(tmp_path, ".marker", "an earlier one's") == tmp_path


def test_a_user_whom_nobody_knows():
    with pytest.raises(CommandError, match="--output must be a folder, got ~nobody-of-this-name/x"):
        claim(Path("~nobody-of-this-name/x"), ".marker", "an earlier one's")
