"""What two processes check of a model that FSDP2 has sharded; a module of its own, since each of them imports it."""

import itertools
from functools import partial

import pytest
import torch
from distributed_processes import relative_error
from sharding_checks import check_collectives
from tiny_models import VOCABULARY, build_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtune.modules.peft import DoRALinear, LoRALinear
from torchtune.training import get_shard_conditions, shard_model

from torchtune_lce import LinearCrossEntropyLoss, LinearTokenLogprobs, skip_output_layer

RANKS = 2
MICRO_BATCHES = 2


def check_two_processes(rank: int) -> None:
    for head, own_group, reshard in itertools.product(
        ("tied", "untied", "lora", "dora"), ([], ["tok_embeddings", "output"]), (True, False)
    ):
        _check_gradients(rank, head, own_group, reshard)
        if not own_group:
            _check_token_logprobs(rank, head, reshard)
    _check_bound_before_sharding()
    _check_data_parallel(rank)
    check_collectives(init_device_mesh("cpu", (RANKS,)))


def _build(head: str) -> nn.Module:
    model = build_model(tied=head == "tied")
    if head in ("lora", "dora"):
        model.output = (LoRALinear if head == "lora" else DoRALinear)(64, VOCABULARY, rank=4, alpha=8)
        nn.init.normal_(model.output.lora_b.weight, std=0.1)
    if head == "dora":
        model.output.initialize_dora_magnitude()
    return model


def _batches(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Micro-batches of one rank. The last one of rank 1 has no label at all."""
    generator = torch.Generator().manual_seed(rank)
    batches = []
    for index in range(MICRO_BATCHES):
        tokens, targets = torch.randint(VOCABULARY, (2, 2, 9), generator=generator)
        targets[0, :4] = -100
        if rank == 1 and index == MICRO_BATCHES - 1:
            targets.fill_(-100)
        batches.append((tokens, targets))
    return batches


def _check_gradients(rank: int, head: str, own_group: list[str], reshard: bool) -> None:
    case = f"{head}, own group {own_group}, reshard_after_forward {reshard}"
    loss = LinearCrossEntropyLoss(impl="chunked")
    single = _build(head)
    loss.set_model_output(single)
    for other in range(RANKS):
        for tokens, targets in _batches(other):
            (loss(single(tokens), targets) / RANKS).backward()

    model = _build(head)
    names = [name for name, _ in model.named_parameters()]
    conditions = [partial(get_shard_conditions, names_to_match=own_group)]
    shard_model(model, conditions, cpu_offload=False, reshard_after_forward=reshard)
    loss.set_model_output(model)
    with torch.no_grad():
        # What an evaluation leaves unsharded or resharded must not matter.
        tokens, targets = _batches(rank)[0]
        before = loss(model(tokens), targets)
    for tokens, targets in _batches(rank):
        last = loss(model(tokens), targets)
        last.backward()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    expected = dict(single.named_parameters())
    parameters = dict(model.named_parameters())
    assert list(parameters) == names
    for name, parameter in parameters.items():
        assert isinstance(parameter, DTensor), f"{case}: {name} was left unsharded"
        torch.testing.assert_close(
            parameter.grad.full_tensor(),
            expected[name].grad,
            rtol=1e-5,
            atol=1e-6,
            msg=lambda m, n=name: f"{case}, {n}: {m}",
        )
    assert before > 0, case
    if rank == 1:
        assert last == 0, case
    loss.release()
    leftovers = [
        key for module in model.modules() for key in vars(module) if "cross_entropy" in key or key == "unembed"
    ]
    assert not leftovers, case


def _check_token_logprobs(rank: int, head: str, reshard: bool) -> None:
    """As GRPO takes them: old ones without gradients, then the policy's with figures, and a loss of one rank's own."""
    case = f"token log-probabilities, {head}, reshard_after_forward {reshard}"
    single, model = _build(head), _build(head)
    mine = LinearTokenLogprobs(impl="chunked", logit_scale=1 / 0.7)
    mine.set_model_output(single)
    total = []
    for other in range(RANKS):
        for tokens, targets in _batches(other):
            found = mine.with_figures(single(tokens), targets)
            (_policy_loss(found.logprobs, found.logprobs.detach()) / RANKS).backward()
            total.append(found)
    shard_model(
        model,
        [partial(get_shard_conditions, names_to_match=[])],
        cpu_offload=False,
        reshard_after_forward=reshard,
    )
    logprobs = LinearTokenLogprobs(impl="chunked", logit_scale=1 / 0.7)
    logprobs.set_model_output(model)
    with torch.no_grad():
        old = [logprobs(model(tokens), targets) for tokens, targets in _batches(rank)]
    expected = total[rank * MICRO_BATCHES : (rank + 1) * MICRO_BATCHES]
    for before, wanted, (tokens, targets) in zip(old, expected, _batches(rank), strict=True):
        found = logprobs.with_figures(model(tokens), targets)
        for name, figure in found._asdict().items():
            torch.testing.assert_close(
                figure, getattr(wanted, name), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{case}, {n}: {m}"
            )
        torch.testing.assert_close(before, found.logprobs, rtol=1e-5, atol=1e-6)
        _policy_loss(found.logprobs, before).backward()
    for (name, parameter), reference in zip(model.named_parameters(), single.parameters(), strict=True):
        error = relative_error(parameter.grad.full_tensor(), reference.grad)
        assert error < 1e-5, f"{case}, {name}: relative error {error}"


def _policy_loss(logprobs: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Another advantage for each row, so that its gradient is no sum that cancels."""
    return ((logprobs - old).exp() * torch.tensor([[2.0], [-1.0]])).sum()


def _check_bound_before_sharding() -> None:
    model = build_model(tied=False)
    loss = LinearCrossEntropyLoss(impl="chunked")
    loss.set_model_output(model)
    shard_model(model, [get_shard_conditions], cpu_offload=False, reshard_after_forward=True)
    tokens, targets = _batches(0)[0]
    hidden = model(tokens)
    with pytest.raises(TypeError, match="is a DTensor .*: apply FSDP2 before set_model_output"):
        loss(hidden, targets)


def _check_data_parallel(rank: int) -> None:
    """DistributedDataParallel is refused; what the refusal says to do works."""
    loss = LinearCrossEntropyLoss(impl="chunked")
    single = build_model(tied=False)
    loss.set_model_output(single)
    for other in range(RANKS):
        tokens, targets = _batches(other)[0]
        (loss(single(tokens), targets) / RANKS).backward()
    model = nn.parallel.DistributedDataParallel(build_model(tied=False))
    with pytest.raises(TypeError, match="got DistributedDataParallel around one: shard it with FSDP2"):
        loss.set_model_output(model)
    skip_output_layer(model.module)
    tokens, targets = _batches(rank)[0]
    loss(model(tokens), targets, weight=model.module.output.weight).backward()
    for (name, parameter), expected in zip(model.named_parameters(), single.parameters(), strict=True):
        assert relative_error(parameter.grad, expected.grad) < 1e-6, name
