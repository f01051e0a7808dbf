"""The subcommand ``demo`` of ``tune-lce``."""

import argparse
import sys
from pathlib import Path

DESCRIPTION = """\
Fine-tunes a small model on real text with torchtune's own loss and with this package's, by LoRA and in full, and
compares the losses step by step. With --method dpo it learns, by LoRA, to tell answers from those to other questions,
with torchtune's log-probabilities and with this package's. Nothing is downloaded: the text is the documentation in
Python's standard library, the tokenizer is trained on its source, the model has random weights. Uses a CUDA GPU if
there is one; on two CPU cores it takes a minute or two. Exit status: 0 if the losses agree, 1 if they differ by
more than rounding, 2 if it could not run.
"""
DEFAULT_STEPS = 20


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds ``demo`` to the subcommands."""
    parser = subparsers.add_parser(
        "demo",
        prog="tune-lce demo",
        help="Compare this package's loss with torchtune's on real text, without any download.",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("tune-lce-demo"),
        metavar="DIR",
        help="folder for everything that it writes; default: ./tune-lce-demo",
    )
    parser.add_argument(
        "--method",
        choices=("finetune", "dpo"),
        default="finetune",
        help="fine-tuning (LoRA and full) or preference tuning (LoRA DPO); default: finetune",
    )
    parser.add_argument(
        "--impl", default="auto", help="implementation of the loss, as loss.impl in a config; default: auto"
    )
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, metavar="N", help=f"steps of each run; default: {DEFAULT_STEPS}"
    )
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> None:
    """Runs the demo and ends the process with its status."""
    # Imported here: `tune-lce` makes the parsers of all subcommands before it runs one.
    from torchtune_lce.commands.demo.demonstration import demonstrate
    from torchtune_lce.commands.shared import interruption
    from torchtune_lce.commands.shared.errors import CommandError

    try:
        with interruption.sigterm_interrupts():
            agrees = demonstrate(args.output, args.impl, args.steps, args.method)
    except CommandError as error:
        print(f"tune-lce demo: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:  # the running fine-tune has been ended
        print("tune-lce demo: interrupted", file=sys.stderr)
        sys.exit(interruption.exit_status(interrupt))
    sys.exit(0 if agrees else 1)
