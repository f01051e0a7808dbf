"""The subcommand ``plan`` of ``tune-lce``."""

import argparse
import sys
from pathlib import Path

DESCRIPTION = """\
Says what a fine-tune will allocate, from its config and before anything is loaded: parameters, gradients, optimizer and
activations, what each loss adds to them, and the largest batch and the longest sequence that fit a card.

  tune-lce plan --config lce/llama3_2/1B_lora_single_device --memory 24GiB
  tune-lce plan --config lce/gemma2/2B_lora_single_device --sequence-length 4096 batch_size=2

For LoRA and full fine-tunes, on one device or several, for distillations and for DPO, where a batch is of pairs; with
--nproc_per_node of the recipes that are for several. Activations are counted tensor by tensor on the model that the
config builds, without its weights; torchtune_lce/commands/plan/ states the formulas for the rest. With compile: True
the model's layers keep less than is said here.
Exit status: 0, or 2 if the config cannot be planned.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds ``plan`` to the subcommands."""
    parser = subparsers.add_parser(
        "plan",
        prog="tune-lce plan",
        help="Say what a fine-tune will allocate, and how much fits a card.",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, metavar="NAME|PATH", help="of a LoRA or full fine-tune, a distillation or DPO"
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="of the card, as 80GiB; default: that of the card here, if any"
    )
    parser.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens in a row; default: tokenizer.max_seq_len, else 2048"
    )
    parser.add_argument("--losses", metavar="LOSS,...", help="as of tune-lce compare; default: the usual ones")
    parser.add_argument("--nproc_per_node", type=int, metavar="N", help="devices that FSDP2 shards the model over")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="a .png to draw the losses' memory into")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the config")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> None:
    """Prints the plan and ends the process with its status."""
    # Imported here: `tune-lce` makes the parsers of all subcommands before it runs one.
    from torchtune_lce.commands.plan.report import show
    from torchtune_lce.commands.shared.errors import CommandError

    try:
        show(
            args.config,
            args.overrides,
            args.losses,
            args.memory,
            args.sequence_length,
            args.nproc_per_node,
            args.picture,
        )
    except CommandError as error:
        print(f"tune-lce plan: {error}", file=sys.stderr)
        sys.exit(2)
