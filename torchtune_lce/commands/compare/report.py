"""What a comparison leaves behind: a table, a JSON file and a picture."""

import math
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from torchtune_lce.commands.compare.runs import OK, Outcome
from torchtune_lce.commands.shared import records
from torchtune_lce.commands.shared.bars import Panel, bars
from torchtune_lce.commands.shared.loss_choices import SEED
from torchtune_lce.commands.shared.recipe_runs import Result

_COLOURS = ("#8fb4d9", "#12355b", "#b23a3a", "#3a7d44", "#c98a1b", "#6b4c9a", "#5b6770", "#c2578f")


def largest_difference(result: Result, first: Result) -> float:
    """Of the losses of the same steps; NaN as soon as one is."""
    differences = [abs(a - b) for a, b in zip(result.losses, first.losses, strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def mean_of_last_tenth(result: Result) -> float:
    """Loss of the last tenth of the steps. Where no row comes twice, as in --demo-data, those rows are held out."""
    last = result.losses[-max(len(result.losses) // 10, 1) :]
    return sum(last) / len(last)


def seed_spread(outcomes: dict[str, Outcome]) -> dict[str, tuple[float, float]]:
    """Smallest and largest :func:`mean_of_last_tenth` of each loss that ran with several seeds, by its name."""
    means = {}
    for name, outcome in outcomes.items():
        if outcome.result is not None:
            means.setdefault(name.partition(SEED)[0], []).append(mean_of_last_tenth(outcome.result))
    return {loss: (min(found), max(found)) for loss, found in means.items() if len(found) > 1}


def seed_differences(outcomes: dict[str, Outcome]) -> dict[str, tuple[float, float]]:
    """Of each loss that ran with several of the first one's seeds: how much larger its :func:`mean_of_last_tenth` is,
    seed by seed, in the mean, and that mean's standard error.

    With the same seed two losses begin with the same weights, so these are closer than seeds are to each other.
    """
    means: dict[str, dict[str, float]] = {}
    for name, outcome in outcomes.items():
        loss, _, seed = name.partition(SEED)
        if outcome.result is not None:
            means.setdefault(loss, {})[seed] = mean_of_last_tenth(outcome.result)
    first = next(iter(outcomes), "").partition(SEED)[0]
    of_first, found = means.pop(first, {}), {}
    for loss, by_seed in means.items():
        gaps = [mean - of_first[seed] for seed, mean in by_seed.items() if seed in of_first]
        if len(gaps) > 1:
            mean = sum(gaps) / len(gaps)
            # Not statistics.stdev, which fails on a NaN.
            variance = sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
            found[loss] = mean, math.sqrt(variance / len(gaps))
    return found


def _first(outcomes: dict[str, Outcome]) -> Result | None:
    """What the others are compared with: the first loss, if it ran."""
    return next(iter(outcomes.values())).result


def rows(outcomes: dict[str, Outcome]) -> list[dict]:
    """One for each loss, as they go into the table and the JSON file."""
    first = _first(outcomes)
    found = []
    for name, outcome in outcomes.items():
        result = outcome.result
        row = {"loss": name, "status": outcome.status}
        if result is not None:
            row |= {
                "tokens_per_second": result.tokens_per_second,
                "tokens_per_second_spread": result.spread,
                "speed_to_first": first and result.tokens_per_second / first.tokens_per_second,
                "peak_allocated_bytes": result.peak_bytes,
                "peak_reserved_bytes": result.reserved_bytes,
                "memory_to_first": _ratio(result.peak_bytes, first and first.peak_bytes),
                "final_loss": result.losses[-1],
                "mean_loss_of_last_tenth": mean_of_last_tenth(result),
                "largest_difference": first and largest_difference(result, first),
                "kept_fraction": result.kept_fraction,
            }
        found.append(row)
    return found


def cells(outcomes: dict[str, Outcome], on_card: bool) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line of text for each loss; one that has no result has its status alone beside its name."""
    told = any(outcome.result and outcome.result.kept_fraction is not None for outcome in outcomes.values())
    memory = ("peak GiB\nallocated", "peak GiB\nreserved") if on_card else ("peak GiB\nresident",)
    headings = [
        "loss",
        "tokens/s",
        "spread",
        "speed\nx first",
        *memory,
        "memory\nx first",
        "final\nloss",
        "mean of\nlast tenth",
        "largest\ndifference",
        *(("tiles\nkept",) if told else ()),
    ]
    lines = []
    for row in rows(outcomes):
        if row["status"] != OK:
            lines.append([row["loss"], row["status"]])
            continue
        reserved = (_gib(row["peak_reserved_bytes"]),) if on_card else ()
        lines.append(
            [
                row["loss"],
                f"{row['tokens_per_second']:,.0f}",
                f"{row['tokens_per_second_spread']:,.0f}",
                _number(row["speed_to_first"], ".2f"),
                _gib(row["peak_allocated_bytes"]),
                *reserved,
                _number(row["memory_to_first"], ".2f"),
                f"{row['final_loss']:.4f}",
                f"{row['mean_loss_of_last_tenth']:.4f}",
                _number(row["largest_difference"], ".1e"),
                *((_number(row["kept_fraction"], ".3f"),) if told else ()),
            ]
        )
    return headings, lines


def table(outcomes: dict[str, Outcome], on_card: bool) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    (loss, *numbers), lines = cells(outcomes, on_card)
    grid.add_column(loss, no_wrap=True)
    for heading in numbers:
        grid.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        grid.add_row(*line)
    return grid


def notes(outcomes: dict[str, Outcome], runs_at_once: int, pairs: bool) -> list[str]:
    """What the table's figures are, of ``pairs`` of rows or of rows, and how far apart seeds are."""
    # As torchtune's recipes count them.
    counted = "all tokens of both rows of a pair, questions and padding too" if pairs else "tokens with a label"
    said = [
        f"tokens/s: {counted}, of one device, median without the warm-up; spread: interquartile range of the steps, "
        "the scatter within a run, not between runs."
    ]
    if runs_at_once > 1:
        said.append(f"{runs_at_once} runs at once: not a speed to compare.")
    for loss, (lowest, highest) in seed_spread(outcomes).items():
        said.append(f"{loss}, by its seeds: mean of last tenth from {lowest:.4f} to {highest:.4f}")
    for loss, (gap, error) in seed_differences(outcomes).items():
        first = next(iter(outcomes)).partition(SEED)[0]
        said.append(f"{loss} less {first}, seed by seed: {gap:+.4f}, standard error {error:.4f}")
    return said


def document(outcomes: dict[str, Outcome], about: list[str], on_card: bool, runs_at_once: int, pairs: bool) -> str:
    """Markdown: ``about`` says what was compared and on what, the command and the commit among it."""
    headings, lines = cells(outcomes, on_card)
    padded = [line + [""] * (len(headings) - len(line)) for line in lines]
    grid = [[heading.replace("\n", " ") for heading in headings], ["---"] + ["---:"] * (len(headings) - 1), *padded]
    written = [f"| {' | '.join(line)} |" for line in grid]
    return "\n\n".join(["# Comparison", *about, "\n".join(written), *notes(outcomes, runs_at_once, pairs)]) + "\n"


def _ratio(value: int | None, other: int | None) -> float | None:
    """None where either was not counted."""
    return value / other if value and other else None


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def _gib(value: int | None) -> str:
    return _number(None if value is None else value / 2**30, ".2f")


def write_json(outcomes: dict[str, Outcome], about: dict, path: Path) -> None:
    """``about`` says what was compared, with what and on what."""
    steps = {name: asdict(outcome.result)["losses"] for name, outcome in outcomes.items() if outcome.result}
    seeds = {"seed_spread": seed_spread(outcomes), "seed_differences": seed_differences(outcomes)}
    records.write({**about, "rows": rows(outcomes), **seeds, "losses": steps}, path)


def draw(outcomes: dict[str, Outcome], title: str, on_card: bool, path: Path) -> None:
    """Loss curves, their differences to the first, and bars of speed and memory, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ran = {name: outcome.result for name, outcome in outcomes.items() if outcome.result}
    # Those of a loss's seeds are one.
    losses = list(dict.fromkeys(name.partition(SEED)[0] for name in ran))
    colours = {name: _COLOURS[losses.index(name.partition(SEED)[0]) % len(_COLOURS)] for name in ran}
    # Without pyplot: no display is touched and no global state stays behind.
    figure = Figure(figsize=(12, 6.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 1), height_ratios=(1.4, 1))
    curves, differences = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    speed, memory = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
    for index, (name, result) in enumerate(ran.items()):
        steps = range(1, len(result.losses) + 1)
        # The first is wide, so that curves that lie on it leave it visible.
        width = 5 if index == 0 else 1.3
        curves.plot(steps, result.losses, color=colours[name], linewidth=width, label=name, solid_capstyle="round")
    first = _first(outcomes)
    if first is not None:
        for name, result in list(ran.items())[1:]:
            gaps = [abs(a - b) for a, b in zip(result.losses, first.losses, strict=True)]
            differences.plot(range(1, len(gaps) + 1), gaps, color=colours[name], linewidth=1.2, label=name)
    curves.set_ylabel("loss")
    if ran:
        curves.legend(frameon=False, fontsize=8)
    differences.set_ylabel(f"|difference to {next(iter(outcomes))}|")
    differences.set_yscale("symlog", linthresh=1e-6)
    differences.set_ylim(bottom=0)
    differences.set_xlabel("step")
    for axis in (curves, differences):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
    for axis in (curves, differences):
        axis.spines[["top", "right"]].set_visible(False)
    speeds = [result.tokens_per_second for result in ran.values()]
    peaks = [(result.peak_bytes or 0) / 2**30 for result in ran.values()]
    for axis, values, style, label in (
        (speed, speeds, "{:,.0f}", "tokens/s of a device (median)"),
        (memory, peaks, "{:.2f}", "peak GiB " + ("allocated" if on_card else "resident")),
    ):
        bars(axis, list(ran), list(colours.values()), Panel(label, values, list(map(style.format, values))))
    figure.savefig(path)
