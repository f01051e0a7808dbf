"""The benchmark from beginning to end."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from torchtune_lce.commands.bench import correctness, measure, probe, report, teacher_batches, text
from torchtune_lce.commands.bench.measure import OK, OUT_OF_MEMORY, Case
from torchtune_lce.commands.bench.statistics import Statistics, softmax_statistics
from torchtune_lce.commands.bench.timing import Timer
from torchtune_lce.commands.shared import environment, output_folder
from torchtune_lce.commands.shared.batches import Batch, file_batches, random_batch
from torchtune_lce.commands.shared.candidates import Candidate
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.objective import Objective
from torchtune_lce.commands.shared.shapes import FLOPS_FORMULA, Shape
from torchtune_lce.commands.shared.tables import print_table
from torchtune_lce.commands.shared.trained_batches import trained_batch
from torchtune_lce.commands.shared.yardstick import Yardstick

MARKER, RESULTS, PICTURE = ".tune-lce-bench", "bench.json", "bench.png"


@dataclass(frozen=True)
class Source:
    """Where a batch comes from: "random", "trained" or "probe" with a shape, "file" with a path; with the shape of a
    teacher too, "random" or "near".

    A probe, which takes minutes to train, also gives batches of its first ``fewer`` tokens.
    """

    kind: str
    shape: Shape | None = None
    path: Path | None = None
    fewer: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and on what."""

    candidates: list[Candidate]
    sources: list[Source]
    device: torch.device
    dtype: torch.dtype
    timer: Timer
    output: Path
    command: str
    training: probe.Training = field(default_factory=probe.Training)

    @property
    def objective(self) -> Objective | None:
        """Of all candidates."""
        return self.candidates[0].objective


def bench(plan: Plan) -> bool:
    """Checks and times everything, prints it as it comes and writes it; whether this package's losses all passed.

    Files are written after each batch, so that an interrupted run leaves what it had. A batch that does not fit, with
    what the losses are compared with, is recorded as that. Raises CommandError if it cannot run.
    """
    console = _console()
    output = output_folder.claim(plan.output, MARKER, "an earlier benchmark's")
    setting = environment.describe(plan.device)
    console.print(environment.in_words(setting))
    candidates, left_out = _able(console, plan)
    loss, flops = "cross-entropy", FLOPS_FORMULA
    if plan.objective is not None:
        loss, flops = str(plan.objective), teacher_batches.FLOPS_FORMULA
        console.print(loss)
    results = {**setting, "command": plan.command, "dtype": _name(plan.dtype), "loss": loss, "flops": flops}
    results |= {"left_out": left_out, "data": [], "floors": [], "cases": []}
    refused = _refused(console, candidates, plan)
    for source in plan.sources:
        for batch in _batches(console, source, plan, results):
            console.print(f"\n{batch.title}, {_name(plan.dtype)}")
            right = _about_batch(console, batch, candidates, plan, results)
            if right is not None:
                rate = results["floors"][-1]["tflops"]
                cases = _measure_all(console, candidates, refused, batch, right, rate, plan)
                results["cases"] += cases
                print_table(console, report.table(cases))
                ours = {candidate.name for candidate in plan.candidates if candidate.ours}
                report.draw(results["cases"], ours, results["floors"], output / PICTURE, left_out)
            report.write_json(results, output / RESULTS)
            del batch, right  # before the next one is made
    report.write_json(results, output / RESULTS)
    if not results["cases"]:
        raise CommandError("no loss was measured: none of the data fit into memory")
    console.print(flops)
    console.print(f"Written: {output / RESULTS}, {output / PICTURE}")
    ours = {candidate.name for candidate in candidates if candidate.ours}
    return all(case.status in (OK, OUT_OF_MEMORY) for case in results["cases"] if case.impl in ours)


def _about_batch(
    console: Console, batch: Batch, candidates: list[Candidate], plan: Plan, results: dict
) -> Yardstick | None:
    """Adds the batch's "data" and "floors" to the results; what losses are held against, None where it does not fit."""
    about = {"data": batch.data, "data_name": batch.name, "shape": asdict(batch.shape)}
    try:
        projection = measure.time_projection(batch, plan.timer)
        with console.status("computing what the losses are held against"):
            right = correctness.yardstick(batch, candidates)
            statistics = _statistics(batch, right, plan.objective)
    except RuntimeError as error:
        if measure.describe(error) != OUT_OF_MEMORY:
            raise
        right = None  # the exception still holds what was allocated
    if right is None:
        _does_not_fit(console, results, about, "what the losses are held against")
        return None
    console.print(f"  {statistics}")
    rate = batch.shape.flops(None) / projection / 1e9
    console.print(f"  the matrix product of all logits alone: {projection:.2f} ms, {rate:,.0f} TFLOP/s")
    results["data"].append({**about, "status": OK, **asdict(statistics)})
    results["floors"].append({**about, "logits_gemm_ms": projection, "tflops": rate})
    return right


def _statistics(batch: Batch, right: Yardstick, objective: Objective | None) -> Statistics | teacher_batches.Statistics:
    """Those of a softmax are of what a filter can leave out; of a teacher's nothing is."""
    return softmax_statistics(batch) if objective is None else teacher_batches.Statistics(right.loss)


def _does_not_fit(console: Console, results: dict, about: dict, what: str) -> None:
    console.print(f"  {OUT_OF_MEMORY}: {what}; not measured")
    results["data"].append({**about, "status": f"{OUT_OF_MEMORY}: {what}"})
    measure.give_memory_back()


def check_only(candidates: list[Candidate], device: torch.device, dtype: torch.dtype) -> bool:
    """The correctness check on small data, as a table; whether every loss that can run here passed.

    Raises CommandError if none can.
    """
    console = _console()
    console.print(f"correctness check on {environment.describe(device)['device']} in {_name(dtype)}")
    rows, passed = [], True
    for candidate in candidates:
        obstacle = candidate.obstacle(device, dtype)
        if obstacle:
            console.print(f"  {candidate.name} is left out: {obstacle}")
            continue
        with console.status(candidate.name):
            checks = measure.check(candidate, dtype, device)
        passed &= all(check.status == OK for check in checks)
        rows += [(candidate.name, check) for check in checks]
    if not rows:
        raise CommandError("none of the losses can run here")
    print_table(console, report.check_table(rows))
    return passed


def _console() -> Console:
    return Console(highlight=False, markup=False, soft_wrap=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _able(console: Console, plan: Plan) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates that can run here, and why each other one cannot, which it also says."""
    able, left_out = [], {}
    for candidate in plan.candidates:
        obstacle = candidate.obstacle(plan.device, plan.dtype)
        if obstacle:
            console.print(f"{candidate.name} is left out: {obstacle}")
            left_out[candidate.name] = obstacle
        else:
            able.append(candidate)
    if not able:
        raise CommandError("none of the losses can run here")
    return able, left_out


def _refused(console: Console, candidates: list[Candidate], plan: Plan) -> dict[str, str]:
    """What is wrong with those that fail on small data, by name. Losses with demands on sizes are not asked."""
    refused = {}
    for candidate in candidates:
        if not candidate.any_size:
            continue
        with console.status(f"checking {candidate.name}"):
            checks = measure.check(candidate, plan.dtype, plan.device)
        wrong = next((check for check in checks if check.status != OK), None)
        if wrong is not None:
            refused[candidate.name] = f"small {wrong.data} data: {wrong.status}"
            console.print(f"{candidate.name} fails on small {wrong.data} data and will not be timed: {wrong.status}")
    return refused


def _batches(console: Console, source: Source, plan: Plan, results: dict) -> Iterator[Batch]:
    try:
        if isinstance(source.shape, teacher_batches.TeacherShape):
            batches = [teacher_batches.teacher_batch(source.kind, source.shape, plan.dtype, plan.device)]
        elif source.kind == "random":
            batches = [random_batch(source.shape, plan.dtype, plan.device)]
        elif source.kind == "trained":
            batches = [trained_batch(source.shape, plan.dtype, plan.device)]
        elif source.kind == "probe":
            whole = _probe_batches(console, source.shape, plan)
            batches = [part for batch in whole for part in (*map(batch.first, source.fewer), batch)]
        else:
            batches = file_batches(source.path, plan.dtype, plan.device)
    except RuntimeError as error:
        if measure.describe(error) != OUT_OF_MEMORY:
            raise
        batches = None
    if batches is None:
        size = None if source.shape is None else asdict(source.shape)
        console.print(f"\n{source.kind} {source.shape or source.path}")
        _does_not_fit(console, results, {"data": source.kind, "data_name": source.kind, "shape": size}, "the data")
        return
    while batches:
        yield batches.pop(0)


def _probe_batches(console: Console, shape: Shape, plan: Plan) -> list[Batch]:
    with console.status("reading the probe's text"):
        texts = text.read_texts(plan.training.characters())
    with console.status("training its tokenizer"):
        tokens = text.tokenize(texts, shape.vocab)
    console.print(
        f"probe: {len(tokens) / 1e6:.1f} million tokens of {len(texts):,} files, {len(tokens.unique()):,} ids"
    )
    columns = (TextColumn("  training {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=plan.training.steps)

        def on_step(step: int, loss: float) -> None:
            progress.update(task, completed=step + 1, description=f"loss {loss:.2f}")

        return probe.probe_batches(tokens, shape, plan.dtype, plan.device, plan.training, on_step)


def _measure_all(
    console: Console,
    candidates: list[Candidate],
    refused: dict[str, str],
    batch: Batch,
    right: Yardstick,
    projection_tflops: float,
    plan: Plan,
) -> list[Case]:
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=2 * len(candidates) * measure.STEPS)

        def group(frozen: bool) -> list[Case]:
            def on_step(name: str) -> None:
                progress.update(task, advance=1, description=f"{name}{', frozen head' if frozen else ''}")

            return measure.measure(candidates, batch, right, frozen, plan.timer, refused, on_step)

        pairs = list(zip(group(False), group(True), strict=True))
    measure.give_memory_back()
    cases = [case for pair in pairs for case in pair]
    measure.compare(cases, projection_tflops)
    return cases
