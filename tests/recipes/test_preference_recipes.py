"""Our DPO recipes beside torchtune's own, both really run: the same losses and metrics step by step."""

from pathlib import Path

import pytest
from tiny_models import LORA_DPO, our_recipe, stock_recipe, train
from tiny_preferences import METRICS, RSO_LOSS, logged_metrics, preference_config, write_preference_assets

# Of float32: both sum the same products in another order.
ROUNDING = 1e-5


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

    def config(self, **settings):
        return preference_config(self.assets, self.output(), LORA_DPO, **settings)

    def ours(self, **settings) -> Path:
        return self._run(our_recipe(LORA_DPO), self.config(**settings))

    def stock(self, *, overrides=(), **settings) -> Path:
        key = (tuple(overrides), *settings.items())
        if key not in self._stock:
            self._stock[key] = self._run(stock_recipe(LORA_DPO), self.config(overrides=overrides, **settings))
        return self._stock[key]

    @staticmethod
    def _run(recipe, cfg) -> Path:
        train(recipe, cfg)
        return Path(cfg.output_dir)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("preferences"))


def assert_equal_steps(ours: Path, stock: Path, steps: int = 10) -> None:
    ours, stock = logged_metrics(ours), logged_metrics(stock)
    assert len(stock["loss"]) == steps
    # LoRA starts as the reference does, and warms up from a rate of 0.
    assert len(set(stock["loss"])) >= steps - 1, "stock's losses must change, or equality says nothing"
    for name in ("loss", *METRICS):
        assert ours[name] == pytest.approx(stock[name], rel=ROUNDING, abs=ROUNDING), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("loss", [{}, {"loss": RSO_LOSS}])
def test_steps_equal_stock(runs, tied, loss):
    assert_equal_steps(runs.ours(tied=tied, **loss), runs.stock(tied=tied, **loss))
