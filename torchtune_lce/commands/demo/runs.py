"""The four fine-tunes as ``tune run`` commands."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchtune_lce.commands.shared import recipe_runs
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.recipe_runs import LOG, STOCK_LOSS, Result

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
METHOD_TITLES = {"lora": "LoRA", "full": "full"}


@dataclass(frozen=True)
class Setting:
    """What all runs of one demo have in common."""

    device: str
    dtype: str  # as in torchtune's configs: fp32 or bf16
    batch_size: int
    steps: int
    impl: str  # as asked for


@dataclass(frozen=True)
class Run:
    """One fine-tune. ``ours`` says which loss, and therefore whose recipe."""

    method: str  # a key of METHOD_TITLES
    ours: bool

    @property
    def title(self) -> str:
        loss = "linear" if self.ours else "torchtune's"
        return f"{METHOD_TITLES[self.method]}, {loss} loss"

    @property
    def folder(self) -> str:
        return f"runs/{self.method}_{'lce' if self.ours else 'stock'}"

    def command(self, setting: Setting) -> list[str]:
        """The command line, to be started in the demo's folder."""
        recipe = f"{self.method}_finetune_single_device"
        return [
            "tune",
            "run",
            f"torchtune_lce/recipes/{recipe}.py" if self.ours else recipe,
            "--config",
            str(CONFIGS / f"{self.method}_single_device.yaml"),
            f"output_dir={self.folder}",
            f"device={setting.device}",
            f"dtype={setting.dtype}",
            f"batch_size={setting.batch_size}",
            f"max_steps_per_epoch={setting.steps}",
            *([f"loss.impl={setting.impl}"] if self.ours else [f"loss={STOCK_LOSS}", "~loss.impl"]),
        ]


RUNS = tuple(Run(method, ours) for method in METHOD_TITLES for ours in (False, True))


def execute(run: Run, setting: Setting, output: Path, on_step: Callable[[int], None]) -> Result:
    """Runs it inside ``output`` and calls ``on_step`` with the number of steps so far.

    Raises CommandError, with the end of what it printed, if it fails.
    """
    try:
        return recipe_runs.run(run.command(setting), output, setting.steps, on_step, output / run.folder / LOG)
    except recipe_runs.RunFailed as error:
        raise CommandError(f"{run.title}: {error}") from error
