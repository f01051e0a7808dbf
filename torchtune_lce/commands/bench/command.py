"""The subcommand ``bench`` of ``tune-lce``."""

import argparse
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from torchtune_lce.commands.shared.errors import CommandError

DESCRIPTION = """\
Times linear cross-entropy losses on one CUDA card, or on the CPU: this package's, PyTorch's and those of
cut-cross-entropy, liger-kernel and quack-kernels where they are installed. Each is first compared with an exact
reference, and not timed if it is wrong. Writes the results as JSON and as a picture. With --divergence, the same of
this package's and torchtune's divergences of a student from its teacher.

data:
  random    an untrained model: nothing to leave out
  trained   a synthetic softmax as sparse as a trained language model's (default)
  probe     trains a small language model first, about three minutes, and takes its hidden states
  file      saved tensors: a .pt file with {"hidden", "weight", "targets"} or {name: (hidden, weight, targets)},
            hidden [N, D], weight [V, D], targets [N] int64 or int32, -100 where ignored
data with --divergence (default: both):
  random    an untrained student and an untrained teacher, which have nothing in common
  near      a student that is its teacher but for 1%, where rounded logits cost most

A shape of its own follows a colon: --data random:8192x4096x128256 --data trained:gemma2_2b. Data whose tokens are named
neither there nor by --tokens are measured with 1024, 2048 and 8192.

Exit status: 0 if every loss of this package that ran is right, 1 if one is wrong or fails, 2 if it could not run.
Without a card --cpu times what runs on the processor, and --check-only compares with the reference.
"""
KINDS = ("random", "trained", "probe", "file")
DIVERGENCES = ("forward", "reverse", "symmetric")
KINDS_WITH_TEACHER = ("random", "near")
# Not float16: without loss scaling the mean over thousands of tokens underflows in everybody's gradients.
DTYPES = ("bfloat16", "float32")
# Few: where launches and the host count. Many: where the products do.
DEFAULT_TOKENS = "1024,2048,8192"
DEFAULT_MODEL, DEFAULT_OUTPUT = "qwen2_5_3b", Path("tune-lce-bench")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds ``bench`` to the subcommands."""
    parser = subparsers.add_parser(
        "bench",
        prog="tune-lce bench",
        help="Time this package's losses and others on a card, each checked first.",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", metavar="NAME", help=f"hidden size and vocabulary of a model; default: {DEFAULT_MODEL}"
    )
    parser.add_argument(
        "--tokens", metavar="N,...", help=f"one batch of each kind of data for each N; default: {DEFAULT_TOKENS}"
    )
    parser.add_argument("--hidden", type=int, help="hidden size, in place of the model's")
    parser.add_argument("--vocab", type=int, help="vocabulary, in place of the model's")
    parser.add_argument(
        "--data", action="append", metavar="KIND[:SHAPE]", help="one of the above; may be given several times"
    )
    parser.add_argument(
        "--divergence", choices=DIVERGENCES, help="time this of a student from its teacher, in place of cross-entropy"
    )
    parser.add_argument(
        "--teacher-hidden",
        type=int,
        metavar="E",
        help="hidden size of the teacher of random data; default: the student's",
    )
    parser.add_argument(
        "--kd-ratio",
        type=float,
        metavar="R",
        help="share of the divergence, in (0, 1], beside the labels' cross-entropy, as in a recipe; default: 1, alone",
    )
    parser.add_argument("--file", type=Path, metavar="PATH", help="the tensors of --data file")
    parser.add_argument("--only", metavar="IMPL,...", help="losses to take; default: all but the rarer presets of cce")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16; float32 for --check-only without a card")
    parser.add_argument("--workspace-mib", type=int, metavar="N", help="of this package's losses; default: theirs, 128")
    parser.add_argument(
        "--filter-eps",
        metavar="EPS,...",
        help="measure this package's losses that filter with each of these thresholds, as 2^-13; default: theirs",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: ./tune-lce-bench")
    parser.add_argument("--cpu", action="store_true", help="time on the CPU, by the clock, in OMP_NUM_THREADS threads")
    parser.add_argument("--check-only", action="store_true", help="compare with the reference on small data, no timing")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark and ends the process with its status."""
    try:
        passed = run(args)
    except CommandError as error:
        print(f"tune-lce bench: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("tune-lce bench: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0 if passed else 1)


def run(args: argparse.Namespace) -> bool:
    """What the arguments ask for; raises CommandError for those that make no sense and for want of a card."""
    # Imported here: `tune-lce` makes the parsers of all subcommands before it runs one.
    import torch

    from torchtune_lce.commands.bench import session, timing

    if args.workspace_mib is not None and args.workspace_mib < 1:
        raise CommandError(f"--workspace-mib must be at least 1, got {args.workspace_mib}")
    only = [name.strip() for name in args.only.split(",")] if args.only else None
    candidates = _candidates(args, only)
    if args.check_only:
        _refuse_beside_check_only(args)
    sources = read_sources(args)
    output = args.output or DEFAULT_OUTPUT
    card = torch.cuda.is_available() and not args.cpu
    device = torch.device("cuda" if card else "cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if card else "float32"))
    if args.check_only:
        return session.check_only(candidates, device, dtype)
    if not card and not args.cpu:
        raise CommandError("there is no CUDA card to time on; --cpu times on the processor, --check-only times nothing")
    command = shlex.join(["tune-lce", *sys.argv[1:]])
    timer = timing.cuda_timer if card else timing.clock_timer
    plan = session.Plan(candidates, sources, device, dtype, timer, output, command)
    return session.bench(plan)


def _refuse_beside_check_only(args: argparse.Namespace) -> None:
    for name in ("model", "tokens", "hidden", "vocab", "teacher_hidden", "data", "file", "output"):
        if getattr(args, name) is not None:
            raise CommandError(
                f"{_option(name)} is not for --check-only, which takes small data of its own and writes nothing"
            )


def _candidates(args: argparse.Namespace, only: list[str] | None) -> list:
    """The :class:`torchtune_lce.commands.shared.candidates.Candidate` that are asked for."""
    from torchtune_lce.commands.bench import divergence_candidates
    from torchtune_lce.commands.shared.candidates import select
    from torchtune_lce.commands.shared.objective import Objective

    if args.divergence is None:
        chosen = select(only, args.workspace_mib, filter_eps=_thresholds(args.filter_eps) if args.filter_eps else ())
        if args.filter_eps and not any("filter_eps" in candidate.settings for candidate in chosen):
            raise CommandError(
                f"--filter-eps is for losses of this package that filter, as cce; got --only {args.only}"
            )
        return chosen
    if args.filter_eps:
        raise CommandError("--filter-eps is not for --divergence, which leaves nothing out")
    kd_ratio = 1.0 if args.kd_ratio is None else args.kd_ratio
    if not 0 < kd_ratio <= 1:
        raise CommandError(f"--kd-ratio must be in (0, 1], got {kd_ratio}")
    objective = Objective(args.divergence, kd_ratio)
    return select(only, args.workspace_mib, divergence_candidates.candidates(objective))


def read_sources(args: argparse.Namespace) -> list:
    """The :class:`torchtune_lce.commands.bench.session.Source` that ``--data`` and the sizes name."""
    from torchtune_lce.commands.bench.session import Source
    from torchtune_lce.commands.shared import shapes

    kinds, default = (KINDS, ["trained"]) if args.divergence is None else (KINDS_WITH_TEACHER, KINDS_WITH_TEACHER)
    if args.model and args.model not in shapes.MODELS:
        raise CommandError(f"--model takes {', '.join(shapes.MODELS)}; got {args.model!r}")
    hidden, vocab = (
        usual if given is None else given
        for given, usual in zip((args.hidden, args.vocab), shapes.MODELS[args.model or DEFAULT_MODEL], strict=True)
    )
    tokens = _numbers(DEFAULT_TOKENS if args.tokens is None else args.tokens)
    usual = [shapes.checked(shapes.Shape(number, hidden, vocab)) for number in tokens]
    sources = []
    for entry in args.data or default:
        kind, _, shape = entry.partition(":")
        if kind not in kinds:
            beside = "" if args.divergence is None else " with --divergence"
            raise CommandError(f"--data takes {', '.join(kinds)}{beside}; got {kind!r}")
        if kind == "file":
            if args.file is None or shape:
                raise CommandError("--data file takes its tensors, and their sizes, from --file PATH")
            if not args.file.is_file():  # told now, not after the other data have been measured
                raise CommandError(f"--file: {args.file} is no file")
            sources.append(Source(kind, path=args.file))
            continue
        # In numbers it is the same whatever --tokens says.
        wanted = list(dict.fromkeys(shapes.parse_shape(shape, number) for number in tokens)) if shape else usual
        if kind == "probe":
            most = max(wanted, key=lambda shape: shape.tokens)
            sources.append(Source(kind, most, fewer=tuple(shape.tokens for shape in wanted if shape != most)))
        else:
            sources += [Source(kind, shape) for shape in wanted]
    if args.divergence is not None:
        sources = [_with_teacher(source, args.teacher_hidden) for source in sources]
    _refuse_what_nothing_takes(args, {source.kind for source in sources})
    return sources


def _with_teacher(source, hidden: int | None):
    """A teacher that is near has the student's sizes."""
    from torchtune_lce.commands.bench.teacher_batches import NEAR, TeacherShape
    from torchtune_lce.commands.shared.shapes import checked

    student = source.shape
    width = student.hidden if hidden is None or source.kind == NEAR else hidden
    return replace(source, shape=checked(TeacherShape(student.tokens, student.hidden, student.vocab, width)))


def _refuse_what_nothing_takes(args: argparse.Namespace, kinds: set[str]) -> None:
    if args.divergence is None:
        for name in ("teacher_hidden", "kd_ratio"):
            if getattr(args, name) is not None:
                raise CommandError(f"{_option(name)} is for --divergence")
    elif args.teacher_hidden is not None and "random" not in kinds:
        raise CommandError("--teacher-hidden is for --data random: a teacher that is near has the student's sizes")
    if args.file and "file" not in kinds:
        raise CommandError("--file is for --data file")


def _numbers(text: str) -> list[int]:
    """Each of them once."""
    try:
        return list(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError as error:
        raise CommandError(f"--tokens takes whole numbers with commas between them, got {text!r}") from error


def _thresholds(text: str) -> list[float]:
    """Each of them once, to the six digits that name its losses; a power as base^exponent."""
    found = {}
    for threshold in text.split(","):
        base, power, exponent = threshold.partition("^")
        try:
            eps = math.pow(float(base), float(exponent) if power else 1)
        except (ValueError, ArithmeticError) as error:
            raise CommandError(
                f"--filter-eps takes numbers as 1.2e-4 or 2^-13 with commas between them, got {text!r}"
            ) from error
        if not 0 <= eps < 1:
            raise CommandError(f"--filter-eps takes numbers in [0, 1), got {threshold!r}")
        found.setdefault(f"{eps:.6g}", eps)
    return list(found.values())


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
