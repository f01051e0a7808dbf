"""The folders that subcommands write into: never a folder that holds somebody else's files."""

from pathlib import Path

from torchtune_lce.commands.shared.errors import CommandError


def claim(output: Path, marker: str, whose: str) -> Path:
    """An absolute path to ``output``, which is made if it is not there and has the empty file ``marker`` from now on.

    Raises CommandError for a file, a folder that cannot be written, or one that holds something and no ``marker``;
    ``whose`` says what puts it there, as in "an earlier demo's".
    """
    output = output.expanduser().resolve()
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output must be a folder, {output} is a file")
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not (output / marker).exists() and any(output.iterdir()):
            raise CommandError(f"--output must be a new folder, an empty one or {whose}; {output} is neither")
        (output / marker).touch()
    except OSError as error:
        raise CommandError(f"--output must be a folder that can be written, {output}: {error.strerror}") from error
    return output
