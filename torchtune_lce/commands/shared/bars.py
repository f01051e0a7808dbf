"""Bars of one figure for each loss, in pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TORCHTUNES, OURS, LIMIT = "#8fb4d9", "#12355b", "#b23a3a"


@dataclass(frozen=True)
class Panel:
    """What one loss each has of something: ``values`` and what is written behind them, by their names' order."""

    label: str
    values: Sequence[float]
    texts: Sequence[str]
    limit: float | None = None  # where a line is drawn across, called by limit_label
    limit_label: str = ""


def bars(axis, names: Sequence[str], colours: Sequence[str], panel: Panel, size: float = 8) -> None:
    """Into a matplotlib ``axis``, the first on top; ``size`` is the texts', in points."""
    axis.barh(names, panel.values, color=colours)
    for place, (value, text) in enumerate(zip(panel.values, panel.texts, strict=True)):
        axis.text(value, place, " " + text, va="center", fontsize=size)
    axis.set_xlabel(panel.label)
    axis.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axis.margins(x=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    if panel.limit is not None:
        axis.axvline(panel.limit, color=LIMIT, linestyle="--", label=panel.limit_label)
        axis.legend(frameon=False, fontsize=size, loc="lower right")


def save(title: str, names: Sequence[str], colours: Sequence[str], panels: Sequence[Panel], path: Path) -> None:
    """Writes a picture of panels side by side, on a white ground, in the format of the path's ending."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Without pyplot: no display is touched and no global state stays behind.
    figure = Figure(figsize=(8.5, 1 + 0.4 * len(names)), dpi=180, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, wrap=True)
    for axis, panel in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        bars(axis, names, colours, panel, size=9)
        axis.margins(x=0.4)  # for the texts
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter("{x:,.0f}")
    figure.savefig(path)
