"""Draws docs/workspace.png: time of forward and backward by workspace_mib, for three numbers of tokens.

python docs/workspace_figure.py
"""

import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from torchtune_lce.commands.shared.bars import OURS, TORCHTUNES

DOCS = Path(__file__).parent
RECORDS, PICTURE = DOCS / "benchmarks" / "h200-23a4e3e", DOCS / "workspace.png"
_COLOURS, _MARKERS = {"cce": OURS, "cce_exact": TORCHTUNES}, {8192: "o", 32768: "s", 131072: "^"}


def milliseconds() -> dict[tuple[str, bool, int, int], float]:
    """As `tune-lce bench --workspace-mib` recorded them, by loss, whether the head is frozen, tokens and workspace."""
    found = {}
    for record in sorted(RECORDS.glob("workspace-*.json")):
        for case in json.loads(record.read_text(encoding="utf-8"))["cases"]:
            of = case["impl"], case["frozen_weight"], case["shape"]["tokens"], case["workspace_mib"]
            found[of] = case["forward_backward_ms"]
    return found


def draw(path: Path) -> None:
    found = milliseconds()
    sizes = sorted({workspace for *_, workspace in found})
    # Without pyplot: no display is touched and no global state stays behind.
    figure = Figure(figsize=(8.5, 3.6), dpi=180, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle("Forward and backward by workspace_mib, 2048 x 151,936, bfloat16, NVIDIA H200", fontsize=10)
    for axis, is_frozen in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for impl, colour in _COLOURS.items():
            for tokens, marker in _MARKERS.items():
                times = [found[impl, is_frozen, tokens, size] / tokens * 1e3 for size in sizes]
                axis.plot(sizes, times, color=colour, marker=marker, label=f"{impl}, {tokens:,} tokens")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.set_title("frozen head" if is_frozen else "both gradients", fontsize=9)
        axis.set_xlabel("workspace_mib")
        axis.spines[["top", "right"]].set_visible(False)
    left, right = figure.axes
    left.set_ylabel("microseconds a token")
    left.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
    figure.savefig(path)


if __name__ == "__main__":
    draw(PICTURE)
    sys.exit(0)
