"""What several processes check of models that FSDP2 shards, on meshes of one and two axes; each imports this."""

import itertools
from collections import Counter
from contextlib import contextmanager
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_processes import relative_error
from tiny_models import SIZES, VOCABULARY, build_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torchtune.models.llama3_2._component_builders import lora_llama3_2
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.training import get_shard_conditions, scale_grads, shard_model
from vision_models import TOKENS_PER_TILE, build_deep_fusion, images

from torchtune_lce import LinearCrossEntropyLoss

IGNORED = -100
# The last two are their names before torch 2.13.
COLLECTIVES = {
    "all_gather_single": "gathers",
    "reduce_scatter_single": "reduce-scatters",
    "all_gather_into_tensor": "gathers",
    "reduce_scatter_tensor": "reduce-scatters",
}


def check_sharded(flat: DeviceMesh, hybrid: DeviceMesh) -> None:
    """``flat`` has one axis; ``hybrid`` has two: FSDP2 replicates over the first and shards over the second."""
    for tied in (True, False):
        for own_group in ([], ["tok_embeddings"], ["tok_embeddings", "output"]):
            _check_recipe_scaling(f"hybrid, tied {tied}, own group {own_group}", tied, hybrid, own_group)
        _check_recipe_scaling(f"flat, tied {tied}", tied, flat, [])
        _check_recipe_scaling(f"offloaded, tied {tied}", tied, flat, [], cpu_offload=True)
    for own_group in ([], ["decoder.tok_embeddings"]):
        _check_fusion(flat, own_group)
    _check_evaluation_leaves_parameters_sharded(flat)
    _check_head_trained_alone(flat)
    _check_mixed_precision(flat)


def _batch(rank: int, index: int, device: str) -> tuple[Tensor, Tensor]:
    """As many labels as this rank has, from none at all (the last rank's second) to many."""
    generator = torch.Generator().manual_seed(2 * rank + index)
    tokens, targets = torch.randint(VOCABULARY, (2, 2, 9), generator=generator)
    targets[:, : 2 * rank + index] = IGNORED
    if rank == dist.get_world_size() - 1 and index == 1:
        targets.fill_(IGNORED)
    return tokens.to(device), targets.to(device)


def _adapted(tied: bool) -> nn.Module:
    model = lora_llama3_2(
        **SIZES, tie_word_embeddings=tied, lora_attn_modules=["q_proj", "v_proj"], lora_rank=4, lora_alpha=8
    )
    set_trainable_params(model, get_adapter_params(model))
    return model


def _sharded(
    tied: bool,
    mesh: DeviceMesh,
    own_group: list[str],
    cpu_offload: bool = False,
    reshard: bool | None = True,
    lora: bool = False,
) -> nn.Module:
    """As torchtune shards a model; with ``reshard`` None as FSDP2 does by default, where the root alone keeps."""
    model = _adapted(tied) if lora else build_model(tied)
    if not cpu_offload:
        model.to(mesh.device_type)
    elif mesh.device_type == "cpu":
        # As shard_model does it, but that pins memory, which needs a card.
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
        return model
    if reshard is None:
        for module in (*model.layers, *map(model.get_submodule, own_group), model):
            fully_shard(module, mesh=mesh)
        return model
    conditions = [partial(get_shard_conditions, names_to_match=own_group)]
    shard_model(model, conditions, cpu_offload=cpu_offload, reshard_after_forward=reshard, dp_mesh=mesh)
    return model


def _check_recipe_scaling(
    case: str, tied: bool, mesh: DeviceMesh, own_group: list[str], cpu_offload: bool = False
) -> None:
    """Gradients of the mean over every rank's labels, as torchtune's recipes get them from each rank's own means."""
    ranks, device = dist.get_world_size(), mesh.device_type
    labels, gradients = _gradients_of_one_process(tied, ranks, device)
    loss = LinearCrossEntropyLoss(impl="reference")
    model = _sharded(tied, mesh, own_group, cpu_offload)
    loss.set_model_output(model)
    for index in range(2):
        tokens, targets = _batch(dist.get_rank(), index, device)
        (loss(model(tokens), targets) * (targets != IGNORED).sum()).backward()
    scale_grads(model, torch.tensor(ranks / labels))
    for (name, parameter), expected in zip(model.named_parameters(), gradients, strict=True):
        assert isinstance(parameter, DTensor), f"{case}: {name} was left unsharded"
        error = relative_error(parameter.grad.full_tensor().to(device), expected)
        assert error < 1e-6, f"{case}, {name}: relative error {error}"


@cache
def _gradients_of_one_process(tied: bool, ranks: int, device: str) -> tuple[int, list[Tensor]]:
    """How many labels all ranks' batches have, and the gradients of the mean over these."""
    loss = LinearCrossEntropyLoss(impl="reference")
    single = build_model(tied).to(device)
    loss.set_model_output(single)
    batches = [_batch(rank, index, device) for rank in range(ranks) for index in range(2)]
    labels = sum(int((targets != IGNORED).sum()) for _, targets in batches)
    for tokens, targets in batches:
        (loss(single(tokens), targets) * (targets != IGNORED).sum() / labels).backward()
    return labels, [parameter.grad for parameter in single.parameters()]


def _check_fusion(mesh: DeviceMesh, own_group: list[str]) -> None:
    """Llama 3.2 Vision, whose head lies in a decoder that is no shard group; every rank has the same batch."""
    case, device = f"fusion, own group {own_group}", mesh.device_type
    tokens, targets = _batch(0, 0, device)
    # Special tokens of images, which embed and are never predicted.
    tokens[0, :8] = VOCABULARY + torch.arange(8)
    inputs = {
        "encoder_input": {name: value.to(device) for name, value in images(len(tokens)).items()},
        "encoder_mask": torch.ones(*tokens.shape, TOKENS_PER_TILE, dtype=torch.bool, device=device),
    }
    loss = LinearCrossEntropyLoss(impl="chunked")
    single = build_deep_fusion(decoder_trainable=True).to(device)
    loss.set_model_output(single)
    loss(single(tokens, **inputs), targets).backward()
    model = build_deep_fusion(decoder_trainable=True).to(device)
    conditions = [partial(get_shard_conditions, names_to_match=own_group)]
    shard_model(model, conditions, cpu_offload=False, reshard_after_forward=True, dp_mesh=mesh)
    loss.set_model_output(model)
    loss(model(tokens, **inputs), targets).backward()
    for (name, parameter), expected in zip(model.named_parameters(), single.parameters(), strict=True):
        assert expected.grad.any(), f"{case}: {name} has no gradient"
        error = relative_error(parameter.grad.full_tensor(), expected.grad)
        assert error < 1e-6, f"{case}, {name}: relative error {error}"


def check_collectives(mesh: DeviceMesh) -> None:
    """However the model is sharded: no more gathers than torchtune's own loss needs, nor do statistics.

    One reduce-scatter more where a trained head is in the root's group with another embedding, whose gradient comes
    last, and the root was to reshard after forward.
    """
    tokens, targets = _batch(0, 0, mesh.device_type)

    def stock(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    loss = LinearCrossEntropyLoss(impl="chunked")

    def ours(model: nn.Module) -> Tensor:
        return loss(model(tokens), targets)

    for tied, own_group, lora, reshard in itertools.product(
        (True, False), ([], ["tok_embeddings"], ["tok_embeddings", "output"]), (False, True), (True, False, None)
    ):
        if tied and "output" in own_group:
            continue
        case = f"tied {tied}, own group {own_group}, LoRA {lora}, reshard_after_forward {reshard}"
        model = _sharded(tied, mesh, own_group, reshard=reshard, lora=lora)
        if tied and own_group and reshard is not False:
            # torchtune's own loss crashes: each of five forwards is gathered once more for its backward.
            expected = {"gathers": 10 if reshard else 9, "reduce-scatters": 2 if lora else 4}
        else:
            expected = _collectives(model, stock)
        if reshard and not (tied or lora or "output" in own_group):
            expected["reduce-scatters"] += 1
        loss.set_model_output(model)
        assert _collectives(model, ours) == expected, case
    assert expected == {"gathers": 9, "reduce-scatters": 2}, "one gather of the root, two of all others"

    model = _sharded(True, mesh, [])
    assert _collectives(model, stock) == {"gathers": 6, "reduce-scatters": 3}
    loss.set_model_output(model)
    loss.after_batch.append(lambda batch: batch.statistics())
    assert _collectives(model, ours) == {"gathers": 6, "reduce-scatters": 3}


def _collectives(model: nn.Module, forward) -> dict[str, int]:
    """Of the second of two micro-batches: the first one also sets FSDP2 up."""
    for _ in range(2):
        with counting() as count:
            forward(model).backward()
    return dict(count)


@contextmanager
def counting():
    """Counts what FSDP2 calls, from whatever thread the backward runs in."""
    count = Counter()
    functions = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def counted(name: str):
        def call(*arguments, **settings):
            count[COLLECTIVES[name]] += 1
            return functions[name](*arguments, **settings)

        return call

    for name in functions:
        setattr(dist, name, counted(name))
    try:
        yield count
    finally:
        for name, function in functions.items():
            setattr(dist, name, function)


def _check_evaluation_leaves_parameters_sharded(mesh: DeviceMesh) -> None:
    """As torchtune's setting promises, though the root keeps its parameters from forward to loss."""
    model = _sharded(True, mesh, [])
    loss = LinearCrossEntropyLoss(impl="chunked")
    loss.set_model_output(model)
    tokens, targets = _batch(0, 0, mesh.device_type)
    with torch.no_grad():
        loss(model(tokens), targets)
    unsharded = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not unsharded


def _check_head_trained_alone(mesh: DeviceMesh) -> None:
    """No gradient of the hidden states then says that the head's own has come."""
    tokens, targets = _batch(0, 0, mesh.device_type)
    loss = LinearCrossEntropyLoss(impl="chunked")
    single = build_model(tied=False).to(mesh.device_type)
    loss.set_model_output(single)
    loss(single(tokens), targets).backward()
    for reshard in (True, False):
        model = build_model(tied=False).to(mesh.device_type).requires_grad_(False)
        model.output.requires_grad_(True)
        shard_model(model, [get_shard_conditions], cpu_offload=False, reshard_after_forward=reshard, dp_mesh=mesh)
        loss.set_model_output(model)
        loss(model(tokens), targets).backward()
        error = relative_error(model.output.weight.grad.full_tensor(), single.output.weight.grad)
        assert error < 1e-6, f"head alone, reshard_after_forward {reshard}: relative error {error}"


def _check_mixed_precision(mesh: DeviceMesh) -> None:
    """Hidden states returned in float32 go back to the head's dtype; a loss in that dtype would be a rounded one."""
    tokens, targets = _batch(0, 0, mesh.device_type)
    loss = LinearCrossEntropyLoss(impl="chunked")

    def bound(output_dtype: torch.dtype, reshard: bool) -> nn.Module:
        model = build_model(tied=False).to(mesh.device_type)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=output_dtype)
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        loss.set_model_output(model)
        return model

    found = []
    for reshard in (True, False):
        model = bound(torch.float32, reshard)
        result = loss(model(tokens), targets)
        assert result.dtype == torch.float32
        result.backward()
        found.append([result.detach(), *(parameter.grad.full_tensor() for parameter in model.parameters())])
    for resharded, kept in zip(*found, strict=True):
        assert torch.equal(resharded, kept)
        assert kept.any()
    for reshard in (True, False):
        model = bound(torch.bfloat16, reshard)
        with pytest.raises(TypeError, match="round the loss from torch.float32 to torch.bfloat16: leave output_dtype"):
            loss(model(tokens), targets)
