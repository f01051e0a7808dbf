"""torchtune_lce.transformers.patch: loss and gradients of the class itself, and when it is left alone."""

import copy
import functools
import inspect
import logging
import subprocess
import sys
from types import MethodType

import pytest
import torch

pytest.importorskip("transformers")

from tiny_transformers import VOCABULARY, assert_same, batch, build, step

from torchtune_lce.transformers import patch, unpatch
from torchtune_lce.transformers.deferred_logits import DeferredLogits

ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
FAMILIES = {
    "Llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "capped": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 0.05}),
    "divided": ("Granite", {"logits_scaling": 3.0}),
    "multiplied": ("Cohere", {"logit_scale": 0.25}),
    "routed": ("Mixtral", {"num_local_experts": 4, **ROUTED}),
    "biased": ("Phi", {}),
}


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "torchtune_lce.transformers")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "torchtune_lce.transformers"]


@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": torch.tensor(5)}], ids=["mean", "sum by a number"])
@pytest.mark.parametrize("case", FAMILIES)
def test_equals_its_own(case, more, said):
    family, settings = FAMILIES[case]
    model = build(family, **settings)
    own, expected = step(model, **more)
    assert patch(model) is model
    result, got = step(model, **more)
    assert type(result) is type(own)
    assert result.logits is None
    assert_same(got, expected)
    if case == "routed":
        torch.testing.assert_close(result.aux_loss, own.aux_loss)
    assert not said()


def test_scale_and_cap_matter():
    """The cases above could not fail without them."""
    plain = step(build("Gemma2", head_dim=8, final_logit_softcapping=None))[1]["loss"]
    assert (step(build("Gemma2", head_dim=8, final_logit_softcapping=0.05))[1]["loss"] - plain).abs() > 1e-3


def test_labels_already_shifted():
    model, labels = build("Llama"), batch()["labels"]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    expected = step(model, shift_labels=shifted)[1]
    patch(model)
    result, got = step(model, shift_labels=shifted)
    assert result.logits is None
    assert_same(got, expected)


def test_all_masked_is_a_zero_with_gradients():
    model = patch(build("Llama"))
    result, got = step(model, labels=torch.full((2, 12), -100))
    assert result.loss == 0
    assert all((value == 0).all() for value in got.values())


def test_bfloat16_autocast():
    model = build("Llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model)[1]["loss"]
        patch(model)
        result, got = step(model)
    assert result.logits is None
    torch.testing.assert_close(got["loss"], expected, rtol=5e-3, atol=0)


def test_gradient_checkpointing():
    model = build("Llama")
    expected = step(model)[1]
    model.gradient_checkpointing_enable()
    patch(model)
    assert_same(step(model)[1], expected)


def test_resized_and_reloaded(tmp_path):
    model = patch(build("Llama"))
    model.resize_token_embeddings(80)
    assert model.get_output_embeddings().weight.shape[0] == 80
    result, got = step(model)
    assert result.logits is None
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).train()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert_same(got, step(again)[1])


def test_copy_uses_its_own_weights():
    model = patch(build("Llama"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    assert step(other)[1]["loss"] != step(model)[1]["loss"]
    unpatch(other)
    assert not other.model._forward_pre_hooks
    assert step(other)[0].logits is not None
    assert step(model)[0].logits is None


def test_evaluation_and_generation_have_logits():
    model = build("Llama").eval()
    tokens = batch()["input_ids"]
    expected, text = model(**batch()), model.generate(tokens, max_new_tokens=3, do_sample=False)
    patch(model)
    assert torch.equal(model(**batch()).logits, expected.logits)
    assert torch.equal(model.generate(tokens, max_new_tokens=3, do_sample=False), text)
    assert model.train()(input_ids=tokens).logits.shape == (2, 12, VOCABULARY)


def test_unpatch_restores():
    model = build("Llama")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    patch(model, impl="reference")
    step(model)
    assert unpatch(patch(model)) is model
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not model.model._forward_pre_hooks
    assert step(model)[0].logits is not None


def replaced_loss(logits, labels, **kwargs):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Doubled(torch.nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


class Around(torch.nn.Module):
    """A head that computes its product in its own way, as ``call`` of the linear layer and hidden states does."""

    def __init__(self, linear, call):
        super().__init__()
        self.linear, self.call = linear, call

    @property
    def weight(self):
        return self.linear.weight

    def forward(self, hidden):
        return self.call(self.linear, hidden)


def in_float32(linear, hidden):
    with torch.autocast("cpu", enabled=False):
        return linear(hidden.float())


def without_gradients(linear, hidden):
    with torch.no_grad():
        return linear(hidden)


def sliced(linear, hidden):
    return linear(hidden)[..., :]


def in_two_other_ways(linear, hidden):
    logits = linear(hidden)
    return logits.T.T + 0 * logits.pow(2)


def own_head(model):
    model.lm_head = Doubled(32, VOCABULARY, bias=False)


def head_of_one_module(model):
    model.lm_head.forward = lambda hidden: torch.nn.functional.linear(hidden, 2 * model.lm_head.weight)


def head_passed_by(model):
    model.get_output_embeddings = lambda: torch.nn.Linear(32, VOCABULARY)


FALLBACKS = {
    "another class of head": (own_head, {}, "a Doubled, whose product is not torch.nn.Linear's"),
    "a replaced head": (head_of_one_module, {}, "the forward of its output projection has been replaced"),
    "logits in another way": (
        lambda m: setattr(m, "lm_head", Around(m.lm_head, sliced)),
        {},
        "uses the logits themselves (getitem)",
    ),
    "and another": (
        lambda m: setattr(m, "lm_head", Around(m.lm_head, in_two_other_ways)),
        {},
        "uses the logits themselves (T)",
    ),
    "a head that is not called": (head_passed_by, {}, "makes the logits without calling its output projection"),
    "a replaced loss": (lambda m: setattr(m, "loss_function", replaced_loss), {}, "is replaced_loss, not"),
    "a tuple": (lambda m: None, {"return_dict": False}, "return_dict is False"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_falls_back_and_says_so_once(case, said):
    change, more, sentence = FALLBACKS[case]
    model = build("Llama")
    change(model)
    expected = model(**batch(), **more)
    patch(model)
    for _ in range(2):
        got = model(**batch(), **more)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    (line,) = said()
    assert line.startswith("LlamaForCausalLM computes its loss from whole logits, as before: ")
    assert sentence in line


def test_a_head_that_computes_in_float32_under_autocast(said):
    """As one does whose logits shall not be rounded: the product is put off, and its context with it."""
    results = []
    for prepare in (lambda model: model, patch):
        model = build("Llama")
        with torch.no_grad():
            model.lm_head.weight.mul_(40)
        model.lm_head = Around(model.lm_head, in_float32)
        prepare(model)
        with torch.autocast("cpu", torch.bfloat16):
            result = model(**batch())
        result.loss.backward()
        results.append((result, model.lm_head.weight.grad))
    (own, expected), (result, got) = results
    assert result.logits is None
    assert own.logits.dtype == torch.float32
    torch.testing.assert_close(result.loss, own.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert not said()


def test_compiled():
    model = build("Llama")
    expected = step(model)[1]
    patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    result = compiled(**batch())
    model.zero_grad()
    result.loss.backward()
    assert result.logits is None
    assert_same({"loss": result.loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}, expected)


def test_compiled_with_a_head_in_float32_under_autocast():
    model = build("Llama")
    model.lm_head = Around(model.lm_head, in_float32)
    results = []
    for prepare in (
        lambda model: model,
        lambda model: torch.compile(patch(model), backend="aot_eager", fullgraph=True),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            result = prepare(model)(**batch())
        model.zero_grad()
        result.loss.backward()
        results.append((result.loss.detach(), model.lm_head.weight.grad))
    assert result.logits is None
    for got, expected in zip(*reversed(results), strict=True):
        # What reaches the head has been rounded in bfloat16, in another order.
        assert (got - expected).norm() < 2e-3 * expected.norm()


def test_an_adapter_in_another_context_than_its_head(said):
    low, up = torch.nn.Linear(32, 4, bias=False), torch.nn.Linear(4, VOCABULARY, bias=False)

    def with_adapter(linear, hidden):
        with torch.autocast("cpu", enabled=False):
            of_adapter = up(low(hidden.float()))
        return linear(hidden) + of_adapter

    model = build("Llama")
    model.lm_head = Around(model.lm_head, with_adapter)
    model.lm_head.up = up
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model)[1]
        patch(model)
        result, got = step(model)
    assert result.logits is not None
    assert_same(got, expected)
    assert "under another autocast" in said()[0]


def test_logits_that_somebody_looks_at_without_gradients():
    """They have theirs all the same, as the class's own would."""

    def looked_at(linear, hidden):
        logits = linear(hidden)
        with torch.no_grad():
            logits.softmax(-1)
        return logits

    model = build("Llama")
    model.lm_head = Around(model.lm_head, looked_at)
    expected = step(model)[1]
    assert_same(step(patch(model))[1], expected)


def test_a_head_without_gradients():
    model = build("Llama")
    model.lm_head = Around(model.lm_head, without_gradients)
    assert not model(**batch()).loss.requires_grad
    result = patch(model)(**batch())
    assert result.logits is None
    assert not result.loss.requires_grad


def test_inference_mode():
    """Of a model in training mode, as somebody evaluates it who forgets eval()."""
    model = build("Llama")
    with torch.inference_mode():
        expected = model(**batch()).loss
        result = patch(model)(**batch())
    assert result.logits is None
    torch.testing.assert_close(result.loss, expected)


def test_hidden_states_changed_in_place_after_the_head():
    """The stock loss is that of what they were, and its backward refuses."""

    def then_zero(linear, hidden):
        logits = linear(hidden)
        with torch.no_grad():
            hidden.zero_()
        return logits

    model = build("Llama")
    model.lm_head = Around(model.lm_head, then_zero)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(model)
    with pytest.raises(RuntimeError, match="hidden states .* have been changed in place since"):
        step(patch(model))


def test_a_parametrised_head_is_made_once_a_step():
    made = []

    class Halved(torch.nn.Module):
        def forward(self, weight):
            made.append(weight)
            return weight / 2

    model = build("Llama")
    torch.nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Halved())
    expected = step(model)[1]
    patch(model)
    made.clear()
    result, got = step(model)
    assert result.logits is None
    assert len(made) == 1
    assert_same(got, expected)


def test_a_model_without_a_head(said):
    """Of the backbone alone, given by mistake, no forward would say that it has no loss."""
    patch(build("Llama").model)
    assert "it has no output projection (get_output_embeddings gives None)" in said()[0]


def test_it_is_not_pickled_as_a_whole(tmp_path):
    """Into a file that nobody could load."""
    model = patch(build("Llama"))
    with pytest.raises(TypeError, match="patched LlamaForCausalLM cannot be pickled.*unpatch"):
        torch.save(model, tmp_path / "model.pt")
    torch.save(unpatch(model), tmp_path / "model.pt")
    assert_same(step(torch.load(tmp_path / "model.pt", weights_only=False))[1], step(model)[1])


def test_what_reads_the_forward_finds_the_class_s():
    """Trainer its parameters; and who takes wrappers away one by one stops at the patched one, not behind it."""
    model = build("Llama")
    expected = inspect.signature(model.forward)
    patch(model)
    assert inspect.signature(model.forward) == expected
    assert inspect.unwrap(model.forward) == model.forward


def test_loss_replaced_after_the_patch(said):
    model = patch(build("Llama"))
    model.loss_function = replaced_loss
    assert step(model)[0].logits is not None
    assert "its loss_function has been replaced since the patch" in said()[0]
    unpatch(model)
    assert model.loss_function is replaced_loss


def doubling(forward):
    @functools.wraps(forward)
    def run(*args, **kwargs):
        result = forward(*args, **kwargs)
        return result if result.loss is None else type(result)(loss=2 * result.loss, logits=result.logits)

    return run


def test_forward_replaced_before_the_patch(said):
    """By TRL or accelerate, for instance: theirs stays."""
    model = build("Llama")
    own = step(model)[1]["loss"]
    model.forward = doubling(model.forward)
    patch(model)
    result, got = step(model)
    assert result.logits is not None
    assert got["loss"] == 2 * own
    assert "its forward has been replaced on this one model" in said()[0]
    assert unpatch(model) is model


def test_forward_replaced_by_one_that_passes_ours_by(said):
    """TRL and Liger do so: the loss is theirs, and the patch does nothing."""
    model = build("Llama")
    expected = step(model)[1]
    patch(model)
    model.forward = MethodType(type(model).forward, model)
    model.eval()(**batch())
    assert not said()
    for _ in range(2):
        assert_same(step(model.train())[1], expected)
    (line,) = said()
    assert line.startswith("LlamaForCausalLM trains without the patch: its forward has been replaced since")


def named_alone(forward):
    """As accelerate's: around another that it names, without its attributes."""
    run = doubling(forward)
    vars(run).clear()
    run.__wrapped__ = forward
    return run


@pytest.mark.parametrize("around", [doubling, named_alone])
def test_forward_replaced_after_the_patch(around, said):
    model = patch(build("Llama"))
    own = step(model)[1]["loss"]
    model.forward = around(model.forward)
    assert step(model)[1]["loss"] == 2 * own
    # It stays, whatever becomes of ours.
    for prepare, is_patched in ((unpatch, False), (patch, True), (unpatch, False)):
        result, got = step(prepare(model))
        assert (result.logits is None) == is_patched
        torch.testing.assert_close(got["loss"], 2 * own)
    assert not said()


def test_own_loss_code(said):
    """Bart's decoder computes its loss from the logits itself: it gets them."""
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 48, "decoder_attention_heads": 4, "dropout": 0.0}
    model = build("Bart", **sizes)
    own, expected = step(model)
    patch(model)
    result, got = step(model)
    assert torch.equal(result.logits, own.logits)
    assert_same(got, expected)
    assert "its forward uses the logits themselves (view)" in said()[0]


def test_logits_to_keep_is_the_class_s_own_affair():
    """Labels of another length than the logits: the class's own error, not a loss of something else."""
    model = build("Llama")
    with pytest.raises(ValueError, match="batch_size") as own:
        model(**batch(), logits_to_keep=3)
    patch(model)
    with pytest.raises(ValueError, match="batch_size") as ours:
        model(**batch(), logits_to_keep=3)
    assert str(ours.value) == str(own.value)


def test_an_error_in_the_forward_leaves_no_deferred_logits():
    model = patch(build("Llama"))
    with pytest.raises(IndexError):
        step(model, input_ids=torch.full((2, 12), VOCABULARY))
    assert not model._lce_switch.on
    assert not isinstance(model.lm_head(torch.zeros(1, 32)), DeferredLogits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"impl": "fast"}, "impl must be one of"), ({"filter_eps": "some"}, "filter_eps")],
)
def test_bad_settings(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        patch(build("Llama"), **arguments)


def test_another_kind_of_model():
    with pytest.raises(TypeError, match="model must be a transformers.PreTrainedModel, or PEFT's around one, got"):
        patch(torch.nn.Linear(2, 2))


WITHOUT_TORCHTUNE = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("torchtune", "torchao")
        return None if hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
import torch
from tiny_transformers import build, step
from torchtune_lce.transformers import patch

own = step(build("Llama"))[1]
result, ours = step(patch(build("Llama")))
assert result.logits is None
assert all(torch.allclose(ours[name], own[name], atol=1e-5) for name in own)
assert not {"torchtune", "torchao"} & set(sys.modules)
"""


def test_without_torchtune_and_torchao():
    import tiny_transformers

    folder = tiny_transformers.__file__.rpartition("/")[0]
    code = f"import sys; sys.path.insert(0, {folder!r})\n{WITHOUT_TORCHTUNE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
