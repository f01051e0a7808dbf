"""What ``tune-lce plan`` prints and draws."""

import re
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from torchtune_lce.commands.plan import fine_tune
from torchtune_lce.commands.plan.planning import USABLE, Planner
from torchtune_lce.commands.plan.step import Step
from torchtune_lce.commands.shared import bars, config_reading, distillation, loss_choices, preferences
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.tables import print_table

_USUAL = "stock,stock_compiled,main_compiled,torch_compile,chunked,cce"
_USUAL_WITH_A_SECOND_FORWARD = "stock,chunked,cce"
_TORCHTUNES = (loss_choices.STOCK, loss_choices.MAIN)
_DEFAULT_SEQUENCE = 2048
_UNITS = {"GiB": 2**30, "G": 2**30, "GB": 10**9, "MiB": 2**20, "M": 2**20, "MB": 10**6}


def parse_memory(text: str) -> float:
    """Bytes of ``80GiB`` and the like; raises CommandError for anything else."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})", text)
    if not found or float(found[1]) == 0:
        raise CommandError(f"--memory takes a number and one of {', '.join(_UNITS)}, as 80GiB; got {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def show(
    name: str,
    overrides: list[str],
    named: str | None,
    memory: str | None,
    sequence: int | None,
    devices: int | None,
    picture: Path | None,
) -> None:
    """Prints the plan, and draws it into ``picture``; raises CommandError for an argument that makes no sense."""
    if picture is not None:
        _check_picture(picture)
    config = config_reading.read(name, overrides)
    fine_tune.check(name, config, devices)
    distils = distillation.distils(config)
    usual = _USUAL_WITH_A_SECOND_FORWARD if distils or preferences.prefers(config) else _USUAL
    choices = loss_choices.parse(named or usual)
    if any(choice.kind == "auto" for choice in choices):
        raise CommandError("--losses: auto is not planned, name what it takes: cce on a card, chunked elsewhere")
    if distils:
        distillation.check(config, [])
    size = None if memory is None else parse_memory(memory)
    if size is None and torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
    dtype = config_reading.training_dtype(config)
    sequence, why = _sequence(config, sequence)
    batch = config.batch_size
    planner = Planner(config, dtype, devices or 1)
    most = planner.max_seq_len
    if not 1 <= sequence <= most:
        raise CommandError(f"--sequence-length must be from 1 to {most}, the model's own limit, got {sequence}")
    kinds, left_out = _planned([choice.loss for choice in choices], planner, named is not None)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    counted = f"{batch} pairs of rows" if planner.prefers else batch
    settings = f"{config.dtype}{_settings(config, devices)}"
    console.print(f"{name}: {counted} x {sequence} tokens{why}, {settings}")
    print_table(console, _fixed_table(planner, batch, sequence))
    limit = None if size is None else USABLE * size
    print_table(console, _loss_table(planner, kinds, batch, sequence, limit))
    if size is None:
        console.print("--memory 80GiB says how much of a batch fits such a card.")
    else:
        console.print(
            f"Largest: what fits {USABLE:.0%} of {size / 2**30:.1f} GiB; the rest is CUDA's and fragmentation's."
        )
    for caution in [*left_out, *_cautions(config, devices)]:
        console.print(caution)
    if picture is not None:
        steps = {kind: planner.step(kind, batch, sequence) for kind in kinds}
        _draw(f"{name}\n{counted} x {sequence} tokens, {settings}", steps, limit, picture)
        console.print(f"Written: {picture}")


def _check_picture(path: Path) -> None:
    if path.suffix != ".png" or not path.parent.is_dir():
        raise CommandError(f"--picture must be a .png file in a folder that is there, got {path}")


def _planned(kinds: list[str], planner: Planner, named: bool) -> tuple[list[str], list[str]]:
    """Those that have a plan, and a sentence for each other. Raises CommandError for such a one that was named."""
    obstacles = {kind: planner.obstacle(kind) for kind in kinds}
    left_out = [f"{kind} {why}." for kind, why in obstacles.items() if why]
    if named and left_out:
        raise CommandError(f"--losses: {left_out[0].removesuffix('.')}")
    return [kind for kind, why in obstacles.items() if not why], left_out


def _sequence(config: DictConfig, asked: int | None) -> tuple[int, str]:
    configured = config.tokenizer.get("max_seq_len")
    if asked is not None:
        return asked, ""
    if configured is not None:
        return configured, " (tokenizer.max_seq_len)"
    return _DEFAULT_SEQUENCE, f" (the config sets no length: {_DEFAULT_SEQUENCE} assumed)"


def _settings(config: DictConfig, devices: int | None) -> str:
    said = ["", config.optimizer._component_.rpartition(".")[2]]
    for key, meaning in (
        ("enable_activation_checkpointing", "activations checkpointed"),
        ("optimizer_in_bwd", "optimizer in the backward"),
        ("compile", "compiled"),
    ):
        if config.get(key):
            said.append(meaning)
    if config.get("gradient_accumulation_steps", 1) > 1:
        said.append(f"{config.gradient_accumulation_steps} batches a step")
    if devices:
        said.append(f"on each of {devices} devices")
    return ", ".join(said)


def _cautions(config: DictConfig, devices: int | None) -> list[str]:
    """What the figures leave out of this config."""
    cautions = []
    if config.get("compile"):
        cautions.append("compile: True lets the layers keep less: take these figures for an upper bound.")
    if config.get("enable_activation_offloading"):
        cautions.append("enable_activation_offloading moves activations to the host; they are counted here.")
    if config.optimizer._component_.startswith("bitsandbytes.optim.Paged"):
        cautions.append("A paged optimizer's state may be moved to the host; it is counted here.")
    if devices or config.get("fsdp_cpu_offload"):
        cautions.append("FSDP2's figures have not been checked against a measurement; nothing is offloaded in them.")
    return cautions


def _fixed_table(planner: Planner, batch: int, sequence: int) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_header=False)
    grid.add_column("what", no_wrap=True)
    grid.add_column("GiB", justify="right", no_wrap=True)
    activations = planner.activations(batch, sequence)
    held = len(activations.layers) * activations.layer_input if planner.fixed.checkpoints else sum(activations.layers)
    for what, value in (
        ("parameters" if planner.second is None else "parameters of both models", planner.fixed.parameters),
        ("gathered parameters", planner.fixed.gathered),
        ("gradients of all that is trained", planner.fixed.trained),
        ("optimizer state", planner.fixed.optimizer),
        ("activations for the backward", held + activations.outside),
        ("one layer's, while it is checkpointed", max(activations.layers) if planner.fixed.checkpoints else 0),
    ):
        if value:
            grid.add_row(what, f"{_gib(value)} GiB")
    return grid


def _loss_table(planner: Planner, kinds: list[str], batch: int, sequence: int, limit: float | None) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column("loss", no_wrap=True)
    headings = ["its own\nGiB", "share of\nthe peak", "peak of the\nstep, GiB"]
    if limit is not None:
        headings += [f"largest batch\nof {sequence}", f"longest of\n{batch} {'pairs' if planner.prefers else 'rows'}"]
    for heading in headings:
        grid.add_column(heading, justify="right", no_wrap=True)
    for kind in kinds:
        step = planner.step(kind, batch, sequence)
        cells = [_gib(step.loss.peak), f"{step.share:.0%}", _gib(step.peak)]
        if limit is not None:
            longest = planner.longest(kind, batch, limit)
            of_the_model = " (the model's)" if longest + 256 > planner.max_seq_len else ""
            cells += [f"{planner.largest_batch(kind, sequence, limit):,}", f"{longest:,}{of_the_model}"]
        grid.add_row(kind, *cells)
    return grid


def _draw(title: str, steps: dict[str, Step], limit: float | None, path: Path) -> None:
    """Bars of what each loss allocates itself, and of the peak of its step, with the card's limit if that is known."""
    own, peaks = [step.loss.peak for step in steps.values()], [step.peak for step in steps.values()]
    panels = [
        bars.Panel(label, [value / 2**30 for value in values], list(map(_gib, values)))
        for label, values in (("the loss itself, GiB", own), ("peak of the step, GiB", peaks))
    ]
    if limit is not None:
        panels[1] = replace(panels[1], limit=limit / 2**30, limit_label=f"fits {limit / USABLE / 2**30:.4g} GiB")
    colours = [bars.TORCHTUNES if kind.startswith(_TORCHTUNES) else bars.OURS for kind in steps]
    try:
        bars.save(title, list(steps), colours, panels, path)
    except OSError as error:
        raise CommandError(f"--picture: {error}") from error


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f}"
