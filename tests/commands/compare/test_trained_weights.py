"""compare --trained-weights: layers that do nothing, a model that learns other files, runs that start from it."""

import json
import math
import re

import pytest
import torch
from command_line import exit_status
from interpreted import IS_INTERPRETED
from omegaconf import OmegaConf
from tiny_models import FULL, LORA, OUR_LOSS, SIZES, our_recipe, recipe_config, stock_recipe, train
from torchtune import config as torchtune_config
from torchtune.modules.peft import get_adapter_params

from torchtune_lce.commands import registry
from torchtune_lce.commands.compare import command, runs, session
from torchtune_lce.commands.compare.demo_data import DemoData, rows_and_rest
from torchtune_lce.commands.compare.identity_layers import deepened, first_layers
from torchtune_lce.commands.compare.runs import Outcome
from torchtune_lce.commands.compare.trained_weights import Learnt, TrainedWeights, learn
from torchtune_lce.commands.shared import chats, recipe_runs
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.loss_choices import LossChoice
from torchtune_lce.commands.shared.random_weights import random_state
from torchtune_lce.commands.shared.vocabulary import spread
from torchtune_lce.inputs import filtering
from torchtune_lce.loss import LinearCrossEntropyLoss

CPU = torch.device("cpu")
DATA = DemoData(rows=48, sequence=32, vocabulary=320, model_entries=512)
GEMMA = {**SIZES, "head_dim": 16}
ADAPTERS = {
    "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
}
LLAMA = "torchtune.models.llama3_2._component_builders."
MODELS = {
    "gemma2_lora": {"_component_": "torchtune.models.gemma2.lora_gemma2", **GEMMA, **ADAPTERS},
    "gemma2": {"_component_": "torchtune.models.gemma2._component_builders.gemma2", **GEMMA},
    "gemma_lora": {"_component_": "torchtune.models.gemma._component_builders.lora_gemma", **GEMMA, **ADAPTERS},
    "llama_lora": {"_component_": f"{LLAMA}lora_llama3_2", **SIZES, **ADAPTERS},
    "untied_with_an_adapter": {
        "_component_": "torchtune.models.llama3._component_builders.lora_llama3",
        **SIZES,
        **ADAPTERS,
        "apply_lora_to_output": True,
    },
    "qwen": {"_component_": "torchtune.models.qwen2.qwen2", **SIZES, "tie_word_embeddings": True},
}


@pytest.fixture(autouse=True)
def _registered():
    registry.register()


def sources() -> dict[str, str]:
    """Files that repeat themselves, each about words of its own."""
    words = [word for word in dir(torch) if word.isalpha()][:240]
    return {f"m{i}": f"def {w}(value):\n    return {w} + {w}_{i}(value, {i})\n" * 4 for i, w in enumerate(words)}


def wanted(model: dict, dtype=torch.float32) -> TrainedWeights:
    return TrainedWeights(OmegaConf.create(model), DATA, dtype, CPU, seconds=60)


def compare(*arguments) -> int:
    return exit_status(command, *arguments)


def with_layers(layers: int, model: dict):
    return OmegaConf.create({**model, "num_layers": layers})


# --- layers that do nothing ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_deep_model_computes_what_its_first_layers_do(name, dtype):
    deep = with_layers(5, MODELS[name])
    shallow = first_layers(deep, 2)
    assert not get_adapter_params(shallow)
    state = random_state(shallow, dtype)
    # Scales that a training has moved, of norms before and behind.
    state = {k: v + 0.1 * torch.rand_like(v) if v.ndim == 1 else v for k, v in state.items()}
    two = torchtune_config.instantiate(with_layers(2, MODELS[name])).to(dtype)
    five = torchtune_config.instantiate(deep).to(dtype)
    for model, weights in ((two, state), (five, deepened(state, deep))):
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) == set(get_adapter_params(model))
    tokens = torch.randint(512, (2, 24))
    torch.testing.assert_close(five(tokens), two(tokens), rtol=0, atol=0)
    other = torchtune_config.instantiate(deep).to(dtype)
    other.load_state_dict(random_state(other, dtype), strict=False)
    assert not torch.allclose(other(tokens), two(tokens), atol=0.1), "layers that do something"


def test_an_idle_layer_costs_what_any_costs_and_shares_its_memory():
    deep = with_layers(5, MODELS["gemma2_lora"])
    state = deepened(random_state(first_layers(deep, 2)), deep)
    for part in ("attn.q_proj", "attn.v_proj", "mlp.w1", "mlp.w3"):
        assert state[f"layers.4.{part}.weight"] is state[f"layers.0.{part}.weight"]
        assert state[f"layers.3.{part}.weight"].abs().min() > 0
    # What no matrix product reads may be trained as it was loaded.
    assert state["layers.4.sa_norm.scale"] is not state["layers.0.sa_norm.scale"]
    assert not state["layers.2.mlp.w2.weight"].any()
    assert state["layers.1.mlp.w2.weight"].all()


def test_the_first_step_of_an_optimizer_does_not_wake_idle_layers():
    """Behind a norm whose factor is 1 an adapter's first step of 1e-4 becomes a whole layer's output."""
    deep = with_layers(5, MODELS["gemma2_lora"])
    model = torchtune_config.instantiate(deep)
    state = deepened(random_state(first_layers(deep, 2)), deep)
    model.load_state_dict(state, strict=False)
    tokens = torch.randint(512, (2, 24))
    before = model(tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name and int(name.split(".")[1]) >= 2:
                parameter.add_(torch.where(torch.rand_like(parameter) < 0.5, -1e-4, 1e-4))
    moved = (model(tokens) - before).norm() / before.norm()
    assert 0 < moved < 0.02


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MODELS["llama_lora"] | {"use_dora": True}, "model.use_dora must be False, got True: DoRA divides"),
        (
            {"_component_": "torchtune.models.t5._component_builders.t5_encoder", "embed_dim": 8, "mlp_dim": 8}
            | {"num_heads": 2, "head_dim": 4, "num_layers": 1, "rel_pos_num_buckets": 4, "rel_pos_max_dist": 4}
            | {"vocab_size": 9, "norm_eps": 1e-6, "max_seq_len": 8},
            "one of torchtune's text decoders, got T5Encoder",
        ),
    ],
)
def test_models_without_idle_layers_are_refused(model, message):
    with pytest.raises(CommandError, match=message):
        first_layers(OmegaConf.create(model), 1)


def test_layers_of_another_kind_are_refused(monkeypatch):
    from torchtune.modules import TransformerDecoder

    monkeypatch.setattr(TransformerDecoder, "__init__", _with_other_layers(TransformerDecoder.__init__))
    with pytest.raises(CommandError, match="layers of self-attention and an MLP, .* got Linear; take --random-weights"):
        first_layers(OmegaConf.create(MODELS["qwen"]), 1)


def _with_other_layers(init):
    def initialise(self, **settings):
        settings["layers"] = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
        init(self, **settings)

    return initialise


# --- what it learns ---


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    DATA.make(folder, sources())
    return folder


@pytest.fixture(scope="module")
def learnt(data) -> tuple[dict, Learnt]:
    model = with_layers(4, MODELS["llama_lora"])
    return learn(wanted(model), *rows_and_rest(data), lambda step, loss: None)


def test_what_is_learnt_is_in_no_row(data):
    rows, rest = rows_and_rest(data)
    assert rows.shape == (DATA.rows, DATA.sequence)
    places = spread(DATA.vocabulary, DATA.model_entries).int()
    tokenizer = torchtune_config.instantiate(OmegaConf.create(DATA.sections(data)).tokenizer)
    tuned, learnt = (
        set(re.findall(r"_(\d+)\(value", tokenizer.decode(torch.searchsorted(places, tokens).flatten().tolist())))
        for tokens in (rows, rest)
    )
    assert len(tuned) > 5
    assert len(learnt) > 20
    assert not tuned & learnt
    assert tuned | learnt == {name.removeprefix("m") for name in sources()}


def test_the_softmax_is_sharper_than_at_the_start(data, learnt, device):
    pytest.importorskip("triton")
    state, came_to = learnt
    assert came_to.layers == 2
    assert came_to.impl == "chunked"
    assert came_to.held_out_loss < 0.6 * math.log(512)
    shallow = with_layers(2, MODELS["llama_lora"])
    tokens = rows_and_rest(data)[0][:12].long()
    kept, entropies = [], []
    for weights in (random_state(first_layers(shallow, 2)), state):
        model = torchtune_config.instantiate(shallow)
        model.load_state_dict(weights, strict=False)
        entropies.append(torch.distributions.Categorical(logits=model(tokens).detach()).entropy().mean())
        loss = LinearCrossEntropyLoss(impl="cce", filter_eps=2**-8)  # of 512 entries
        loss.set_model_output(model.requires_grad_(False).to(device))
        hidden = model(tokens[:, :-1].to(device)).requires_grad_()
        with filtering.recording() as records:
            value = loss(hidden, tokens[:, 1:].to(device))
            value.backward()
        kept.append(records[0].kept_fraction)
    assert value.item() == pytest.approx(came_to.held_out_loss, rel=0.2), "of some of the rows"
    assert entropies[1] < 0.6 * entropies[0]
    # Of blocks of 32 tokens; a card's have 128, in which more entries matter to some token.
    assert kept[1] < (0.5 if IS_INTERPRETED else 0.9) * kept[0]


@pytest.mark.parametrize("method", [LORA, FULL])
def test_runs_start_where_the_training_ended(tmp_path, data, learnt, method):
    """Stock's losses and ours, step by step, in this process."""
    state, came_to = learnt
    torch.save(state, tmp_path / "weights.pt")
    model = OmegaConf.to_container(with_layers(4, MODELS["llama_lora"]))
    if method == FULL:
        model = {k: v for k, v in model.items() if k not in ADAPTERS} | {"_component_": f"{LLAMA}llama3_2"}
    curves = []
    for kind, recipe in (("stock", stock_recipe), ("chunked", our_recipe)):
        cfg = recipe_config(tmp_path, tmp_path, method, tied=True, loss=OUR_LOSS, overrides=["batch_size=24"])
        cfg.model = model
        for section, content in DATA.sections(data).items():
            cfg[section] = content
        checkpointer = wanted(cfg.model).checkpointer(tmp_path, came_to)
        folder = tmp_path / kind
        train(recipe(method), runs.prepared(cfg, LossChoice(kind, False), folder, 1, False, checkpointer))
        curves.append([record["loss"] for record in recipe_runs.read_log(folder / recipe_runs.LOG)])
    stock, ours = curves
    # One step of all the rows: those of the held-out loss.
    assert stock == pytest.approx([came_to.held_out_loss], rel=0.01)
    assert ours == pytest.approx(stock, rel=1.5e-6)


def test_too_little_text_is_told(data):
    rows, rest = rows_and_rest(data)
    with pytest.raises(CommandError, match="takes 16 rows of 33 tokens, .* leaves over has 15; take fewer --steps"):
        learn(wanted(MODELS["qwen"]), rows, rest[: 16 * 33 - 1], print)


# --- the command line ---


def recipe_in_this_process(progress, run, *_) -> Outcome:
    """What session.run_one is for, without the seconds that a process takes to import."""
    recipe = stock_recipe(run.recipe) if run.choice.kind == "stock" else our_recipe(run.recipe)
    train(recipe, run.config)
    return Outcome("ok", recipe_runs.summarise(recipe_runs.read_log(run.folder / recipe_runs.LOG), None, run.warmup))


def test_from_the_command_line_and_again(tmp_path, monkeypatch, capsys):
    """The training is in a process of its own, and done once."""
    monkeypatch.setattr(chats, "read_sources", sources)
    monkeypatch.setattr(session, "run_one", recipe_in_this_process)
    sizes = [f"model.{name}={size}" for name, size in (SIZES | {"num_layers": 3}).items()]
    common = ["--config", "lce/tiny/full_single_device", "--output", tmp_path / "out", "--trained-weights"]
    common += ["--demo-data", "--sequence-length", "32", "--vocabulary", "320", "--steps", "2", "--warmup", "1"]
    common += ["--losses", "stock,chunked"]
    settings = ["log_loss_stats=True", *sizes]
    assert compare(*common, *settings) == 0
    assert "trained weights: 2 layers, the others idle" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / session.RESULTS).read_text())
    stock, chunked = written["losses"].values()
    held_out = written["about"]["trained_weights"]["held_out_loss"]
    assert held_out < 0.6 * math.log(512)
    assert stock[0] == pytest.approx(held_out, rel=0.25)
    assert chunked == pytest.approx(stock, rel=1.5e-6)
    assert f"held-out loss {held_out:.3f}." in (tmp_path / "out" / session.TABLE).read_text()
    assert compare(*common, *settings) == 0
    assert f"held-out loss {held_out:.3f} (made before)" in capsys.readouterr().out

    def make(*arguments):
        raise CommandError("made again")

    monkeypatch.setattr(TrainedWeights, "make", make)
    for change in (["--train-seconds", "7"], ["--fresh"], ["--vocabulary", "319"]):
        assert compare(*common, *change, *settings) == 2
        assert "tune-lce compare: made again" in capsys.readouterr().err
    assert compare(*common, *settings, "model.norm_eps=1e-5") == 2
    # Gigabytes of a real model, which somebody may have deleted by themselves.
    (tmp_path / "out" / "weights" / "weights.pt").unlink()
    assert compare(*common, *settings) == 2


def test_a_failed_training_is_told(tmp_path, data):
    """One in a process of its own, whose model has fewer entries than the text."""
    small = MODELS["qwen"] | {"vocab_size": 400}
    with pytest.raises(CommandError, match="--trained-weights: the training ended with status 1, see above"):
        wanted(small).make(tmp_path, data, print)
    assert wanted(small).made_before(tmp_path) is None


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ("lce/llama3_2/1B_lora_single_device", ["--trained-weights"], "--trained-weights need --demo-data"),
        ("lce/llama3_2/1B_lora_single_device", ["--train-seconds", "9"], "--train-seconds are those of --trained-w"),
        (
            "lce/llama3_2/1B_lora_single_device",
            ["--trained-weights", "--demo-data", "--train-seconds", "0"],
            "--train-seconds must be at least 1, got 0",
        ),
        (
            "lce/llama3_2/1B_lora_single_device",
            ["--trained-weights", "--demo-data", "--train-seconds", "nan"],
            "--train-seconds must be at least 1, got nan",
        ),
        (
            "lce/qwen2/1.5_to_0.5B_KD_lora_single_device",
            ["--trained-weights", "--demo-data", "--losses", "stock"],
            "--trained-weights are for LoRA and full fine-tunes",
        ),
        (
            "llama3_1/8B_lora_dpo_single_device",
            ["--trained-weights", "--demo-data", "--losses", "stock"],
            "--trained-weights are for LoRA and full fine-tunes",
        ),
    ],
)
def test_what_cannot_start_from_them_is_told(tmp_path, capsys, config, arguments, message):
    output = tmp_path / "out"
    assert compare("--config", config, "--output", output, *arguments, "device=cpu", "dtype=fp32") == 2
    assert capsys.readouterr().err.startswith(f"tune-lce compare: {message}")
    assert not output.exists()
