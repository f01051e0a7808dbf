"""The accuracy report from beginning to end."""

import time
from pathlib import Path

import torch
from rich.console import Console

from torchtune_lce.commands.accuracy import report
from torchtune_lce.commands.accuracy.data import KINDS, SHAPE
from torchtune_lce.commands.accuracy.measure import Row, rows_of
from torchtune_lce.commands.shared import environment, output_folder
from torchtune_lce.commands.shared.candidates import CANDIDATES
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.shapes import Shape
from torchtune_lce.implementations.capabilities import CAPABILITIES

MARKER, TABLE, PICTURE = ".tune-lce-accuracy", "accuracy.md", "accuracy.png"
DTYPES = (torch.float32, torch.bfloat16)


def examine(output: Path, command: str, device: torch.device | None = None, shape: Shape = SHAPE) -> bool:
    """Measures whatever can run here, prints and writes it; whether all of it is as accurate as it must be."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = output_folder.claim(output, MARKER, "an earlier report's")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    about = [
        environment.in_words(environment.describe(device)),
        f"`{command}`, {shape.tokens} tokens, {shape.hidden} features, {shape.vocab:,} entries.",
    ]
    console.print("\n".join(about))
    started = time.perf_counter()
    left_out: dict[str, str] = {}
    rows: list[Row] = []
    for dtype in DTYPES:
        able, unable = runnable(device, dtype)
        left_out |= unable
        for kind, make in KINDS.items():
            with console.status(f"{kind} rows in {str(dtype).removeprefix('torch.')}"):
                rows += rows_of(make(shape, dtype, device), able)
    if not any(row.allowed for row in rows):
        raise CommandError("none of the implementations can run here")
    wrong = [row for row in rows if not row.passed]
    ran = {row.name for row in rows if row.allowed}
    if wrong:
        verdict = f"FAIL: {', '.join(sorted({row.name for row in wrong}))} above what is allowed, see the table."
    else:
        verdict = f"PASS: {len(ran)} of {len(CAPABILITIES)} implementations ran, all as accurate as they must be."
    console.print("\n".join(report.table(rows)))
    for name, why in left_out.items():
        console.print(f"Not run: {name}, which {why}")
    (output / TABLE).write_text(report.document(rows, about, left_out, verdict), encoding="utf-8")
    report.draw(rows, about[0], output / PICTURE)
    console.print(f"Written: {output / TABLE}, {output / PICTURE}, in {time.perf_counter() - started:.0f} s")
    console.print(verdict)
    return not wrong


def runnable(device: torch.device, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    """The implementations that can run there, and why each other one cannot."""
    able, unable = [], {}
    for name, can in CAPABILITIES.items():
        obstacle = CANDIDATES[name].obstacle(device, dtype)
        if can.cuda_only and device.type == "cpu":
            # Not in Triton's interpreter either: it would take hours.
            obstacle = "needs a CUDA card"
        if obstacle:
            unable[name] = obstacle
        else:
            able.append(name)
    return able, unable
