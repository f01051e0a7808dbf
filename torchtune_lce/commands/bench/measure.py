"""One loss on one batch: checked, then timed."""

import gc
from dataclasses import dataclass

import torch

from torchtune_lce.commands.bench import correctness
from torchtune_lce.commands.bench.timing import Timer
from torchtune_lce.commands.shared.batches import Batch
from torchtune_lce.commands.shared.candidates import Candidate, Loss
from torchtune_lce.commands.shared.recipe_runs import ran_out_of_memory
from torchtune_lce.commands.shared.shapes import Shape
from torchtune_lce.commands.shared.yardstick import Errors, Yardstick
from torchtune_lce.inputs import filtering
from torchtune_lce.inputs.options import Options

OK, OUT_OF_MEMORY = "ok", "out of memory"
_PROJECTION_LOGITS = 2**31  # held at a time


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
    kept_fraction: float | None = None  # of the tiles, in the backward of this package's kernels
    forward_ms: float | None = None  # without autograd
    forward_recording_ms: float | None = None  # with what the backward needs
    forward_backward_ms: float | None = None
    spread_ms: float | None = None  # interquartile range of forward_backward_ms
    forward_backward_tflops: float | None = None
    ratio_to_torch_compile_full: float | None = None
    peak_mib: float | None = None  # over inputs and gradients
    grad_error_hidden: float | None = None
    grad_error_weight: float | None = None


def new_case(candidate: Candidate, batch: Batch, frozen: bool, status: str) -> Case:
    workspace = Options(**candidate.settings).workspace_mib if candidate.ours else None
    return Case(candidate.name, batch.shape, batch.data, batch.name, frozen, status, workspace)


def measure(candidate: Candidate, batch: Batch, right: Yardstick, frozen: bool, timer: Timer) -> Case:
    """Times the candidate if it agrees with ``right``; whatever it raises becomes the case's status."""
    case = new_case(candidate, batch, frozen, OK)
    # Past a few recompilations torch.compile gives up, in silence: each case starts from none.
    torch.compiler.reset()
    try:
        _fill(case, candidate, candidate.build(**candidate.settings), batch, right, timer)
    except Exception as error:  # other people's code may raise anything, and the other losses still have their turn
        case.status = describe(error)
    give_memory_back()
    return case


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


def _fill(case: Case, candidate: Candidate, loss: Loss, batch: Batch, right: Yardstick, timer: Timer) -> None:
    frozen = case.frozen_weight
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

    hidden = batch.hidden.detach().requires_grad_()
    weight = batch.weight.detach().requires_grad_(not frozen)
    wanted = [hidden] if frozen else [hidden, weight]

    def both():
        return torch.autograd.grad(loss(hidden, weight, batch.targets), wanted)

    if batch.hidden.is_cuda:
        case.peak_mib = _peak_bytes(both, gradient_bytes) / 2**20
    timing = timer(both)
    case.forward_backward_ms, case.spread_ms = timing.median, timing.spread
    case.forward_backward_tflops = batch.shape.flops(frozen) / timing.median / 1e9
    case.forward_recording_ms = timer(lambda: loss(hidden, weight, batch.targets)).median
    with torch.no_grad():  # and inputs that ask for no gradient: an autograd.Function may look at them alone
        case.forward_ms = timer(lambda: loss(batch.hidden, batch.weight, batch.targets)).median


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
    right = correctness.yardstick(batch, [candidate], **settings)
    most = correctness.allowed(candidate, right)
    found = None
    try:
        loss = candidate.build(**candidate.settings, **settings)
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
    """Milliseconds of the logits' matrix product alone, cuBLAS's on a card: no loss can be much faster forwards.

    In slices of tokens whose logits fit into half of the memory that is left.
    """
    most = _PROJECTION_LOGITS
    if batch.hidden.is_cuda:
        most = min(most, torch.cuda.mem_get_info()[0] // (2 * batch.hidden.itemsize))
    tokens = min(max(most // batch.shape.vocab, 1), batch.shape.tokens)
    logits = batch.hidden.new_empty(tokens, batch.shape.vocab)

    def multiply() -> None:
        for hidden in batch.hidden.split(tokens):
            torch.mm(hidden, batch.weight.T, out=logits[: len(hidden)])

    return timer(multiply).median
