"""The folder that holds everything the demo writes."""

import shutil
from pathlib import Path

from torchtune_lce.commands.shared import output_folder
from torchtune_lce.commands.shared.errors import CommandError

# Says that a folder is the demo's own, whose contents the next demo may delete.
MARKER = ".tune-lce-demo"
SAMPLES, PAIRS, TOKENIZER, MODEL = "samples.jsonl", "pairs.jsonl", "tokenizer", "model"
RUNS, CURVES = "runs", "curves.png"
# The configs have the data set's cache here too, not in the home folder.
_OWN = (SAMPLES, PAIRS, TOKENIZER, MODEL, RUNS, CURVES, "cache")


def prepare(output: Path) -> Path:
    """An absolute path to a folder without anything of an earlier demo in it.

    Raises CommandError for a file, a folder that cannot be written, or one that holds something else.
    """
    output = output_folder.claim(output, MARKER, "an earlier demo's")
    try:
        for path in map(output.joinpath, _OWN):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"--output must be a folder that can be written, {output}: {error.strerror}") from error
    return output
