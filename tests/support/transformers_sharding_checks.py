"""What two processes check of a patched model of transformers that is sharded: a module that each of them imports."""

import itertools
import logging
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tiny_transformers import SIZES, VOCABULARY, build
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from torchtune_lce.transformers import patch

RANKS = 2
STEPS = 3


def check_two_processes(rank: int) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    for tied, reshard, patched_first in itertools.product((False, True), (True, False), (False, True)):

        def shard(model, reshard=reshard):
            return _fully_shard(model, mesh, reshard_after_forward=reshard)

        case = f"fully_shard, tied {tied}, reshard_after_forward {reshard}, patched first {patched_first}"
        _check(case, rank, shard, tied=tied, patched_first=patched_first)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    _check("bfloat16", rank, lambda model: _fully_shard(model, mesh, mp_policy=half), tolerance=0.01)
    _check(
        "the first FSDP",
        rank,
        lambda model: FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")),
    )
    _check("data parallel", rank, DistributedDataParallel)
    _check(
        "a unit of its own",
        rank,
        lambda model: _fully_shard(model, mesh, own=[model.lm_head]),
        why="its output projection is an FSDP unit of its own",
    )
    _check(
        "tensor parallel",
        rank,
        lambda model: parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())}),
        why="its output projection's weight is a DTensor, not a plain tensor",
        same_batch=True,
    )
    _check_a_rank_without_labels(rank, mesh)


def _fully_shard(model: nn.Module, mesh, own=(), **settings) -> nn.Module:
    """A unit each layer, as accelerate has it; the root holds what is left, and with it the projection."""
    for part in (*model.model.layers, *own):
        fully_shard(part, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def _check(case, rank, shard, *, tied=False, patched_first=False, why=None, tolerance=1e-5, same_batch=False) -> None:
    """Losses and weights of some steps equal those without the patch; ``why`` there are logits, None if not."""
    own_losses, own_weights, _ = _train(shard(build("Llama", tie_word_embeddings=tied)), rank, same_batch)
    model = build("Llama", tie_word_embeddings=tied)
    with _warnings() as said:
        if patched_first:
            patch(model)
            model = shard(model)
        else:
            model = shard(model)
            patch(model)
        losses, weights, logits = _train(model, rank, same_batch)
    assert [logits is None, len(said)] == ([True, 0] if why is None else [False, 1]), (case, said)
    assert why is None or why in said[0], (case, said)
    assert own_losses[0] - own_losses[-1] > 0.01, case
    assert max(abs(mine - own) for mine, own in zip(losses, own_losses, strict=True)) < tolerance, case
    assert weights.keys() == own_weights.keys(), case
    for name, weight in own_weights.items():
        assert (weights[name] - weight).abs().max() < tolerance, (case, name)


def _train(model: nn.Module, rank: int, same_batch: bool):
    """Losses of the steps of this rank, all weights after them, and the logits of the last result."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tokens, labels = _batch(0 if same_batch else rank)
    losses = []
    for _ in range(STEPS):
        for part in range(2):  # micro-batches, whose gradients are added
            result = model(input_ids=tokens[part], labels=labels[part])
            (result.loss / 2).backward()
        losses.append(result.loss.item())
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            assert model(input_ids=tokens[0], labels=labels[0]).logits.shape == (2, 12, VOCABULARY)
        model.train()
    return losses, _whole_weights(model), result.logits


def _whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {name: value.detach().clone() for name, value in model.named_parameters()}
    whole = (value.full_tensor() if isinstance(value, DTensor) else value for value in model.parameters())
    return {name: value.detach().clone() for (name, _), value in zip(model.named_parameters(), whole, strict=True)}


def _batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[2, 2, 12] each: two micro-batches of a rank."""
    tokens = torch.randint(3, VOCABULARY, (2, 2, 12), generator=torch.Generator().manual_seed(rank))
    labels = tokens.clone()
    labels[:, 0, : 4 + rank] = -100
    return tokens, labels


def _check_a_rank_without_labels(rank: int, mesh) -> None:
    """Its loss is 0, with gradients for the others to reduce: the class itself would give everybody NaN."""
    model = patch(_fully_shard(build("Llama"), mesh))
    tokens, labels = (part[0] for part in _batch(rank))
    result = model(input_ids=tokens, labels=torch.full_like(labels, -100) if rank else labels)
    result.loss.backward()
    assert (result.loss == 0) == bool(rank)
    gradient = model.lm_head.weight.grad.full_tensor()
    assert gradient.shape == (VOCABULARY, SIZES["hidden_size"])
    assert gradient.isfinite().all()
    assert gradient.any()
    dist.barrier()


@contextmanager
def _warnings():
    """What the patch says of the model."""
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("torchtune_lce.transformers")
    log.addHandler(handler)
    yield said
    log.removeHandler(handler)
