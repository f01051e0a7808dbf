"""Models beyond a plain decoder: images, quantisation-aware training, several outputs. Equal to stock, or refused."""

import copy
import sys

import pytest
import torch
from tiny_models import VOCABULARY, build_model
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.qat import Int4WeightOnlyQATQuantizer, Int8DynActInt4WeightQATQuantizer
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.models.mistral._component_builders import mistral_classifier
from torchtune.modules.early_exit_loss import early_exit_loss
from torchtune.modules.loss import CEWithChunkedOutputLoss
from vision_models import DECODER, IMAGE_TOKEN, TOKENS_PER_TILE, build_deep_fusion, build_early_fusion, images

from torchtune_lce import LinearCrossEntropyLoss

BATCH, LENGTH = 2, 12


@pytest.fixture
def tokens() -> Tensor:
    # None of them an image's.
    return torch.randint(IMAGE_TOKEN + 1, VOCABULARY, (BATCH, LENGTH))


@pytest.fixture
def targets() -> Tensor:
    targets = torch.randint(VOCABULARY, (BATCH, LENGTH))
    targets[0, :5] = -100
    return targets


def assert_equals_stock(model: nn.Module, tokens: Tensor, targets: Tensor, **inputs) -> dict[str, Tensor]:
    """Loss and every gradient are those of torchtune's own loss; returns the gradients by name."""
    stock = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(stock.num_output_chunks)
    expected = stock(model(tokens, **inputs), targets)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    loss = LinearCrossEntropyLoss(impl="chunked")
    loss.set_model_output(model)
    actual = loss(model(tokens, **inputs), targets)
    actual.backward()
    torch.testing.assert_close(actual, expected)
    for name, parameter in model.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None, name
        else:
            # Zero gradients would be equal however wrong.
            assert gradients[name].any(), name
            torch.testing.assert_close(parameter.grad, gradients[name], msg=lambda text, name=name: f"{name}: {text}")
    loss.release()
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


# ---- images


@pytest.mark.parametrize("trained", ["frozen decoder", "trained decoder", "lora"])
def test_llama3_2_vision_equals_stock(trained, tokens, targets):
    """The head has fewer rows than the embedding, and is frozen unless the decoder is trained."""
    model = build_deep_fusion(lora=trained == "lora", decoder_trainable=trained == "trained decoder")
    assert model.decoder.tok_embeddings.num_embeddings == VOCABULARY + DECODER["num_special_tokens"]
    # All of the special tokens, which embed and are never predicted.
    tokens[:, : DECODER["num_special_tokens"]] = VOCABULARY + torch.arange(DECODER["num_special_tokens"])
    mask = torch.ones(BATCH, LENGTH, TOKENS_PER_TILE, dtype=torch.bool)
    text_only = model(tokens)
    assert not torch.allclose(model(tokens, encoder_input=images(BATCH), encoder_mask=mask), text_only)
    gradients = assert_equals_stock(model, tokens, targets, encoder_input=images(BATCH), encoder_mask=mask)
    assert any(name.startswith("encoder.") for name in gradients)
    assert ("decoder.output.weight" in gradients) == (trained == "trained decoder")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_early_fusion_equals_stock(tied, tokens, targets):
    sizes = {name: DECODER[name] for name in ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "embed_dim")}
    decoder = llama3_2(**sizes, max_seq_len=64, intermediate_dim=48, tie_word_embeddings=tied)
    model = build_early_fusion(decoder)
    tokens[:, 1 : 1 + TOKENS_PER_TILE] = IMAGE_TOKEN
    gradients = assert_equals_stock(model, tokens, targets, encoder_input={"image": images(BATCH)})
    assert any(name.startswith("encoders.image.") for name in gradients)
    assert ("decoder.output.weight" in gradients) != tied


# ---- quantisation-aware training


def qat_model(quantizer) -> nn.Module:
    model = build_model(tied=False)
    nn.init.normal_(model.output.weight)
    return quantizer.prepare(model)


def int8_activations() -> Int8DynActInt4WeightQATQuantizer:
    return Int8DynActInt4WeightQATQuantizer(groupsize=32)


@pytest.mark.parametrize("enabled", [True, False], ids=["rounded", "rounding off"])
def test_fake_quantised_head_equals_stock(enabled, tokens, targets):
    """As the QAT recipe prepares it: hidden states rounded to 8 bits, the head's weight to 4."""
    model = qat_model(int8_activations())
    if not enabled:
        model.apply(lambda module: getattr(module, "disable_fake_quant", lambda: None)())
    gradients = assert_equals_stock(model, tokens, targets)
    assert "output.weight" in gradients
    hidden = torch.randn(BATCH, LENGTH, model.output.in_features)
    exact = nn.functional.linear(hidden, model.output.weight)
    assert torch.allclose(model.output(hidden), exact) != enabled, "rounding must matter, or equality says nothing"


def test_fake_quantised_head_in_bfloat16_equals_stock(tokens, targets):
    model = qat_model(Int8DynActInt4WeightQATQuantizer(groupsize=32, precision=torch.bfloat16)).bfloat16()
    stock = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(stock.num_output_chunks)
    expected = stock(model(tokens), targets)
    loss = LinearCrossEntropyLoss(impl="chunked")
    loss.set_model_output(model)
    torch.testing.assert_close(loss(model(tokens), targets), expected, rtol=2**-8, atol=0)


def test_head_whose_activations_stay_as_they_are(tokens, targets):
    torch.manual_seed(2)
    model = llama3_2(
        vocab_size=VOCABULARY,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        # The least that tiles of int4 weights take.
        embed_dim=1024,
        max_seq_len=64,
        intermediate_dim=1024,
        tie_word_embeddings=False,
    )
    model = Int4WeightOnlyQATQuantizer(groupsize=32, precision=torch.float32).prepare(model)
    assert model.output.activation_fake_quantizer is None
    assert_equals_stock(model, tokens, targets)


# ---- refused


def test_quantised_heads_are_refused_by_name():
    model = build_model(tied=False)
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(TypeError, match=r"plain tensor, got (Affine|Int8)\w*Tensor: leave the output projection"):
        LinearCrossEntropyLoss().set_model_output(model)


def test_mistrals_classifier_is_refused():
    sizes = {"vocab_size": 512, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 32}
    model = mistral_classifier(4, **sizes, intermediate_dim=32, max_seq_len=16)
    with pytest.raises(ValueError, match="has 4 rows for 512 token embeddings: that is a classifier's head"):
        LinearCrossEntropyLoss().set_model_output(model)


def test_early_exit_loss_is_refused(tokens, targets):
    """It works with a copy of the loss, which would train a copy of the head: gradients would be lost silently."""
    model = build_model(tied=False)
    loss = LinearCrossEntropyLoss()
    loss.set_model_output(model)
    hidden = {layer: torch.randn(BATCH, LENGTH, model.output.in_features) for layer in range(2)}
    with pytest.raises(TypeError, match=r"cannot be copied: .*early_exit_loss copies its loss .*CrossEntropyLoss"):
        early_exit_loss(model, hidden, targets, loss)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(loss)
    loss.release()
    assert copy.deepcopy(loss).ignore_index == loss.ignore_index


def test_unbound_loss_in_the_early_exit_recipe(tokens, targets, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/recipes/dev/early_exit_finetune_distributed.py"])
    model = build_model()
    hidden = {layer: torch.randn(BATCH, LENGTH, 64) for layer in range(2)}
    with pytest.raises(RuntimeError, match=r"early-exit recipe cannot use it, .* set loss=torch.nn.CrossEntropyLoss"):
        early_exit_loss(model, hidden, targets, LinearCrossEntropyLoss())
