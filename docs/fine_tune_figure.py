"""Draws docs/fine-tune.png: a recorded fine-tune of Gemma 2 2B, its speed and memory with torchtune's losses and ours.

python docs/fine_tune_figure.py
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from torchtune_lce.commands.shared import bars

DOCS = Path(__file__).parent
RECORD, PICTURE = DOCS / "benchmarks" / "gemma2-2b-trained.json", DOCS / "fine-tune.png"
# In this order, by their names in a comparison; each set of runs is compared with its first.
RUNS = (
    {"stock": "torchtune 0.6.1", "cce": "torchtune-lce"},
    {
        "stock_compiled": "torchtune 0.6.1, compile: True",
        "main_compiled": "torchtune main, compile: True",
        "cce_compiled": "torchtune-lce, compile: True",
    },
)


@dataclass(frozen=True)
class Row:
    """Of one run; the texts have the ratio to the first run of its set, too."""

    title: str
    ours: bool
    speed: float  # tokens/s
    speed_text: str
    peak: float  # GiB
    peak_text: str


def rows() -> list[Row]:
    """The runs of :data:`RUNS` as `tune-lce compare` recorded them."""
    recorded = {row["loss"]: row for row in json.loads(RECORD.read_text(encoding="utf-8"))["rows"]}
    found = []
    for runs in RUNS:
        speeds = [recorded[name]["tokens_per_second"] for name in runs]
        peaks = [recorded[name]["peak_allocated_bytes"] / 2**30 for name in runs]
        for (name, title), speed, peak in zip(runs.items(), speeds, peaks, strict=True):
            texts = f"{speed:,.0f}{_ratio(speed, speeds[0])}", f"{peak:.2f}{_ratio(peak, peaks[0])}"
            found.append(Row(title, name.startswith("cce"), speed, texts[0], peak, texts[1]))
    return found


def _ratio(value: float, first: float) -> str:
    return "" if value == first else f" ({value / first:.2f} x)"


def draw(path: Path) -> None:
    about, shown = json.loads(RECORD.read_text(encoding="utf-8"))["about"], rows()
    title = (
        f"LoRA fine-tune of Gemma 2 2B, {about['batch_size']} x {about['demo_data_sequence']} tokens a step, "
        f"{about['dtype']}, {about['device']}"
    )
    panels = [
        bars.Panel("tokens/s", [row.speed for row in shown], [row.speed_text for row in shown]),
        bars.Panel("peak memory, GiB", [row.peak for row in shown], [row.peak_text for row in shown]),
    ]
    colours = [bars.OURS if row.ours else bars.TORCHTUNES for row in shown]
    bars.save(title, [row.title for row in shown], colours, panels, path)


if __name__ == "__main__":
    draw(PICTURE)
    sys.exit(0)
