"""Other people's losses, each in the way that its own documentation calls it. Packages are imported when asked for."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtune_lce.commands.shared.batches import IGNORE_INDEX
from torchtune_lce.commands.shared.objective import Objective

CHUNKS = 8


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """F.linear, float32 logits, F.cross_entropy."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=IGNORE_INDEX)


def compiled_full_logits():
    # Every size is a constant to the compiler, so that it may choose by it.
    return torch.compile(lambda hidden, weight, targets: full_logits(hidden, weight, targets), dynamic=False)


def torchtune_release():
    """The loss of torchtune 0.6.1 behind the chunked output of its models, compiled as ``compile: True`` does."""
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.training import compile_loss

    loss = compile_loss(CEWithChunkedOutputLoss(CHUNKS, IGNORE_INDEX), verbose=False)
    return lambda hidden, weight, targets: loss(_logits_in_chunks(hidden, weight), targets[None])


def _logits_in_chunks(hidden: Tensor, weight: Tensor) -> list[Tensor]:
    return [F.linear(part, weight) for part in hidden[None].chunk(CHUNKS, dim=1)]


def full_logits_with_teacher(objective: Objective):
    """torchtune's divergence on the full logits of both models, and F.cross_entropy where that has a share."""
    import torchtune.modules.loss

    kd_loss = getattr(torchtune.modules.loss, f"{objective.divergence.capitalize()}KLLoss")(ignore_index=IGNORE_INDEX)

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, *teacher: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        # The sum: of a mean torchtune asks first whether it is of any token, which cuts a compiled graph in two.
        total = kd_loss(logits, F.linear(*teacher), labels, normalize=False)
        return objective.mix(
            total / (labels != IGNORE_INDEX).sum().clamp(min=1),
            lambda: F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX),
        )

    return call


def compiled_full_logits_with_teacher(objective: Objective):
    return torch.compile(full_logits_with_teacher(objective), dynamic=False)


def torchtune_release_with_teacher(objective: Objective):
    """Both losses of torchtune 0.6.1 behind chunked outputs, compiled, as its distillation recipes have them."""
    import torchtune.modules.loss
    from torchtune.training import compile_loss

    name = f"{objective.divergence.capitalize()}KLWithChunkedOutputLoss"
    kd_loss, loss = (
        compile_loss(getattr(torchtune.modules.loss, component)(CHUNKS, ignore_index=IGNORE_INDEX), verbose=False)
        for component in (name, "CEWithChunkedOutputLoss")
    )

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, *teacher: Tensor) -> Tensor:
        logits = _logits_in_chunks(hidden, weight)
        return objective.mix(
            kd_loss(logits, _logits_in_chunks(*teacher), labels[None]), lambda: loss(logits, labels[None])
        )

    return call


def compiled_chunks(dynamic: bool | None = False):
    """The way of torchtune's main branch: eight chunks of tokens, each projected and reduced in one compiled function.

    Autograd keeps what every chunk's backward needs.
    """
    return _chunks(torch.compile(_chunk_sum, dynamic=dynamic))


def eager_chunks():
    """The same, not compiled: autograd keeps every chunk's float32 log-softmax."""
    return _chunks(_chunk_sum)


def _chunk_sum(hidden: Tensor, projection: Tensor | nn.Module, targets: Tensor) -> Tensor:
    """``projection``: the weight, or the layer itself where it is more than that."""
    logits = (projection(hidden) if isinstance(projection, nn.Module) else F.linear(hidden, projection)).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def _chunks(chunk_sum):
    def loss(hidden: Tensor, projection: Tensor | nn.Module, targets: Tensor) -> Tensor:
        parts = zip(hidden.tensor_split(CHUNKS), targets.tensor_split(CHUNKS), strict=True)
        total = sum(chunk_sum(part, projection, labels) for part, labels in parts if len(labels))
        return total / (targets != IGNORE_INDEX).sum().clamp(min=1)

    return loss


def torch_linear_ce():
    """PyTorch's own from 2.13 on, in chunks; without options it would be full logits.

    From 2.15 on these options are what its fused kernels ask for, on a card with the packages nvidia-cutlass-dsl and
    apache-tvm-ffi; without them it takes the chunks of before, and does not say so.
    """
    options = nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: F.linear_cross_entropy(
        hidden, weight, targets, ignore_index=IGNORE_INDEX, options=options
    )


def apple_cce():
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, impl="cce")


def liger():
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX)
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def quack():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, targets: chunked_linear_cross_entropy(
        hidden, weight, targets, ignore_index=IGNORE_INDEX
    )
