"""What the demo shows at the end: one table and one picture."""

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from torchtune_lce.commands.demo.comparison import Comparison
from torchtune_lce.commands.demo.runs import METHOD_TITLES, Result, Run

_STOCK_COLOUR, _OUR_COLOUR, _BOUND_COLOUR = "#8fb4d9", "#12355b", "#b23a3a"


def show(
    console: Console, results: dict[Run, Result], comparisons: dict[str, Comparison], impl: str, device: str
) -> None:
    """Prints the table. ``impl`` is the implementation that ran, ``comparisons`` goes by method."""
    grid = table(results, comparisons, impl, device)
    # Never cut: a terminal that is too narrow breaks the lines instead.
    needed = Measurement.get(console, console.options.update(width=1000), grid).maximum
    Console(file=console.file, width=max(needed, console.width)).print(grid)


def table(results: dict[Run, Result], comparisons: dict[str, Comparison], impl: str, device: str) -> Table:
    memory = "peak GPU\nmemory\n(allocated)" if device == "cuda" else "peak\nmemory\n(RSS)"
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("recipe", "loss, impl"):
        grid.add_column(heading, no_wrap=True)
    for heading in ("first\nloss", "last\nloss", "largest\ndifference", memory, "tokens/s"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for run, result in results.items():
        grid.add_row(
            METHOD_TITLES[run.method],
            f"linear, {impl}" if run.ours else "torchtune's",
            f"{result.losses[0]:.3f}",
            f"{result.losses[-1]:.3f}",
            f"{comparisons[run.method].largest:.1e}" if run.ours else "",
            "not counted" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:,.0f} MiB",
            f"{result.tokens_per_second:,.0f}",
            end_section=run.ours,
        )
    return grid


def draw(results: dict[Run, Result], comparisons: dict[str, Comparison], impl: str, path: Path) -> None:
    """Both loss curves of each recipe above their difference at each step, as a PNG."""
    # Without pyplot: no display is touched and no global state stays behind.
    figure = Figure(figsize=(5.5 * len(comparisons), 6.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(comparisons), sharex="col", height_ratios=(2, 1), squeeze=False)
    for (method, comparison), (above, below) in zip(comparisons.items(), axes.T, strict=True):
        _draw_losses(above, *(results[Run(method, ours)].losses for ours in (False, True)), impl)
        above.set_title(f"{METHOD_TITLES[method]} recipe")
        _draw_differences(below, comparison)
        for axis in (above, below):
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _draw_losses(axis, stock: list[float], ours: list[float], impl: str) -> None:
    steps = range(1, len(stock) + 1)
    axis.plot(steps, stock, color=_STOCK_COLOUR, linewidth=6, solid_capstyle="round", label="torchtune's")
    axis.plot(steps, ours, color=_OUR_COLOUR, linewidth=1.5, marker="o", markersize=3, label=f"linear, {impl}")
    axis.set_ylabel("loss")
    axis.legend(frameon=False, loc="upper right")


def _draw_differences(axis, comparison: Comparison) -> None:
    steps = range(1, len(comparison.bounds) + 1)
    axis.plot(steps, comparison.bounds, color=_BOUND_COLOUR, linestyle="--", label="explained by rounding")
    axis.plot(
        steps, comparison.differences, color=_OUR_COLOUR, linestyle="none", marker="o", markersize=4, label="difference"
    )
    # Linear up to the smallest difference that two such losses show in float32, so that 0 has a place.
    axis.set_yscale("symlog", linthresh=1e-6)
    finite = [value for value in comparison.bounds + comparison.differences if math.isfinite(value)]
    axis.set_ylim(bottom=-3e-7, top=100 * max(finite, default=1))  # room for the legend
    axis.set_ylabel("|torchtune's - linear|")
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, loc="upper right", ncols=2)
