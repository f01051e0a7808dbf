"""What two processes check of a patched model under DeepSpeed's ZeRO-3: a module that each of them imports."""

import deepspeed
import torch
from tiny_transformers import VOCABULARY, build

from torchtune_lce.transformers import patch

RANKS = 2
STEPS = 4
# Every weight is split, and let go as soon as its own module has run.
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
}


def check_two_processes(rank: int) -> None:
    deepspeed.init_distributed("gloo")
    for tied in (False, True):
        own, logits = _train(rank, tied, patched=None)
        assert logits is not None
        assert own[0] - own[-1] > 0.1
        for patched in ("before", "after"):
            ours, logits = _train(rank, tied, patched)
            assert logits is None, (tied, patched)
            assert max(abs(mine - theirs) for mine, theirs in zip(ours, own, strict=True)) < 1e-5, (tied, patched)


def _train(rank: int, tied: bool, patched: str | None) -> tuple[list[float], torch.Tensor | None]:
    """This rank's losses, and the last logits, of a model ``patched`` before or after DeepSpeed splits it, or not."""
    model = build("Llama", tie_word_embeddings=tied)
    if patched == "before":
        patch(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.5), config=CONFIG)
    if patched == "after":
        patch(engine)
    tokens = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(rank))
    losses = []
    for _ in range(STEPS):
        result = engine(input_ids=tokens, labels=tokens)
        engine.backward(result.loss)
        engine.step()
        losses.append(result.loss.item())
        assert model.lm_head.weight.numel() == 0, "the projection has not been split"
    return losses, result.logits
