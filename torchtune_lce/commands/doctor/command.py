"""The subcommand ``doctor`` of ``tune-lce``."""

import argparse
import sys

DESCRIPTION = """\
Says which versions and devices are here, which implementation of the loss `auto` takes on each device and why, what
stands against the Triton kernels there, and whether the taken one computes the loss and its gradients right: a few
seconds of self-test against PyTorch in float64. Exit status: 0 if all is well, 1 if a self-test fails or a version
does not fit.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds ``doctor`` to the subcommands."""
    parser = subparsers.add_parser(
        "doctor",
        prog="tune-lce doctor",
        help="Say which implementation of the loss runs here and test it.",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> None:
    """Examines this machine and ends the process with the status."""
    # Imported here: `tune-lce` makes the parsers of all subcommands before it runs one.
    from torchtune_lce.commands.doctor.report import show

    sys.exit(0 if show() else 1)
