"""A subcommand of tune-lce as the command line runs it, in this process."""

import argparse
from types import ModuleType

import pytest


def exit_status(command: ModuleType, *arguments) -> int:
    """``command`` is a command's module command.py; what it prints is the test's to capture."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    name = command.__name__.split(".")[-2]
    args = parser.parse_args([name, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        args.func(args)
    return end.value.code
