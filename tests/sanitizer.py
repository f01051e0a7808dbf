"""The kernels under NVIDIA's compute-sanitizer: `python tests/sanitizer.py` on a machine with a card.

memcheck looks for reads and writes out of bounds, initcheck for reads of memory that nothing wrote, racecheck for
hazards in shared memory. Each runs the same small calls in every dtype, with descriptor and with pointer loads. Before,
the calls run without a tool: that compiles the kernels, checks every result against plain PyTorch in float64, and lists
which value of every flag of every kernel was met; a flag that was never on, or never off, is not clean. Under the
tools every result must have the same bits again. A kernel with a fault of each of the three kinds must be found out.
The last line is the verdict, and the exit status is 0 only for `clean`.
"""

import argparse
import ast
import functools
import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

TOOLS = ("memcheck", "initcheck", "racecheck")
PATHS = ("descriptor", "pointer")
DTYPES = ("bfloat16", "float16", "float32")
# Faults made on purpose, by the tool that must see them.
CONTROLS = {"memcheck": "past the end", "initcheck": "never written", "racecheck": "no barrier"}
LOGS = Path(tempfile.gettempdir()) / "torchtune-lce-sanitizer"
ROOT = Path(__file__).parent.parent
# Where the tools print that an access happened.
PLACE = re.compile(r"^=========\s+at (.+?)\+0x", re.MULTILINE)
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")

# A kernel's flag in a dtype, and a value that it had.
Met = set[tuple[str, str, bool]]


@dataclass(frozen=True)
class Call:
    """One small call. Sizes are in units of the configuration's blocks, plus a rest; a token more is another block."""

    name: str
    tokens: tuple[int, int] = (2, 9)  # row blocks and a rest
    vocabulary: tuple[int, int] = (8, 8)  # entry tiles and a rest
    width: int | None = 72  # None: what the backward's products divide evenly
    impl: str = "cce"
    bias: bool = False
    rank: int = 0
    scaled: bool = False  # rows of the weight and of the low rank's
    softcap: float | None = None
    smoothing: float = 0.0  # with a softcap
    logit_scale: float = 1.0
    with_lse: bool = False
    with_entropy: bool = False
    ignored: bool = False
    workspace_mib: int = 128
    # Tiles of the vocabulary's exponentials; None: as many as the workspace has room for, or the weight's gradient.
    held: int | None = None
    frozen: tuple[str, ...] = ()
    paths: tuple[str, ...] = PATHS
    narrow: bool = False  # blocks for cards with 100 KiB of shared memory a program
    # Of the forward and the reverse divergence from a teacher, whose operands are frozen, in place of a cross-entropy.
    shares: tuple[float, float] | None = None
    divergence_share: float = 1.0  # of that loss, whose rest is the student's cross-entropy

    @property
    def of_teacher(self) -> tuple[str, ...]:
        names = ("teacher_hidden", "teacher_weight", "teacher_bias")
        return names[: 2 + self.bias] if self.shares else ()

    def sizes(self, config) -> tuple[int, int, int]:
        """Tokens, entries and features with a :class:`Config`."""
        tokens = self.tokens[0] * config.row_block + self.tokens[1]
        vocabulary = self.vocabulary[0] * config.entry_tile + self.vocabulary[1]
        return tokens, vocabulary, self.width or config.features


CALLS = (
    Call("sparse, even", width=None, ignored=True),
    Call(
        "sparse, everything",
        bias=True,
        rank=8,
        scaled=True,
        softcap=20.0,
        smoothing=0.1,
        logit_scale=0.7,
        with_lse=True,
        with_entropy=True,
    ),
    # More logit gradients than 1 MiB holds.
    Call("sparse strips", vocabulary=(14, 8), impl="cce_kahan_full_c", ignored=True, workspace_mib=1),
    # Also no room there for a copy of the hidden states, and some for strips in the weight's gradient.
    Call(
        "dense strips",
        tokens=(3, 100),
        vocabulary=(14, 8),
        width=264,
        impl="cce_exact",
        bias=True,
        rank=8,
        softcap=20.0,
        with_lse=True,
        workspace_mib=1,
    ),
    Call("adapter alone", vocabulary=(4, 8), impl="cce_exact", rank=24, frozen=("hidden", "weight"), ignored=True),
    Call("frozen hidden, whole tiles", vocabulary=(4, 0), width=None, impl="cce_exact", frozen=("hidden",)),
    Call("frozen weight, rows of no whole 16 bytes", width=70, frozen=("weight",), paths=("descriptor",)),
    Call("one of everything", tokens=(0, 1), vocabulary=(0, 1), width=16, bias=True, paths=("descriptor",)),
    Call("narrow blocks", paths=("pointer",), narrow=True),
    Call("dense way", vocabulary=(4, 0), width=None, impl="cce_exact", ignored=True, held=0),
    # The last tile, which is ragged, and all of them.
    Call("some held", vocabulary=(8, 8), impl="cce_exact", bias=True, with_lse=True, ignored=True, held=1),
    Call("all held, whole tiles", vocabulary=(4, 0), width=None, impl="cce_exact", softcap=20.0),
    # Of two pieces of tokens, whose sums leave no room in the workspace.
    Call(
        "held in the gradient",
        tokens=(4, 100),
        vocabulary=(14, 8),
        width=528,
        impl="cce_exact",
        ignored=True,
        workspace_mib=1,
    ),
    # Several strips forward and back, the last of them ragged.
    Call(
        "dense way, everything",
        held=0,
        vocabulary=(14, 8),
        width=264,
        impl="cce_exact",
        bias=True,
        softcap=20.0,
        smoothing=0.1,
        logit_scale=0.7,
        with_lse=True,
        with_entropy=True,
        workspace_mib=1,
    ),
    Call("both divergences", bias=True, ignored=True, shares=(0.3, 0.7)),
    Call(
        "forward divergence and cross-entropy, whole tiles",
        vocabulary=(4, 0),
        width=None,
        frozen=("weight",),
        shares=(1.0, 0.0),
        divergence_share=0.4,
    ),
    Call("reverse divergence", vocabulary=(4, 8), shares=(0.0, 1.0)),
    # Several strips of several pieces of tokens.
    Call(
        "divergence and cross-entropy in strips",
        tokens=(9, 100),
        vocabulary=(14, 8),
        workspace_mib=1,
        shares=(0.3, 0.7),
        divergence_share=0.6,
    ),
    Call("capped means", vocabulary=(4, 0), softcap=20.0, smoothing=0.1, ignored=True, frozen=("weight",)),
)

BY_DTYPE = (
    ("_difference_kernel", "FOR_TF32", True, ("bfloat16", "float32"), "float16's alone are multiplied in tf32"),
    ("_difference_kernel", "FOR_TF32", False, ("float16",), "float16's are multiplied in tf32"),
    ("_by_row_kernel", "OF_SUM", True, ("bfloat16", "float32"), "float16 alone has no room for a mean's"),
    ("_by_row_kernel", "OF_SUM", False, ("float16",), "float16 has no room for a mean's"),
    ("_exponential_kernel", "FOR_TF32", True, ("bfloat16", "float32"), "float16's alone are multiplied in tf32"),
    ("_exponential_kernel", "FOR_TF32", False, ("float16",), "float16's are multiplied in tf32"),
    ("_again_kernel", "FOR_TF32", True, ("bfloat16", "float32"), "float16's alone are multiplied in tf32"),
    ("_again_kernel", "FOR_TF32", False, ("float16",), "float16's are multiplied in tf32"),
    ("_scale_kernel", "FOR_TF32", True, ("bfloat16", "float32"), "float16's alone are multiplied in tf32"),
    ("_scale_kernel", "FOR_TF32", False, ("float16",), "float16's are multiplied in tf32"),
    ("_redo_kernel", "FOR_TF32", True, ("bfloat16", "float32"), "float16's alone are multiplied in tf32"),
    ("_redo_kernel", "FOR_TF32", False, ("float16",), "float16's are multiplied in tf32"),
    ("_slope_kernel", "FOR_TF32", True, ("bfloat16", "float32"), "float16's alone are multiplied in tf32"),
    ("_slope_kernel", "FOR_TF32", False, ("float16",), "float16's are multiplied in tf32"),
    ("_multiply_kernel", "FOR_TF32", True, ("bfloat16", "float32"), "float16's alone are multiplied in tf32"),
    ("_finish_kernel", "NORMALISED", True, ("bfloat16", "float32"), "float16 alone has no room for small values"),
    ("_finish_kernel", "NORMALISED", False, ("float16",), "float16 has no room for small values"),
)
# What cannot be met: kernel, flag (None for all of it), value, and the dtypes in which it cannot.
IMPOSSIBLE = (
    ("_backward_kernel", "gradient_rows", True, ("float32",), "the copy engine takes logit gradients of 16 bits alone"),
    ("_backward_kernel", "gradient_columns", True, ("float32",), "the copy engine takes those of 16 bits alone"),
    ("_exponential_kernel", "strip_blocks", True, ("float16", "float32"), "bfloat16's alone are stored in 16 bits"),
    ("_again_kernel", "strip_blocks", True, ("float16", "float32"), "bfloat16's alone are stored in 16 bits"),
    ("_difference_kernel", "strip_blocks", True, ("float16", "float32"), "bfloat16's alone are stored in 16 bits"),
    ("_slope_kernel", "strip_blocks", True, ("float16", "float32"), "bfloat16's alone are stored in 16 bits"),
    ("_list_kernel", "PAIRED", True, ("float32",), "a forward's tile of float32 is as wide as a backward's"),
    *BY_DTYPE,
)
WITHOUT_COPY_ENGINE = (
    ("_descriptor_kernel", None, None, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_backward_kernel", "hidden_rows", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_backward_kernel", "weight_rows", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_backward_kernel", "gradient_rows", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_backward_kernel", "gradient_columns", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_strip_kernel", "count_in_order", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_exponential_kernel", "strip_blocks", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_again_kernel", "strip_blocks", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_difference_kernel", "strip_blocks", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_slope_kernel", "strip_blocks", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_exponential_kernel", "TMA", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_segment_kernel", "TMA", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_difference_kernel", "TMA", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_product_kernel", "TMA", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_again_kernel", "TMA", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_weight_kernel", "TMA", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_bias_kernel", "TMA", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_slope_kernel", "TMA", True, DTYPES, "sm90 and newer alone have a copy engine"),
    ("_slope_kernel", "FLATTEN", True, DTYPES, "sm90 and newer alone have a copy engine"),
)
IN_INTERPRETER = (
    *WITHOUT_COPY_ENGINE,
    *BY_DTYPE,
    ("_list_kernel", "PAIRED", False, DTYPES, "the interpreter has one configuration"),
)


@dataclass
class Coverage:
    """Of each kernel: its flags, True and False where they were met; and the most strips of a launch, by kind.

    What is given or None is a flag too: `operands.bias` is one of the kernels that take operands.
    """

    flags: dict[str, dict[str, set[bool]]] = field(default_factory=dict)
    strips: Counter[str] = field(default_factory=Counter)

    def note(self, kernel: str, arguments: dict) -> None:
        """One launch. A launch whose strips are none leaves at once: it shows nothing of its flags."""
        if "strips" in arguments:
            first, end, _ = arguments["strips"].tolist()
            is_dense = arguments["plan"].pairs is None
            kind = "output" if arguments["first_slot_factor"] else "dense" if is_dense else "sparse"
            self.strips[kind] = max(self.strips[kind], end - first)
            if end <= first:
                return
        if "sparse_strips" in arguments and not arguments["sparse_strips"][1].item():
            return
        own = self.flags.setdefault(kernel, {})
        for name, value in flattened(arguments):
            if isinstance(value, bool) and name.isupper():
                own.setdefault(name, set()).add(value)
            elif name in asked_for(kernel):
                own.setdefault(name, set()).add(value is not None)

    def add(self, other: "Coverage") -> None:
        for kernel, flags in other.flags.items():
            own = self.flags.setdefault(kernel, {})
            for flag, values in flags.items():
                own.setdefault(flag, set()).update(values)
        self.strips |= other.strips

    def to_json(self) -> str:
        flags = {kernel: {flag: sorted(met) for flag, met in flags.items()} for kernel, flags in self.flags.items()}
        return json.dumps({"flags": flags, "strips": self.strips})

    @classmethod
    def from_json(cls, text: str) -> "Coverage":
        read = json.loads(text)
        flags = {kernel: {flag: set(met) for flag, met in flags.items()} for kernel, flags in read["flags"].items()}
        return cls(flags, Counter(read["strips"]))


def flattened(arguments: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Names and values, those in named tuples as `argument.field` too."""
    for name, value in arguments.items():
        yield prefix + name, value
        if isinstance(value, tuple):
            yield from flattened(value._asdict(), f"{prefix}{name}.")


@functools.cache
def asked_for(function: str) -> set[str]:
    """What a kernel, or a function that it calls, compares with None: arguments, and fields as `argument.field`."""
    body = _functions().get(function)
    if body is None:
        return set()
    found = set()
    for node in ast.walk(body):
        if isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "None":
            found.add(ast.unparse(node.left))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found |= asked_for(node.func.id)
    return found


@functools.cache
def _functions() -> dict[str, ast.FunctionDef]:
    """Kernels and their functions."""
    sources = (path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    nodes = (node for source in sources for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    return {node.name: node for node in nodes if any("triton.jit" in ast.unparse(x) for x in node.decorator_list)}


def missing(coverage: Coverage, dtype: str, impossible: Iterable[tuple]) -> list[str]:
    """What no launch met: kernels, and values of flags, but for what is impossible."""
    excused = {(kernel, flag, value) for kernel, flag, value, dtypes, _ in impossible if dtype in dtypes}
    lost = []
    for kernel in kernel_names():
        flags = coverage.flags.get(kernel)
        if flags is None and (kernel, None, None) not in excused:
            lost.append(f"{kernel} was never launched in {dtype}")
        for flag, met in (flags or {}).items():
            for value in {True, False} - met:
                if (kernel, flag, value) not in excused:
                    lost.append(f"{kernel}: {flag} was never {value} in {dtype}")
    return lost


def table(coverage: dict[str, Coverage]) -> str:
    """Every kernel's flags, and their values in each dtype: + on, - off."""
    rows = {(kernel, flag) for met in coverage.values() for kernel, flags in met.flags.items() for flag in flags}
    lines = [f"{'kernel':20}{'flag':24}" + "".join(f"{dtype:>10}" for dtype in coverage)]
    for kernel, flag in sorted(rows):
        values = (met.flags.get(kernel, {}).get(flag, set()) for met in coverage.values())
        shown = ("".join("+" if value else "-" for value in sorted(met, reverse=True)) for met in values)
        lines.append(f"{kernel:20}{flag:24}" + "".join(f"{text:>10}" for text in shown))
    for kernel in kernel_names():
        if not any(kernel == name for name, _ in rows) and any(kernel in met.flags for met in coverage.values()):
            lines.append(f"{kernel:20}(no flags)")
    for kind in sorted({kind for met in coverage.values() for kind in met.strips}):
        numbers = "".join(f"{met.strips[kind]:>10}" for met in coverage.values())
        lines.append(f"{'most strips':20}{kind:24}" + numbers)
    return "\n".join(lines)


def kernel_names() -> list[str]:
    """As the source names them: a tool's process would be slower for an import."""
    sources = sorted((ROOT / "kernels").glob("*.py"))
    return [name for path in sources for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)]


class Watched:
    """A kernel whose launches are noted."""

    def __init__(self, kernel, name: str, coverage: Coverage) -> None:
        self.kernel, self.name, self.coverage = kernel, name, coverage
        self.parameters = list(inspect.signature(kernel.fn).parameters)

    def __getitem__(self, grid) -> Callable:
        def launch(*positional, **named):
            arguments = dict(zip(self.parameters, positional, strict=False)) | named
            self.coverage.note(self.name, {name: arguments[name] for name in self.parameters})
            return self.kernel[grid](*positional, **named)

        return launch


class watching:
    """While it lasts, launches of all kernels are noted in the coverage that it gives."""

    def __enter__(self) -> Coverage:
        import torchtune_lce.kernels as kernels

        coverage, self.own = Coverage(), []
        for module in pkgutil.iter_modules(kernels.__path__, "torchtune_lce.kernels."):
            module = importlib.import_module(module.name)
            for name in set(kernel_names()) & set(vars(module)):
                self.own.append((module, name, getattr(module, name)))
                setattr(module, name, Watched(getattr(module, name), name, coverage))
        return coverage

    def __exit__(self, *_) -> None:
        for module, name, kernel in self.own:
            setattr(module, name, kernel)


def use_blocks(path: str, narrow: bool, stores_by_pointers: bool) -> None:
    """Sets the configuration that calls take: with pointer loads that of a card without a copy engine."""
    from torchtune_lce.kernels import tuning

    own = getattr(tuning._cuda_config, "of_the_card", tuning._cuda_config)

    def config(capability, dtype, precision):
        blocks = own((8, 6) if narrow else (8, 0) if path == "pointer" else capability, dtype, precision)
        return replace(blocks, stores_transposed=False) if stores_by_pointers else blocks

    config.of_the_card = own
    tuning._cuda_config = config


def operands(call: Call, dtype, device) -> tuple[dict, "object"]:
    """hidden, weight and what else the call has, and targets: made on the host, since a tool watches the card.

    Two thirds of the vocabulary have next to no probability, so that their tiles are dropped.
    """
    import torch

    from torchtune_lce.kernels.tuning import config_for

    config = config_for(device, dtype)
    tokens, vocabulary, width = call.sizes(config)
    torch.manual_seed(0)
    leaves = {"hidden": torch.randn(tokens, width), "weight": torch.randn(vocabulary, width) * 2 / width**0.5}
    alive = vocabulary // 3 or 1
    leaves["hidden"][:, 0] = 2
    leaves["weight"][alive:, 0] = -7
    if call.bias:
        leaves["bias"] = torch.randn(vocabulary)
    if call.rank:
        leaves["low"] = torch.randn(tokens, call.rank) / 4
        leaves["up"] = torch.randn(vocabulary, call.rank) / 4
    if call.scaled:
        scale = 0.5 + torch.rand(vocabulary)
    for name, shape in zip(call.of_teacher, ((tokens, 40), (vocabulary, 40), (vocabulary,)), strict=False):
        leaves[name] = torch.randn(shape) / (1 if name == "teacher_hidden" else 3)
    targets = torch.randint(0, alive, (tokens,))
    if call.ignored:
        targets[1::4] = -100
    leaves = {name: leaf.to(dtype).to(device) for name, leaf in leaves.items()}
    if call.scaled:
        leaves["scale"] = scale.to(device)
    return leaves, targets.to(device)


def make_call(call: Call, leaves: dict, targets) -> dict:
    """Loss, lse and the gradients of what is not frozen."""
    import torch

    if call.shares:
        return make_divergence(call, leaves, targets)
    from torchtune_lce.implementations import choice
    from torchtune_lce.inputs.call import checked
    from torchtune_lce.inputs.low_rank import LowRank
    from torchtune_lce.inputs.options import Options
    from torchtune_lce.terms.label_smoothing import smooth

    wanted = {name: leaf.requires_grad_() for name, leaf in leaves.items() if name not in call.frozen}
    options = Options(
        softcap=call.softcap,
        logit_scale=call.logit_scale,
        label_smoothing=call.smoothing,
        workspace_mib=call.workspace_mib,
        filter_eps=2**-12,
    )
    given = checked(leaves["hidden"], leaves["weight"], targets, leaves.get("bias"), options=options)
    if call.rank:
        given = replace(given, low_rank=LowRank(leaves["low"], leaves["up"], leaves.get("scale")))
    _, token_losses = choice.choose(call.impl, leaves["hidden"])
    losses = token_losses(replace(given, with_entropy=call.with_entropy))
    loss, lse = losses.nll.sum(), losses.peak + losses.log_total
    if call.smoothing:
        loss = smooth(losses, options).sum()
    gradients = torch.autograd.grad(loss + lse.sum() if call.with_lse else loss, list(wanted.values()))
    results = {"loss": loss, "lse": lse} | dict(zip(wanted, gradients, strict=True))
    if call.with_entropy:
        results["entropy"] = losses.entropy
    return {name: result.detach().cpu() for name, result in results.items()}


def make_divergence(call: Call, leaves: dict, targets) -> dict:
    """Loss and the gradients of what is not frozen."""
    import torch

    from torchtune_lce.divergence.function import divergence, divergence_and_cross_entropy
    from torchtune_lce.divergence.operands import Head, Shares

    given = leaves | {name: leaves[name].detach() for name in call.of_teacher}
    wanted = {name: given[name].requires_grad_() for name in given if name not in (*call.frozen, *call.of_teacher)}
    student, teacher = (
        Head(name, *(given.get(f"{prefix}{part}") for part in ("hidden", "weight", "bias")))
        for name, prefix in (("student", ""), ("teacher", "teacher_"))
    )
    settings = {"ignore_index": -100, "workspace_mib": call.workspace_mib}
    of_both = student, teacher, targets, Shares(*call.shares)
    if call.divergence_share < 1:
        of_divergence, of_labels = divergence_and_cross_entropy(
            *of_both, divergence_share=call.divergence_share, **settings
        )
        loss = call.divergence_share * of_divergence + (1 - call.divergence_share) * of_labels
    else:
        loss = divergence(*of_both, impl="cce_exact", normalize=True, **settings)
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    results = {"loss": loss} | dict(zip(wanted, gradients, strict=True))
    return {name: result.detach().cpu() for name, result in results.items()}


def check(call: Call, leaves: dict, targets, results: dict) -> None:
    """Against plain PyTorch in float64."""
    import torch
    import torch.nn.functional as F

    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    logits = F.linear(exact["hidden"], exact["weight"], exact.get("bias"))
    if call.rank:
        logits = (logits + exact["low"] @ exact["up"].T) * exact.get("scale", 1)
    if call.softcap:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits = logits * call.logit_scale
    if call.shares:
        q = logits.log_softmax(-1)
        p = F.linear(exact["teacher_hidden"], exact["teacher_weight"], exact.get("teacher_bias")).log_softmax(-1)
        losses = call.shares[1] * (q.exp() * (q - p)).sum(-1) - call.shares[0] * (p.exp() * q).sum(-1)
        loss = call.divergence_share * losses[targets != -100].mean()
        loss = loss + (1 - call.divergence_share) * F.cross_entropy(logits, targets)
    else:
        loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=call.smoothing)
    lse = logits.logsumexp(-1).where(targets != -100, 0)
    names = [name for name in leaves if name not in (*call.frozen, *call.of_teacher)]
    wanted = torch.autograd.grad(loss + lse.sum() if call.with_lse else loss, [exact[name] for name in names])
    rights = {"loss": loss, **({} if call.shares else {"lse": lse}), **dict(zip(names, wanted, strict=True))}
    if call.with_entropy:
        rights["entropy"] = torch.distributions.Categorical(logits=logits).entropy().where(targets != -100, 0)
    for name, right in rights.items():
        right = right.detach().cpu()
        # Roomy, for what 16 bits round and the filter leaves out: a tile that was lost or doubled is more.
        error = (results[name].double() - right).norm() / right.norm().clamp(min=1e-6)
        if not error < (1e-3 if name in ("loss", "lse") else 0.05):
            raise AssertionError(f"{call.name}: {name} is {error.item():.2g} off")


def run_calls(
    path: str, dtype_name: str, calls: Iterable[Call], compare: dict | None = None, stores_by_pointers: bool = False
) -> dict:
    """The results of each call by its name: checked, or with `compare`, what another process had, of the same bits."""
    import torch

    from torchtune_lce.kernels import compiling, mean_gradients, strip_operators, strip_product, strips

    tiles_held, tiles_in_gradient = strips.tiles_held, strip_operators.tiles_in_gradient
    # Nothing runs on what was not computed, which a list of the kernels to compile would be made with.
    compiling._threads = lambda: 1
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = torch.device("cpu" if interpreted else "cuda")
    if not interpreted:
        # Our own kernel always: what cuBLAS writes by the copy engine, initcheck takes for never written.
        strip_product.LEAST_FILL = 0
        # And not torch's sum, which reads of its own memory for partial sums what it has not written.
        mean_gradients._product = lambda left, right: (left.float()[:, :, None] * right.float()).cumsum(1)[:, -1]
    results = {}
    for call in calls:
        begin = time.perf_counter()
        if device.type == "cuda":
            use_blocks(path, call.narrow, stores_by_pointers)
        if call.held is not None:
            strips.tiles_held = lambda *_, tiles=call.held: tiles
            strip_operators.tiles_in_gradient = lambda *_: 0
        leaves, targets = operands(call, getattr(torch, dtype_name), device)
        results[call.name] = make_call(call, leaves, targets)
        if compare is None:
            check(call, leaves, targets, results[call.name])
        else:
            for name, value in results[call.name].items():
                if not torch.equal(value, compare[call.name][name]):
                    raise AssertionError(f"{call.name}: {name} has other bits than without the tool")
        strips.tiles_held, strip_operators.tiles_in_gradient = tiles_held, tiles_in_gradient
        print(f"{call.name}: {time.perf_counter() - begin:.1f} s", flush=True)
    return results


def calls_of(path: str, share: int, shares: int) -> list[Call]:
    """Every `shares`-th call of a path: several processes compile faster than one."""
    return [call for call in CALLS if path in call.paths][share::shares]


def run_control(fault: str) -> None:
    """A kernel with a fault."""
    import torch

    if fault == "no barrier":
        _race(torch.zeros(128, dtype=torch.int32, device="cuda"))
        torch.cuda.synchronize()
        return
    import triton
    import triton.language as tl

    @triton.jit
    def _planted_kernel(source, target, offset, BLOCK: tl.constexpr):
        place = tl.arange(0, BLOCK)
        tl.store(target + offset + place, tl.load(source + place) + 1)

    source = torch.empty(1024, device="cuda")
    if fault == "past the end":
        source.zero_()
    target = torch.zeros(1024, device="cuda")
    _planted_kernel[(1,)](source, target, 1024 * 1024 if fault == "past the end" else 0, BLOCK=1024)
    torch.cuda.synchronize()


# Each thread reads what a thread two warps away wrote, without a barrier between: Triton would put one there.
RACE = """
.version 7.0
.target sm_80
.address_size 64
.visible .entry _planted_kernel(.param .u64 target) {
    .reg .u32 %r<8>;
    .reg .u64 %rd<4>;
    .shared .align 4 .b8 values[512];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    mov.u32 %r3, values;
    add.u32 %r4, %r3, %r2;
    st.shared.u32 [%r4], %r1;
    xor.b32 %r5, %r2, 256;
    add.u32 %r6, %r3, %r5;
    ld.shared.u32 %r7, [%r6];
    ld.param.u64 %rd1, [target];
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r7;
    ret;
}
"""


def _race(target) -> None:
    """Launches RACE in torch's context, by the driver alone: it compiles PTX itself."""
    import ctypes

    driver = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    pointer = ctypes.c_uint64(target.data_ptr())
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(pointer))

    def call(name: str, *values) -> None:
        if status := getattr(driver, name)(*values):
            raise RuntimeError(f"{name} failed with CUDA's error {status}")

    call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(RACE.encode()))
    call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(b"_planted_kernel"))
    call("cuLaunchKernel", function, *map(ctypes.c_uint, (1, 1, 1, 128, 1, 1, 0)), None, arguments, None)


@dataclass(frozen=True)
class Finding:
    """What a tool said of a process."""

    errors: int | None  # None where it never came to a summary
    returncode: int
    log: Path
    places: Counter[str] = field(default_factory=Counter)  # kernels that it named, as far as it printed them
    last: str = ""  # line of the process itself

    @property
    def clean(self) -> bool:
        return self.errors == 0 and self.returncode == 0

    def __str__(self) -> str:
        if self.errors is None or (self.returncode and not self.errors):
            why = "timed out" if self.returncode == 124 else f"status {self.returncode}"
            last = f", its last line: {self.last}" if self.last else ""
            return f"did not run to its end ({why}), see {self.log}{last}"
        named = "".join(f", {count} in {place}" for place, count in self.places.most_common(5))
        return "clean" if self.clean else f"{self.errors} errors{named}, see {self.log}"


def errors_in(output: str) -> int | None:
    """The number in compute-sanitizer's summary; the largest, since it counts again what it did not print."""
    found = SUMMARY.findall(output)
    return max(map(int, found)) if found else None


def find_sanitizer() -> str:
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda")]
    folders = [os.environ.get("PATH", ""), *(f"{home}/{sub}" for home in homes for sub in ("bin", "compute-sanitizer"))]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if found is None:
        raise SystemExit("compute-sanitizer was not found: install the CUDA toolkit, or set CUDA_HOME to where it is")
    return found


def filters(tool: str) -> list[str]:
    """Options under which a tool leaves out torch's kernels, whose C++ names are mangled: it takes long over each.

    Not a list of ours to watch, which a tool that reads it otherwise would find nothing with. initcheck has to see what
    torch's kernels write.
    """
    return [] if tool == "initcheck" else ["--kernel-name-exclude", "kns=_Z"]


def run_limited(command: list[str], environment: dict[str, str], log: Path, timeout: float) -> int:
    """The status of a process and its children, 124 where they were killed for the time."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(max(timeout, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return 124


def examine(tool: str, arguments: list[str], log: Path, timeout: float) -> Finding:
    """One process under one tool. Every allocation of its own, or torch's cache would hide where they end."""
    command = [find_sanitizer(), "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "99"]
    command += ["--print-limit", "1000", *filters(tool), sys.executable, __file__, *arguments]
    environment = child_environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status = run_limited(command, environment, log, timeout)
    text = log.read_text(errors="replace")
    return Finding(errors_in(text), status, log, Counter(PLACE.findall(text)), last_line(text))


def last_line(output: str) -> str:
    """The last that is not the tool's."""
    own = [line for line in output.splitlines() if line.strip() and not line.startswith("=========")]
    return own[-1] if own else ""


def child_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Unit:
    """The calls of a process."""

    path: str
    dtype: str
    share: int
    shares: int

    def __str__(self) -> str:
        part = f", part {self.share + 1} of {self.shares}" if self.shares > 1 else ""
        return f"{self.path} loads, {self.dtype}{part}"

    def file(self, logs: Path, kind: str) -> Path:
        return logs / f"{kind.format(f'{self.path}-{self.dtype}-{self.share}')}"

    def arguments(self, logs: Path) -> list[str]:
        which = ["--calls", self.path, "--dtype", self.dtype, "--share", str(self.share), "--shares", str(self.shares)]
        return [*which, "--logs", str(logs)]


def run_unit(unit: Unit, logs: Path, tool: str | None) -> None:
    """In a process of its own: the calls, whose results and coverage the first run leaves for those under a tool."""
    import torch

    calls = calls_of(unit.path, unit.share, unit.shares)
    expected = unit.file(logs, "results-{}.pt")
    if tool:
        # initcheck takes what the copy engine writes for never written.
        run_calls(unit.path, unit.dtype, calls, torch.load(expected), stores_by_pointers=tool == "initcheck")
        return
    with watching() as coverage:
        torch.save(run_calls(unit.path, unit.dtype, calls), expected)
    unit.file(logs, "coverage-{}.json").write_text(coverage.to_json())


class Examination:
    """All processes of a verdict, as many at once as there are processors, within a time."""

    def __init__(self, tools: Iterable[str], logs: Path, seconds: float, shares: int) -> None:
        self.tools, self.logs, self.shares = tools, logs, shares
        self.begin = time.monotonic()
        self.end = self.begin + seconds
        self.well = True
        self.coverage = defaultdict(Coverage)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begin:4.0f} s  {text}", flush=True)

    def fail(self, text: str) -> None:
        self.well = False
        self.say(text)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def compile(self, unit: Unit) -> Finding:
        log = unit.file(self.logs, "calls-{}.log")
        status = run_limited(
            [sys.executable, __file__, *unit.arguments(self.logs)], child_environment(), log, self.left
        )
        return Finding(0, status, log, last=last_line(log.read_text(errors="replace")))

    def watch(self, tool: str, unit: Unit) -> Finding:
        log = unit.file(self.logs, tool + "-{}.log")
        return examine(tool, [*unit.arguments(self.logs), "--under", tool], log, self.left)

    def control(self, tool: str) -> Finding:
        return examine(tool, ["--control", CONTROLS[tool]], self.logs / f"{tool}-control.log", self.left)

    def finished(self, kind: str, unit: Unit | None, finding: Finding, seconds: float) -> None:
        if unit is None:
            seen = bool(finding.errors)
            self.well &= seen
            verdict = "found" if seen else f"NOT FOUND: {finding}"
            self.say(f"{kind}, a fault on purpose ({CONTROLS[kind]}): {verdict} ({seconds:.0f} s)")
        else:
            self.well &= finding.clean
            self.say(f"{kind}, {unit}: {finding} ({seconds:.0f} s)")
        if kind == "calls" and finding.clean:
            self.coverage[unit.dtype].add(Coverage.from_json(unit.file(self.logs, "coverage-{}.json").read_text()))

    def run(self) -> bool:
        units = [Unit(*of, share, self.shares) for of in PATHS_AND_DTYPES for share in range(self.shares)]
        with ThreadPoolExecutor(os.cpu_count()) as together:
            running: dict[Future, tuple] = {}

            def start(kind: str, unit: Unit | None, function: Callable, *arguments) -> None:
                def timed() -> tuple[Finding, float]:
                    begin = time.monotonic()
                    return function(*arguments), time.monotonic() - begin

                running[together.submit(timed)] = kind, unit

            for unit in units:
                start("calls", unit, self.compile, unit)
            for tool in self.tools:
                start(tool, None, self.control, tool)
            compiling = len(units)
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    kind, unit = running.pop(future)
                    finding, seconds = future.result()
                    self.finished(kind, unit, finding, seconds)
                    if kind != "calls":
                        continue
                    if finding.clean:
                        # The slowest first.
                        for tool in reversed(self.tools):
                            start(tool, unit, self.watch, tool, unit)
                    compiling -= 1
                    if not compiling:
                        self.judge_coverage()
        return self.well

    def judge_coverage(self) -> None:
        print(table({dtype: self.coverage[dtype] for dtype in DTYPES}), flush=True)
        for kernel, flag, value, dtypes, why in IMPOSSIBLE:
            print(f"not asked for: {kernel}, {flag} {value} in {', '.join(dtypes)}: {why}", flush=True)
        for dtype in DTYPES:
            for lost in missing(self.coverage[dtype], dtype, IMPOSSIBLE):
                self.fail(lost)
            for kind in ("sparse", "output", "dense"):
                # Sums over strips; one is enough in the weight's gradient, since others come after it.
                least = 1 if kind == "output" else 2
                if self.coverage[dtype].strips[kind] < least:
                    self.fail(f"no launch had {least} {kind} strips in {dtype}")


PATHS_AND_DTYPES = [(path, dtype) for dtype in DTYPES for path in PATHS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder for what the tools print")
    parser.add_argument("--timeout", type=int, default=470, help="seconds for all of it")
    parser.add_argument("--shares", type=int, default=2, help="processes that the calls of a dtype are divided among")
    parser.add_argument("--calls", choices=PATHS, help="only make the calls, without a tool")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of --calls")
    parser.add_argument("--share", type=int, default=0, help="which share of --calls, from 0")
    parser.add_argument("--under", choices=TOOLS, help="the tool --calls run under: compare with what they gave before")
    parser.add_argument("--control", choices=list(CONTROLS.values()), help="only make this fault, without a tool")
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    if arguments.calls:
        unit = Unit(arguments.calls, arguments.dtype, arguments.share, arguments.shares)
        run_unit(unit, arguments.logs, arguments.under)
        return 0
    if arguments.control:
        run_control(arguments.control)
        return 0
    find_sanitizer()
    well = Examination(arguments.tools, arguments.logs, arguments.timeout, arguments.shares).run()
    print("clean" if well else "NOT clean")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
