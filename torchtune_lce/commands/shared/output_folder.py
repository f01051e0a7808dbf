"""The folders that subcommands write into: never one that holds somebody else's files, or where somebody is at work."""

import sys
from pathlib import Path

from torchtune_lce.commands.shared.errors import CommandError

if sys.platform != "win32":
    import fcntl
# Markers that this process has locked: the kernel lets go of them when it ends, in whatever way.
_locked = {}


def claim(output: Path, marker: str, whose: str) -> Path:
    """An absolute path to ``output``, which is made if it is not there and has the empty file ``marker`` from now on.

    Raises CommandError for a file, a folder that cannot be written, one that another process has claimed and still runs
    (where system and disk have locks), or one that holds something and no ``marker``; ``whose`` says what puts it
    there, as in "an earlier demo's".
    """
    try:
        output = output.expanduser().resolve()
    except RuntimeError as error:  # of a user whom nobody knows
        raise CommandError(f"--output must be a folder, got {output}: {error}") from error
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output must be a folder, {output} is a file")
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not (output / marker).exists() and any(output.iterdir()):
            raise CommandError(f"--output must be a new folder, an empty one or {whose}; {output} is neither")
        (output / marker).touch()
        _lock(output / marker)
    except BlockingIOError as error:
        raise CommandError(f"another process is at work in --output {output}: wait for it, or give another") from error
    except OSError as error:
        raise CommandError(f"--output must be a folder that can be written, {output}: {error.strerror}") from error
    return output


def _lock(marker: Path) -> None:
    if sys.platform == "win32" or marker in _locked:
        return
    file = marker.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        # Some network disks have no locks: whoever has one there is not seen.
        if isinstance(error, BlockingIOError):
            raise
        return
    _locked[marker] = file
