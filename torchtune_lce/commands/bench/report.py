"""What the benchmark leaves behind: a table, a JSON file and a picture."""

import dataclasses
import math
from pathlib import Path

from rich import box
from rich.table import Table

from torchtune_lce.commands.bench.measure import OK, Case, Check
from torchtune_lce.commands.shared import records

_OURS, _OTHERS, _FLOOR_COLOUR = "#12355b", "#b9c4d0", "#b23a3a"
_LEAST_MIB = 0.5  # so that nothing at all has a place on a logarithmic axis


def write_json(results: dict, path: Path) -> None:
    """``results`` as it is; its "cases" are :class:`Case`, its "floors" and "data" plain dictionaries.

    A wrong loss's errors may be no numbers, and so may what is found of data: null in their place.
    """
    records.write({**results, "cases": [dataclasses.asdict(case) for case in results["cases"]]}, path)


def table(cases: list[Case]) -> Table:
    """The cases of one batch, each loss with both gradients and then with a frozen head."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("loss", "gradients"):
        grid.add_column(heading, no_wrap=True)
    numbers = (
        "forward\nms",
        "recording\nms",
        "forward +\nbackward, ms",
        "spread\nms",
        "host\nms",
        "launches",
        "x compiled\nfull logits",
        "queued\nms",
        "x compiled,\nqueued",
        "TFLOP/s",
        "of cuBLAS's\nown rate",
        "peak\nMiB",
        "tiles\nkept",
        "error\nhidden",
        "error\nweight",
    )
    for heading in numbers:
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("", no_wrap=True)
    for case in cases:
        grid.add_row(
            case.impl,
            "frozen head" if case.frozen_weight else "both",
            _number(case.forward_ms, ".2f"),
            _number(case.forward_recording_ms, ".2f"),
            _number(case.forward_backward_ms, ".2f"),
            _number(case.spread_ms, ".2f"),
            _number(case.host_ms, ".2f"),
            _number(case.launches, ",d"),
            _number(case.ratio_to_torch_compile_full, ".2f"),
            _number(case.queued_ms, ".2f"),
            _number(case.queued_ratio_to_torch_compile_full, ".2f"),
            _number(case.forward_backward_tflops, ",.0f"),
            _number(case.cublas_fraction, ".2f"),
            _number(case.peak_mib, ",.0f"),
            _number(case.kept_fraction, ".3f"),
            _number(case.grad_error_hidden, ".1e"),
            _number(case.grad_error_weight, ".1e"),
            "" if case.status == OK else case.status,
        )
    return grid


def check_table(rows: list[tuple[str, Check]]) -> Table:
    """Of the correctness check alone, by name: errors, each with the most that it may be."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("loss", "data"):
        grid.add_column(heading, no_wrap=True)
    for heading in ("error of loss\n/ allowed", "of hidden's gradient\n/ allowed", "of weight's gradient\n/ allowed"):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("", no_wrap=True)
    for name, check in rows:
        found = {} if check.found is None else check.found.parts
        cells = [
            f"{found[part]:.1e} / {most:.1e}" if part in found else "" for part, most in check.allowed.parts.items()
        ]
        grid.add_row(name, check.data, *cells, check.status)
    return grid


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def draw(cases: list[Case], ours: set[str], floors: list[dict], path: Path, left_out: dict[str, str]) -> None:
    """Time with both gradients, with a frozen head, and peak memory of each batch, as a PNG; below, what is missing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches = list(dict.fromkeys((case.data_name, case.shape) for case in cases))
    names = list(dict.fromkeys(case.impl for case in cases))
    # Without pyplot: no display is touched and no global state stays behind.
    figure = Figure(figsize=(15, 1.2 + len(batches) * (1.2 + 0.3 * len(names))), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, shape) in zip(figure.subplots(len(batches), 3, squeeze=False), batches, strict=True):
        here = [case for case in cases if (case.data_name, case.shape) == (name, shape)]
        both = {case.impl: case for case in here if not case.frozen_weight}
        frozen = {case.impl: case for case in here if case.frozen_weight}
        floor = next(floor for floor in floors if (floor["data_name"], floor["shape"]) == (name, vars(shape)))
        titles = (f"{name}, {shape}: both gradients", "frozen head", "peak memory, both gradients")
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title, loc="left", fontsize=10)
        for axis, group in zip(axes, (both, frozen), strict=False):
            _bars(axis, {impl: case.forward_backward_ms for impl, case in group.items()}, group, ours, "{:.1f}")
            axis.axvline(floor["logits_gemm_ms"], color=_FLOOR_COLOUR, linestyle="--", linewidth=1)
            axis.set_xlabel("forward + backward, ms (dashed: the logits' product alone)")
        _draw_peaks(axes[2], both, ours)
    if left_out:
        figure.supxlabel("; ".join(f"{name} is left out: {why}" for name, why in left_out.items()), fontsize=8)
    figure.savefig(path)


def _draw_peaks(axis, cases: dict[str, Case], ours: set[str]) -> None:
    peaks = {impl: None if case.peak_mib is None else max(case.peak_mib, _LEAST_MIB) for impl, case in cases.items()}
    _bars(axis, peaks, cases, ours, "{:,.0f}")
    axis.set_xlabel("MiB over inputs and gradients")
    if any(peaks.values()):
        axis.set_xscale("log")
        axis.set_xlim(left=_LEAST_MIB / 2)
    else:
        axis.set_xticks([])


def _bars(axis, values: dict[str, float | None], cases: dict[str, Case], ours: set[str], style: str) -> None:
    for place, (name, value) in enumerate(values.items()):
        if value is None or not math.isfinite(value):
            status = cases[name].status
            axis.text(0, place, "  not measured" if status == OK else f"  {status[:30]}", va="center", fontsize=8)
            axis.barh(place, 0)
            continue
        axis.barh(place, value, color=_OURS if name in ours else _OTHERS)
        axis.text(value, place, " " + style.format(value), va="center", fontsize=8)
    axis.set_yticks(range(len(values)), values)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)
