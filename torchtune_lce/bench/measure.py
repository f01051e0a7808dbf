"""One loss on one batch: checked, then timed."""

import gc
from dataclasses import dataclass

import torch

from torchtune_lce import filtering
from torchtune_lce.bench import correctness
from torchtune_lce.bench.correctness import Exact
from torchtune_lce.bench.data import Batch
from torchtune_lce.bench.losses import Candidate, Loss
from torchtune_lce.bench.shapes import Shape
from torchtune_lce.bench.timing import Timer

OK, OUT_OF_MEMORY = "ok", "out of memory"


@dataclass
class Case:
    """A row of the results. A measurement is None where it does not apply, or was not reached before ``status``."""

    impl: str
    shape: Shape
    data: str
    data_name: str
    frozen_weight: bool
    status: str
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


def measure(candidate: Candidate, batch: Batch, right: Exact, frozen: bool, timer: Timer) -> Case:
    """Times the candidate if it agrees with ``right``; whatever it raises becomes the case's status."""
    case = Case(candidate.name, batch.shape, batch.data, batch.name, frozen, OK)
    # Past a few recompilations torch.compile gives up, in silence: each case starts from none.
    torch.compiler.reset()
    try:
        _fill(case, candidate, candidate.build(), batch, right, timer)
    except torch.OutOfMemoryError:
        case.status = OUT_OF_MEMORY
    except Exception as error:  # other people's code may raise anything, and the other losses still have their turn
        case.status = describe(error)
    # What an exception or a compiled function still holds would count against the next one.
    gc.collect()
    if batch.hidden.is_cuda:
        torch.cuda.empty_cache()
    return case


def describe(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:200]}"


def _fill(case: Case, candidate: Candidate, loss: Loss, batch: Batch, right: Exact, timer: Timer) -> None:
    frozen = case.frozen_weight
    with filtering.recording() as records:
        value, grads = correctness.gradients(loss, batch, frozen)
    found = correctness.errors(value, grads, right)
    case.grad_error_hidden, case.grad_error_weight = found.hidden, found.weight
    if records:
        case.kept_fraction = records[-1].kept_fraction
    complaint = correctness.complaint(candidate, found, batch.hidden.dtype)
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


def check(candidate: Candidate, dtype: torch.dtype, device: torch.device) -> tuple[str, correctness.Errors | None]:
    """Status and errors of a candidate on a small batch, with both gradients and with a frozen head."""
    batch = correctness.small_batch(candidate, dtype, device)
    right = correctness.exact(batch)
    found = None
    try:
        loss = candidate.build()
        for frozen in (True, False):
            found = correctness.errors(*correctness.gradients(loss, batch, frozen), right)
            complaint = correctness.complaint(candidate, found, dtype)
            if complaint:
                return complaint, found
    except Exception as error:  # as in `measure`
        return describe(error), found
    return OK, found


def time_projection(batch: Batch, timer: Timer) -> float:
    """Milliseconds of the logits' matrix product alone, cuBLAS's on a card: no loss can be much faster forwards."""
    with torch.no_grad():
        return timer(lambda: torch.mm(batch.hidden, batch.weight.T)).median
