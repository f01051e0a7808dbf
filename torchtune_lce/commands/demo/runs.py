"""The runs of a demo as ``tune run`` commands."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from omegaconf import OmegaConf

from torchtune_lce.commands.shared import recipe_runs
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.recipe_runs import LOG, STOCK_LOSS, Result, read_log

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
METHOD_TITLES = {"lora": "LoRA", "full": "full", "lora_dpo": "LoRA DPO"}
# By --method; each method runs with torchtune's loss and with ours.
DEMOS = {"finetune": ("lora", "full"), "dpo": ("lora_dpo",)}


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
    """One run of a recipe. ``ours`` says which loss, or log-probabilities, and therefore whose recipe."""

    method: str  # a key of METHOD_TITLES
    ours: bool

    @property
    def title(self) -> str:
        whose = "linear" if self.ours else "torchtune's"
        return f"{METHOD_TITLES[self.method]}, {whose} {'log-probabilities' if self.prefers else 'loss'}"

    @property
    def prefers(self) -> bool:
        """Whether it learns from pairs; the loss is torchtune's then in any case."""
        return self.method == "lora_dpo"

    @property
    def folder(self) -> str:
        return f"runs/{self.method}_{'lce' if self.ours else 'stock'}"

    def command(self, setting: Setting) -> list[str]:
        """The command line, to be started in the demo's folder."""
        recipe = f"{self.method}_{'' if self.prefers else 'finetune_'}single_device"
        if self.prefers:
            loss = [f"logprobs.impl={setting.impl}"] if self.ours else []  # a section that torchtune's does not read
        else:
            loss = [f"loss.impl={setting.impl}"] if self.ours else [f"loss={STOCK_LOSS}", "~loss.impl"]
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
            *loss,
        ]


def runs(demo: str) -> list[Run]:
    """Of a key of :data:`DEMOS`; torchtune's before ours of each method."""
    return [Run(method, ours) for method in DEMOS[demo] for ours in (False, True)]


def start(run: Run, setting: Setting, output: Path) -> Popen:
    """A process for :func:`execute`; see :func:`recipe_runs.start`."""
    return recipe_runs.start(run.command(setting), output, output / run.folder / LOG)


def execute(run: Run, setting: Setting, output: Path, on_step: Callable[[int], None], process: Popen) -> Result:
    """Runs it inside ``output``, in the ``process`` that :func:`start` gave, and calls ``on_step`` with the number of
    steps so far.

    Raises CommandError, with the end of what it printed, if it fails.
    """
    try:
        log = output / run.folder / LOG
        return recipe_runs.run(run.command(setting), output, setting.steps, on_step, log, process=process)
    except recipe_runs.RunFailed as error:
        raise CommandError(f"{run.title}: {error}") from error


def sizes(run: Run, output: Path) -> list[float] | None:
    """Of each step of a run that learns from pairs, what its loss is a difference of: log-probabilities of whole
    answers, times DPO's beta. None of any other run.
    """
    if not run.prefers:
        return None
    beta = OmegaConf.load(CONFIGS / f"{run.method}_single_device.yaml").loss.beta
    records = read_log(output / run.folder / LOG)
    return [beta * (abs(record["log_probs/chosen"]) + abs(record["log_probs/rejected"])) for record in records]
