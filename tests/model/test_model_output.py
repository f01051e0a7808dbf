"""Taking torchtune models' outputs apart: hidden states out, the projection found, and everything put back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from distributed_processes import RUN_AGAIN_AFTER_A_SIGNAL, spawn
from fsdp_checks import RANKS, check_two_processes
from tiny_models import SIZES, VOCABULARY, build_model
from torch import nn
from torch.nn.utils import prune
from torchao.dtypes.nf4tensor import to_nf4
from torchtune.generation import generate
from torchtune.models.llama2._component_builders import llama2_classifier
from torchtune.modules import TransformerDecoder
from torchtune.modules.model_fusion import DeepFusionModel, EarlyFusionModel, FusionEmbedding
from torchtune.modules.peft import LoRALinear, QATLoRALinear
from torchtune.training import get_act_offloading_ctx_manager
from torchtune_main import as_on_main

from torchtune_lce import LinearCrossEntropyLoss, LinearForwardKLLoss, skip_output_layer

EMBED_DIM = SIZES["embed_dim"]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 7))


@pytest.fixture
def targets() -> torch.Tensor:
    targets = torch.randint(VOCABULARY, (2, 7))
    targets[0, :3] = -100
    return targets


def with_output(output) -> nn.Module:
    model = build_model(tied=False)
    model.output = output
    return model


def lora_output(**settings) -> LoRALinear:
    output = LoRALinear(EMBED_DIM, VOCABULARY, rank=4, alpha=8, **settings)
    nn.init.normal_(output.lora_b.weight, std=0.1)  # starts at zero, where A has no gradient
    return output


# ---- skip_output_layer


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_skip_and_restore(tokens, tied):
    model = build_model(tied)
    logits, names, modules = model(tokens), list(model.state_dict()), list(model.named_modules())
    handle = skip_output_layer(model)
    hidden = model(tokens)
    assert hidden.shape == (2, 7, EMBED_DIM)
    assert torch.equal(model.output(hidden).float(), logits)
    assert list(model.state_dict()) == names
    assert list(model.named_modules()) == modules
    handle.restore()
    assert torch.equal(model(tokens), logits)
    handle.restore()
    assert torch.equal(model(tokens), logits)


def test_hidden_states_keep_their_dtype(tokens):
    model = build_model().bfloat16()
    skip_output_layer(model)
    assert model(tokens).dtype == torch.bfloat16


def test_skip_twice_is_skip_once(tokens):
    model = build_model()
    logits = model(tokens)
    handles = [skip_output_layer(model), skip_output_layer(model)]
    assert model(tokens).shape[-1] == EMBED_DIM
    handles[0].restore()
    assert torch.equal(model(tokens), logits)


def test_copy_of_a_skipped_model_uses_its_own_norm(tokens):
    model = build_model()
    skip_output_layer(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens), model(tokens))
    nn.init.zeros_(twin.norm.scale)
    assert not twin(tokens).any()
    assert model(tokens).any()


@pytest.mark.parametrize("on_main", [False, True], ids=["0.6.1", "main"])
def test_compiled_model_sees_every_switch(tokens, on_main):
    """Compiled before binding; bound, in and out of logits(), released and bound again, each as uncompiled."""
    torch.compiler.reset()
    model = as_on_main(build_model()) if on_main else build_model()
    logits = model(tokens)
    hidden = model.norm(hidden_before_norm(model, tokens))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    loss = LinearCrossEntropyLoss()
    torch.testing.assert_close(compiled(tokens), logits)
    for _ in range(2):
        loss.set_model_output(compiled)
        torch.testing.assert_close(compiled(tokens), hidden)
        with loss.logits():
            torch.testing.assert_close(compiled(tokens), logits)
        torch.testing.assert_close(compiled(tokens), hidden)
        loss.release()
        torch.testing.assert_close(compiled(tokens), logits)


def test_model_compiled_while_skipped(tokens):
    """And within a function that is compiled around it."""
    torch.compiler.reset()
    model = build_model()
    logits = model(tokens)
    handle = skip_output_layer(model)
    hidden = model(tokens)
    doubled = torch.compile(lambda tokens: 2 * model(tokens), backend="eager")
    for _ in range(2):
        torch.testing.assert_close(doubled(tokens), 2 * hidden)
        handle.restore()
        torch.testing.assert_close(doubled(tokens), 2 * logits)
        handle = skip_output_layer(model)


def hidden_before_norm(model, tokens):
    hidden = model.tok_embeddings(tokens)
    for layer in model.layers:
        hidden = layer(hidden)
    return hidden


def test_fusion_models(tokens, targets):
    deep = DeepFusionModel(build_model(tied=False), nn.Identity(), decoder_trainable=True)
    early = EarlyFusionModel(build_model(), {}, {}, decoder_trainable=True)
    extended = build_model(tied=False)
    extended.tok_embeddings = FusionEmbedding(VOCABULARY, 8, EMBED_DIM)  # more entries than the head has rows
    for model in (deep, early, DeepFusionModel(extended, nn.Identity())):
        logits = model(tokens)
        loss = LinearCrossEntropyLoss(impl="reference")
        loss.set_model_output(model)
        assert model(tokens).shape[-1] == EMBED_DIM
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(loss(model(tokens), targets), expected)
        loss.release()
        assert torch.equal(model(tokens), logits)


def test_a_decoder_with_its_own_switch(tokens):
    model = as_on_main(build_model())
    logits = model(tokens)
    handle = skip_output_layer(model)
    assert model.skip_output_layer is True
    assert "unembed" not in vars(model)
    assert model(tokens).shape[-1] == EMBED_DIM
    handle.restore()
    assert torch.equal(model(tokens), logits)


@pytest.mark.parametrize("bind", [skip_output_layer, LinearCrossEntropyLoss().set_model_output])
def test_foreign_model_is_refused(bind):
    with pytest.raises(
        TypeError, match=r"model must be a torchtune.modules.TransformerDecoder .* got Linear; .* weight="
    ):
        bind(nn.Linear(4, 4))


def test_own_unembed_is_refused():
    class Scaled(TransformerDecoder):
        def unembed(self, h):
            return super().unembed(h) / 2

    model = build_model()
    model.__class__ = Scaled
    with pytest.raises(TypeError, match=r"this Scaled has its own unembed; .* weight=projection.weight"):
        skip_output_layer(model)
    model = build_model()
    model.unembed = lambda h: h
    with pytest.raises(TypeError, match="has its own unembed"):
        skip_output_layer(model)


# ---- binding


def outputs():
    biased = nn.Linear(EMBED_DIM, VOCABULARY)
    disabled = lora_output(dropout=0.5)
    disabled.disabled = True
    evaluated = lora_output(dropout=0.5).eval()
    return {
        "linear": nn.Linear(EMBED_DIM, VOCABULARY, bias=False),
        "linear with bias": biased,
        "lora": lora_output(),
        "lora with bias": lora_output(use_bias=True),
        "lora disabled": disabled,
        "lora evaluated": evaluated,
        "tied": None,
    }


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", list(outputs()))
def test_loss_and_gradients_equal_those_of_the_output_itself(kind, frozen, targets):
    """float64, so that only exactly the same function passes; the expectation calls the output module."""
    torch.manual_seed(1)
    model = (build_model() if kind == "tied" else with_output(outputs()[kind])).double()
    owner = model.tok_embeddings if kind == "tied" else model.output
    owner.weight.requires_grad_(not frozen)
    hidden = torch.randn(2, 7, EMBED_DIM, dtype=torch.float64, requires_grad=True)
    inputs = {"hidden": hidden} | {name: p for name, p in owner.named_parameters() if p.requires_grad}

    expected = F.cross_entropy(model.output(hidden).flatten(0, 1), targets.flatten())
    expected_gradients = torch.autograd.grad(expected, inputs.values(), allow_unused=True)
    loss = LinearCrossEntropyLoss(impl="reference")
    loss.set_model_output(model)
    actual = loss(hidden, targets)
    gradients = torch.autograd.grad(actual, inputs.values(), allow_unused=True)

    torch.testing.assert_close(actual, expected)
    for name, gradient, expected in zip(inputs, gradients, expected_gradients, strict=True):
        assert (gradient is None) == (expected is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, expected, msg=lambda text, name=name: f"{name}: {text}")
    if kind.startswith("lora") and kind != "lora disabled":
        assert gradients[list(inputs).index("lora_a.weight")].any()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weight_is_read_at_every_call(tied, targets):
    """FSDP2 puts another Parameter in its place, and so may anyone."""
    model = build_model(tied)
    loss = LinearCrossEntropyLoss(impl="reference")
    loss.set_model_output(model)
    hidden = torch.randn(2, 7, EMBED_DIM)
    owner = model.tok_embeddings if tied else model.output
    before = loss(hidden, targets)
    owner.weight = nn.Parameter(torch.zeros_like(owner.weight))
    assert loss(hidden, targets) != before
    torch.testing.assert_close(loss(hidden, targets), torch.tensor(float(VOCABULARY)).log())


def quantised_linear():
    linear = nn.Linear(EMBED_DIM, VOCABULARY, bias=False)
    linear.weight = nn.Parameter(to_nf4(linear.weight.detach(), 64, 256), requires_grad=False)
    return linear


REFUSED_OUTPUTS = {
    "nf4": (quantised_linear, TypeError, "must be a plain tensor, got NF4Tensor: leave the output projection unquant"),
    "qat": (
        lambda: QATLoRALinear(EMBED_DIM, VOCABULARY, 4, 8),
        TypeError,
        "QATLoRALinear, .* apply_lora_to_output: False",
    ),
    "callable": (lambda: torch.nn.Sequential(), TypeError, "must be a torch.nn.Linear, .* got Sequential; .* weight="),
    "classifier": (
        lambda: nn.Linear(EMBED_DIM, 2),
        ValueError,
        "has 2 rows for 512 token embeddings: that is a classifier's head",
    ),
}


@pytest.mark.parametrize("kind", REFUSED_OUTPUTS)
def test_output_that_is_no_single_matrix_is_refused(kind, tokens):
    """And the model is left as it was."""
    build, error, message = REFUSED_OUTPUTS[kind]
    model = with_output(build())
    attributes = set(vars(model))
    with pytest.raises(error, match=message):
        LinearCrossEntropyLoss().set_model_output(model)
    assert set(vars(model)) == attributes


def test_torchtunes_classifier_is_refused():
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_dim"}
    with pytest.raises(ValueError, match="classifier's head, .* torch.nn.CrossEntropyLoss"):
        LinearCrossEntropyLoss().set_model_output(llama2_classifier(num_classes=3, **sizes))


def test_decoder_apart_from_its_tied_embedding_is_refused():
    model = EarlyFusionModel(build_model(), {}, {})
    with pytest.raises(ValueError, match="pass the whole model, not its decoder"):
        LinearCrossEntropyLoss().set_model_output(model.decoder)


# ---- release


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_generation_after_release_equals_stock(tied, tokens, targets):
    """The model after a step of training with the loss, against one that was never bound and has the same weights."""
    model = build_model(tied)
    attributes = set(vars(model))
    loss = LinearCrossEntropyLoss()
    loss.set_model_output(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss(model(tokens), targets).backward()
    optimizer.step()
    loss.release()
    assert set(vars(model)) == attributes

    stock = build_model(tied, seed=5)
    stock.load_state_dict(model.state_dict())
    results = [
        generate(each, tokens, max_generated_tokens=6, top_k=5, rng=torch.Generator().manual_seed(3))
        for each in (model, stock)
    ]
    for released, expected in zip(*results, strict=True):
        assert torch.equal(released, expected)
    assert results[0][0].shape == (2, 13)


def test_bound_again_and_by_two_losses(tokens, targets):
    model = build_model()
    first, second = LinearCrossEntropyLoss(), LinearCrossEntropyLoss()
    for loss in (first, first, second):
        loss.set_model_output(model)
    assert torch.equal(first(model(tokens), targets), second(model(tokens), targets))
    second.release()
    second.release()
    assert model(tokens).shape[-1] == VOCABULARY
    first.release()
    assert not [name for name in vars(model) if "cross_entropy" in name or name == "unembed"]


def test_failed_binding_keeps_the_earlier_one(tokens, targets):
    model = build_model()
    loss = LinearCrossEntropyLoss()
    loss.set_model_output(model)
    with pytest.raises(TypeError):
        loss.set_model_output(nn.Linear(2, 2))
    assert loss(model(tokens), targets).isfinite()


# ---- logits() and generation


def test_logits_within(tokens, targets):
    model = build_model()
    logits, attributes = model(tokens), set(vars(model))
    loss, second = LinearCrossEntropyLoss(), LinearCrossEntropyLoss()
    with loss.logits():
        assert torch.equal(model(tokens), logits)
    for each in (loss, second):
        each.set_model_output(model)
    expected = loss(model(tokens), targets)
    with loss.logits(), second.logits(), loss.logits():
        assert torch.equal(model(tokens), logits)
    with loss.logits():
        with second.logits():
            pass
        assert torch.equal(model(tokens), logits)
        with pytest.raises(
            ValueError, match=r"those are logits: leave `with loss.logits\(\)`, or call set_model_output"
        ):
            loss(logits, targets)
    assert torch.equal(loss(model(tokens), targets), expected)
    with pytest.raises(KeyError), loss.logits():
        raise KeyError
    assert torch.equal(loss(model(tokens), targets), expected)
    with loss.logits():
        loss.release()
    assert torch.equal(model(tokens), logits)
    second.release()
    assert set(vars(model)) == attributes


def test_distillation_gives_logits_of_both_models(tokens):
    models = build_model(), build_model(seed=3)
    logits = [model(tokens) for model in models]
    loss = LinearForwardKLLoss()
    loss.set_model_output(models[0])
    loss.set_teacher_output(models[1])
    with loss.logits():
        assert all(torch.equal(model(tokens), each) for model, each in zip(models, logits, strict=True))
    assert all(model(tokens).shape[-1] == EMBED_DIM for model in models)


def generated(model, tokens, **settings):
    torch.manual_seed(3)
    return generate(model, tokens, max_generated_tokens=3, top_k=5, **settings)


BOUND_MODELS = {
    "0.6.1": lambda: build_model(),
    "main": lambda: as_on_main(build_model()),
    "compiled": lambda: torch.compile(build_model(), backend="eager"),
    "fusion": lambda: DeepFusionModel(build_model(tied=False), nn.Identity()),
    "cached": lambda: with_caches(build_model()),
}


def with_caches(model):
    model.setup_caches(batch_size=2, dtype=torch.float32, decoder_max_seq_len=16)
    return model


@pytest.mark.parametrize("kind", BOUND_MODELS)
def test_generation_while_bound(kind, tokens):
    """Refused in a sentence, and stock's within logits()."""
    model = BOUND_MODELS[kind]()
    expected = generated(model, tokens)
    if kind == "cached":
        model.reset_caches()
    loss = LinearCrossEntropyLoss()
    loss.set_model_output(model)
    for settings in ({}, {"custom_generate_next_token": lambda *args, **kwargs: pytest.fail("sampled hidden states")}):
        with pytest.raises(RuntimeError, match=r"returns hidden states, .* generate within `with loss.logits\(\):`"):
            generated(model, tokens, **settings)
    with loss.logits():
        actual = generated(model, tokens)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


# ---- what is done to the head


def with_forward_hook(model):
    model.output.register_forward_hook(lambda module, inputs, output: output / 2)


def with_pre_hook(model):
    model.output.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))


def with_backward_hook(model):
    model.output.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] / 2,))


def with_own_forward(model):
    model.output.forward = lambda hidden: hidden @ model.output.weight.T / 2


CHANGED_HEADS = {
    "forward hook": (with_forward_hook, "model.output has a hook .* remove it"),
    "pre-hook": (with_pre_hook, "model.output has a hook .* remove it"),
    "backward hook": (with_backward_hook, "model.output has a hook .* remove it"),
    "prune": (
        lambda model: prune.l1_unstructured(model.output, "weight", amount=0.5),
        "model.output has a hook .*L1Unstructured of torch.nn.utils.prune.* remove it",
    ),
    "weight_norm": (
        lambda model: torch.nn.utils.weight_norm(model.output),
        "model.output has a hook .*WeightNorm of torch.nn.utils.weight_norm.* remove it",
    ),
    "spectral_norm": (
        lambda model: torch.nn.utils.spectral_norm(model.output),
        "model.output has a hook .*SpectralNorm",
    ),
    "own forward": (with_own_forward, "model.output has its own forward"),
}
CHANGED_LATER = {
    "replaced": (
        lambda model: setattr(model, "output", nn.Linear(EMBED_DIM, VOCABULARY)),
        "model.output is another module than set_model_output found: call set_model_output again",
    ),
    "adapter": (
        lambda model: setattr(model, "output", lora_output()),
        "model.output is another module than set_model_output found: call set_model_output again",
    ),
    "own unembed": (lambda model: setattr(model, "unembed", lambda hidden: hidden / 2), "has its own unembed"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGED_HEADS)
def test_changed_head_is_refused(change):
    apply, message = CHANGED_HEADS[change]
    model = build_model(tied=False)
    apply(model)
    attributes = set(vars(model))
    with pytest.raises(TypeError, match=message):
        LinearCrossEntropyLoss().set_model_output(model)
    assert set(vars(model)) == attributes


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGED_HEADS | CHANGED_LATER)
def test_head_changed_after_binding_is_refused(change, targets):
    apply, message = (CHANGED_HEADS | CHANGED_LATER)[change]
    model = build_model(tied=False)
    loss = LinearCrossEntropyLoss(impl="reference")
    loss.set_model_output(model)
    hidden = torch.randn(2, 7, EMBED_DIM)
    assert loss(hidden, targets).isfinite()
    apply(model)
    with pytest.raises(TypeError, match=message):
        loss(hidden, targets)


def test_changed_tied_or_adapted_head_is_refused(targets):
    """Where the hook is not on model.output itself, or the weight is another module's."""
    tied, adapted, moved = build_model(), with_output(lora_output()), build_model()
    hidden = torch.randn(2, 7, EMBED_DIM)
    losses = []
    for model in (tied, adapted, moved):
        losses.append(LinearCrossEntropyLoss(impl="reference"))
        losses[-1].set_model_output(model)
    tied.output.linear.register_forward_hook(lambda module, inputs, output: output / 2)
    adapted.output.lora_b.register_forward_hook(lambda module, inputs, output: output / 2)
    moved.output.tied_module = nn.Embedding(VOCABULARY, EMBED_DIM)
    for loss, message in zip(
        losses, ("output.linear has a hook", "output.lora_b has a hook", "another module"), strict=True
    ):
        with pytest.raises(TypeError, match=message):
            loss(hidden, targets)


def reparametrised(model):
    torch.nn.utils.parametrizations.weight_norm(model.output)
    nn.init.uniform_(model.output.parametrizations.weight.original0, 0.5, 2)


def half(module, inputs, output):
    return output / 2


HONOURED = {
    "parametrised": reparametrised,
    "pruned for good": lambda model: prune.remove(prune.l1_unstructured(model.output, "weight", amount=0.5), "weight"),
    "compiled": lambda model: model.output.compile(backend="eager"),
    "hook on the norm": lambda model: model.norm.register_forward_hook(half),
    "activation offloading": lambda model: get_act_offloading_ctx_manager(model, True),
}


@pytest.mark.parametrize("later", [False, True], ids=["before binding", "after"])
@pytest.mark.parametrize(
    "change",
    # torchtune makes its streams as it puts its hooks on the head.
    [pytest.param(name, marks=pytest.mark.gpu if name == "activation offloading" else ()) for name in HONOURED],
)
def test_change_that_is_honoured(change, later, tokens, targets):
    """Loss and gradients are the model's own, twice."""
    model = build_model(tied=False).double()
    loss = LinearCrossEntropyLoss(impl="reference")
    if later:
        loss.set_model_output(model)
    HONOURED[change](model)
    if not later:
        loss.set_model_output(model)
    with loss.logits():
        expected = F.cross_entropy(model(tokens).flatten(0, 1).double(), targets.flatten())
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    for _ in range(2):
        actual = loss(model(tokens), targets)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
        for one, other in zip(torch.autograd.grad(actual, list(model.parameters())), expected_gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


# ---- FSDP2


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch's FSDP2 does not run on a CPU")
@RUN_AGAIN_AFTER_A_SIGNAL
def test_fsdp2_equals_one_process():
    """All cases in one spawn: starting two processes costs more than everything that they do."""
    spawn(check_two_processes, RANKS)
