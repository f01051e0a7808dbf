"""The comparison from beginning to end."""

import math
import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torchtune.modules import TransformerDecoder

from torchtune_lce.commands.compare import report, runs
from torchtune_lce.commands.compare.demo_data import LEAST_VOCABULARY, DemoData
from torchtune_lce.commands.compare.identity_layers import first_layers
from torchtune_lce.commands.compare.runs import OK, OUT_OF_MEMORY, Outcome, Run
from torchtune_lce.commands.compare.trained_weights import (
    LAYERS,
    SECONDS_ELSEWHERE,
    SECONDS_ON_A_CARD,
    Learnt,
    TrainedWeights,
)
from torchtune_lce.commands.shared import distillation, environment, loss_choices, output_folder, preferences
from torchtune_lce.commands.shared.config_reading import training_device, training_dtype
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.process_queue import ProcessQueue
from torchtune_lce.commands.shared.random_weights import configured_model
from torchtune_lce.commands.shared.recipe_choice import recipe_for
from torchtune_lce.commands.shared.tables import print_table
from torchtune_lce.model.model_output import find_decoder

MARKER, DATA, WEIGHTS = ".tune-lce-compare", "data", "weights"
RESULTS, TABLE, PICTURE = "compare.json", "compare.md", "compare.png"


@dataclass(frozen=True)
class Settings:
    """The command line, read."""

    config: str
    overrides: list[str]
    losses: str | None
    steps: int
    warmup: int
    output: Path
    devices: int | None
    random_weights: bool
    demo_data: bool
    sequence: int
    vocabulary: int
    fresh: bool
    command: str
    jobs: int = 1
    trained_weights: bool = False
    train_seconds: float | None = None


def compare(settings: Settings) -> bool:
    """Runs what has not run yet, shows and writes the comparison; whether every run came to an end.

    Raises CommandError if it cannot run; what the arguments alone can tell is told before anything is written.
    """
    check_numbers(settings)
    config = runs.read_config(settings.config, settings.overrides)
    recipe = recipe_for(settings.config, config, settings.devices)
    runs.check(settings.config, config)
    dtype, device = training_dtype(config), training_device(config)
    on_card = device.type == "cuda"
    if on_card and not torch.cuda.is_available():
        raise CommandError(
            "the config's device is cuda, and there is none; give device=cpu dtype=fp32 behind the options"
        )
    choices = loss_choices.select(settings.losses, config.device, dtype)
    if distillation.distils(config):
        distillation.check(config, choices)
    if preferences.prefers(config):
        preferences.check(choices)
    if settings.demo_data:
        check_demo_data(config, settings.vocabulary, settings.sequence)
    if distillation.distils(config):
        distillation.check_vocabularies(*(configured_model(config, section) for section in ("model", "teacher_model")))
    check_trained_weights(config, settings)
    output = output_folder.claim(settings.output, MARKER, "an earlier comparison's")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    about = environment.describe(device)
    console.print(environment.in_words(about))
    console.print(f"{settings.config}, {recipe}; everything is written to {output}")
    if settings.demo_data:
        demo, config = with_demo_data(console, settings, config, output)
    learnt, checkpointer = None, None
    if settings.trained_weights:
        learnt, checkpointer = train_weights(console, settings, config, demo, output)
    waiting = []
    for choice in choices:
        folder = output / choice.name
        ready = runs.prepared(config, choice, folder, settings.steps, settings.random_weights, checkpointer)
        run = Run(choice, recipe, ready, settings.devices, folder, settings.steps, settings.warmup, about)
        waiting.append(replace(run, at_once=settings.jobs))
    outcomes = {}

    def on_outcome(run: Run, outcome: Outcome) -> None:
        outcomes[run.choice.name] = outcome
        # After each run: an interrupted comparison leaves what it had.
        write(settings, config, recipe, about, outcomes, on_card, output, learnt)

    # On a card a run begins with seconds of loading. On a CPU its steps would share that with the next one's imports.
    ahead = on_card and settings.jobs == 1
    run_all(console, waiting, settings.jobs, settings.fresh, ahead, on_outcome)
    print_table(console, report.table(outcomes, on_card))
    for note in report.notes(outcomes, settings.jobs, preferences.prefers(config)):
        console.print(note)
    console.print(f"Written: {output / RESULTS}, {output / TABLE}, {output / PICTURE}")
    return all(outcome.status in (OK, OUT_OF_MEMORY) for outcome in outcomes.values())


def check_numbers(settings: Settings) -> None:
    """Raises CommandError for a number of the command line that no comparison can have."""
    for option, value, least in (
        ("--warmup", settings.warmup, 0),
        ("--jobs", settings.jobs, 1),
        ("--nproc_per_node", settings.devices, 1),
        ("--sequence-length", settings.sequence, 2),
        ("--train-seconds", settings.train_seconds, 1),
    ):
        if value is not None and not least <= value < math.inf:
            raise CommandError(f"{option} must be at least {least}, got {value}")
    if settings.steps <= settings.warmup:
        raise CommandError(f"--steps must be more than the --warmup of {settings.warmup}, got {settings.steps}")
    if settings.vocabulary < LEAST_VOCABULARY:
        raise CommandError(
            f"--vocabulary must be at least {LEAST_VOCABULARY}, a byte's values and the special tokens, got "
            f"{settings.vocabulary}"
        )


def check_demo_data(config: DictConfig, vocabulary: int, sequence: int) -> None:
    """Raises CommandError for rows that the config's model cannot take."""
    sections = ("model", "teacher_model") if distillation.distils(config) else ("model",)
    decoders = [_decoder(config, section) for section in sections]
    entries = min(decoder.tok_embeddings.weight.shape[0] for decoder in decoders)
    longest = min(decoder.max_seq_len for decoder in decoders)
    if vocabulary > entries:
        raise CommandError(f"--vocabulary must be at most {entries}, the entries of the model's own, got {vocabulary}")
    if not 1 < sequence <= longest:
        raise CommandError(f"--sequence-length must be from 2 to {longest}, the model's own limit, got {sequence}")


def check_trained_weights(config: DictConfig, settings: Settings) -> None:
    """Raises CommandError for a fine-tune that cannot start from them, if it shall."""
    if not settings.trained_weights:
        if settings.train_seconds is not None:
            raise CommandError(f"--train-seconds are those of --trained-weights, got {settings.train_seconds:g} alone")
        return
    if not settings.demo_data:
        raise CommandError("--trained-weights need --demo-data: they learn the rest of its text")
    if distillation.distils(config) or preferences.prefers(config):
        raise CommandError("--trained-weights are for LoRA and full fine-tunes; take --random-weights")
    first_layers(config.model, LAYERS)


def train_weights(
    console: Console, settings: Settings, config: DictConfig, demo: DemoData, output: Path
) -> tuple[Learnt, dict]:
    """Makes them, unless an earlier call made them, and says so; also the settings of their checkpointer."""
    device = training_device(config)
    seconds = settings.train_seconds or (SECONDS_ON_A_CARD if device.type == "cuda" else SECONDS_ELSEWHERE)
    wanted = TrainedWeights(config.model, demo, training_dtype(config), device, seconds)
    folder = output / WEIGHTS
    learnt = None if settings.fresh else wanted.made_before(folder)
    before = " (made before)" if learnt else ""
    if learnt is None:
        with console.status("training weights") as status:
            learnt = wanted.make(
                folder,
                output / DATA,
                lambda step, loss: status.update(f"training weights, step {step:,}, loss {loss:.2f}"),
            )
    console.print(f"{learnt}{before}")
    return learnt, wanted.checkpointer(folder, learnt)


def _decoder(config: DictConfig, section: str) -> TransformerDecoder:
    try:
        return find_decoder(configured_model(config, section))
    except TypeError as error:
        raise CommandError(f"{section}: {error}") from error


def with_demo_data(
    console: Console, settings: Settings, config: DictConfig, output: Path
) -> tuple[DemoData, DictConfig]:
    """The rows that are made here, unless an earlier call made them, and the config reading them."""
    batches = settings.steps * config.get("gradient_accumulation_steps", 1) * (settings.devices or 1)
    pairs = preferences.prefers(config)
    entries = _decoder(config, "model").tok_embeddings.weight.shape[0] if settings.trained_weights else None
    rows = batches * config.batch_size * (1 + pairs)
    demo = DemoData(rows, settings.sequence, settings.vocabulary, pairs, entries)
    with console.status("making rows from the source of Python's library"):
        made = demo.make(output / DATA)
    console.print(
        f"data: {demo.rows:,} full rows of {demo.sequence:,} tokens, a tokenizer of {demo.vocabulary:,} entries, from "
        f"the source of Python's library{'' if made else ' (made before)'}"
    )
    config = config.copy()
    for section, content in demo.sections(output / DATA).items():
        config[section] = content
    return demo, config


def run_all(
    console: Console,
    waiting: list[Run],
    jobs: int,
    fresh: bool,
    ahead: bool,
    on_outcome: Callable[[Run, Outcome], None],
) -> None:
    """Runs them, ``jobs`` at once; ``on_outcome`` gets the outcomes in the order of the runs.

    With ``ahead`` each process is started along with the run before it, to import what takes seconds, and waits.
    """
    interrupted = Event()
    done = {} if fresh else {run.folder: outcome for run in waiting if (outcome := run.finished())}
    queue = ProcessQueue({run.folder: run.start for run in waiting if run.folder not in done}, ahead)
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, queue, ThreadPoolExecutor(jobs) as pool:

        def in_turn(run: Run) -> Outcome:
            with _sets_if_left_early(interrupted):
                return run_one(progress, run, done.get(run.folder), queue, interrupted)

        # Whatever it is, nothing more is started then, and what was started ends before the pool is left.
        with _sets_if_left_early(interrupted):
            for run, outcome in zip(waiting, pool.map(in_turn, waiting), strict=True):
                on_outcome(run, outcome)


@contextmanager
def _sets_if_left_early(event: Event) -> Iterator[None]:
    try:
        yield
    except BaseException:
        event.set()
        raise


def run_one(progress: Progress, run: Run, earlier: Outcome | None, queue: ProcessQueue, interrupted: Event) -> Outcome:
    """Runs it, unless that is done ``earlier``; raises KeyboardInterrupt, and ends it, once it is ``interrupted``."""
    if interrupted.is_set():
        raise KeyboardInterrupt
    console, name = progress.console, run.choice.name
    if earlier is not None:
        console.print(f"{name}: done before ({earlier.status})")
        return earlier
    console.print(shlex.join(run.command()))
    task = progress.add_task(name, total=run.steps)

    def on_step(done: int) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        progress.update(task, completed=done)

    outcome = run.execute(on_step, queue.take(run.folder))
    console.print(f"{name}: {outcome.status}{outcome.details and ': ' + outcome.details}")
    return outcome


def write(
    settings: Settings,
    config: DictConfig,
    recipe: str,
    about: dict,
    outcomes: dict[str, Outcome],
    on_card: bool,
    output: Path,
    learnt: Learnt | None,
) -> None:
    document = {
        **about,
        "command": settings.command,
        "config": settings.config,
        "overrides": settings.overrides,
        "recipe": recipe,
        "devices": settings.devices or 1,
        "batch_size": config.batch_size,
        "gradient_accumulation_steps": config.get("gradient_accumulation_steps", 1),
        "dtype": config.dtype,
        "steps": settings.steps,
        "warmup": settings.warmup,
        "runs_at_once": settings.jobs,
        "random_weights": settings.random_weights,
        "trained_weights": learnt and asdict(learnt),
        "demo_data_sequence": settings.sequence if settings.demo_data else None,
    }
    report.write_json(outcomes, {"about": document}, output / RESULTS)
    said = [
        environment.in_words(about),
        f"`{settings.command}`",
        f"{recipe}, {settings.devices or 1} device(s), batch {config.batch_size} x "
        f"{document['gradient_accumulation_steps']}, {config.dtype}, {settings.steps} steps, the first "
        f"{settings.warmup} of them warm-up.",
        *([f"{learnt}."] if learnt else []),
    ]
    written = report.document(outcomes, said, on_card, settings.jobs, preferences.prefers(config))
    (output / TABLE).write_text(written, encoding="utf-8")
    title = f"{settings.config}, {recipe}, {about['device']}, batch {config.batch_size}, {config.dtype}"
    report.draw(outcomes, title, on_card, output / PICTURE)
