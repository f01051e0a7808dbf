"""``tune-lce``: torchtune's command line, which also knows this package's recipes and configs by name."""

import argparse
import logging
import sys

from torchtune_lce.commands.doctor import command as doctor


def _matters(record: logging.LogRecord) -> bool:
    """False for torchao's notice, at every command, that its C++ extensions were built for another torch."""
    return not record.getMessage().startswith("Skipping import of cpp extensions due to incompatible torch version")


# Before torchtune, which imports torchao.
logging.getLogger("torchao").addFilter(_matters)


def main() -> None:
    if sys.argv[1:2] == ["doctor"]:
        # Without torchtune, whose import is what it may have to explain.
        parser = argparse.ArgumentParser(prog="tune-lce")
        doctor.add_parser(parser.add_subparsers())
        args = parser.parse_args()
        args.func(args)
        return
    try:
        from torchtune_lce.commands.tune_parser import TuneLCEParser
    except ImportError as error:
        said = " ".join(str(error).split())
        print(
            f"tune-lce: torchtune cannot be imported: {said}. `tune-lce doctor` says what to install", file=sys.stderr
        )
        sys.exit(2)
    parser = TuneLCEParser()
    parser.run(parser.parse_args())
