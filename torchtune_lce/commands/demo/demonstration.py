"""The demo from beginning to end."""

import platform
import shlex
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from torchtune_lce.commands.demo import device, folder, model, report
from torchtune_lce.commands.demo.comparison import Comparison, compare
from torchtune_lce.commands.demo.runs import (
    CONFIGS,
    DEMOS,
    METHOD_TITLES,
    Result,
    Run,
    Setting,
    execute,
    runs,
    sizes,
    start,
)
from torchtune_lce.commands.shared import chats, tokenizer
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.process_queue import ProcessQueue

_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Of rows: enough padded tokens that the logits stand out in the memory table.
_BATCH_SIZE = {"cpu": 8, "cuda": 32}


def demonstrate(output: Path, impl: str, steps: int, method: str) -> bool:
    """Makes the data, runs the recipes of a key of DEMOS, shows the comparison; whether the losses agree.

    Raises CommandError if it cannot run; what the arguments alone can tell is told before anything is written.
    """
    kind, dtype = device.choose()
    ran = device.implementation(impl, kind, dtype)
    if steps < 2:
        raise CommandError(f"--steps must be at least 2, a first and a last one, got {steps}")
    pairs = method == "dpo"
    setting = Setting(kind, _DTYPE_NAMES[dtype], _BATCH_SIZE[kind] // (1 + pairs), steps, impl)
    output = folder.prepare(output)

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"tune-lce demo on {device.describe(kind)} in {setting.dtype}, impl '{ran}' (set: '{impl}')")
    console.print(f"Everything is written to {output}")
    results = run_all(console, runs(method), setting, output, pairs)

    comparisons = {}
    for name in DEMOS[method]:
        stock, ours = Run(name, ours=False), Run(name, ours=True)
        comparisons[name] = compare(results[stock].losses, results[ours].losses, dtype, sizes(stock, output))
    report.show(console, results, comparisons, ran, kind)
    report.draw(results, comparisons, ran, output / folder.CURVES)
    console.print(f"Curves: {output / folder.CURVES}")
    return conclude(console, comparisons)


def run_all(console: Console, waiting: list[Run], setting: Setting, output: Path, pairs: bool) -> dict[Run, Result]:
    """The inputs, then one run after the other.

    Each process is started ahead of its turn, to import what takes seconds, where that slows down no other: on a card.
    """
    ahead = setting.device == "cuda"
    with ProcessQueue({run: partial(start, run, setting, output) for run in waiting}, ahead) as queue:
        if ahead:
            queue.start(waiting[0])
        prepare_inputs(console, setting, output, pairs)
        console.print("The commands, as they are started in that folder:")
        width = max(len(run.title) for run in waiting)
        return {run: run_one(console, run, setting, output, width, queue) for run in waiting}


def prepare_inputs(console: Console, setting: Setting, output: Path, pairs: bool) -> None:
    """Writes data set, of questions and answers or of ``pairs`` of these, tokenizer and checkpoint."""
    config: DictConfig = OmegaConf.load(CONFIGS / "full_single_device.yaml")
    with console.status("reading the standard library"):
        sources = chats.read_sources()
        samples = chats.questions_and_answers(sources)
    most = len(samples) // setting.batch_size
    if setting.steps > most:
        raise CommandError(
            f"--steps must be at most {most}, got {setting.steps}: "
            f"the data set has {len(samples)} samples and a step takes {setting.batch_size}"
        )
    if pairs:
        chats.write_jsonl(chats.pairs(samples), output / folder.PAIRS)
    else:
        chats.write_jsonl(samples, output / folder.SAMPLES)
    console.print(
        f"  samples    {len(samples):,} questions and answers{', and those of others, ' if pairs else ' '}from "
        f"{len(sources):,} modules of Python {platform.python_version()}'s library"
    )
    entries = config.model.vocab_size
    with console.status("training the tokenizer"):
        tokenizer.train(sources.values(), entries - len(config.tokenizer.special_tokens), output / folder.TOKENIZER)
    characters = sum(map(len, sources.values())) / 1e6
    console.print(f"  tokenizer  {entries:,} entries, trained on {characters:.1f} million characters of its source")
    parameters = model.write_checkpoint(config.model, output / folder.MODEL / "model.pt")
    console.print(f"  model      {parameters / 1e6:.1f} million parameters, random weights, tied head")


def run_one(console: Console, run: Run, setting: Setting, output: Path, width: int, queue: ProcessQueue) -> Result:
    console.print(shlex.join(run.command(setting)))
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(run.title.ljust(width), total=setting.steps)
        process = queue.take(run)
        return execute(run, setting, output, lambda done: progress.update(task, completed=done), process)


def conclude(console: Console, comparisons: dict[str, Comparison]) -> bool:
    """Says for each recipe whether the losses agree, with the numbers; whether all do."""
    for method, comparison in comparisons.items():
        console.print(
            f"{METHOD_TITLES[method]}: {'agree' if comparison.agrees else 'DIFFER'}. The losses differ by up to "
            f"{comparison.largest:.1e}; rounding explains up to {min(comparison.bounds):.1e}."
        )
    return all(comparison.agrees for comparison in comparisons.values())
