"""The numerics of the suite under pairs of torch and Triton: `python tests/matrix.py` makes an environment for each.

    python tests/matrix.py --index-url URL --write

Torch is taken as a CPU build (`torch==2.8.0+cpu`), so that no pair pulls gigabytes of CUDA libraries: give
``--index-url`` where pip's own index has none, or ``--allow-cuda`` to take what there is. A pair that cannot be
installed is a row that says so. ``--write`` puts the rows into docs/matrix.md.
"""

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "matrix.md"
BEGIN, END = "<!-- rows: tests/matrix.py -->", "<!-- end of rows -->"
HEAD = ("pair", "Python", "torch", "Triton", "torchtune", "result", "on")


@dataclass(frozen=True)
class Pair:
    """Versions that belong together; ``others`` are requirements that they need of other packages."""

    name: str
    python: str
    torch: str
    others: tuple[str, ...]


PAIRS = (
    # What torch 2.8 came with; before 3.7.1 Triton's interpreter fails on loop bounds with newer NumPy.
    Pair("oldest", "3.11", "2.8.0", ("triton==3.4.0", "torchao==0.15.0", "numpy<2.4")),
    # What pip takes for `pip install .` today; it brings its own Triton.
    Pair("newest", "3.11", "2.15.0", ("torchao==0.15.0",)),
    Pair("newest Python", "3.13", "2.15.0", ("torchao==0.15.0",)),
)
# A single device, from the functions up to the recipes and patched models.
TESTS = (
    "test_linear_cross_entropy.py",
    "test_properties.py",
    "test_autograd.py",
    "test_dtypes.py",
    "test_determinism.py",
    "test_bad_input.py",
    "test_compile.py",
    "test_kernels.py",
    "test_entry_gradients.py",
    "test_import.py",
    "test_loss_module.py",
    "test_recipes.py",
    "test_patch.py",
)


def torch_requirement(pair: Pair, allow_cuda: bool, system: str = platform.system()) -> str:
    """On Linux a CPU build is marked as one; other systems have no other kind."""
    return f"torch=={pair.torch}" + ("+cpu" if system == "Linux" and not allow_cuda else "")


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "said nothing"


def summary(output: str) -> str:
    """pytest's closing line without its frame and its time."""
    return re.sub(r" in [\d.]+s.*", "", last_line(output).strip("= "))


def run_pair(pair: Pair, arguments: argparse.Namespace, folder: Path) -> tuple[str, ...]:
    """A row of the table."""
    row = [pair.name, pair.python, pair.torch, "", ""]

    def not_run(why: str) -> tuple[str, ...]:
        return (*row, f"not run: {why}", str(date.today()))

    interpreter = arguments.python or shutil.which(f"python{pair.python}")
    if interpreter is None:
        return not_run(f"no python{pair.python} here")
    made = subprocess.run([interpreter, "-m", "venv", str(folder)], capture_output=True, text=True)
    if made.returncode:
        return not_run(last_line(made.stderr))
    python = str(folder / "bin" / "python")

    def pip(*requirements: str, index: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        command = [python, "-m", "pip", "install", "--quiet", *index, *requirements]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    index = ("--extra-index-url", arguments.index_url) if arguments.index_url else ()
    wanted = torch_requirement(pair, arguments.allow_cuda)
    # Alone and first: the package's own requirement would take any version.
    if pip(wanted, index=index).returncode:
        return not_run(f"pip's index has no {wanted}")
    installed = pip(".[test]", wanted, *pair.others, index=index)
    if installed.returncode:
        return not_run(last_line(installed.stderr))
    asked = "from importlib.metadata import version; print(*map(version, ('torch', 'triton', 'torchtune')))"
    row[2:5] = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    row[1] = platform_of(python)
    tests = [str(file_of(name).relative_to(ROOT)) for name in arguments.tests]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (arguments.logs / f"{pair.name}.log").write_text(done.stdout + done.stderr)
    # A pytest that a signal ended has no closing line.
    result = summary(done.stdout) if done.returncode >= 0 else f"failed: pytest died of signal {-done.returncode}"
    return (*row, result, str(date.today()))


def file_of(name: str) -> Path:
    """Raises ValueError unless one file of the tests has that name."""
    (path,) = (ROOT / "tests").rglob(name)
    return path


def platform_of(python: str) -> str:
    """The interpreter's version."""
    asked = "import platform; print(platform.python_version())"
    return subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


def table(rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (HEAD, ["---"] * len(HEAD), *rows))


def written() -> dict[str, tuple[str, ...]]:
    """Rows that the page holds, by the name of their pair."""
    lines = PAGE.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    rows = [tuple(cell.strip() for cell in line.strip("| ").split(" | ")) for line in lines]
    return {row[0]: row for row in rows}


def write(rows: list[tuple[str, ...]]) -> None:
    """Replaces the rows of the pairs that ran; the others stay."""
    known = written() | {row[0]: row for row in rows}
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(list(known.values()))}\n{END}{rest.split(END)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", choices=[pair.name for pair in PAIRS], default=[p.name for p in PAIRS])
    parser.add_argument("--tests", nargs="+", default=TESTS, help="names of test files")
    parser.add_argument("--python", help="interpreter for every pair, in place of python3.11 and the like")
    parser.add_argument("--index-url", help="one more package index, with CPU builds of torch")
    parser.add_argument("--allow-cuda", action="store_true", help="take a CUDA build where there is no other")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()), help="folder for pytest's output")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/matrix.md")
    arguments = parser.parse_args()
    rows = []
    for pair in PAIRS:
        if pair.name in arguments.pairs:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(run_pair(pair, arguments, Path(folder)))
            print(*rows[-1], sep=" | ", flush=True)
    if arguments.write:
        write(rows)
    return 0 if all(" failed" not in row[5] and "error" not in row[5] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
