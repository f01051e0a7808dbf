"""Our PPO recipe beside torchtune's own, both really run: the same trajectories, losses and metrics step by step."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import PPO, VOCABULARY, build_model, our_recipe, stock_recipe, train
from tiny_ppo import METRICS, logged_metrics, ppo_config, write_ppo_assets
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune import rlhf

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
            # A tenth of what one of forty steps moves an entry by.
            torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-4)


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
def test_a_step_makes_no_logits(runs, whose):
    """Between generating and the optimizer nothing is as large as the logits of the rows that it sees."""
    # More entries than what else a tiny model makes of a token, and responses of a token.
    cfg = runs.config(tied=True, steps=1, overrides=("max_generated_tokens=1", "logprobs.workspace_mib=1"))
    if whose == "stock":
        del cfg.logprobs
    recipe = (our_recipe if whose == "ours" else stock_recipe)(PPO)(cfg=cfg)
    recipe.setup(cfg=cfg)
    tokens = torch.randint(256, (2, 90))
    with torch.no_grad():
        trajectory = recipe.generate_trajectory(tokens)
    zeros = torch.zeros_like(trajectory.logprobs)
    with Largest() as largest:
        recipe.ppo_step(trajectory, zeros + 1, zeros + 1, tokens.shape[1])
    recipe.cleanup()
    logits = 2 * 91 * VOCABULARY
    assert (largest.elements >= logits) == (whose == "stock")


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
    with logprobs.logits():
        assert torch.equal(model(tokens), logits)
    for wrong in (
        lambda: to_come[..., 0],
        lambda: to_come[:, :, :5],
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
