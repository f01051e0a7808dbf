"""Draws docs/fine-tune.png: a recorded fine-tune of Gemma 2 2B, its speed and memory with torchtune's losses and ours.

python docs/fine_tune_figure.py
"""

import json
import sys
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


def rows() -> list[tuple[str, bool, float, float, float, float]]:
    """Of each run: its title, whether the loss is this package's, tokens/s, that to its first, GiB, that to its first.

    As `tune-lce compare` recorded them.
    """
    recorded = {row["loss"]: row for row in json.loads(RECORD.read_text(encoding="utf-8"))["rows"]}
    found = []
    for runs in RUNS:
        first, *_ = ((recorded[name]["tokens_per_second"], recorded[name]["peak_allocated_bytes"]) for name in runs)
        for name, title in runs.items():
            speed, memory = recorded[name]["tokens_per_second"], recorded[name]["peak_allocated_bytes"]
            ours = name.startswith("cce")
            found.append((title, ours, speed, speed / first[0], memory / 2**30, memory / first[1]))
    return found


def draw(path: Path) -> None:
    about = json.loads(RECORD.read_text(encoding="utf-8"))["about"]
    title = (
        f"LoRA fine-tune of Gemma 2 2B, {about['batch_size']} x {about['demo_data_sequence']} tokens a step, "
        f"{about['dtype']}, {about['device']}"
    )
    titles, ours, speeds, of_speed, peaks, of_peak = zip(*rows(), strict=True)
    panels = [
        bars.Panel("tokens/s", speeds, list(map(_text, map("{:,.0f}".format, speeds), of_speed))),
        bars.Panel("peak memory, GiB", peaks, list(map(_text, map("{:.2f}".format, peaks), of_peak))),
    ]
    bars.save(title, titles, [bars.OURS if x else bars.TORCHTUNES for x in ours], panels, path)


def _text(value: str, ratio: float) -> str:
    return value if ratio == 1 else f"{value}  ({ratio:.2f} x)"


if __name__ == "__main__":
    draw(PICTURE)
    sys.exit(0)
