"""What ``tune-lce accuracy`` prints and leaves behind: a Markdown table and a picture."""

import math
import re
import textwrap
from pathlib import Path

from torchtune_lce.commands.accuracy.measure import QUANTITIES, Row

_HEADINGS = {"loss": "losses", "hidden": "gradient of hidden", "weight": "gradient of weight"}
# Lines for what the implementations are measured by, dots in colours of their own for those.
_LINES = (("black", "solid"), ("0.55", "dashed"))
_DOT_DISTANCE = 0.055


def table(rows: list[Row]) -> list[str]:
    """Markdown: a cell that is larger than allowed says so."""
    lines = [f"| data | dtype | implementation | {' | '.join(_HEADINGS.values())} |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [_cell(row, quantity) for quantity in QUANTITIES]
        lines.append(f"| {row.data} | {row.dtype} | {row.name} | {' | '.join(cells)} |")
    return lines


def _cell(row: Row, quantity: str) -> str:
    error = getattr(row.errors, quantity)
    if row.allowed is None or error <= getattr(row.allowed, quantity):
        return f"{error:.1e}"
    return f"**{error:.1e}**, allowed {getattr(row.allowed, quantity):.1e}"


def document(rows: list[Row], about: list[str], left_out: dict[str, str], verdict: str) -> str:
    lines = ["# Accuracy", "", *about, ""]
    lines += [
        "Relative errors against float64, ||actual - exact|| / ||exact||, over all tokens. PyTorch: F.linear and "
        "F.cross_entropy in that dtype, logits rounded to it. Strictest filter: every entry below the threshold left "
        "out, its mean put back into hidden's gradient. Allowed: 1.25 x PyTorch's error; of gradients 1.25 x the root "
        "of the squares of PyTorch's, of one more rounding and, where they are filtered, of the strictest filter's; "
        "beside that, float32's roundings of a log-sum-exp and of a sum over the tokens.",
        "",
        *table(rows),
        "",
    ]
    lines += [f"Not run: {name}, which {why}" for name, why in left_out.items()]
    return "\n".join([*lines, "", verdict, ""])


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Errors by kind of rows, a panel for each quantity and dtype, PyTorch's own as a line, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    kinds = list(dict.fromkeys(row.data for row in rows))
    yardsticks = list(dict.fromkeys(row.name for row in rows if row.allowed is None))
    names = list(dict.fromkeys(row.name for row in rows if row.allowed is not None))
    # Without pyplot: no display is touched and no global state stays behind.
    figure = Figure(figsize=(13, 1 + 3 * len(dtypes)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    short = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", title)  # a commit
    figure.suptitle(textwrap.fill(short, 170), fontsize=8, x=0.01, ha="left")
    grid = figure.subplots(len(dtypes), len(QUANTITIES), squeeze=False)
    for dtype, axes in zip(dtypes, grid, strict=True):
        for quantity, axis in zip(QUANTITIES, axes, strict=True):
            for index, name in enumerate(yardsticks):
                places, heights = _points(rows, dtype, name, kinds, quantity)
                colour, style = _LINES[index]
                left, right = [place - 0.33 for place in places], [place + 0.33 for place in places]
                axis.hlines(heights, left, right, color=colour, linestyle=style, label=name, zorder=1)
            for index, name in enumerate(names):
                places, heights = _points(rows, dtype, name, kinds, quantity)
                places = [place + _DOT_DISTANCE * (index - (len(names) - 1) / 2) for place in places]
                axis.scatter(places, heights, s=22, color=f"C{index}", label=name, zorder=2)
            axis.set_yscale("log")
            axis.set_xticks(range(len(kinds)), kinds)
            axis.set_xlim(-0.5, len(kinds) - 0.5)
            axis.set_title(f"{_HEADINGS[quantity]}, {dtype}", fontsize=9, loc="left")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("relative error")
    handles, labels = grid[-1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center")
    figure.savefig(path)


def _points(rows: list[Row], dtype: str, name: str, kinds: list[str], quantity: str) -> tuple[list[int], list[float]]:
    """Places and heights of one name's errors; no height where there is none on a logarithmic axis."""
    found = {row.data: getattr(row.errors, quantity) for row in rows if (row.dtype, row.name) == (dtype, name)}
    heights = [value if math.isfinite(value) and value > 0 else math.nan for value in found.values()]
    return [kinds.index(kind) for kind in found], heights
