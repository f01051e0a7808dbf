"""What several processes check of the layouts of torchtune's main branch; each of them imports this."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from distributed_processes import relative_error
from tensor_parallel_checks import counted
from tiny_models import SIZES, VOCABULARY, build_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.training import get_shard_conditions, prepare_mha_for_tp, scale_grads, shard_model
from torchtune_main import as_on_main, context_parallel_manager, training_tp_plan

from torchtune_lce import LinearCrossEntropyLoss

IGNORED = -100
# On two cards each rank's two pieces are 32 long: torch's ring attention pads sums of shorter ones and trips over it.
LENGTH = 128
# A few roundings of float32, through two layers. On cards attention sums in blocks.
ROUNDING = 2e-5 if torch.cuda.is_available() else 4e-6


def check_sequence_parallel(mesh: DeviceMesh) -> None:
    """Tensor parallelism on a mesh of one axis, hidden states split along the sequence."""
    for tied in (True, False):
        _check_model(mesh, None, tied)
    _check_collectives(mesh)


def check_sequence_parallel_with_fsdp(mesh: DeviceMesh) -> None:
    """The same on a mesh ("dp", "tp"), with FSDP2 over the first axis."""
    for tied in (True, False):
        _check_model(mesh["tp"], mesh["dp"], tied)


def check_context_parallel(mesh: DeviceMesh) -> None:
    """Each rank has a part of every sequence, and FSDP2 shards the model over the same ranks."""
    for tied in (True, False):
        _check_context_parallel(mesh, tied)


def _batch(seed: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(VOCABULARY, (2, 2, LENGTH), generator=generator)
    targets[0, :4] = IGNORED
    return tokens.to(device), targets.to(device)


def _assert_gradients(case: str, model: nn.Module, single: nn.Module) -> None:
    for (name, parameter), expected in zip(model.named_parameters(), single.parameters(), strict=True):
        assert isinstance(parameter, DTensor), f"{case}: {name} was left whole"
        error = relative_error(parameter.grad.full_tensor(), expected.grad)
        assert error < ROUNDING, f"{case}, {name}: relative error {error}"


def _check_model(tp: DeviceMesh, dp: DeviceMesh | None, tied: bool) -> None:
    """In the order in which main's recipe calls the loss and the model."""
    case = f"sequence parallel, tied {tied}, FSDP2 {dp is not None}"
    ranks = 1 if dp is None else dp.size()
    device = tp.device_type
    loss = LinearCrossEntropyLoss(impl="chunked")
    single = build_model(tied).to(device)
    loss.set_model_output(single)
    for rank in range(ranks):
        tokens, targets = _batch(rank, device)
        (loss(single(tokens), targets) / ranks).backward()
    tokens, targets = _batch(0 if dp is None else dp.get_local_rank(), device)
    with torch.no_grad():
        expected = loss(single(tokens), targets)

    loss = LinearCrossEntropyLoss(impl="chunked")
    loss.tp_enabled = True
    plan = loss.patch_tp_plan(training_tp_plan(tied))
    assert not loss.tp_requires_loss_parallel_ctx_manager
    model = as_on_main(prepare_mha_for_tp(build_model(tied).to(device), tp))
    parallelize_module(model, tp, plan)
    if dp is not None:
        condition = partial(get_shard_conditions, names_to_match=[])
        shard_model(model, [condition], cpu_offload=False, reshard_after_forward=True, dp_mesh=dp)
    loss.set_model_output(model)
    hidden = model(tokens)
    assert hidden.placements == (Shard(1),), case
    assert hidden.to_local().shape[1] == LENGTH // tp.size()
    actual = loss(hidden, targets)
    assert not isinstance(actual, DTensor)
    assert relative_error(actual, expected) < ROUNDING, case
    actual.backward()
    # Validation, between two steps.
    model.eval()
    with torch.no_grad():
        assert relative_error(loss(model(tokens), targets), expected) < ROUNDING, f"{case}, validation"
    _assert_gradients(case, model, single)


def _check_collectives(mesh: DeviceMesh) -> None:
    """Beside the two small all-reduces, hidden states are gathered once and their gradient is scattered once."""
    with torch.device(mesh.device_type):
        model = as_on_main(build_model(tied=False))
        parallelize_module(model, mesh, {"output": training_tp_plan(tied=False)["output"]})
        loss = LinearCrossEntropyLoss(impl="chunked")
        loss.set_model_output(model)
        hidden = torch.randn(2, LENGTH, SIZES["embed_dim"])
        targets = torch.randint(VOCABULARY, (2, LENGTH))
    hidden = distribute_tensor(hidden, mesh, [Shard(1)]).requires_grad_()
    with CommDebugMode() as forward:
        result = loss(hidden, targets)
    with CommDebugMode() as backward:
        result.backward()
    assert counted(forward) == {"all_gather_into_tensor": 1, "allreduce_": 2}
    assert counted(backward) == {"reduce_scatter_tensor": 1}


def _check_context_parallel(mesh: DeviceMesh, tied: bool) -> None:
    case = f"context parallel, tied {tied}"
    ranks, device = mesh.size(), mesh.device_type
    tokens, targets = _batch(7, device)
    # Of 2 pieces a rank, the two in the middle are the last rank's: it has no label at all.
    piece = LENGTH // (2 * ranks)
    targets[:, (ranks - 1) * piece : (ranks + 1) * piece] = IGNORED
    labels = (targets != IGNORED).sum()

    def build() -> nn.Module:
        torch.manual_seed(3)
        # As many positions as the sequence has: main splits the table of positions just as the sequence.
        model = llama3_2(**SIZES | {"max_seq_len": LENGTH}, tie_word_embeddings=tied)
        nn.init.normal_(model.tok_embeddings.weight, std=0.1)
        return as_on_main(model).to(device)

    loss = LinearCrossEntropyLoss(impl="chunked")
    single = build()
    loss.set_model_output(single)
    expected = loss(single(tokens), targets)
    expected.backward()

    model = build()
    condition = partial(get_shard_conditions, names_to_match=[])
    shard_model(model, [condition], cpu_offload=False, reshard_after_forward=True, dp_mesh=mesh)
    loss.set_model_output(model)
    positions = torch.arange(LENGTH, device=device).expand_as(tokens).clone()
    with context_parallel_manager(mesh, model, [tokens, targets, positions]), _attention(mesh, positions[0]):
        assert targets.shape == (2, LENGTH // ranks)
        local_labels = (targets != IGNORED).sum()
        assert (local_labels == 0) == (mesh.get_local_rank() == ranks - 1)
        share = loss(model(tokens), targets) * local_labels
        share.backward()
    scale_grads(model, ranks / labels)
    _assert_gradients(case, model, single)
    total = DTensor.from_local(share.detach(), mesh, [Partial()]).full_tensor()
    assert relative_error(total / labels, expected) < ROUNDING, case


@contextmanager
def _attention(mesh: DeviceMesh, positions: Tensor) -> Iterator[None]:
    """torch's own ring attention runs on cards only. On a CPU, gather keys and values and mask by position."""
    if mesh.device_type != "cpu":
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            yield
        return
    ring = F.scaled_dot_product_attention

    def whole(local: Tensor, dim: int) -> Tensor:
        gathered = DTensor.from_local(local, mesh, [Shard(dim)]).redistribute(placements=[Replicate()])
        return gathered.to_local(grad_placements=[Partial()])

    def gathering(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: None, dropout_p: float, is_causal: bool):
        assert is_causal
        assert attn_mask is None
        assert dropout_p == 0
        seen = positions[:, None] >= whole(positions, 0)[None]
        weights = query @ whole(key, 2).transpose(-2, -1) / query.shape[-1] ** 0.5
        return weights.masked_fill(~seen, -torch.inf).softmax(-1) @ whole(value, 2)

    F.scaled_dot_product_attention = gathering
    try:
        yield
    finally:
        F.scaled_dot_product_attention = ring
