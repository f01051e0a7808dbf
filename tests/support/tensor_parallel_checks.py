"""What several processes check of a vocabulary that tensor parallelism splits; each of them imports this."""

import itertools
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from distributed_processes import relative_error
from tiny_models import SIZES, VOCABULARY, build_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torchao.quantization.qat.linear import Int8DynActInt4WeightQATLinear
from torchtune.models.llama3 import base_llama_tp_plan
from torchtune.modules.peft import DoRALinear, LoRALinear
from torchtune.training import get_shard_conditions, prepare_mha_for_tp, shard_model

from torchtune_lce import LinearCrossEntropyLoss, LinearTokenLogprobs, linear_cross_entropy, linear_token_statistics

EMBED_DIM = SIZES["embed_dim"]
# Divisible by neither ranks nor tiles.
RAGGED = 509
# What all logits share; of the latter two a sum over the vocabulary is no float32.
COMMON = (0.0, 1e3, 2.0**16 + 1 / 8, 2.0**20 + 1 / 8)
OUTPUT_PLAN = {"output": ColwiseParallel(output_layouts=Replicate())}
TIED_PLAN = {"tok_embeddings": RowwiseParallel(input_layouts=Replicate())}


def check_vocabulary_parallel(mesh: DeviceMesh, impls: tuple[str, ...], digits: tuple[str, ...] = ()) -> None:
    """On a mesh of one axis, every rank of which sees the same tokens.

    ``digits``: those of `impls` whose digits are counted where some are easily lost; without any, all.
    """
    digits = digits or impls
    with torch.device(mesh.device_type):
        for impl in impls:
            _check_equals_one_process(mesh, impl, False, None, "mean")
            _check_equals_one_process(mesh, impl, True, 5.0, "none")
        _check_gradient_through_log_sum_exp(mesh)
        _check_label_smoothing(mesh, impls)
        _check_common_logit(mesh, digits)
        if "cce_exact" in digits:
            _check_frozen_head(mesh)
        _check_confident_tokens(mesh)
        _check_ignore_index_that_is_a_row(mesh)
        _check_sequence_parallel_hidden(mesh)
        _check_far_apart(mesh)
        _check_no_labels(mesh)
        _check_token_statistics(mesh)
        _check_entropy(mesh)
        _check_token_logprobs(mesh, impls)
        # In the interpreter the kernels take seconds for each of its cases.
        _check_masked_rank(mesh, impls if mesh.device_type == "cuda" else ("reference", "chunked"))
        _check_autocast(mesh)
        _check_tied(mesh)
        _check_collectives(mesh)
        _check_refusals(mesh)
        _check_second_derivative(mesh)


def check_with_fsdp(mesh: DeviceMesh) -> None:
    """On a mesh ("dp", "tp"): FSDP2 over the first axis, tensor parallelism over the second."""
    for tied, own_group, reshard in itertools.product((True, False), ([], ["tok_embeddings", "output"]), (True, False)):
        _check_gradients_with_fsdp(mesh, tied, own_group, reshard)


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    upstream: Tensor


def _problem(bias: bool = False, scale: float = 1.0) -> Problem:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())

    targets = torch.randint(RAGGED, (2, 7), generator=generator, device="cpu")
    # Both ends of the vocabulary, and what a shorter last shard would take for its own.
    targets[0, :3] = torch.tensor([0, RAGGED - 1, RAGGED // 2], device="cpu")
    targets[1, 2:4] = -100
    return Problem(
        normal(2, 7, EMBED_DIM),
        normal(RAGGED, EMBED_DIM) * 0.3 * scale,
        normal(RAGGED) if bias else None,
        targets.to(torch.get_default_device()),
        normal(2, 7),
    )


def _bound(
    mesh: DeviceMesh, problem: Problem, frozen: bool = False, **settings
) -> tuple[LinearCrossEntropyLoss, nn.Module]:
    model = _split(mesh, problem)
    model.output.requires_grad_(not frozen)
    loss = LinearCrossEntropyLoss(**settings)
    loss.set_model_output(model)
    return loss, model


def _split(mesh: DeviceMesh, problem: Problem) -> nn.Module:
    model = build_model(tied=False)
    model.output = nn.Linear(EMBED_DIM, RAGGED, bias=problem.bias is not None)
    with torch.no_grad():
        model.output.weight.copy_(problem.weight)
        if problem.bias is not None:
            model.output.bias.copy_(problem.bias)
    return parallelize_module(model, mesh, OUTPUT_PLAN)


def _backward(loss: Tensor, upstream: Tensor) -> None:
    (loss * upstream).sum().backward() if loss.ndim else (loss * 3).backward()


def _expected(problem: Problem, **settings) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one process with the whole vocabulary, summed in float64."""
    inputs = {"hidden": problem.hidden, "weight": problem.weight}
    if problem.bias is not None:
        inputs["bias"] = problem.bias
    inputs = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    loss = linear_cross_entropy(**inputs, targets=problem.targets, impl="reference", **settings)
    _backward(loss, problem.upstream)
    return loss.detach(), {name: tensor.grad for name, tensor in inputs.items()}


def _assert_close(actual: Tensor, expected: Tensor, case: str, tolerance: float = 2e-6) -> None:
    """By default within a few roundings of float32."""
    if isinstance(actual, DTensor):
        actual = actual.full_tensor()
    error = relative_error(actual, expected)
    assert error < tolerance, f"{case}: relative error {error}"


def _check_equals_one_process(mesh, impl: str, bias: bool, softcap: float | None, reduction: str) -> None:
    problem = _problem(bias)
    expected, gradients = _expected(problem, softcap=softcap, reduction=reduction)
    loss, model = _bound(mesh, problem, impl=impl, softcap=softcap, reduction=reduction)
    hidden = problem.hidden.clone().requires_grad_()
    actual = loss(hidden, problem.targets)
    _backward(actual, problem.upstream)
    case = f"{impl}, bias {bias}, softcap {softcap}, {reduction}"
    _assert_close(actual, expected, f"{case}, loss")
    _assert_close(hidden.grad, gradients["hidden"], f"{case}, hidden")
    weight = model.output.weight
    assert isinstance(weight.grad, DTensor)
    assert weight.grad.placements == weight.placements == (Shard(0),)
    assert weight.grad.to_local().shape == weight.to_local().shape
    _assert_close(weight.grad, gradients["weight"], f"{case}, weight")
    if bias:
        _assert_close(model.output.bias.grad, gradients["bias"], f"{case}, bias")


def _check_gradient_through_log_sum_exp(mesh) -> None:
    """The z-loss is a function of nothing else."""
    problem = _problem()
    single = {name: getattr(problem, name).double().requires_grad_() for name in ("hidden", "weight")}
    nll, lse = linear_cross_entropy(
        **single, targets=problem.targets, impl="reference", reduction="none", return_lse=True
    )
    _backward(nll + 0.1 * lse.square(), problem.upstream)
    loss, model = _bound(mesh, problem, impl="chunked", reduction="none", z_loss=0.1)
    hidden = problem.hidden.clone().requires_grad_()
    _backward(loss(hidden, problem.targets), problem.upstream)
    _assert_close(hidden.grad, single["hidden"].grad, "z-loss, hidden")
    _assert_close(model.output.weight.grad, single["weight"].grad, "z-loss, weight")


def _check_label_smoothing(mesh, impls: tuple[str, ...]) -> None:
    """Over the whole vocabulary, whose shards are of unlike sizes."""
    for impl, softcap in itertools.product(impls, (None, 5.0)):
        problem = _problem(bias=True)
        settings = {"label_smoothing": 0.2, "reduction": "none", "softcap": softcap}
        expected, gradients = _expected(problem, **settings)
        loss, model = _bound(mesh, problem, impl=impl, **settings)
        hidden = problem.hidden.clone().requires_grad_()
        actual = loss(hidden, problem.targets)
        _backward(actual, problem.upstream)
        _assert_close(actual, expected, f"{impl}, label smoothing, loss")
        _assert_close(hidden.grad, gradients["hidden"], f"{impl}, label smoothing, hidden")
        _assert_close(model.output.weight.grad, gradients["weight"], f"{impl}, label smoothing, weight")
        _assert_close(model.output.bias.grad, gradients["bias"], f"{impl}, label smoothing, bias")


def _check_common_logit(mesh, impls: tuple[str, ...]) -> None:
    """No digit goes to what all logits share, but for the rounding of the log-sum-exp that a z-loss squares."""
    added = ("bias", {}), ("logits", {"label_smoothing": 0.2}), ("logits", {"z_loss": 1e-6})
    for impl, (where, setting), common in itertools.product(impls, added, COMMON):
        if impl.startswith("cce") and common < 2**20:  # seconds in the interpreter
            continue
        problem = _problem_with_a_common_logit(where, common)
        settings = {"reduction": "none", **setting}
        case = f"{impl}, {common} in {where}, {setting}"
        expected, gradients = _expected(problem, **settings)
        loss, model = _bound(mesh, problem, impl=impl, **settings)
        hidden = problem.hidden.clone().requires_grad_()
        actual = loss(hidden, problem.targets)
        _backward(actual, problem.upstream)
        _assert_close(actual, expected, f"{case}, loss")
        # The common column's is a sum that cancels.
        _assert_close(hidden.grad[..., 1:], gradients["hidden"][..., 1:], f"{case}, hidden")
        _assert_close(model.output.weight.grad, gradients["weight"], f"{case}, weight")
        _assert_close(model.output.bias.grad, gradients["bias"], f"{case}, bias")


def _check_frozen_head(mesh) -> None:
    """`cce_exact` then measures from a logit that is not the largest: the target's, or what stands in for it here."""
    problems = {
        "plain": (_problem(bias=True), 2e-6),
        "common logit": (_problem_with_a_common_logit("logits", COMMON[-1]), 2e-6),
        "unlikely targets": (_problem(bias=True, scale=10.0), 2e-5),
        "confident": (_confident_problem(), 2e-5),
        "rank masked by -inf": (_masked_problem(mesh, -torch.inf, False), 2e-6),
        "rank masked by the least number": (_masked_problem(mesh, torch.finfo(torch.float32).min, False), 2e-6),
    }
    for name, setting in itertools.product(problems, ({}, {"label_smoothing": 0.2}, {"z_loss": 1e-6})):
        if "masked" in name and "label_smoothing" in setting:  # all losses are infinite, or as large as the bias
            continue
        problem, tolerance = problems[name]
        settings = {"reduction": "none", **setting}
        expected, gradients = _expected(problem, **settings)
        loss, _ = _bound(mesh, problem, frozen=True, impl="cce_exact", **settings)
        hidden = problem.hidden.clone().requires_grad_()
        actual = loss(hidden, problem.targets)
        _backward(actual, problem.upstream)
        _assert_close(actual, expected, f"frozen head, {name}, {setting}, loss", tolerance)
        # The common column's is a sum that cancels.
        by_hidden = (x[..., name == "common logit" :] for x in (hidden.grad, gradients["hidden"]))
        _assert_close(*by_hidden, f"frozen head, {name}, {setting}, hidden", tolerance)


def _problem_with_a_common_logit(where: str, common: float) -> Problem:
    """No logit is rounded: differences are multiples of an eighth."""
    problem = _problem(bias=True)
    problem.hidden = (2 * problem.hidden.clamp(-2, 2)).round() / 2
    problem.hidden[..., 8:] = 0
    problem.weight = (4 * problem.weight.clamp(-1, 1)).round() / 4
    problem.bias.zero_()
    if where == "bias":
        problem.bias += common
    else:
        problem.hidden[..., 0], problem.weight[:, 0] = 1, common
    return problem


def _check_confident_tokens(mesh) -> None:
    """1 - p near 1e-5: p - 1 is what the others have, those of the other ranks too. The kernels' waits for issue 16."""
    problem = _confident_problem()
    expected, gradients = _expected(problem, reduction="none")
    assert 1e-6 < expected[expected > 0].median() < 1e-4
    for impl in ("reference", "chunked"):
        loss, model = _bound(mesh, problem, impl=impl, reduction="none")
        hidden = problem.hidden.clone().requires_grad_()
        actual = loss(hidden, problem.targets)
        _backward(actual, problem.upstream)
        _assert_close(actual, expected, f"{impl}, confident, loss", 2e-5)
        _assert_close(hidden.grad, gradients["hidden"], f"{impl}, confident, hidden", 2e-5)
        _assert_close(model.output.weight.grad, gradients["weight"], f"{impl}, confident, weight", 2e-5)


def _confident_problem() -> Problem:
    problem = _problem()
    problem.weight = nn.functional.normalize(problem.weight, dim=-1)
    problem.hidden = 20 * problem.weight[problem.targets.clamp(min=0)]
    return problem


def _check_ignore_index_that_is_a_row(mesh) -> None:
    """Every rank's rows start at 0, which must not be taken for ignore_index there."""
    problem = _problem()
    problem.targets[problem.targets == -100] = 0
    expected, gradients = _expected(problem, reduction="none", ignore_index=0)
    loss, model = _bound(mesh, problem, impl="chunked", reduction="none", ignore_index=0)
    actual = loss(problem.hidden, problem.targets)
    _backward(actual, problem.upstream)
    _assert_close(actual, expected, "ignore_index 0, loss")
    _assert_close(model.output.weight.grad, gradients["weight"], "ignore_index 0, weight")


def _check_sequence_parallel_hidden(mesh) -> None:
    """As torchtune's main branch has it: ranks hold parts of the sequence, here parts of unequal length."""
    problem = _problem()
    expected, gradients = _expected(problem)
    loss, model = _bound(mesh, problem, impl="chunked")
    for placement in (Shard(1), Replicate()):
        hidden = distribute_tensor(problem.hidden, mesh, [placement]).requires_grad_()
        model.output.weight.grad = None
        actual = loss(hidden, problem.targets)
        actual.mul(3).backward()
        _assert_close(actual, expected, f"{placement}, loss")
        assert hidden.grad.placements == (placement,)
        _assert_close(hidden.grad, gradients["hidden"], f"{placement}, hidden")
        _assert_close(model.output.weight.grad, gradients["weight"], f"{placement}, weight")


def _check_far_apart(mesh) -> None:
    """Where the other ranks' rows have no share in the sum, the loss is what the target's rank says, to the bit."""
    problem = _problem(scale=20.0)
    parts = problem.weight.chunk(mesh.size())
    lse = torch.stack([(problem.hidden @ part.T).logsumexp(-1) for part in parts])
    largest, runner_up = lse.topk(2, 0).values
    ahead = lse.argmax(0)
    targets = torch.full_like(problem.targets, -100)
    for rank, part in enumerate(parts):
        # Second best there: neither certain nor lost.
        second = (problem.hidden @ part.T).topk(2, -1).indices[..., 1]
        targets = torch.where((ahead == rank) & (largest - runner_up > 20), second + rank * len(parts[0]), targets)
    assert (targets != -100).any()
    loss, _ = _bound(mesh, problem, impl="reference", reduction="none")
    actual = loss(problem.hidden, targets)
    own = mesh.get_local_rank()
    mine = torch.where(ahead == own, targets - own * len(parts[0]), -100).clamp(min=-100)
    expected = linear_cross_entropy(problem.hidden, parts[own], mine, impl="reference", reduction="none")
    assert torch.equal(actual[mine >= 0], expected[mine >= 0])


def _check_no_labels(mesh) -> None:
    """Zero, with gradients that are zeros and not missing; the collectives run all the same."""
    problem = _problem()
    loss, model = _bound(mesh, problem, impl="chunked")
    hidden = problem.hidden.clone().requires_grad_()
    actual = loss(hidden, torch.full_like(problem.targets, -100))
    actual.backward()
    assert actual == 0
    assert not hidden.grad.any()
    assert not model.output.weight.grad.to_local().any()


def _check_token_statistics(mesh) -> None:
    """Right predictions in the first and the last rank's rows, equal logits in both; then none of the last can be."""
    last = -(-RAGGED // mesh.size()) * (mesh.size() - 1)
    for masked in (False, True):
        problem = _problem(bias=True)
        for tensor in (problem.weight, problem.bias):
            tensor[1] = tensor[last] = tensor[0]
        targets = torch.tensor([0, 1, last, last + 3])
        problem.targets[0, :4] = targets
        problem.hidden[0, :4] = 3 * problem.weight[targets]
        if masked:
            problem.bias[last:] = -torch.inf
        softcap = None if masked else 30.0  # a capped logit is finite
        loss, _ = _bound(mesh, problem, impl="chunked", softcap=softcap)
        found = []
        loss.after_batch.append(lambda batch, found=found: found.append(batch.statistics()))
        loss(problem.hidden, problem.targets)
        hidden, weight, bias = (x.double() for x in (problem.hidden, problem.weight, problem.bias))
        expected = linear_token_statistics(hidden, weight, problem.targets, bias, softcap=softcap)
        ((entropy, correct),) = found
        _assert_close(entropy, expected.entropy, f"entropy, masked {masked}")
        assert torch.equal(correct, expected.correct)
        # Of equal ones the first, wherever the others are.
        assert correct[0, :4].tolist() == [True, False, False, not masked]


def _check_entropy(mesh) -> None:
    """Neither what all logits share nor a certain token costs it digits, nor a rank of whose rows none can be."""
    problems = {
        f"{common} in {where}": _problem_with_a_common_logit(where, common)
        for where, common in itertools.product(("bias", "logits"), COMMON)
    }
    for mask in (-torch.inf, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min):
        problem = problems[f"bias {mask}"] = _problem(bias=True)
        problem.bias[: -(-RAGGED // mesh.size())] = mask
    problems["confident"] = _confident_problem()
    for case, problem in problems.items():
        loss, _ = _bound(mesh, problem, impl="chunked")
        found = []
        loss.after_batch.append(lambda batch, found=found: found.append(batch.statistics()))
        loss(problem.hidden, problem.targets)
        bias = 0 if problem.bias is None else problem.bias.double()
        logits = problem.hidden.double() @ problem.weight.double().T + bias
        expected = torch.special.entr(logits.softmax(-1)).sum(-1).where(problem.targets != -100, 0)
        ((entropy, correct),) = found
        _assert_close(entropy, expected, f"entropy, {case}", 2e-5 if case == "confident" else 2e-6)
        if "in" not in case:  # beside a common logit several are equal
            assert torch.equal(correct, logits.argmax(-1) == problem.targets), case


def _check_token_logprobs(mesh, impls: tuple[str, ...]) -> None:
    """Policies' log-probabilities at a temperature, and the figures beside them, are those of the whole vocabulary."""
    for impl, sequence_parallel in itertools.product(impls, (False, True)):
        if sequence_parallel and impl.startswith("cce"):  # seconds in the interpreter
            continue
        case = f"token log-probabilities, {impl}, sequence parallel {sequence_parallel}"
        problem = _problem(bias=True)
        inputs = [x.double().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
        logits = nn.functional.linear(*inputs) / 0.7
        every, used = logits.log_softmax(-1), problem.targets != -100
        expected = every.gather(-1, problem.targets.clamp(min=0)[..., None])[..., 0].where(used, 0)
        _backward(expected, problem.upstream)
        model, logprobs = _split(mesh, problem), LinearTokenLogprobs(impl=impl, logit_scale=1 / 0.7)
        logprobs.set_model_output(model)
        assert logprobs.rows == RAGGED
        hidden = problem.hidden.clone()
        if sequence_parallel:
            hidden = distribute_tensor(hidden, mesh, [Shard(1)])
        hidden.requires_grad_()
        found = logprobs.with_figures(hidden, problem.targets)
        assert [figure.dtype for figure in found] == [torch.float32] * 3
        _assert_close(found.logprobs, expected, f"{case}, values")
        _assert_close(found.entropy, -(every.exp() * every).sum(-1).where(used, 0), f"{case}, entropy")
        # Of all ranks' rows, whose numbers differ.
        _assert_close(found.mean_logits, logits.mean(-1), f"{case}, mean logits")
        assert not found.mean_logits.requires_grad
        _backward(found.logprobs, problem.upstream)
        gradients = hidden.grad, model.output.weight.grad, model.output.bias.grad
        for name, gradient, single in zip(("hidden", "weight", "bias"), gradients, inputs, strict=True):
            _assert_close(gradient, single.grad, f"{case}, {name}")
        with torch.no_grad():
            _assert_close(logprobs(hidden, problem.targets), expected, f"{case}, without gradients")


def _check_masked_rank(mesh, impls: tuple[str, ...]) -> None:
    """No row of one rank can be, nor the first of another: no share in any gradient, and for a target there a loss that
    is infinite, or as large as the bias is small: vocabularies are padded so too.
    """
    least = torch.finfo(torch.float32).min
    masks = (-torch.inf, False), (-torch.inf, True), (least, False), (torch.finfo(torch.bfloat16).min, True)
    added = {}, {"label_smoothing": 0.1}, {"z_loss": 0.1, "logit_scale": 0.5}
    for impl, (mask, target_there), setting in itertools.product(impls, masks, added):
        problem = _masked_problem(mesh, mask, target_there)
        valid = problem.targets != -100
        case = f"masked rank, {impl}, bias {mask}, target there {target_there}, {setting}"
        settings = {"reduction": "none", **setting}
        expected, gradients = _expected(problem, **settings)
        loss, model = _bound(mesh, problem, impl=impl, **settings)
        hidden = problem.hidden.clone().requires_grad_()
        actual = loss(hidden, problem.targets)
        _backward(actual, problem.upstream)
        lost = expected == torch.inf
        # Smoothing has each token aim at the masked rows too.
        infinite = valid.sum() if "label_smoothing" in setting else 2 * target_there
        assert lost.sum() == (infinite if mask == -torch.inf else 0), case
        assert torch.equal(actual == torch.inf, lost), case
        torch.testing.assert_close(
            actual[~lost].double(), expected[~lost], rtol=2e-6, atol=0, msg=lambda text, case=case: f"{case}: {text}"
        )
        _assert_close(hidden.grad, gradients["hidden"], f"{case}, hidden")
        _assert_close(model.output.weight.grad, gradients["weight"], f"{case}, weight")
        bias_gradient = model.output.bias.grad.full_tensor()
        can_be = problem.bias.isfinite()
        _assert_close(bias_gradient[can_be], gradients["bias"][can_be], f"{case}, bias")
        assert bias_gradient.isfinite().all(), case


def _masked_problem(mesh: DeviceMesh, mask: float, target_there: bool) -> Problem:
    """All rows of the last rank are masked, and the first of all."""
    problem = _problem(bias=True)
    last = -(-RAGGED // mesh.size()) * (mesh.size() - 1)
    problem.bias[last:] = problem.bias[0] = mask
    valid = problem.targets != -100
    problem.targets[valid] = problem.targets[valid].clamp(min=1, max=last - 1)
    if target_there:
        problem.targets[0, :2] = last
    return problem


def _check_autocast(mesh) -> None:
    problem = _problem()
    loss, _ = _bound(mesh, problem, impl="chunked")
    with torch.autocast(problem.hidden.device.type, torch.bfloat16):
        actual = loss(problem.hidden, problem.targets)
        expected = linear_cross_entropy(problem.hidden, problem.weight, problem.targets, impl="chunked")
    # Each rank's product may sum in another order, and is rounded to bfloat16.
    _assert_close(actual, expected, "autocast", tolerance=torch.finfo(torch.bfloat16).eps / 2)


def _tokens_and_targets(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    tokens, targets = torch.randint(VOCABULARY, (2, 2, 9), generator=generator, device="cpu")
    targets[0, :4] = -100
    return tokens.to(torch.get_default_device()), targets.to(torch.get_default_device())


def _check_tied(mesh) -> None:
    """torchtune 0.6.1's own tied head fails under tensor parallelism; its embedding's rows are a vocabulary's."""
    tokens, targets = _tokens_and_targets(3)
    single, loss = build_model(), LinearCrossEntropyLoss(impl="chunked")
    loss.set_model_output(single)
    expected = loss(single(tokens), targets)
    expected.backward()
    model = parallelize_module(build_model(), mesh, TIED_PLAN)
    loss.set_model_output(model)
    actual = loss(model(tokens), targets)
    actual.backward()
    _assert_close(actual, expected, "tied, loss")
    for (name, parameter), reference in zip(model.named_parameters(), single.parameters(), strict=True):
        _assert_close(parameter.grad, reference.grad, f"tied, {name}")


def _check_collectives(mesh) -> None:
    """Two all-reduces over the tokens and one of the hidden states' gradient; nothing is ever gathered."""
    problem = _problem()
    loss, _ = _bound(mesh, problem, impl="chunked")
    hidden = problem.hidden.clone().requires_grad_()
    with CommDebugMode() as forward:
        result = loss(hidden, problem.targets)
    with CommDebugMode() as backward:
        result.backward()
    assert counted(forward) == {"allreduce_": 2}
    assert counted(backward) == {"allreduce_": 1}


def counted(mode: CommDebugMode) -> dict[str, int]:
    return {str(operator).split(".")[-1]: count for operator, count in mode.get_comm_counts().items() if count}


def _check_refusals(mesh) -> None:
    problem = _problem()
    for placement in (Replicate(), Shard(1)):
        loss, model = _bound(mesh, problem)
        whole = distribute_tensor(problem.weight, mesh, [placement])
        model.output.weight = nn.Parameter(whole)
        with pytest.raises(ValueError, match=r"weight of the model's output must be split by rows .*, got "):
            loss(problem.hidden, problem.targets)
    ranks = mesh.size()
    model = build_model(tied=False)
    model.tok_embeddings = nn.Embedding(ranks, EMBED_DIM)
    model.output = nn.Linear(EMBED_DIM, ranks - 1, bias=False)
    parallelize_module(model, mesh, OUTPUT_PLAN)
    loss = LinearCrossEntropyLoss()
    loss.set_model_output(model)
    with pytest.raises(ValueError, match=f"rows for each of {ranks} tensor parallel ranks, got {ranks - 1}"):
        loss(problem.hidden, torch.zeros_like(problem.targets))
    model = build_model(tied=False)
    model.output = Int8DynActInt4WeightQATLinear(EMBED_DIM, VOCABULARY, groupsize=32)
    parallelize_module(model, mesh, OUTPUT_PLAN)
    loss.set_model_output(model)
    with pytest.raises(TypeError, match="a .*QATLinear under tensor parallelism, .* set tensor_parallel_dim: 1"):
        loss(problem.hidden, torch.zeros_like(problem.targets))
    for kind in (LoRALinear, DoRALinear):
        model = build_model(tied=False)
        model.output = kind(EMBED_DIM, VOCABULARY, rank=4, alpha=8)
        model.output.weight = nn.Parameter(distribute_tensor(model.output.weight.detach(), mesh, [Shard(0)]))
        loss.set_model_output(model)
        with pytest.raises(TypeError, match=f"a {kind.__name__} under tensor parallelism, .* apply_lora_to_output"):
            loss(problem.hidden, torch.zeros_like(problem.targets))
    loss, _ = _bound(mesh, problem)
    with pytest.raises(TypeError, match="outputs must be sharded or replicated, got a DTensor of unsummed parts"):
        loss(DTensor.from_local(problem.hidden, mesh, [Partial()]), problem.targets)
    with pytest.raises(ValueError, match=rf"in \[0, {RAGGED}\)"):
        loss(problem.hidden, problem.targets + RAGGED)


def _check_second_derivative(mesh) -> None:
    """Refused: silence would leave the other ranks' rows out of it."""
    problem = _problem()
    hidden = problem.hidden.clone().requires_grad_()
    loss, _ = _bound(mesh, problem, impl="reference")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(hidden, problem.targets), hidden, create_graph=True)


def _check_gradients_with_fsdp(mesh, tied: bool, own_group: list[str], reshard: bool) -> None:
    case = f"tied {tied}, own group {own_group}, reshard_after_forward {reshard}"
    loss = LinearCrossEntropyLoss(impl="reference")
    model = prepare_mha_for_tp(build_model(tied).to(mesh.device_type), mesh["tp"])
    plan = base_llama_tp_plan()
    if tied:
        plan = {name: style for name, style in plan.items() if name != "output"}
    parallelize_module(model, mesh["tp"], plan)
    shard_model(
        model,
        [partial(get_shard_conditions, names_to_match=own_group)],
        cpu_offload=False,
        reshard_after_forward=reshard,
        dp_mesh=mesh["dp"],
    )
    loss.set_model_output(model)
    tokens, targets = (tensor.to(mesh.device_type) for tensor in _tokens_and_targets(mesh["dp"].get_local_rank()))
    loss(model(tokens), targets).backward()
    expected = _gradients_of_one_process(tied, mesh.device_type)
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        error = relative_error(parameter.grad.full_tensor(), gradient)
        assert error < 2e-6, f"{case}, {name}: relative error {error}"


@cache
def _gradients_of_one_process(tied: bool, device: str) -> list[Tensor]:
    """However the model is sharded, what each parameter's gradient must be."""
    loss = LinearCrossEntropyLoss(impl="reference")
    single = build_model(tied).to(device)
    loss.set_model_output(single)
    for rank in range(2):
        tokens, targets = (tensor.to(device) for tensor in _tokens_and_targets(rank))
        (loss(single(tokens), targets) / 2).backward()
    return [parameter.grad for parameter in single.parameters()]
