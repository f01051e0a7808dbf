"""Running a torchtune recipe as ``tune run`` does, watching it, and reading what it logged."""

import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchtune_lce.commands.shared.errors import CommandError

# Of torchtune's DiskLogger and of what a recipe prints, in the folder of a run.
LOG, PRINTED = "log.txt", "output.txt"
STOCK_LOSS = "torchtune.modules.loss.CEWithChunkedOutputLoss"
OUR_LOSS = "torchtune_lce.LinearCrossEntropyLoss"
_POLL_SECONDS = 0.1
# The same entry as the console script `tune`, which may not be on the PATH. What is read is whether to go on.
_WAITING = "import sys; from torchtune._cli.tune import main; sys.stdin.readline() and main()"
# What a process prints whose card is full: PyTorch's allocator, cuBLAS, the driver under PyTorch and under Triton.
_NO_MEMORY_LEFT = (
    "OutOfMemoryError",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
)


class RunFailed(CommandError):
    """A recipe ended early; the message holds its command and the end of what it printed."""

    def __init__(self, message: str, out_of_memory: bool):
        super().__init__(message)
        self.out_of_memory = out_of_memory


@dataclass(frozen=True)
class Result:
    """What one run left behind."""

    losses: list[float]
    tokens_per_second: float  # median, of each device; tokens as its recipe counts them
    spread: float  # interquartile range of tokens_per_second
    peak_bytes: int | None  # allocated on the GPU; on a CPU the process's resident set; None where nobody counts it
    reserved_bytes: int | None  # by PyTorch on the GPU; None on a CPU
    kept_fraction: float | None = None  # median; None unless the config sets log_loss_stats and the loss filters


def start(command: list[str], folder: Path, log: Path) -> subprocess.Popen:
    """A process that imports what ``tune run ...`` needs, which takes seconds, and goes on once :func:`run` lets it.

    It ends by itself if its standard input is closed before.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with (log.parent / PRINTED).open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", _WAITING, *command[1:]],
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.PIPE,
            # There is nothing to look up: data and models are local files.
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )


def run(
    command: list[str],
    folder: Path,
    steps: int,
    on_step: Callable[[int], None],
    log: Path,
    warmup: int = 1,
    process: subprocess.Popen | None = None,
) -> Result:
    """Runs ``tune run ...`` in a process of its own inside ``folder``; ``on_step`` gets the number of steps so far.

    The run must log every step to ``log``, beside which goes what it prints. ``process`` is what :func:`start` gave for
    the same command, folder and log, if that was called before. Raises RunFailed unless it logs ``steps``.
    """
    process = process or start(command, folder, log)
    printed = log.parent / PRINTED
    resident = None
    alone = "--nproc_per_node" not in command  # else this process is the launcher
    try:
        _let_go(process)
        while process.poll() is None:
            if alone:
                resident = _peak_resident_bytes(process.pid) or resident
            on_step(len(read_log(log)))
            time.sleep(_POLL_SECONDS)
    finally:
        stop(process)
    records = read_log(log)
    if process.returncode or len(records) != steps:
        said = printed.read_text(encoding="utf-8", errors="replace").strip()
        raise RunFailed(
            f"the run ended with status {process.returncode} after {len(records)} of {steps} steps. In {folder}:\n"
            f"{shlex.join(command)}\nIt printed, in full in {printed}:\n{said[-2000:]}",
            out_of_memory=ran_out_of_memory(said),
        )
    on_step(len(records))
    return summarise(records, resident, warmup)


def _let_go(process: subprocess.Popen) -> None:
    try:
        process.stdin.write(b"go\n")
        process.stdin.close()
    except BrokenPipeError:  # it has ended, and why is in what it printed
        pass


def stop(process: subprocess.Popen) -> None:
    """Ends a process, started or let go, unless it has ended."""
    if process.poll() is None:
        # Asked first: torchrun, which several devices take, ends its processes then.
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ran_out_of_memory(printed: str) -> bool:
    """Whether that is why a process ended that ``printed`` this, a card's memory."""
    return any(message in printed for message in _NO_MEMORY_LEFT)


def read_log(path: Path) -> list[dict[str, float]]:
    """The records of torchtune's DiskLogger, one for each step: ``Step 3 | loss:9.1 lr:0.002 ...``."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # the last may be half written
    return [
        {name: float(value) for name, _, value in (pair.rpartition(":") for pair in line.partition("|")[2].split())}
        for line in whole
    ]


def summarise(records: list[dict[str, float]], resident: int | None, warmup: int = 1) -> Result:
    """Speed without the first ``warmup`` steps, memory with them."""
    speeds = [record["tokens_per_second_per_gpu"] for record in records[warmup:]]
    lower, middle, upper = math.nan, math.nan, math.nan
    if len(speeds) > 1:
        lower, middle, upper = statistics.quantiles(speeds, n=4, method="inclusive")
    elif speeds:
        lower = middle = upper = speeds[0]
    kept = [record["kept_fraction"] for record in records[warmup:] if "kept_fraction" in record]
    return Result(
        losses=[record["loss"] for record in records],
        tokens_per_second=middle,
        spread=upper - lower,
        peak_bytes=_largest(records, "peak_memory_alloc") or resident,
        reserved_bytes=_largest(records, "peak_memory_reserved"),
        kept_fraction=statistics.median(kept) if kept else None,
    )


def _largest(records: list[dict[str, float]], name: str) -> int | None:
    """In bytes; torchtune logs GiB."""
    values = [record[name] for record in records if name in record]
    return int(max(values) * 2**30) if values else None


def _peak_resident_bytes(pid: int) -> int | None:
    """Linux counts it for each process; elsewhere, and once the process has ended, there is nothing to read.

    Not ``resource.getrusage``: a child's ``ru_maxrss`` starts at what its parent held when it forked.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
