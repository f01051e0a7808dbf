"""One fine-tune for each loss: its config, its command, and what it left behind."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from torchtune_lce.commands.shared import config_reading, distillation, preferences, recipe_runs, records
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.loss_choices import MOST_SEED, STOCK, LossChoice
from torchtune_lce.commands.shared.recipe_choice import TAKES
from torchtune_lce.commands.shared.recipe_runs import LOG, Result

CONFIG, RESULT = "config.yaml", "result.json"
OK, OUT_OF_MEMORY = "ok", "out of memory"
# Set by the comparison itself.
_RESERVED = (
    "compile",
    "epochs",
    "log_every_n_steps",
    "max_steps_per_epoch",
    "metric_logger",
    "output_dir",
    "resume_from_checkpoint",
)
_RESERVED_OF_LOSSES = ("loss", "loss._component_", "loss.impl", "kd_loss.impl", "logprobs.impl")
_NEEDED = ("model._component_", "loss._component_", "checkpointer.model_type")
_CHECKPOINTERS = "torchtune_lce.commands.compare.checkpointers."


@dataclass(frozen=True)
class Outcome:
    """Of one loss: ``status`` is :data:`OK`, :data:`OUT_OF_MEMORY`, or that it failed; a result only if it is OK."""

    status: str
    result: Result | None
    details: str = ""  # of a failure


def read_config(name: str, overrides: list[str]) -> DictConfig:
    """See :func:`config_reading.read`; raises CommandError also for a setting that the comparison makes itself."""
    for override in overrides:
        key = override.lstrip("~").partition("=")[0]
        if key.partition(".")[0] in _RESERVED or key in _RESERVED_OF_LOSSES:
            raise CommandError(f"{key} is set by tune-lce compare: see its --losses, --steps and --output")
    return config_reading.read(name, overrides)


def check(name: str, config: DictConfig) -> None:
    """Raises CommandError for a config without what every run reads, or with settings that its losses do not take."""
    config_reading.check_sections(name, config, _NEEDED, TAKES)
    config_reading.check_positive("batch_size", config.get("batch_size"))
    config_reading.check_positive("gradient_accumulation_steps", config.get("gradient_accumulation_steps", 1))
    seed = config.get("seed")
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed <= MOST_SEED):
        raise CommandError(f"seed must be null or a whole number from 0 to {MOST_SEED}, got {seed!r}")
    config_reading.check_settings(config, ("loss", "kd_loss"))
    if preferences.prefers(config):
        preferences.check_logprobs(config)


@dataclass(frozen=True)
class Run:
    """One loss's fine-tune inside ``folder``, which is its own."""

    choice: LossChoice
    recipe: str  # as in :func:`torchtune_lce.commands.shared.recipe_choice.recipe_for`
    config: DictConfig
    devices: int | None
    folder: Path
    steps: int
    warmup: int
    environment: dict
    at_once: int = 1  # runs that share the device

    def command(self) -> list[str]:
        launcher = [] if self.devices is None else ["--nproc_per_node", str(self.devices)]
        # torchtune's own loss in torchtune's own recipe.
        recipe = self.recipe if self.choice.kind == STOCK else f"torchtune_lce/recipes/{self.recipe}.py"
        return ["tune", "run", *launcher, recipe, "--config", str(self.folder / CONFIG)]

    def finished(self) -> Outcome | None:
        """What an earlier call with the same settings in the same environment found, if it came to its end."""
        stored = records.read(self.folder / RESULT)
        if stored is None or stored["key"] != self._key():
            return None
        result = None
        if stored["status"] == OK:
            # Read again: what is warm-up may be asked differently.
            logged = recipe_runs.read_log(self.folder / LOG)
            if len(logged) != self.steps:
                return None
            result = recipe_runs.summarise(logged, stored["result"]["peak_bytes"], self.warmup)
        return Outcome(stored["status"], result)

    def start(self) -> subprocess.Popen:
        """A process for :meth:`execute`, ahead of it; see :func:`recipe_runs.start`."""
        return recipe_runs.start(self.command(), Path.cwd(), self.folder / LOG)

    def execute(self, on_step: Callable[[int], None], process: subprocess.Popen | None = None) -> Outcome:
        """Runs it from the beginning, and remembers a result, out of memory among them; nothing else."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (RESULT, LOG):
            (self.folder / name).unlink(missing_ok=True)
        OmegaConf.save(self.config, self.folder / CONFIG)
        try:
            command, log = self.command(), self.folder / LOG
            result = recipe_runs.run(command, Path.cwd(), self.steps, on_step, log, self.warmup, process)
            outcome = Outcome(OK, result)
        except recipe_runs.RunFailed as error:
            if not error.out_of_memory:
                return Outcome("failed", None, str(error))
            outcome = Outcome(OUT_OF_MEMORY, None)
        stored = {"key": self._key(), "status": outcome.status, "result": outcome.result and asdict(outcome.result)}
        records.write(stored, self.folder / RESULT)
        return outcome

    def _key(self) -> dict:
        """All that a result depends on, as JSON gives it back."""
        key = {
            "config": OmegaConf.to_container(self.config),
            "command": self.command(),
            "environment": self.environment,
            "at_once": self.at_once,
        }
        return json.loads(json.dumps(key))


def prepared(
    config: DictConfig,
    choice: LossChoice,
    folder: Path,
    steps: int,
    random_weights: bool,
    trained_weights: dict | None = None,
) -> DictConfig:
    """The config of one loss's run, on random weights, those that a checkpointer with the settings ``trained_weights``
    loads, or those of the config's checkpoint.
    """
    config = config.copy()
    if preferences.prefers(config):
        config.logprobs = preferences.section(choice, config.get("logprobs"))
    else:
        config.loss = choice.section(config.loss)
    config.compile = choice.compiled
    config.output_dir = str(folder)
    config.metric_logger = {
        "_component_": "torchtune.training.metric_logging.DiskLogger",
        "log_dir": str(folder),
        "filename": LOG,
    }
    config.log_every_n_steps = 1
    config.log_peak_memory_stats = True
    config.epochs = 1
    config.max_steps_per_epoch = steps
    config.resume_from_checkpoint = False
    if "lora_rank" in config.model:
        config.save_adapter_weights_only = True  # nothing is saved, and merging takes time
    if choice.seed is not None:
        config.seed = choice.seed
    elif config.get("seed") is None:
        config.seed = 0  # all losses see the same
    # torchtune's recipes look at the model_type themselves.
    checkpointer = {"model_type": config.checkpointer.model_type}
    if random_weights:
        checkpointer |= _random_weights("model", config.seed)
        if "ref_checkpointer" in config:
            # The policy as it was, as in any run.
            config.ref_checkpointer = checkpointer
    elif trained_weights:
        checkpointer |= trained_weights
    else:
        checkpointer["_component_"] = f"{_CHECKPOINTERS}LoadOnly"
        checkpointer["checkpointer"] = config.checkpointer
    config.checkpointer = checkpointer
    if distillation.distils(config):
        config.kd_loss = distillation.section(choice, config.kd_loss)
        if random_weights:
            # Not the student's numbers: a teacher of the same shapes would have nothing to teach.
            config.teacher_checkpointer = _random_weights("teacher_model", config.seed + 1)
    return config


def _random_weights(model: str, seed: int) -> dict:
    """The section of a checkpointer for the config's section ``model``."""
    return {"_component_": f"{_CHECKPOINTERS}RandomWeights", "model": f"${{{model}}}", "seed": seed}
