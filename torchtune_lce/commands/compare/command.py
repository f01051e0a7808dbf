"""The subcommand ``compare`` of ``tune-lce``."""

import argparse
import shlex
import sys
from pathlib import Path

DESCRIPTION = """\
Runs the same fine-tune once for each loss, through torchtune's recipes, and compares speed, memory and losses step by
step. Writes a table, a JSON file and a picture. Given again with the same arguments it repeats nothing that is done.

losses, with commas between them; the first is what the others are compared with:
  stock        torchtune's own loss in torchtune's own recipe
  main         the way of torchtune's main branch, chunks of projected tokens
  auto, cce, cce_exact, torch_compile, chunked, ...   this package's, as loss.impl in a config
  <name>_compiled   any of them with compile: True, which compiles the model's layers too
  <name>@<seed>     any of them with a seed of its own: how far apart may runs be that differ in nothing else?

In a distillation config the same name sets both losses: stock is torchtune's cross-entropy and its divergence in
chunks; this package's kd_loss takes cce_exact, chunked, torch_compile or reference where that is the name, and auto
beside the others.

In a DPO config the loss stays torchtune's: stock is its recipe, which makes logits, and the other names are how this
package's makes log-probabilities, as logprobs.impl in a config.

Settings of the config follow the options as key=value, as behind `tune run`. On a machine without any model or data:

  tune-lce compare --config lce/gemma2/2B_lora_single_device --trained-weights --demo-data --steps 20 \\
      --losses stock,stock_compiled,main_compiled,cce,cce_compiled batch_size=4 gradient_accumulation_steps=1

--random-weights are an untrained model's, whose flat softmax lets a loss leave nothing out. --trained-weights train the
model's first two layers, embedding and head on the spot; its other layers compute as always, and add nothing.

Exit status: 0 if every run came to its end or ran out of memory, 1 if one failed otherwise, 2 if it could not run.
"""
DEFAULT_STEPS, DEFAULT_WARMUP, DEFAULT_SEQUENCE, DEFAULT_VOCABULARY = 20, 5, 2048, 32_768


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds ``compare`` to the subcommands."""
    parser = subparsers.add_parser(
        "compare",
        prog="tune-lce compare",
        help="Run the same fine-tune with several losses and compare them.",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help="of a fine-tune, a distillation or DPO")
    parser.add_argument("--losses", metavar="LOSS,...", help="default: stock and the usual ones that can run here")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, metavar="N", help=f"default: {DEFAULT_STEPS}")
    parser.add_argument(
        "--warmup",
        type=int,
        default=DEFAULT_WARMUP,
        metavar="N",
        help=f"steps that do not count for the speed; default: {DEFAULT_WARMUP}",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at once on the same device, for their losses: speeds say nothing then; default: 1",
    )
    parser.add_argument("--nproc_per_node", type=int, metavar="N", help="devices, for the distributed recipes")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--random-weights", action="store_true", help="no checkpoint: weights of the model's shapes, made on the spot"
    )
    weights.add_argument(
        "--trained-weights",
        action="store_true",
        help="no checkpoint: weights of the model's shapes that have learnt the text of --demo-data, made once",
    )
    parser.add_argument(
        "--train-seconds",
        type=float,
        metavar="S",
        help="how long --trained-weights are trained at most; default: 75 on a card, 20 elsewhere",
    )
    parser.add_argument(
        "--demo-data", action="store_true", help="no data set: full rows of the source of Python's library"
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        default=DEFAULT_SEQUENCE,
        metavar="N",
        help=f"tokens in a row of --demo-data; default: {DEFAULT_SEQUENCE}",
    )
    parser.add_argument(
        "--vocabulary",
        type=int,
        default=DEFAULT_VOCABULARY,
        metavar="N",
        help=f"of the tokenizer of --demo-data; the model's stays its own; default: {DEFAULT_VOCABULARY}",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("tune-lce-compare"), metavar="DIR", help="default: ./tune-lce-compare"
    )
    parser.add_argument("--fresh", action="store_true", help="repeat what is done, too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the config")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> None:
    """Runs the comparison and ends the process with its status."""
    # Imported here: `tune-lce` makes the parsers of all subcommands before it runs one.
    from torchtune_lce.commands.compare.session import Settings, compare
    from torchtune_lce.commands.shared import interruption
    from torchtune_lce.commands.shared.errors import CommandError

    settings = Settings(
        config=args.config,
        overrides=args.overrides,
        losses=args.losses,
        steps=args.steps,
        warmup=args.warmup,
        output=args.output,
        devices=args.nproc_per_node,
        random_weights=args.random_weights,
        trained_weights=args.trained_weights,
        train_seconds=args.train_seconds,
        demo_data=args.demo_data,
        sequence=args.sequence_length,
        vocabulary=args.vocabulary,
        fresh=args.fresh,
        jobs=args.jobs,
        command=shlex.join(["tune-lce", *sys.argv[1:]]),
    )
    try:
        with interruption.sigterm_interrupts():
            finished = compare(settings)
    except CommandError as error:
        print(f"tune-lce compare: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:  # the running fine-tune has been ended
        print("tune-lce compare: interrupted; what is done is kept, the same command goes on", file=sys.stderr)
        sys.exit(interruption.exit_status(interrupt))
    sys.exit(0 if finished else 1)
