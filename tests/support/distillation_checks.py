"""What several processes check of distillation when FSDP2 shards student and teacher; each of them imports this."""

import itertools
from functools import cache, partial

import torch
from distributed_processes import relative_error
from sharding_checks import counting
from tiny_distillation import build_teacher
from tiny_models import SIZES, VOCABULARY, build_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torchtune.models.llama3_2._component_builders import lora_llama3_2
from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params, set_trainable_params
from torchtune.training import get_shard_conditions, shard_model

from torchtune_lce import LinearCrossEntropyLoss, LinearForwardKLLoss, LinearSymmetricKLLoss

# Adapter on the output of both models, what has a shard group of its own, and whether the student's is frozen.
ON_OUTPUT = [(LoRALinear, [], False), (DoRALinear, ["output"], False), (LoRALinear, ["output"], True)]


def check_distillation(mesh: DeviceMesh) -> None:
    """On a mesh of one axis."""
    for tied in (True, False):
        for own_group, impl in itertools.product(([], ["tok_embeddings", "output"]), ("chunked", "reference")):
            _check_gradients(mesh, tied, own_group, impl, adapters=False)
            _check_gradients(mesh, tied, own_group, impl, adapters=True)
        _check_collectives(mesh, tied)
    for kind, own_group, frozen in ON_OUTPUT:
        _check_gradients(mesh, False, own_group, "chunked", adapters=True, on_output=kind, frozen=frozen)


def _student(tied: bool, adapters: bool, device: str) -> nn.Module:
    """All of it trained, or adapters alone and the head frozen."""
    if not adapters:
        return build_model(tied).to(device)
    torch.manual_seed(0)
    lora = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8}
    model = lora_llama3_2(**SIZES, **lora, tie_word_embeddings=tied).to(device)
    set_trainable_params(model, get_adapter_params(model))
    for parameter in get_adapter_params(model).values():
        # Half of them start as zeros, which leaves the other half without a gradient.
        nn.init.normal_(parameter, std=0.1)
    return model


def _sharded(model: nn.Module, mesh: DeviceMesh, own_group: list[str]) -> nn.Module:
    conditions = [partial(get_shard_conditions, names_to_match=own_group)]
    shard_model(model, conditions, cpu_offload=False, reshard_after_forward=True, dp_mesh=mesh)
    return model


def _put_on_output(model: nn.Module, kind: type[LoRALinear | DoRALinear], frozen: bool) -> nn.Module:
    """An adapter around the output's weight, which stays what it is."""
    weight = model.output.weight
    torch.manual_seed(7)
    model.output = kind(weight.shape[1], weight.shape[0], rank=4, alpha=8).to(weight.device)
    model.output.weight = weight
    nn.init.normal_(model.output.lora_b.weight, std=0.1)
    if kind is DoRALinear:
        model.output.initialize_dora_magnitude()
    for parameter in get_adapter_params(model.output).values():
        parameter.requires_grad_(not frozen)
    return model


def _check_gradients(
    mesh: DeviceMesh,
    tied: bool,
    own_group: list[str],
    impl: str,
    adapters: bool,
    on_output: type[LoRALinear | DoRALinear] | None = None,
    frozen: bool = False,
) -> None:
    """Both losses of the recipe, each rank with its own tokens; FSDP2 averages over the ranks.

    ``on_output``: the kind of adapter on the output of both models, the student's ``frozen`` or trained.
    """
    case = f"tied {tied}, own group {own_group}, {impl}, adapters alone {adapters}, on output {on_output}, {frozen}"
    device, ranks = mesh.device_type, mesh.size()
    losses = _Losses(impl, frozen)
    expected = _gradients_of_one_process(device, ranks, tied, impl, adapters, on_output, frozen)
    student, teacher = _models(device, tied, adapters, on_output, frozen)
    model = _sharded(student, mesh, own_group)
    losses.bind(model, _sharded(teacher.requires_grad_(False), mesh, own_group))
    losses.mixed(_batches(ranks, device)[mesh.get_local_rank()]).backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == expected.keys(), case
    for name, parameter in trained.items():
        error = relative_error(parameter.grad.full_tensor(), expected[name])
        assert error < 2e-6, f"{case}, {name}: relative error {error}"
    losses.kd_loss.release()


@cache
def _gradients_of_one_process(
    device: str,
    ranks: int,
    tied: bool,
    impl: str,
    adapters: bool,
    on_output: type[LoRALinear | DoRALinear] | None,
    frozen: bool,
) -> dict[str, Tensor]:
    """However the models are sharded, what each trained parameter's gradient must be."""
    losses = _Losses(impl, frozen)
    student, teacher = _models(device, tied, adapters, on_output, frozen)
    losses.bind(student, teacher)
    for tokens in _batches(ranks, device):
        (losses.mixed(tokens) / ranks).backward()
    losses.kd_loss.release()
    return {name: parameter.grad for name, parameter in student.named_parameters() if parameter.requires_grad}


def _batches(ranks: int, device: str) -> Tensor:
    return torch.randint(VOCABULARY, (ranks, 2, 9), generator=torch.Generator().manual_seed(3)).to(device)


def _models(device: str, tied: bool, adapters: bool, on_output, frozen: bool) -> tuple[nn.Module, nn.Module]:
    student, teacher = _student(tied, adapters, device), build_teacher().to(device)
    if on_output is None:
        return student, teacher
    return _put_on_output(student, on_output, frozen), _put_on_output(teacher, on_output, True)


class _Losses:
    """Both losses of the recipe, mixed as it mixes them."""

    def __init__(self, impl: str, frozen: bool) -> None:
        self.loss, self.kd_loss = LinearCrossEntropyLoss(impl="chunked"), LinearSymmetricKLLoss(impl=impl)
        self.frozen = frozen

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student, self.teacher = student, teacher
        self.loss.set_model_output(student)
        self.kd_loss.set_model_output(student)
        self.kd_loss.set_teacher_output(teacher)

    def mixed(self, tokens: Tensor) -> Tensor:
        hidden = self.student(tokens)
        with torch.no_grad():
            teacher_hidden = self.teacher(tokens)
        labels = tokens.roll(-1, 1)
        divergence = self.kd_loss(hidden, teacher_hidden, labels)
        # Alone where cross-entropy would have what is frozen gathered for the backward.
        return divergence if self.frozen else 0.3 * divergence + 0.7 * self.loss(hidden, labels)


def _check_collectives(mesh: DeviceMesh, tied: bool) -> None:
    """As many as torchtune's own losses need, which see the logits of a forward that is over."""

    def both() -> tuple[nn.Module, nn.Module]:
        device = mesh.device_type
        teacher = build_teacher().to(device).requires_grad_(False)
        return _sharded(_student(tied, True, device), mesh, []), _sharded(teacher, mesh, [])

    chunks = 8
    student, teacher = both()
    student.set_num_output_chunks(chunks)
    teacher.set_num_output_chunks(chunks)
    stock = _collectives(student, teacher, CEWithChunkedOutputLoss(chunks), ForwardKLWithChunkedOutputLoss(chunks))
    student, teacher = both()
    loss, kd_loss = LinearCrossEntropyLoss(impl="chunked"), LinearForwardKLLoss()
    loss.set_model_output(student)
    kd_loss.set_model_output(student)
    kd_loss.set_teacher_output(teacher)
    ours = _collectives(student, teacher, loss, kd_loss)
    assert ours == stock, f"tied {tied}: {ours}, torchtune's {stock}"
    assert stock["gathers"] == 8


def _collectives(student: nn.Module, teacher: nn.Module, loss: nn.Module, kd_loss: nn.Module) -> dict[str, int]:
    """Of the second of two micro-batches, in the recipe's order: the first one also sets FSDP2 up."""
    tokens = torch.randint(VOCABULARY, (2, 16)).to(next(student.parameters()).device)
    for _ in range(2):
        with counting() as count:
            outputs = student(tokens)
            with torch.no_grad():
                teacher_outputs = teacher(tokens)
            (kd_loss(outputs, teacher_outputs, tokens) + loss(outputs, tokens)).backward()
    return dict(count)
