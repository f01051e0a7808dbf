"""What a loss allocates between the hidden states and their gradient: one formula for each, in bytes.

N tokens, D features, V entries, b bytes of an element of the training dtype. Gradients are those of the hidden states,
NDb, and of a trained head, VDb, of which three are there while autograd adds a chunk's to the others'. The rest is what
is alive at the worst moment of the forward and of the backward, found by following each loss's own code:

stock, main: 8 chunks of tokens. Kept for the backward: the float32 log-softmax, 4NV. The forward of stock also holds
the logits of all chunks, bNV; one chunk at a time is there in float32.
With compile: True the log-softmax is not kept; the logits are, bNV, and a chunk's gradient comes to them.

torch_compile: logits, bNV, and in the backward their float32 gradient, 4NV.
reference: float32 logits, 4NV, and as much for what the forward subtracts from them; in the backward four times as much
for their gradients on the way.
chunked, cce: the workspace, whatever NV is, and vectors.

tests/test_plan.py holds these against allocations measured on the CPU, docs/benchmarks.md against a card's.
"""

from dataclasses import dataclass

import torch

from torchtune_lce import implementations
from torchtune_lce.chunked import entries_per_chunk
from torchtune_lce.reference import accumulation_dtype

CHUNKS = 8
# Of labels, places, sums and counts: a few 8-byte numbers each.
_BYTES_PER_TOKEN, _BYTES_PER_ENTRY = 64, 8


@dataclass(frozen=True)
class Problem:
    """Sizes that a loss's memory depends on."""

    tokens: int
    features: int
    vocabulary: int
    itemsize: int
    trained_head: bool
    workspace_mib: int = 128

    @property
    def logits(self) -> int:
        """Their number."""
        return self.tokens * self.vocabulary

    @property
    def hidden_bytes(self) -> int:
        return self.tokens * self.features * self.itemsize

    @property
    def head_bytes(self) -> int:
        """Of the head's gradient, 0 where it is frozen."""
        return self.vocabulary * self.features * self.itemsize if self.trained_head else 0


@dataclass(frozen=True)
class LossMemory:
    """Bytes at the worst moment of the loss's forward and of its backward, gradients among the latter."""

    forward: int
    backward: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


def loss_memory(loss: str, problem: Problem) -> LossMemory:
    """Of ``stock``, ``main`` (each also ``_compiled``) or one of this package's implementations."""
    base = loss.removesuffix("_compiled")
    if base in ("stock", "main"):
        if loss.endswith("_compiled"):
            return _chunks_compiled(problem)
        return _chunks_eager(problem, all_logits=base == "stock")
    logits, gradients = problem.logits, problem.hidden_bytes + problem.head_bytes
    if base == "torch_compile":
        held = logits * problem.itemsize
        return LossMemory(held, held + max(4 * logits, gradients))
    if base == "reference":
        return LossMemory(8 * logits, 20 * logits)
    if base == "chunked":
        return _chunked(problem)
    if base in implementations.CCE_PRESETS:
        return _cce(problem)
    raise ValueError(f"no formula for the memory of {loss!r}")


def _chunks_eager(problem: Problem, all_logits: bool) -> LossMemory:
    b, logits = problem.itemsize, problem.logits
    kept = 4 * logits
    if all_logits:
        # float() of float32 logits is no copy.
        forward = kept + b * logits + (4 * logits // CHUNKS if b < 4 else 0)
    else:
        forward = kept + 4 * logits // CHUNKS
    # The first chunk that the backward comes to: gradients by its log-softmax and by its float32 logits. The second,
    # when neither is kept any more: by its logits and by the head, to be added to the first's.
    first = kept + 8 * logits // CHUNKS
    then = kept - 2 * kept // CHUNKS + b * logits // CHUNKS + problem.hidden_bytes + 3 * problem.head_bytes
    return LossMemory(forward, max(first, then))


def _chunks_compiled(problem: Problem) -> LossMemory:
    kept = problem.itemsize * problem.logits
    return LossMemory(kept, kept + kept // CHUNKS + problem.hidden_bytes + problem.head_bytes)


def _chunked(problem: Problem) -> LossMemory:
    dtype = {8: torch.float64, 4: torch.float32, 2: torch.bfloat16}[problem.itemsize]
    entries = entries_per_chunk(problem.tokens, problem.vocabulary, problem.workspace_mib, dtype)
    wide = accumulation_dtype(dtype).itemsize
    block = problem.tokens * entries
    # Backward: a chunk's gradient, and its copy in the inputs' dtype; the hidden states' summed up in the wide dtype,
    # a chunk's part of it beside the sum.
    copies = wide * problem.tokens * problem.features + problem.hidden_bytes
    rounded = problem.itemsize if problem.itemsize < wide else 0
    vectors = _vectors(problem)
    return LossMemory(
        2 * wide * block + vectors,
        (wide + rounded) * block + copies + problem.hidden_bytes + problem.head_bytes + vectors,
    )


def _cce(problem: Problem) -> LossMemory:
    # Never more than one copy of the logits and a float32 copy of the hidden states would be.
    most = problem.itemsize * problem.logits + 4 * problem.tokens * problem.features
    workspace = min(problem.workspace_mib * 2**20, most) + _vectors(problem)
    return LossMemory(workspace, workspace + problem.hidden_bytes + problem.head_bytes)


def _vectors(problem: Problem) -> int:
    return problem.tokens * _BYTES_PER_TOKEN + problem.vocabulary * _BYTES_PER_ENTRY
