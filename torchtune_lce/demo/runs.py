"""The four fine-tunes as ``tune run`` commands: starting them, watching them, reading what torchtune logged."""

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

from torchtune_lce.demo.errors import DemoError

CONFIGS = Path(__file__).parent.parent / "configs" / "tiny"
STOCK_LOSS = "torchtune.modules.loss.CEWithChunkedOutputLoss"
METHOD_TITLES = {"lora": "LoRA", "full": "full"}
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Setting:
    """What all runs of one demo have in common."""

    device: str
    dtype: str  # as in torchtune's configs: fp32 or bf16
    batch_size: int
    steps: int
    impl: str  # as asked for


@dataclass(frozen=True)
class Run:
    """One fine-tune. ``ours`` says which loss, and therefore whose recipe."""

    method: str  # a key of METHOD_TITLES
    ours: bool

    @property
    def title(self) -> str:
        loss = "linear" if self.ours else "torchtune's"
        return f"{METHOD_TITLES[self.method]}, {loss} loss"

    @property
    def folder(self) -> str:
        return f"runs/{self.method}_{'lce' if self.ours else 'stock'}"

    def command(self, setting: Setting) -> list[str]:
        """The command line, to be started in the demo's folder."""
        recipe = f"{self.method}_finetune_single_device"
        return [
            "tune",
            "run",
            f"torchtune_lce/recipes/{recipe}.py" if self.ours else recipe,
            "--config",
            str(CONFIGS / f"{self.method}_single_device.yaml"),
            f"output_dir={self.folder}",
            f"device={setting.device}",
            f"dtype={setting.dtype}",
            f"batch_size={setting.batch_size}",
            f"max_steps_per_epoch={setting.steps}",
            *([f"loss.impl={setting.impl}"] if self.ours else [f"loss={STOCK_LOSS}", "~loss.impl"]),
        ]


RUNS = tuple(Run(method, ours) for method in METHOD_TITLES for ours in (False, True))


@dataclass(frozen=True)
class Result:
    """What one run left behind."""

    losses: list[float]
    tokens_per_second: float
    peak_bytes: int | None  # allocated on the GPU; on a CPU the process's resident set; None where nobody counts it


def execute(run: Run, setting: Setting, output: Path, on_step: Callable[[int], None]) -> Result:
    """Runs it in a process of its own inside ``output`` and calls ``on_step`` with the number of steps so far.

    Raises DemoError, with the end of what it printed, if it fails.
    """
    folder = output / run.folder
    folder.mkdir(parents=True)
    command = run.command(setting)
    printed = folder / "output.txt"
    with printed.open("wb") as file:
        # The same entry as the console script `tune`, which may not be on the PATH.
        process = subprocess.Popen(
            [sys.executable, "-m", "torchtune._cli.tune", *command[1:]],
            cwd=output,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            # There is nothing to look up: the data set is a local file.
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    log = folder / "log.txt"
    resident = None
    try:
        while process.poll() is None:
            resident = _peak_resident_bytes(process.pid) or resident
            on_step(len(read_log(log)))
            time.sleep(_POLL_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    records = read_log(log)
    if process.returncode or len(records) != setting.steps:
        end = printed.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
        raise DemoError(
            f"{run.title}: the run ended with status {process.returncode} after {len(records)} of {setting.steps} "
            f"steps. In {output}:\n{shlex.join(command)}\nIt printed, in full in {printed}:\n{end}"
        )
    on_step(len(records))
    return summarise(records, resident)


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


def summarise(records: list[dict[str, float]], resident: int | None) -> Result:
    """Tokens per second are the median without the first step, which warms up."""
    speeds = [record["tokens_per_second_per_gpu"] for record in records[1:]]
    allocated = [record["peak_memory_alloc"] for record in records if "peak_memory_alloc" in record]
    return Result(
        losses=[record["loss"] for record in records],
        tokens_per_second=statistics.median(speeds) if speeds else math.nan,
        peak_bytes=int(max(allocated) * 2**30) if allocated else resident,
    )


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
