"""Our DPO recipe beside torchtune's own, both really run: the same losses, metrics and adapters."""

import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from interpreted import INTERPRETED
from omegaconf import OmegaConf
from tiny_models import LORA_DPO, SIZES, VOCABULARY, build_model, our_recipe, stock_recipe, train
from tiny_preferences import (
    METRICS,
    ROUNDING,
    RSO_LOSS,
    assert_equal_checkpoints,
    assert_equal_steps,
    logged_metrics,
    on_output,
    preference_config,
    saved,
    write_pairs,
    write_preference_assets,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.modules.peft import DoRALinear

from torchtune_lce import LinearTokenLogprobs
from torchtune_lce.training.preference_binding import check_same_vocabulary, make_logprobs

# Of what a tensor of one step may hold at the most; the smallest that there is.
WORKSPACE_MIB = 1


class Runs:
    """Runs recipes on one set of assets; the stock run that several tests compare with runs once."""

    def __init__(self, folder: Path):
        self.assets = folder / "assets"
        self._folder = folder
        self._stock = {}
        self._count = 0
        write_preference_assets(self.assets)

    def output(self) -> Path:
        self._count += 1
        return self._folder / f"run{self._count}"

    def config(self, *, tied=True, lora_on_output=False, **settings):
        cfg = preference_config(self.assets, self.output(), LORA_DPO, tied=tied, **settings)
        return on_output(cfg) if lora_on_output else cfg

    def ours(self, **settings) -> Path:
        return self.run(our_recipe, self.config(**settings))

    def stock(self, **settings) -> Path:
        key = str(sorted(settings.items()))
        if key not in self._stock:
            self._stock[key] = self.run(lambda method: with_magnitudes(stock_recipe(method)), self.config(**settings))
        return self._stock[key]

    def resumed(self, recipe, finished: Path, *overrides: str) -> Path:
        """The second epoch of a run of two, from a copy of what it had written after its first."""
        output = self.output()
        shutil.copytree(finished, output, ignore=shutil.ignore_patterns("epoch_1", "steps.txt"))
        cfg = self.config(steps=4, overrides=["epochs=2", "resume_from_checkpoint=True", *overrides])
        cfg.output_dir = cfg.checkpointer.output_dir = cfg.metric_logger.log_dir = str(output)
        return self.run(recipe, cfg)

    @staticmethod
    def run(recipe, cfg) -> Path:
        train(recipe(LORA_DPO), cfg)
        return Path(cfg.output_dir)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("preferences"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("loss", [{}, {"loss": RSO_LOSS}], ids=["DPO", "RSO"])
def test_ten_steps_and_checkpoint_equal_stock(runs, tied, loss):
    ours, stock = runs.ours(tied=tied, **loss), runs.stock(tied=tied, **loss)
    assert_equal_steps(ours, stock)
    assert_equal_checkpoints(ours, stock)


def with_magnitudes(recipe_class: type) -> type:
    """torchtune's recipe, which leaves DoRA's magnitudes as they were in memory, with what its fine-tuning one does."""

    class WithMagnitudes(recipe_class):
        def _setup_model(self, *args, **settings):
            model = super()._setup_model(*args, **settings)
            for module in model.modules():
                if isinstance(module, DoRALinear):
                    module.initialize_dora_magnitude()
            return model

    return WithMagnitudes


@pytest.mark.parametrize(
    "overrides",
    [
        ["enable_activation_checkpointing=True"],
        ["model.use_dora=True"],
        ["loss.beta=0.2", "loss.label_smoothing=0.1", "gradient_accumulation_steps=1", "batch_size=3"],
    ],
    ids="-".join,
)
def test_variants_equal_stock(runs, overrides):
    ours, stock = runs.ours(steps=4, overrides=overrides), runs.stock(steps=4, overrides=overrides)
    assert_equal_steps(ours, stock, steps=4)
    assert_equal_checkpoints(ours, stock)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_adapter_on_the_output(runs, dora, dropout):
    """The policy's alone: the reference is the same model without it."""
    settings = {
        "tied": False,
        "lora_on_output": True,
        "steps": 4,
        "overrides": [f"model.use_dora={dora}", f"model.lora_dropout={dropout}"],
    }
    ours, stock = runs.ours(**settings), runs.stock(**settings)
    assert_equal_steps(ours, stock, steps=4)
    assert_equal_checkpoints(ours, stock)
    adapters = saved(ours)
    assert ("output.magnitude" in adapters) == dora
    assert adapters["output.lora_b.weight"].abs().max() > 1e-3


def test_compile_equals_stock(runs, monkeypatch):
    """The backend that torchtune reads from here: what is traced is the same, and no C++ compiler is needed."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    settings = {"steps": 4, "overrides": ["compile=True"]}
    assert_equal_steps(runs.ours(**settings), runs.stock(**settings), steps=4)


def test_bfloat16_within_its_rounding(runs):
    """Of sums over tens of tokens, of which stock rounds each one's logits."""
    ours, stock = (logged_metrics(run(steps=4, overrides=["dtype=bf16"])) for run in (runs.ours, runs.stock))
    for name in ("log_probs/chosen", "log_probs/rejected"):
        assert ours[name] == pytest.approx(stock[name], rel=torch.finfo(torch.bfloat16).eps / 4), name


@pytest.mark.parametrize("impl", ["reference", "chunked", pytest.param("cce_exact", marks=INTERPRETED)])
def test_impl_comes_from_the_config(runs, caplog, impl):
    """Of a section that the config has not, by the settings that differ from its defaults."""
    caplog.set_level(logging.INFO)
    settings = {"steps": 2, "overrides": ["batch_size=1"]}
    ours = runs.ours(steps=2, overrides=["batch_size=1", f"logprobs.impl={impl}"])
    assert_equal_steps(ours, runs.stock(**settings), steps=2)
    said = [record.getMessage() for record in caplog.records if "Token log-probabilities run" in record.getMessage()]
    assert len(said) == 1
    assert f"impl '{impl}' (set: '{impl}')" in said[0]


def test_there_is_no_loss_whose_statistics_it_could_log(runs, caplog):
    runs.ours(steps=2, overrides=["batch_size=1", "log_loss_stats=True"])
    assert "The key log_loss_stats does nothing here: it is of torchtune_lce.LinearCrossEntropyLoss" in caplog.text


def test_a_section_with_all_of_its_settings(runs):
    cfg = runs.config(steps=4, overrides=["entries=64"])
    cfg.logprobs = {
        "_component_": "torchtune_lce.LinearTokenLogprobs",
        "ignore_index": -100,
        "impl": "chunked",
        "softcap": None,
        "logit_scale": 1.0,
        "filter_eps": None,
        # As any other section may, it takes what stands elsewhere in the config.
        "workspace_mib": "${entries}",
        "check_targets": True,
    }
    assert_equal_steps(runs.run(our_recipe, cfg), runs.stock(steps=4), steps=4)
    assert make_logprobs(cfg)._options.workspace_mib == 64


@pytest.mark.parametrize("section", [None, {}], ids=["null", "empty"])
def test_an_empty_section_has_the_defaults(runs, section):
    cfg = runs.config()
    expected = make_logprobs(cfg)
    cfg.logprobs = section
    assert make_logprobs(cfg)._options == expected._options
    assert make_logprobs(cfg).impl == expected.impl == "auto"


def test_resume(runs):
    """Two epochs, cut after the first: ours and stock go on alike, from what either of them wrote."""
    settings = {"steps": 4, "overrides": ["epochs=2"]}
    ours, stock = runs.ours(**settings), runs.stock(**settings)
    assert_equal_steps(ours, stock, steps=8)
    expected = runs.resumed(stock_recipe, stock)
    for recipe, finished in ((our_recipe, ours), (stock_recipe, ours), (our_recipe, stock)):
        resumed = runs.resumed(recipe, finished)
        assert_equal_steps(resumed, expected, steps=4)
        for name, weight in saved(expected, epoch=1).items():
            torch.testing.assert_close(saved(resumed, epoch=1)[name], weight, rtol=1e-4, atol=2e-5)


def test_resumed_dora_has_its_magnitudes(runs):
    """The first loss is that of the checkpoint's weights on the second epoch's first batches."""
    dora = "model.use_dora=True"
    finished = runs.ours(steps=4, overrides=["epochs=2", dora])
    resumed = logged_metrics(runs.resumed(our_recipe, finished, dora))
    assert resumed["loss"][0] == pytest.approx(logged_metrics(finished)["loss"][4], rel=ROUNDING)


class Largest(TorchDispatchMode):
    """``entries``: of the largest tensor that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, operation, _, arguments=(), settings=None):
        result = operation(*arguments, **(settings or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.entries = max([self.entries, *(x.numel() for x in tensors)])
        return result


@pytest.mark.parametrize("lora_on_output", [False, True], ids=["frozen head", "LoRA on it"])
def test_a_step_holds_no_logits(runs, tmp_path, lora_on_output):
    """With logits larger than the weight and the workspace, nothing that is made is larger than these."""
    vocabulary = 8192
    torch.save(
        llama3_2(**SIZES | {"vocab_size": vocabulary}, tie_word_embeddings=False).state_dict(), tmp_path / "x.pt"
    )
    overrides = [f"model.vocab_size={vocabulary}", f"logprobs.workspace_mib={WORKSPACE_MIB}", "batch_size=4"]
    overrides += [f"checkpointer.checkpoint_dir={tmp_path}", "checkpointer.checkpoint_files=[x.pt]"]
    overrides += ["gradient_accumulation_steps=1", "save_adapter_weights_only=True"]
    largest = {}
    for recipe_of in (our_recipe, stock_recipe):
        cfg = runs.config(tied=False, lora_on_output=lora_on_output, steps=1, overrides=overrides)
        recipe = recipe_of(LORA_DPO)(cfg=cfg)
        recipe.setup(cfg=cfg)
        with Largest() as seen:
            recipe.train()
        recipe.cleanup()
        largest[recipe_of] = seen.entries
    weight = vocabulary * SIZES["embed_dim"]
    assert largest[our_recipe] <= weight
    # 8 rows of dozens of tokens each.
    assert largest[stock_recipe] > 4 * weight


TRUNCATED = ("Say nothing at all. " * 20, "nothing", "no")
ANSWERED = [("Say one", "one, of course", "no"), ("Say two", "two and a half", "3"), ("Say three", "three", "never")]


def on_pairs(runs, name: str, pairs: list, **overrides) -> dict:
    data = write_pairs(runs.assets / f"{name}.jsonl", pairs)
    overrides = {"shuffle": False, "gradient_accumulation_steps": 1, "dataset.data_files": data, **overrides}
    return {"steps": len(pairs), "overrides": [f"{key}={value}" for key, value in overrides.items()]}


@pytest.mark.parametrize("batch_size", [1, 2], ids=["every pair of a step", "a pair of two"])
def test_pairs_without_labels_are_told_of_once_and_count_as_stocks(runs, caplog, batch_size):
    """A truncated question's answers have log-probability 0, and no gradient, in both."""
    pairs = [ANSWERED[0], TRUNCATED, ANSWERED[1], TRUNCATED, TRUNCATED, ANSWERED[2]]
    settings = on_pairs(runs, f"unlabelled{batch_size}", pairs, batch_size=batch_size)
    settings["steps"] //= batch_size
    ours = runs.ours(**settings)
    said = [record for record in caplog.records if "has no label" in record.getMessage()]
    assert len(said) == 1
    assert said[0].levelno == logging.WARNING
    stock = runs.stock(**settings)
    ours_logged, stock_logged = logged_metrics(ours), logged_metrics(stock)
    for name in ("loss", *METRICS):
        assert ours_logged[name] == pytest.approx(stock_logged[name], rel=ROUNDING, abs=ROUNDING), name
    if batch_size == 1:
        assert ours_logged["log_probs/chosen"][1] == ours_logged["log_probs/rejected"][1] == 0
    assert_equal_checkpoints(ours, stock)
    assert all(torch.isfinite(weight).all() for weight in saved(ours).values())


def test_pairs_without_labels_are_told_of_by_the_rank_that_has_them(runs, caplog):
    """Others have none to tell of."""
    torch.distributed.init_process_group("fake", store=torch.distributed.HashStore(), rank=1, world_size=2)
    try:
        runs.ours(**on_pairs(runs, "unlabelled_rank", [TRUNCATED, ANSWERED[0]], batch_size=1))
    finally:
        torch.distributed.destroy_process_group()
    assert len([record for record in caplog.records if "has no label" in record.getMessage()]) == 1


REFUSED = {
    "logprobs._component_=torchtune_lce.LinearCrossEntropyLoss": (
        "logprobs must be torchtune_lce.LinearTokenLogprobs, got torchtune_lce.LinearCrossEntropyLoss: leave "
    ),
    "logprobs=torchtune_lce.LinearTokenLogprobs": (
        "logprobs must be a section of settings, got torchtune_lce.LinearTokenLogprobs: leave it out for .* defaults, "
        "or give settings one by one, such as logprobs.impl=cce_exact"
    ),
    "logprobs.ignore_index=0": "logprobs.ignore_index must be -100, .* got 0",
    "logprobs.impl=ccee": "impl must be one of .* got 'ccee'",
    "logprobs.reduction=sum": "LinearTokenLogprobs takes no reduction, got sum: .* ~logprobs.reduction",
    "logprobs.label_smoothing=0.1": "LinearTokenLogprobs takes no label_smoothing, .* ~logprobs.label_smoothing",
    "logprobs.num_output_chunks=8": "LinearTokenLogprobs takes no num_output_chunks, .* ~logprobs.num_output_chunks",
    "loss._component_=torchtune_lce.LinearCrossEntropyLoss": (
        "loss must be torchtune's own in a preference recipe, such as torchtune.rlhf.loss.DPOLoss, "
        "got torchtune_lce.LinearCrossEntropyLoss, .* the section logprobs"
    ),
    "loss._component_=torchtune_lce.LinearTokenLogprobs": (
        "loss must be torchtune's own in a preference recipe, .* got torchtune_lce.LinearTokenLogprobs, .* logprobs"
    ),
    "loss._component_=torchtune_lce.LinearForwardKLLoss": (
        "loss must be torchtune's own in a preference recipe, .* got torchtune_lce.LinearForwardKLLoss, .* logprobs"
    ),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_refused_before_anything_is_loaded(runs, setting):
    cfg = runs.config(overrides=[setting, "checkpointer.checkpoint_files=[missing.pt]"])
    with pytest.raises((TypeError, ValueError), match=f"^{REFUSED[setting]}"):
        train(our_recipe(LORA_DPO), cfg)


@pytest.mark.parametrize("loss", ["LinearCrossEntropyLoss", "LinearTokenLogprobs", "LinearForwardKLLoss"])
def test_stocks_recipe_with_our_loss_is_told_what_to_do(runs, monkeypatch, loss):
    """It calls what it takes for a preference loss with four log-probabilities a pair."""
    monkeypatch.setattr(sys, "argv", [sys.modules[stock_recipe(LORA_DPO).__module__].__file__])
    cfg = runs.config(overrides=[f"loss._component_=torchtune_lce.{loss}"])
    with pytest.raises(TypeError, match=f"^loss must be .* torchtune.rlhf.loss.DPOLoss, got {loss}") as error:
        train(stock_recipe(LORA_DPO), cfg)
    assert "tune run torchtune_lce/recipes/lora_dpo_single_device.py" in str(error.value)


def test_a_tokenizer_larger_than_the_head_is_named(runs, tmp_path):
    """Before the model's embedding, which cannot say whose fault it is, takes the tokens."""
    cfg = runs.config()
    small = {"vocab_size": 200}
    torch.save(llama3_2(**SIZES | small, tie_word_embeddings=True).state_dict(), tmp_path / "small.pt")
    cfg = OmegaConf.merge(cfg, {"model": small, "checkpointer": {"checkpoint_dir": str(tmp_path)}})
    cfg.checkpointer.checkpoint_files = ["small.pt"]
    with pytest.raises(
        ValueError, match=r"^tokens must be less than 200, .* a larger tokenizer, which has 266 entries"
    ):
        train(our_recipe(LORA_DPO), cfg)


def test_models_of_different_vocabularies_are_refused():
    """In torchtune's own recipes both are of one section of the config, and its strict loading refuses another's."""
    policy, reference = LinearTokenLogprobs(), LinearTokenLogprobs()
    policy.set_model_output(build_model())
    check_same_vocabulary(policy)
    reference.set_model_output(llama3_2(**SIZES | {"vocab_size": 600}))
    with pytest.raises(ValueError, match="same vocabulary, got a policy whose output has 512 rows, and 600 in the"):
        check_same_vocabulary(policy, reference)


def test_a_quantised_output_is_refused(runs):
    from torchao.dtypes.nf4tensor import to_nf4

    cfg = runs.config(tied=False)
    recipe = our_recipe(LORA_DPO)(cfg=cfg)

    class Quantised(type(recipe)):
        def _setup_model(self, *args, **settings):
            model = super()._setup_model(*args, **settings)
            weight = to_nf4(torch.randn(VOCABULARY, 64), block_size=64, scaler_block_size=256)
            model.output.weight = torch.nn.Parameter(weight, requires_grad=False)
            return model

    with pytest.raises(TypeError, match="^weight of the model's output must be a plain tensor, got NF4Tensor: leave"):
        train(Quantised, cfg)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides",
    [["enable_activation_checkpointing=True", "enable_activation_offloading=True"], ["compile=True"]],
    ids=["offloading", "compile"],
)
def test_on_a_card_equals_stock(runs, overrides):
    """Offloading, which torchtune refuses on a CPU, among the rest."""
    settings = {"steps": 4, "overrides": ["device=cuda", *overrides]}
    assert_equal_steps(runs.ours(**settings), runs.stock(**settings), steps=4)
