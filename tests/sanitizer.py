"""The kernels under NVIDIA's compute-sanitizer: `python tests/sanitizer.py` on a machine with a card.

memcheck looks for reads and writes out of bounds, initcheck for reads of memory that nothing wrote, racecheck for
hazards in shared memory. Each runs the same small calls twice, with descriptor and with pointer loads in the forward.
Before, a kernel with a fault of each of the first two kinds must be found out, or the verdict would mean nothing.
The last line is the verdict, and the exit status is 0 only for `clean`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

TOOLS = ("memcheck", "initcheck", "racecheck")
PATHS = ("descriptor", "pointer")
# Faults made on purpose, by the tool that must see them.
CONTROLS = {"memcheck": "past the end", "initcheck": "never written"}
LOGS = Path(tempfile.gettempdir()) / "torchtune-lce-sanitizer"
ROOT = Path(__file__).parent.parent
# Where the tools print that an access happened.
PLACE = re.compile(r"^=========\s+at (.+?)\+0x", re.MULTILINE)
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")


@dataclass(frozen=True)
class Finding:
    """What a tool said of a process."""

    errors: int | None  # None where it never came to a summary
    returncode: int
    log: Path
    places: Counter[str] = field(default_factory=Counter)  # kernels that it named, as far as it printed them

    @property
    def clean(self) -> bool:
        return self.errors == 0 and self.returncode == 0

    def __str__(self) -> str:
        if self.errors is None or (self.returncode and not self.errors):
            return f"did not run to its end (status {self.returncode}), see {self.log}"
        named = "".join(f", {count} in {place}" for place, count in self.places.most_common(5))
        return "clean" if self.clean else f"{self.errors} errors{named}, see {self.log}"


def errors_in(output: str) -> int | None:
    """The number in compute-sanitizer's summary; the largest, since it counts again what it did not print."""
    found = SUMMARY.findall(output)
    return max(map(int, found)) if found else None


def run_calls(path: str) -> None:
    """Small calls that meet every flag of the kernels, each checked against plain PyTorch."""
    import torch
    import torch.nn.functional as F

    from torchtune_lce.functional import compute
    from torchtune_lce.kernels import tuning
    from torchtune_lce.low_rank import LowRank
    from torchtune_lce.options import Options

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if path == "pointer":
        tuning.has_tma = lambda capability: False
        tuning._cuda_config.cache_clear()
    dtypes = (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float16,)
    # Ragged in all three. In a workspace of 1 MiB of several strips, the first of which have their logit gradients in
    # the weight's gradient, and without room for a copy of the hidden states; and one of everything.
    for tokens, vocabulary, width in ((500, 3000, 264), (1, 1, 16)):
        for dtype in dtypes:
            for bias, rank, softcap, impl, with_lse, ignored, workspace_mib in (
                (False, 0, None, "cce", False, True, 128),
                (True, 0, 10.0, "cce", True, True, 1),
                (True, 0, None, "cce_exact", True, False, 1),
                (False, 8, None, "cce", True, True, 128),
                (True, 24, 10.0, "cce_exact", False, True, 1),
            ):
                torch.manual_seed(0)
                hidden = torch.randn(tokens, width, dtype=dtype, device=device)
                weight = torch.randn(vocabulary, width, dtype=dtype, device=device) / 2
                targets = torch.randint(0, vocabulary, (tokens,), device=device)
                # A block of confident tokens, so that tiles are dropped.
                hidden[: tokens // 2] = weight[targets[: tokens // 2]] * 3
                if ignored:
                    targets[1::4] = -100
                leaves = {"hidden": hidden, "weight": weight}
                if bias:
                    leaves["bias"] = torch.randn(vocabulary, dtype=dtype, device=device)
                if rank:
                    leaves["low"] = torch.randn(tokens, rank, dtype=dtype, device=device) / 4
                    leaves["up"] = torch.randn(vocabulary, rank, dtype=dtype, device=device) / 4
                for leaf in leaves.values():
                    leaf.requires_grad_()
                loss, lse = compute(
                    hidden,
                    weight,
                    targets,
                    leaves.get("bias"),
                    options=Options(softcap=softcap, workspace_mib=workspace_mib),
                    reduction="sum",
                    shift=0,
                    impl=impl,
                    return_lse=True,
                    low_rank=LowRank(leaves["low"], leaves["up"], None) if rank else None,
                )
                gradients = torch.autograd.grad(loss + lse.sum() if with_lse else loss, list(leaves.values()))
                exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
                logits = F.linear(exact["hidden"], exact["weight"], exact.get("bias"))
                if rank:
                    logits = logits + exact["low"] @ exact["up"].T
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                nll = F.cross_entropy(logits, targets, reduction="sum")
                exact_lse = logits.logsumexp(-1).where(targets != -100, 0)
                wanted = torch.autograd.grad(nll + exact_lse.sum() if with_lse else nll, list(exact.values()))
                called = f"{impl}, {tokens} x {width} x {vocabulary}, rank {rank}, {dtype}"
                if not torch.allclose(loss.double(), nll, rtol=1e-3, atol=1e-3):
                    raise AssertionError(f"the loss is {loss.item()}, not {nll.item()}: {called}")
                for name, gradient, right in zip(leaves, gradients, wanted, strict=True):
                    # Roomy, for what 16 bits round and the filter leaves out: a tile that was lost or doubled is more.
                    error = (gradient.double() - right).norm() / right.norm().clamp(min=1e-6)
                    if not error < 0.05:
                        raise AssertionError(f"the gradient of {name} is {error.item():.2g} off: {called}")
    if device.type == "cuda":
        torch.cuda.synchronize()


def run_control(fault: str) -> None:
    """A kernel with a fault."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def add_one(source, target, offset, BLOCK: tl.constexpr):
        place = tl.arange(0, BLOCK)
        tl.store(target + offset + place, tl.load(source + place) + 1)

    source = torch.empty(1024, device="cuda")
    if fault == "past the end":
        source.zero_()
    target = torch.zeros(1024, device="cuda")
    add_one[(1,)](source, target, 1024 * 1024 if fault == "past the end" else 0, BLOCK=1024)
    torch.cuda.synchronize()


def find_sanitizer() -> str:
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda")]
    folders = [os.environ.get("PATH", ""), *(f"{home}/{sub}" for home in homes for sub in ("bin", "compute-sanitizer"))]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if found is None:
        raise SystemExit("compute-sanitizer was not found: install the CUDA toolkit, or set CUDA_HOME to where it is")
    return found


def examine(tool: str, arguments: list[str], log: Path, timeout: int) -> Finding:
    """One process under one tool. Every allocation of its own, or torch's cache would hide where they end."""
    command = [find_sanitizer(), "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "99"]
    command += ["--print-limit", "1000", sys.executable, __file__, *arguments]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        try:
            status = subprocess.run(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=timeout
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    text = log.read_text(errors="replace")
    return Finding(errors_in(text), status, log, Counter(PLACE.findall(text)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder for what the tools print")
    parser.add_argument("--timeout", type=int, default=500, help="seconds for each process")
    parser.add_argument("--calls", choices=PATHS, help="only make the calls, without a tool")
    parser.add_argument("--control", choices=list(CONTROLS.values()), help="only make this fault, without a tool")
    arguments = parser.parse_args()
    if arguments.calls:
        run_calls(arguments.calls)
        return 0
    if arguments.control:
        run_control(arguments.control)
        return 0
    arguments.logs.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def call(path: str) -> None:
        subprocess.run([sys.executable, __file__, "--calls", path], check=True, env=environment)

    def watch(tool: str, path: str) -> Finding:
        return examine(tool, ["--calls", path], arguments.logs / f"{tool}-{path}.log", arguments.timeout)

    def control(tool: str) -> Finding:
        return examine(tool, ["--control", CONTROLS[tool]], arguments.logs / f"{tool}-control.log", arguments.timeout)

    with ThreadPoolExecutor() as together:
        # Compiled here, so that the tools watch the kernels alone; and the calls must be right without them.
        list(together.map(call, PATHS))
        controls = {tool: together.submit(control, tool) for tool in arguments.tools if tool in CONTROLS}
        found = {(tool, path): together.submit(watch, tool, path) for tool in arguments.tools for path in PATHS}
        well = True
        for tool, finding in controls.items():
            seen = bool(finding.result().errors)
            verdict = "found" if seen else f"NOT FOUND, see {finding.result().log}"
            print(f"{tool}, a fault on purpose: {verdict}", flush=True)
            well &= seen
        for (tool, path), finding in found.items():
            print(f"{tool}, {path} loads: {finding.result()}", flush=True)
            well &= finding.result().clean
    print("clean" if well else "NOT clean")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
