"""Losses on one batch: each checked, then all of them timed in turns."""

import functools
import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from torchtune_lce.commands.bench import correctness
from torchtune_lce.commands.bench.timing import TURNS, Timer, Timing, host_ms, in_turns, launches, queued_timer
from torchtune_lce.commands.shared.batches import Batch
from torchtune_lce.commands.shared.candidates import BASELINE, Candidate, Loss
from torchtune_lce.commands.shared.recipe_runs import ran_out_of_memory
from torchtune_lce.commands.shared.shapes import Shape
from torchtune_lce.commands.shared.yardstick import Errors, Yardstick
from torchtune_lce.inputs import filtering
from torchtune_lce.inputs.filtering import UNFILTERED
from torchtune_lce.inputs.options import Options

OK, OUT_OF_MEMORY = "ok", "out of memory"
_PROJECTION_LOGITS = 2**31  # held at a time
_TIMED = _STEP, _RECORDING, _FORWARD = ("forward and backward", "forward, recording", "forward")
_QUEUED = "forward and backward, queued"
STEPS = 3 + (len(_TIMED) + 1) * TURNS  # of a loss: what progress counts


@dataclass
class Case:
    """A row of the results. A measurement is None where it does not apply, or was not reached before ``status``."""

    impl: str
    shape: Shape
    data: str
    data_name: str
    frozen_weight: bool
    status: str
    workspace_mib: int | None = None  # of this package's
    filter_eps: float | None = None  # of those that filter
    kept_fraction: float | None = None  # of the tiles, in the backward of this package's kernels
    forward_ms: float | None = None  # without autograd
    forward_recording_ms: float | None = None  # with what the backward needs
    forward_backward_ms: float | None = None
    spread_ms: float | None = None  # interquartile range of forward_backward_ms
    host_ms: float | None = None  # until forward and backward are asked for, the card idle before
    queued_ms: float | None = None  # of forward and backward, asked for while the card does other work
    launches: int | None = None  # kernels, memory copies and memory sets of forward and backward
    forward_backward_tflops: float | None = None
    cublas_fraction: float | None = None  # of the rate of the logits' product alone
    forward_cublas_fraction: float | None = None
    ratio_to_torch_compile_full: float | None = None
    queued_ratio_to_torch_compile_full: float | None = None
    peak_mib: float | None = None  # over inputs and gradients
    grad_error_hidden: float | None = None
    grad_error_weight: float | None = None


def new_case(candidate: Candidate, batch: Batch, frozen: bool, status: str) -> Case:
    case = Case(candidate.name, batch.shape, batch.data, batch.name, frozen, status)
    if candidate.ours:
        options = Options(**candidate.settings)
        case.workspace_mib = options.workspace_mib
        if candidate.filtering != UNFILTERED:
            case.filter_eps = options.resolved_filter_eps(batch.hidden.dtype, not frozen)
    return case


def measure(
    candidates: list[Candidate],
    batch: Batch,
    right: Yardstick,
    frozen: bool,
    timer: Timer,
    refused: dict[str, str] | None = None,
    on_step: Callable[[str], object] = lambda _: None,
) -> list[Case]:
    """A case for each candidate, timed if it agrees with ``right``; whatever it raises becomes the case's status.

    The calls of all candidates are timed in turns. ``refused`` says by name what is wrong with those that are not to be
    asked; ``on_step`` is told the name of a candidate before each of its :data:`STEPS` steps.
    """
    # Past a few recompilations torch.compile gives up, in silence: each group of cases starts from none.
    torch.compiler.reset()
    subjects = []
    for candidate in candidates:
        case = new_case(candidate, batch, frozen, (refused or {}).get(candidate.name, OK))
        subjects.append(_Subject(candidate, batch, case))

    def each(step: Callable[[_Subject], None], order: Iterable[_Subject] = subjects) -> None:
        for subject in order:
            on_step(subject.case.impl)
            if subject.case.status == OK:
                _try(step, subject)

    each(functools.partial(_prepare, right=right))
    for what in _TIMED:
        each(functools.partial(_time, what=what, timer=timer), in_turns(subjects))
    each(_fill_in)
    each(_time_queued, in_turns(subjects))
    each(_count_launches)  # last of all: a profiler slows down what it sees
    return [subject.case for subject in subjects]


@dataclass
class _Subject:
    """A loss in :func:`measure`: what is called for each of ``_TIMED``, and the milliseconds of every call."""

    candidate: Candidate
    batch: Batch
    case: Case
    runs: dict[str, Callable[[], object]] = field(default_factory=dict)
    calls: dict[str, tuple[float, ...]] = field(default_factory=lambda: dict.fromkeys((*_TIMED, _QUEUED), ()))


def _try(step: Callable[[_Subject], None], subject: _Subject) -> None:
    try:
        step(subject)
    except Exception as error:  # other people's code may raise anything, and the other losses still have their turn
        subject.case.status = describe(error)
    if subject.case.status != OK:
        give_memory_back()


def give_memory_back() -> None:
    """What an exception or a compiled function still holds would count against the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe(error: Exception) -> str:
    if ran_out_of_memory(repr(error)):
        return OUT_OF_MEMORY
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:200]}"


def _prepare(subject: _Subject, right: Yardstick) -> None:
    """Checks the loss; of one that is right, takes the peak of memory and what is to be timed."""
    candidate, batch, case = subject.candidate, subject.batch, subject.case
    frozen = case.frozen_weight
    loss = candidate.build(**candidate.settings)
    with filtering.recording() as records:
        value, grads = correctness.gradients(loss, batch, frozen)
    found = correctness.errors(value, grads, right)
    case.grad_error_hidden, case.grad_error_weight = found.hidden, found.weight
    if records:
        case.kept_fraction = records[-1].kept_fraction
    complaint = correctness.complaint(found, correctness.allowed(candidate, right))
    if complaint:
        case.status = complaint
        return
    gradient_bytes = sum(gradient.nbytes for gradient in grads)
    del value, grads, records
    subject.runs = _runs(loss, batch, frozen)
    give_memory_back()
    if batch.hidden.is_cuda:
        case.peak_mib = _peak_bytes(subject.runs[_STEP], gradient_bytes) / 2**20


def _runs(loss: Loss, batch: Batch, frozen: bool) -> dict[str, Callable[[], object]]:
    hidden = batch.hidden.detach().requires_grad_()
    weight = batch.weight.detach().requires_grad_(not frozen)
    wanted = [hidden] if frozen else [hidden, weight]

    def step():
        return torch.autograd.grad(loss(hidden, weight, *batch.others), wanted)

    @torch.no_grad()
    def forward():  # and inputs that ask for no gradient: an autograd.Function may look at them alone
        return loss(batch.hidden, batch.weight, *batch.others)

    return {_STEP: step, _RECORDING: lambda: loss(hidden, weight, *batch.others), _FORWARD: forward}


def _time(subject: _Subject, what: str, timer: Timer) -> None:
    """One turn of ``TURNS``."""
    subject.calls[what] += timer(subject.runs[what], TURNS).calls


def _fill_in(subject: _Subject) -> None:
    """The times, and the host's own."""
    case, timings = subject.case, {what: Timing(subject.calls[what]) for what in _TIMED}
    case.forward_backward_ms, case.spread_ms = timings[_STEP].median, timings[_STEP].spread
    case.forward_backward_tflops = case.shape.flops(case.frozen_weight) / case.forward_backward_ms / 1e9
    case.forward_recording_ms, case.forward_ms = timings[_RECORDING].median, timings[_FORWARD].median
    if subject.batch.hidden.is_cuda:
        case.host_ms = host_ms(subject.runs[_STEP])


def _time_queued(subject: _Subject) -> None:
    """One turn of ``TURNS``."""
    case = subject.case
    if case.host_ms is not None:
        subject.calls[_QUEUED] += queued_timer(subject.runs[_STEP], case.host_ms, TURNS).calls
        case.queued_ms = Timing(subject.calls[_QUEUED]).median


def _count_launches(subject: _Subject) -> None:
    if subject.batch.hidden.is_cuda:
        subject.case.launches = launches(subject.runs[_STEP])


def compare(cases: list[Case], projection_tflops: float) -> None:
    """Fills in what relates the cases of one batch to each other, and to the rate of the logits' product alone."""
    baselines = {case.frozen_weight: case for case in cases if case.impl == BASELINE}
    for case in cases:
        if case.forward_backward_ms is None or case.forward_ms is None:
            continue
        baseline = baselines.get(case.frozen_weight)
        if baseline and baseline.forward_backward_ms:
            case.ratio_to_torch_compile_full = case.forward_backward_ms / baseline.forward_backward_ms
        if baseline and baseline.queued_ms and case.queued_ms:
            case.queued_ratio_to_torch_compile_full = case.queued_ms / baseline.queued_ms
        case.cublas_fraction = case.forward_backward_tflops / projection_tflops
        case.forward_cublas_fraction = case.shape.flops(None) / case.forward_ms / 1e9 / projection_tflops


def _peak_bytes(run, gradient_bytes: int) -> int:
    """Most that was allocated during ``run`` over what was before it and the gradients that it returns."""
    run()  # what is allocated once and stays
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - gradient_bytes


@dataclass(frozen=True)
class Check:
    """Of a candidate on small data. Errors are None where it raised."""

    data: str
    status: str
    found: Errors | None
    allowed: Errors


def check(candidate: Candidate, dtype: torch.dtype, device: torch.device) -> list[Check]:
    """A candidate on its small data: random with both gradients and with a frozen head, then trained-like."""
    return [_check(candidate, data, settings, dtype, device) for data, settings in correctness.checks(candidate)]


def _check(candidate: Candidate, data: str, settings: dict, dtype: torch.dtype, device: torch.device) -> Check:
    batch = correctness.small_batch(candidate, data, dtype, device)
    right = correctness.yardstick(batch, [candidate], settings)
    most = correctness.allowed(candidate, right)
    found = None
    try:
        loss = candidate.build(**candidate.settings | settings)
        for frozen in (True, False) if data == correctness.RANDOM else (False,):
            with filtering.recording() as records:
                found = correctness.errors(*correctness.gradients(loss, batch, frozen), right)
            complaint = correctness.complaint(found, most)
            if complaint:
                return Check(data, complaint, found, most)
        # Of a preset that filters one gradient, the other one's tiles are counted: all.
        whole = candidate.filtering.hidden and candidate.filtering.weight
        if data == correctness.TRAINED and whole and records[-1].kept_fraction == 1:
            return Check(data, "wrong: every tile is kept, where most hold nothing over the threshold", found, most)
    except Exception as error:  # as in `measure`
        return Check(data, describe(error), found, most)
    return Check(data, OK, found, most)


@torch.no_grad()
def time_projection(batch: Batch, timer: Timer) -> float:
    """Milliseconds of the matrix products of all logits alone, cuBLAS's on a card: no loss can be much faster forwards.

    In slices of tokens whose logits fit into half of the memory that is left.
    """
    most = _PROJECTION_LOGITS
    if batch.hidden.is_cuda:
        most = min(most, torch.cuda.mem_get_info()[0] // (2 * batch.hidden.itemsize))
    tokens = min(max(most // batch.shape.vocab, 1), batch.shape.tokens)
    logits = batch.hidden.new_empty(tokens, batch.shape.vocab)

    def multiply() -> None:
        for hidden, weight in batch.heads:
            for some in hidden.split(tokens):
                torch.mm(some, weight.T, out=logits[: len(some)])

    return timer(multiply).median
