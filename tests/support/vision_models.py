"""Llama 3.2 Vision's builders at a size that trains in milliseconds, on machines without torchvision too."""

import copy
import importlib.util
import sys
from types import ModuleType
from unittest import mock

import torch
from tiny_models import VOCABULARY
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchtune.modules.model_fusion import DeepFusionModel, EarlyFusionModel

EMBED_DIM = 32
TILE = 28
PATCH = 14
# One token for the tile's class and one a patch.
TOKENS_PER_TILE = (TILE // PATCH) ** 2 + 1
IMAGE_TOKEN = 7
ENCODER = {
    "patch_size": PATCH,
    "num_heads": 2,
    "clip_embed_dim": 16,
    "clip_num_layers": 2,
    "clip_hidden_states": [0],
    "num_layers_projection": 1,
    "decoder_embed_dim": EMBED_DIM,
    "tile_size": TILE,
    "max_num_tiles": 1,
    "in_channels": 3,
}
DECODER = {
    "vocab_size": VOCABULARY,
    "num_layers": 2,
    "fusion_interval": 1,
    "num_special_tokens": 8,
    "num_heads": 2,
    "num_kv_heads": 2,
    "embed_dim": EMBED_DIM,
    "max_seq_len": 64,
    "encoder_max_seq_len": TOKENS_PER_TILE,
    "intermediate_dim": 48,
}
ADAPTERS = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8}


def import_vision_models() -> ModuleType:
    """``torchtune.models.llama3_2_vision``, whose package imports torchvision for images that no model ever sees here.

    Where torchvision is not installed, names stand in for it while torchtune imports; the models need nothing of it.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("torchtune.models.llama3_2_vision")
    transforms = "torchvision.transforms"
    names = ("torchvision", transforms, f"{transforms}.v2", f"{transforms}.v2.functional")
    absent = {name: ModuleType(name) for name in names}
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(absent[parent], child, absent[name])
    # An annotation is evaluated.
    absent[transforms].InterpolationMode = None
    with mock.patch.dict(sys.modules, absent):
        models = importlib.import_module("torchtune.models.llama3_2_vision")
        imported = {name: module for name, module in sys.modules.items() if name not in absent}
    # patch.dict forgets what was imported meanwhile.
    sys.modules.update(imported)
    return models


def build_deep_fusion(lora: bool = False, decoder_trainable: bool = False, **adapters) -> DeepFusionModel:
    """Encoder, cross-attention and decoder as torchtune's 11B has them; its gates are opened, or images say nothing.

    ``adapters``: what a recipe wants to read of them in its config; they are as in ADAPTERS.
    """
    assert adapters.keys() <= {*ADAPTERS, "apply_lora_to_mlp"}
    torch.manual_seed(0)
    models = import_vision_models()
    if lora:
        encoder = models.lora_llama3_2_vision_encoder(encoder_lora=True, fusion_lora=True, **ENCODER, **ADAPTERS)
        decoder = models.lora_llama3_2_vision_decoder(decoder_lora=True, fusion_lora=True, **DECODER, **ADAPTERS)
    else:
        encoder = models.llama3_2_vision_encoder(**ENCODER)
        decoder = models.llama3_2_vision_decoder(**DECODER)
    model = DeepFusionModel(decoder, encoder, decoder_trainable=decoder_trainable, encoder_trainable=not lora)
    _open(model)
    return model


def build_early_fusion(decoder: nn.Module) -> EarlyFusionModel:
    """Llama 3.2's image encoder before a decoder of text, whose tokens make room for an image's."""
    torch.manual_seed(1)
    encoder = import_vision_models().llama3_2_vision_encoder(**ENCODER)
    model = EarlyFusionModel(
        decoder, {"image": encoder}, {"image": IMAGE_TOKEN}, decoder_trainable=True, encoders_trainable=True
    )
    _open(model.encoders)
    return model


def images(count: int) -> dict[str, Tensor]:
    """Input of the encoder: one image of one tile for each of ``count`` samples, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return {
        "images": torch.randn(count, 1, 1, 3, TILE, TILE, generator=generator),
        "aspect_ratio": torch.ones(count, 1, 2, dtype=torch.int64),
    }


class CaptionedImages(Dataset):
    """What a recipe's data set gives after its transform: tokens, labels, and an image of one tile with its mask."""

    def __init__(self, tokenizer, packed: bool = False):
        generator = torch.Generator().manual_seed(2)
        self._samples = []
        for index in range(12):
            tokens, labels = torch.randint(VOCABULARY, (2, 8 + index % 3), generator=generator)
            tokens[0] = VOCABULARY  # the image's
            labels[:3] = -100
            sample = {
                "tokens": tokens.tolist(),
                "labels": labels.tolist(),
                "encoder_input": {
                    "images": [torch.randn(1, 3, TILE, TILE, generator=generator)],
                    "aspect_ratio": [torch.tensor([1, 1])],
                },
                "encoder_mask": [torch.ones(len(tokens), TOKENS_PER_TILE, dtype=torch.bool)],
            }
            self._samples.append(sample)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict:
        # The recipe takes its samples apart.
        return copy.deepcopy(self._samples[index])


def _open(model: nn.Module) -> None:
    """Gates and LoRA's B start at zero, where nothing behind them gets a gradient."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any() or name.endswith("lora_b.weight"):
                parameter.normal_(std=0.1)
            assert parameter.isfinite().all(), name
