"""Which causal models of the installed transformers the patch serves: `python tests/transformers_scan.py --write`.

It builds a small random model of every causal class, computes loss and gradients as the class does and with
torchtune_lce.transformers.patch, and puts the classes into docs/transformers.md: those that are served, and why the
others are not. It fails where a loss or a gradient differs. Run it once for each version that the page names.
"""

import argparse
import inspect
import logging
import re
import signal
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from torchtune_lce.transformers import patch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "transformers.md"
TOLERANCE = 1e-5
VOCABULARY = 96
# What a config calls its sizes. A class takes those names that its default config has.
SIZES = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "embed_dim": 64, "dim": 64, "emb_dim": 64, "model_dim": 64,
    "embedding_size": 64, "word_embed_proj_dim": 64, "lru_width": 64, "attention_hidden_size": 64,
    "intermediate_size": 96, "ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "n_inner": 96, "d_ff": 96,
    "ffn_hidden_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "intermediate_size_mlp": 96, "dff": 96, "expert_ffn_hidden_size": 32,
    "block_ff_dim": 96, "mlp_hidden_size": 96, "moe_shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2, "layers": 2, "num_hidden_groups": 1,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "n_head_kv": 2,
    "multi_query_num_key_value_heads": 2,
    "head_dim": 16, "d_kv": 16, "kv_channels": 16, "attention_head_dim": 16, "head_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "zero_expert_num": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64, "sliding_window": 8,
    "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "altup_num_inputs": 2, "laurel_rank": 8,
    "state_size": 8, "mamba_d_state": 8, "ssm_state_size": 8, "mamba_d_ssm": 64, "time_step_rank": 8,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "n_groups": 1, "mamba_chunk_size": 8, "chunk_size": 8, "conv_kernel": 4,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "attention_window": 8, "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [32, 32], "num_buckets": 4,
    "bottleneck_size": 16, "d_embed": 64, "d_inner": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "sep_token_id": 2, "rotary_dim": 8, "decoder_start_token_id": 1, "is_decoder": True, "output_router_logits": True,
    "use_cache": False,
}  # fmt: skip
# What the names above do not tell, by model type.
OTHERS = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "reformer": {"attn_layers": ["local", "local"], "local_attn_chunk_length": 4, "is_decoder": True},
    "falcon_mamba": {"intermediate_size": 128},
    "mamba": {"intermediate_size": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "zamba": {"use_mamba_kernels": False, "attention_head_dim": 32, "attention_hidden_size": 128},
    "zamba2": {"attention_head_dim": 32, "attention_hidden_size": 128},
    "jamba": {"use_mamba_kernels": False},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}
TEXTS = ("text_config", "llm_config", "thinker_config", "language_config", "decoder", "text")
SECONDS = 60
LARGEST = 20_000_000


@dataclass
class Outcome:
    """``why`` a class is not served, None where it is; ``wrong`` says what differs from the class's own."""

    name: str
    why: str | None
    wrong: str | None = None


class TooLongError(Exception):
    """A class has taken more than :data:`SECONDS`."""


class NotBuiltError(Exception):
    """No small model, or none that trains on tokens alone, can be made of a class."""


def small_config(kind: str):
    config = CONFIG_MAPPING[kind]
    default = config()
    return config(**{**_smaller(default), **_smaller_parts(default), **OTHERS.get(kind, {})})


def _smaller(default) -> dict:
    known = {**default.to_dict(), **dict.fromkeys(getattr(type(default), "attribute_map", {}))}
    sizes = {name: value for name, value in SIZES.items() if name in known}
    if "qk_rope_head_dim" in known and "head_dim" in sizes:
        # Of latent attention the rotated part alone is called so.
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
    if "kv_lora_rank" in known:
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
    if isinstance(known.get("layer_types"), list):
        kinds = known["layer_types"]
        # One of each kind, if there are two.
        sizes["layer_types"] = [kinds[0], next((other for other in kinds if other != kinds[0]), kinds[0])]
    if isinstance(known.get("layers_block_type"), list):
        sizes.pop("num_hidden_layers", None)
    return sizes


def _smaller_parts(default) -> dict:
    parts = {}
    for name in TEXTS:
        part = getattr(default, name, None)
        if isinstance(part, transformers.PretrainedConfig):
            parts[name] = type(part)(**{**_smaller(part), **OTHERS.get(part.model_type, {})})
    return parts


def build(kind: str, name: str):
    """A small model in training mode. Raises NotBuiltError, saying why, where there is none."""
    model_class = getattr(transformers, name)
    try:
        config = small_config(kind)
        config._attn_implementation = "eager"
        config_class = model_class.config_class
        if config_class is not None and not isinstance(config, config_class):
            parts = (part for part in vars(config).values() if isinstance(part, config_class))
            config = next(parts, None) or config.get_text_config()
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > LARGEST:
            raise NotBuiltError(f"{size:,} parameters")
        torch.manual_seed(0)
        return model_class(config).float().train()
    except (NotBuiltError, TooLongError):
        raise
    except Exception as error:  # whatever a class refuses is told in its row
        raise NotBuiltError(f"{type(error).__name__}: {error}") from error


def step(model, **more) -> tuple:
    """Loss, gradients and the result of a training step, from a seed."""
    generator = torch.Generator().manual_seed(1)
    config = model.config.get_text_config()
    tokens = torch.randint(3, min(VOCABULARY, config.vocab_size), (2, 16), generator=generator)
    labels = tokens.clone()
    labels[0, :5] = -100
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    result = model(input_ids=tokens, labels=labels, **more)
    result.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return result, gradients


def difference(own, ours) -> str | None:
    (result, gradients), (patched, patched_gradients) = own, ours
    if gradients.keys() != patched_gradients.keys():
        return f"gradients of {sorted(gradients.keys() ^ patched_gradients.keys())}"
    pairs = {"loss": (result.loss.detach(), patched.loss.detach())}
    if getattr(result, "aux_loss", None) is not None:
        pairs["aux_loss"] = result.aux_loss.detach(), patched.aux_loss.detach()
    for name, gradient in gradients.items():
        pairs[name] = gradient, patched_gradients[name]
    for name, (theirs, mine) in pairs.items():
        if not torch.isfinite(theirs).all():
            return f"{name} of the class itself is not finite"
        error = (theirs - mine).abs().max().item() if theirs.numel() else 0.0
        if not error <= TOLERANCE * max(1.0, theirs.abs().max().item()):
            return f"{name} by {error:.1e}"
    return None


@contextmanager
def listening() -> Iterator[list[str]]:
    """What the patch warns of, without the names of classes and the words that all of it has."""
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.args[1])
    log = logging.getLogger("torchtune_lce.transformers")
    log.addHandler(handler)
    try:
        yield said
    finally:
        log.removeHandler(handler)


def compare(kind: str, name: str) -> Outcome:
    model = build(kind, name)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(model).forward).parameters.values())
    variants = [{}, {"num_items_in_batch": 7}] if takes_any else [{}]
    try:
        # BigBird's attention and some caches are settled by the first call.
        step(model)
        own = [step(model, **more) for more in variants]
        restless = difference(own[0], step(model, **variants[0]))
    except TooLongError:
        raise
    except Exception as error:  # the class's own refusal is told in its row
        raise NotBuiltError(f"its own step fails: {type(error).__name__}: {error}") from error
    if restless is not None:
        raise NotBuiltError(f"two steps of its own from one seed differ: {restless}")
    with listening() as said:
        patch(model)
        ours = [step(model, **more) for more in variants]
    wrong = next(filter(None, map(difference, own, ours)), None)
    served = not said and ours[0][0].logits is None
    return Outcome(name, None if served else "; ".join(said) or "logits were made and nobody said why", wrong)


def scan(only: str) -> tuple[list[Outcome], dict[str, str]]:
    """Outcomes, and why some classes have none, by class."""
    names = {}
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for each in name if isinstance(name, (list, tuple)) else (name,):
            names.setdefault(each, kind)
    outcomes, unbuilt = [], {}

    def stop(*_):
        raise TooLongError

    signal.signal(signal.SIGALRM, stop)
    for name, kind in sorted(names.items()):
        if not re.search(only, name):
            continue
        signal.alarm(SECONDS)
        try:
            outcomes.append(compare(kind, name))
        except NotBuiltError as error:
            unbuilt[name] = " ".join(str(error).split())[:160]
        except TooLongError:
            unbuilt[name] = f"more than {SECONDS} s"
        finally:
            signal.alarm(0)
        print(name, outcomes[-1] if name not in unbuilt else unbuilt[name], file=sys.stderr, flush=True)
    return outcomes, unbuilt


def section(outcomes: list[Outcome], unbuilt: dict[str, str]) -> str:
    served = [outcome.name for outcome in outcomes if outcome.why is None]
    reasons = defaultdict(list)
    for outcome in outcomes:
        if outcome.why is not None:
            reasons[outcome.why].append(outcome.name)
    by_class = sorted(reasons.items(), key=lambda reason: reason[1])
    rows = [f"| {', '.join(names)} | {why} |" for why, names in by_class]
    lines = [
        f"{len(served)} classes are served, {sum(map(len, reasons.values()))} compute their loss from whole logits, "
        f"{len(unbuilt)} could not be tried.",
        "",
        f"Served: {', '.join(served)}.",
        "",
        "| not served | why |",
        "|---|---|",
        *rows,
    ]
    if unbuilt:
        lines += ["", "| not tried | why |", "|---|---|"]
        lines += [f"| {name} | {why.replace('|', '/')} |" for name, why in unbuilt.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression that names of classes match")
    parser.add_argument("--write", action="store_true", help="put the classes into docs/transformers.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    outcomes, unbuilt = scan(arguments.only)
    text = section(outcomes, unbuilt)
    if arguments.write:
        version = transformers.__version__
        begin, end = f"<!-- classes of {version}: tests/transformers_scan.py -->", f"<!-- end of {version} -->"
        before, rest = PAGE.read_text(encoding="utf-8").split(begin)
        PAGE.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")
    print(text)
    wrong = [f"{outcome.name}: {outcome.wrong}" for outcome in outcomes if outcome.wrong]
    print("\n".join(["", "WRONG:", *wrong]) if wrong else "\nNo loss and no gradient differs.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
