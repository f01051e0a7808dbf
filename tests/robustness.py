"""Counts what was tried to break the loss, by area: `python tests/robustness.py --examples 1000 --write`.

It runs the tests of each area, with that many random cases of each drawn property, and puts the table into
docs/robustness.md. On a machine with a card the tests that need one run too.
"""

import argparse
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "robustness.md"
BEGIN, END = "<!-- table: tests/robustness.py -->", "<!-- end of table -->"
HEAD = ("area", "tests", "cases in them", "survived", "lost", "left out")
AREAS = {
    "numbers against float64, a grid of options": ("test_linear_cross_entropy",),
    "numbers, NaN and bad targets, drawn by Hypothesis": ("test_properties",),
    "bad arguments": ("test_bad_input",),
    "dtypes, autocast, gradient scaler": ("test_dtypes",),
    "the same bits": ("test_determinism",),
    "autograd": ("test_autograd",),
    "torch.compile": ("test_compile",),
    "CUDA graphs": ("test_cuda_graphs",),
    "sizes past 2^31": ("test_huge",),
    "killed runs, failed operations and launches": ("test_interruptions",),
    "memory bounds": ("test_memory",),
    "other hardware, no Triton, no driver": ("test_hardware", "test_import", "test_implementations"),
}


@dataclass
class Area:
    """Counts of one row."""

    outcomes: Counter = field(default_factory=Counter)
    cases: int = 0

    def row(self, name: str) -> tuple[str, ...]:
        tests = self.outcomes["passed"] + self.outcomes["failed"]
        counts = (tests, self.cases, self.outcomes["passed"], self.outcomes["failed"], self.outcomes["skipped"])
        return name, *(f"{count:,}" for count in counts)


class Counting:
    """A pytest plugin that counts outcomes, and the cases that each test tallies, by area."""

    def __init__(self):
        self.areas = {name: Area() for name in AREAS}
        self.kinds: Counter[str] = Counter()
        self.lost: list[str] = []
        self._area_of = {file: name for name, files in AREAS.items() for file in files}

    def area(self, nodeid: str) -> Area:
        return self.areas[self._area_of[Path(nodeid.split("::")[0]).stem]]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item):
        from tally import tried

        before = Counter(tried)
        yield
        new = tried - before
        self.kinds += new
        self.area(item.nodeid).cases += new.total()

    def pytest_runtest_logreport(self, report):
        # A test counts once: by its call, or by what kept it from being called or broke around it.
        if report.when == "call" or not report.passed:
            self.area(report.nodeid).outcomes[report.outcome] += 1
            if report.failed:
                self.lost.append(report.nodeid)


def table(counting: Counting) -> str:
    rows = [area.row(name) for name, area in counting.areas.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in (HEAD, ["---"] * len(HEAD), *rows))


def section(counting: Counting, machine: str) -> str:
    """The table, what its cases were, and which tests failed."""
    kinds = "\n".join(f"- {kind}: {count:,}" for kind, count in sorted(counting.kinds.items()))
    lost = "\n".join(f"- `{nodeid}`" for nodeid in counting.lost) or "none"
    return f"{date.today()}, {machine}.\n\n{table(counting)}\n\nCases by kind:\n{kinds}\n\nLost: {lost}"


def machine() -> str:
    import platform

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, kernels in Triton's interpreter"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {device}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000, help="random cases of each drawn property")
    parser.add_argument("--write", action="store_true", help="put the table into docs/robustness.md")
    arguments = parser.parse_args()
    os.environ["TORCHTUNE_LCE_EXAMPLES"] = str(arguments.examples)
    os.chdir(ROOT)
    counting = Counting()
    files = [str(path) for files in AREAS.values() for file in files for path in ROOT.glob(f"tests/*/{file}.py")]
    status = pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[counting])
    text = section(counting, machine())
    if arguments.write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    print(text)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
