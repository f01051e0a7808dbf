"""Our PPO recipe beside torchtune's own, both really run: the same trajectories, losses and metrics step by step."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from allocations import Usage, usage
from tiny_models import PPO, SIZES, VOCABULARY, build_model, our_recipe, stock_recipe, train
from tiny_ppo import METRICS, logged_metrics, ppo_config, write_ppo_assets
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune import config, generation, rlhf
from torchtune.models.llama3_2._component_builders import llama3_2

from torchtune_lce.logprobs import LinearTokenLogprobs
from torchtune_lce.training.logits_to_come import give_logits_to_come

# Of float32: both sum the same products in another order.
ROUNDING = 1e-5


class Runs:
    """Runs recipes on one set of assets; the stock run that several tests compare with runs once."""

    def __init__(self, folder: Path):
        self.assets = folder / "assets"
        self._folder = folder
        self._stock = {}
        self._count = 0
        write_ppo_assets(self.assets)

    def config(self, **settings):
        self._count += 1
        output = self._folder / f"run{self._count}"
        for name in ("policy", "value"):
            (output / name).mkdir(parents=True)
        return ppo_config(self.assets, output, **settings)

    def ours(self, **settings):
        cfg = self.config(**settings)
        return train(our_recipe(PPO), cfg), Path(cfg.output_dir)

    def stock(self, *, overrides=(), **settings):
        key = (tuple(overrides), *settings.items())
        if key not in self._stock:
            cfg = self.config(overrides=overrides, **settings)
            self._stock[key] = train(stock_recipe(PPO), cfg), Path(cfg.output_dir)
        return self._stock[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("ppo"))


def assert_equal_steps(ours: Path, stock: Path, steps: int = 10) -> None:
    ours, stock = logged_metrics(ours), logged_metrics(stock)
    for name in ("scores", "loss", "kl", "ratios"):
        assert len(stock[name]) == steps
        assert len(set(stock[name])) >= steps - 1, "stock's must change, or equality says nothing"
    for name in METRICS:
        assert ours[name] == pytest.approx(stock[name], rel=ROUNDING, abs=ROUNDING), name


def assert_equal_weights(ours, stock) -> None:
    for name in ("_policy_model", "_value_model"):
        one, other = (getattr(recipe, name).state_dict() for recipe in (ours, stock))
        assert one.keys() == other.keys()
        for key in one:
            # A third of what one of forty steps moves an entry by: AdamW makes steps of gradients near zero too.
            torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_steps_equal_stock(runs, tied):
    ours, stock = runs.ours(tied=tied), runs.stock(tied=tied)
    assert_equal_steps(ours[1], stock[1])
    assert_equal_weights(ours[0], stock[0])


@pytest.mark.parametrize(
    "overrides",
    [
        ("enable_kv_cache=False",),
        ("optimizer_in_bwd=True", "enable_activation_checkpointing=True"),
        ("gradient_accumulation_steps=2", "temperature=1.3", "top_k=40"),
    ],
    ids=["no cache", "in backward, checkpointing", "accumulation, warm"],
)
def test_settings_equal_stock(runs, overrides):
    ours, stock = (run(tied=True, steps=4, overrides=overrides) for run in (runs.ours, runs.stock))
    assert_equal_steps(ours[1], stock[1], steps=4)


def test_compile_equals_stock(runs, monkeypatch):
    """torchtune compiles each model's layers anew for caches, prompts and tokens, which takes inductor minutes."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    overrides = ("compile=True", "max_generated_tokens=2")
    ours, stock = (run(tied=True, steps=2, overrides=overrides) for run in (runs.ours, runs.stock))
    assert_equal_steps(ours[1], stock[1], steps=2)


def goes_on(runs, recipe: type, begun: Path) -> dict[str, list[float]]:
    """What is logged of the second of two epochs."""
    cfg = runs.config(tied=True)
    output = Path(cfg.output_dir)
    shutil.copytree(begun, output, ignore=shutil.ignore_patterns("epoch_1", "steps.txt"), dirs_exist_ok=True)
    cfg.resume_from_checkpoint = True
    cfg.value_checkpointer.checkpoint_dir = str(begun / "value")
    cfg.checkpointer.checkpoint_files = cfg.value_checkpointer.checkpoint_files = ["epoch_0/model-00001-of-00001.bin"]
    train(recipe, cfg)
    return logged_metrics(output)


def test_goes_on_from_the_other_ones_checkpoint(runs):
    """As stock from its own, which draws other mini-batches than an unbroken run."""
    ours, stock = runs.ours(tied=True)[1], runs.stock(tied=True)[1]
    second = goes_on(runs, stock_recipe(PPO), stock)
    assert len(set(second["loss"])) == 5
    for others in (goes_on(runs, our_recipe(PPO), stock), goes_on(runs, stock_recipe(PPO), ours)):
        for name in METRICS:
            assert others[name] == pytest.approx(second[name], rel=ROUNDING, abs=ROUNDING), name


class Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor that an operation has made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in made if x.is_floating_point())])
        return result


@pytest.mark.parametrize("whose", ["ours", "stock"])
def test_neither_generation_nor_a_step_makes_logits(runs, whose):
    """Nothing is as large as the logits of the rows that each sees, of a prompt's or of prompt and response."""
    # More entries than what else a tiny model makes of a token, and responses of a token.
    cfg = runs.config(tied=True, steps=1, overrides=("max_generated_tokens=1", "logprobs.workspace_mib=1"))
    if whose == "stock":
        del cfg.logprobs
    recipe = (our_recipe if whose == "ours" else stock_recipe)(PPO)(cfg=cfg)
    recipe.setup(cfg=cfg)
    tokens = torch.randint(256, (2, 90))
    with torch.no_grad(), Largest() as generating:
        trajectory = recipe.generate_trajectory(tokens)
    zeros = torch.zeros_like(trajectory.logprobs)
    with Largest() as stepping:
        recipe.ppo_step(trajectory, zeros + 1, zeros + 1, tokens.shape[1])
    recipe.cleanup()
    assert (generating.elements >= 2 * 90 * VOCABULARY) == (whose == "stock")
    assert (stepping.elements >= 2 * 91 * VOCABULARY) == (whose == "stock")


@pytest.mark.parametrize("cached", [True, False])
def test_generation_keeps_hidden_states_in_place_of_logits(runs, cached):
    """Of as many tokens, which are those that torchtune draws with the same seed."""
    cfg = runs.config(tied=False, overrides=(f"enable_kv_cache={cached}",))
    prompts = torch.randint(1, 256, (2, 9))
    made = {}
    for recipe_class in (our_recipe(PPO), stock_recipe(PPO)):
        recipe = recipe_class(cfg=cfg)
        recipe.setup(cfg=cfg)
        with recipe.cache_ctx_manager(cached, decoder_max_seq_len=9 + 6):
            tokens, logits = generation.generate(
                recipe._policy_model, prompts, max_generated_tokens=6, temperature=0.7, rng=recipe._rng
            )
        recipe.cleanup()
        made[recipe_class] = tokens, logits, rlhf.logits_to_logprobs(logits, tokens[:, 9:], 0.7)
    (tokens, to_come, logprobs), (stock_tokens, logits, stock_logprobs) = made.values()
    assert torch.equal(tokens, stock_tokens)
    assert to_come._hidden.shape == (2, 6, SIZES["embed_dim"])
    assert to_come.shape == logits.shape == (2, 6, VOCABULARY)
    torch.testing.assert_close(logprobs, stock_logprobs, rtol=1e-5, atol=1e-5)


def test_generation_allocates_the_logits_of_one_position(runs, tmp_path):
    """By the allocator's record. torchtune's: of all positions, twice while it joins the last one's to the others."""
    rows, prompt, generated, vocabulary = 2, 9, 64, 2000
    cfg = runs.config(tied=False, overrides=(f"policy_model.vocab_size={vocabulary}",))
    wide = llama3_2(**SIZES | {"vocab_size": vocabulary}, tie_word_embeddings=False)
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    for checkpointer in (cfg.checkpointer, cfg.ref_policy_checkpointer):
        checkpointer.checkpoint_dir, checkpointer.checkpoint_files = str(tmp_path), ["wide.pt"]
    prompts = torch.randint(1, 256, (rows, prompt))

    def measured(recipe) -> Usage:
        recipe.setup(cfg=cfg)
        made = []

        def generate() -> None:
            made.extend(
                generation.generate(
                    recipe._policy_model, prompts, max_generated_tokens=generated, temperature=0.7, rng=recipe._rng
                )
            )

        with recipe.cache_ctx_manager(True, decoder_max_seq_len=prompt + generated):
            used = usage(generate, torch.device("cpu"), interpreted=False)
        recipe.cleanup()
        return used

    ours, stock = (measured(recipe_of(PPO)(cfg=cfg)) for recipe_of in (our_recipe, stock_recipe))
    float32 = 4
    position = rows * vocabulary * float32
    states = rows * generated * SIZES["embed_dim"] * float32
    assert stock.kept >= generated * position
    assert stock.peak >= (2 * generated - 1) * position
    # Tokens and masks beside hidden states; and what sampling makes of one position: its scaling, probabilities, draws.
    assert ours.kept < states + position
    assert ours.peak < 2 * states + 6 * position


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss._component_=torchtune_lce.LinearCrossEntropyLoss"], "loss must be torchtune's own"),
        (["logprobs._component_=torch.nn.Identity"], "logprobs must be torchtune_lce.LinearTokenLogprobs"),
        (["logprobs.impl=fast"], "impl must be one of"),
        (["temperature=0"], "temperature must be > 0"),
        (["logprobs.logit_scale=2"], "logprobs.logit_scale must be left out, .* got 2"),
        (["logprobs.softcap=30.0"], "logprobs.softcap must be left out, .* got 30.0"),
    ],
    ids=["loss", "another class", "impl", "temperature", "logit_scale", "softcap"],
)
def test_misuse_is_told_before_anything_is_loaded(runs, overrides, message):
    cfg = runs.config(tied=True, overrides=(*overrides, "checkpointer.checkpoint_files=[missing.pt]"))
    with pytest.raises((TypeError, ValueError), match=message):
        our_recipe(PPO)(cfg=cfg).setup(cfg=cfg)


def test_a_reference_of_another_vocabulary_is_told_before_models_are_built(runs, tmp_path):
    cfg = runs.config(tied=True)
    cfg.checkpointer.checkpoint_dir = str(tmp_path)
    cfg.ref_policy_checkpointer.checkpoint_dir = str(tmp_path)
    weights = build_model(tied=True).state_dict()
    torch.save(weights, tmp_path / "tied.pt")
    weights["tok_embeddings.weight"] = torch.zeros(600, SIZES["embed_dim"])
    (tmp_path / "other").mkdir()
    torch.save(weights, tmp_path / "other" / "tied.pt")
    # Going on from a checkpoint, torchtune lets the two differ.
    recipe = our_recipe(PPO)(cfg=cfg)
    cfg.ref_policy_checkpointer.checkpoint_dir = str(tmp_path / "other")
    recipe._setup_checkpointers = lambda *sections: [config.instantiate(s) for s in sections]
    with pytest.raises(ValueError, match="same vocabulary, got 512 embeddings in checkpointer's weights and 600 in"):
        recipe.setup(cfg=cfg)
    assert not hasattr(recipe, "_policy_model")


def test_a_tokenizer_larger_than_the_policy_is_told_before_anything_is_generated(runs):
    cfg = runs.config(tied=True)
    cfg.tokenizer.special_tokens["<|begin_of_text|>"] = VOCABULARY + 8
    with pytest.raises(ValueError, match="tokens must be less than 512, .* got 520: .* larger tokenizer"):
        train(our_recipe(PPO), cfg)


def test_logits_to_come_know_what_recipes_do_with_logits():
    """And say so of anything else; by a factor, not on hidden states."""
    torch.manual_seed(0)
    model = build_model(tied=False)
    tokens = torch.randint(VOCABULARY, (2, 7))
    logits = model(tokens)
    logprobs = LinearTokenLogprobs(impl="reference")
    give_logits_to_come(model, logprobs)
    to_come = model(tokens)
    assert to_come.shape == logits.shape
    for temperature in (1.0, 0.7, 2):
        expected = rlhf.logits_to_logprobs(logits[:, 2:-1], tokens[:, 3:], temperature)
        made = rlhf.logits_to_logprobs(rlhf.truncate_sequence_for_logprobs(to_come, 3), tokens[:, 3:], temperature)
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(made.sum(), model.output.weight)[0],
            torch.autograd.grad(expected.sum(), model.output.weight, retain_graph=True)[0],
            rtol=1e-4,
            atol=1e-5,
        )
        to_come = model(tokens)
    torch.testing.assert_close(to_come[:, -1].clone(), logits[:, -1])
    torch.testing.assert_close((to_come[:, -1] / 2).clone(), logits[:, -1] / 2)
    with logprobs.logits():
        assert torch.equal(model(tokens), logits)
    for wrong in (
        lambda: to_come[..., 0],
        lambda: to_come[:, :, :5],
        lambda: to_come[torch.tensor([0])],
        lambda: to_come.clone(),
        lambda: to_come.unsqueeze(-1),
        lambda: torch.cat([to_come, to_come], -1),
        lambda: torch.cat([to_come, to_come / 2], 1),
        lambda: torch.cat([to_come, logits], 1),
        lambda: to_come / 0,
        lambda: to_come * math.nan,
        lambda: to_come * tokens,
        lambda: torch.nn.functional.log_softmax(to_come, dim=1),
        lambda: torch.gather(to_come, 2, tokens.unsqueeze(-1)),
        lambda: torch.softmax(to_come, -1),
        lambda: torch.nn.functional.log_softmax(to_come, dim=-1) / 2,
    ):
        with pytest.raises(TypeError, match="logits are not there for"):
            wrong()
