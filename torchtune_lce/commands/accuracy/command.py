"""The subcommand ``accuracy`` of ``tune-lce``."""

import argparse
import shlex
import sys
from pathlib import Path

DESCRIPTION = """\
Compares losses and gradients of every implementation that can run here with float64, in float32 and bfloat16, on rows
of an untrained model, of a trained one, and on rows whose targets have a probability above 0.99; beside them PyTorch's
own errors. Says which implementations could not run. Takes one to two minutes on two CPU cores, compilation included;
on a card the kernels run too. Writes a Markdown table and a picture. Exit status: 0 if all that ran is as accurate as
it must be, 1 if something is not, 2 if it could not run.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds ``accuracy`` to the subcommands."""
    parser = subparsers.add_parser(
        "accuracy",
        prog="tune-lce accuracy",
        help="Compare losses and gradients with float64.",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("tune-lce-accuracy"), metavar="DIR", help="default: ./tune-lce-accuracy"
    )
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> None:
    """Measures, and ends the process with its status."""
    # Imported here: `tune-lce` makes the parsers of all subcommands before it runs one.
    from torchtune_lce.commands.accuracy.session import examine
    from torchtune_lce.commands.shared.errors import CommandError

    try:
        passed = examine(args.output, shlex.join(["tune-lce", *sys.argv[1:]]))
    except CommandError as error:
        print(f"tune-lce accuracy: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("tune-lce accuracy: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0 if passed else 1)
