"""tests/sanitizer.py: its calls meet every flag, it reads the tools' summaries, and a run without one is not clean."""

import os
import sys
import time
from pathlib import Path

import pytest
import sanitizer
import torch

from torchtune_lce.kernels.division import bytes_beside, tiles_held, tiles_in_gradient
from torchtune_lce.kernels.tuning import _cuda_config, ceil_div, is_interpreted

LOG = Path("a.log")


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("=========     COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= Invalid __global__ write\n========= ERROR SUMMARY: 1 error\n", 1),
        ("========= ERROR SUMMARY: 1024 errors\n========= ERROR SUMMARY: 924 errors were not printed", 1024),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", 2),
        ("Traceback (most recent call last):\n", None),
    ],
)
def test_reads_the_summary(output, errors):
    assert sanitizer.errors_in(output) == errors


@pytest.mark.parametrize(
    ("errors", "returncode", "clean", "said"),
    [
        (0, 0, True, "clean"),
        (3, 99, False, "3 errors, see a.log"),
        (None, 124, False, "did not run to its end (timed out), see a.log"),
        (0, 1, False, "did not run to its end (status 1), see a.log"),
    ],
)
def test_clean_is_a_whole_run_without_errors(errors, returncode, clean, said):
    finding = sanitizer.Finding(errors, returncode, LOG)
    assert finding.clean == clean
    assert str(finding) == said


def test_names_the_kernels(monkeypatch, tmp_path):
    """Of what a tool printed, in its own words."""
    said = "".join(
        f"========= Uninitialized __global__ memory read of size 4 bytes\n=========     at {kernel}+0x90 in a.py:1\n"
        for kernel in ("add_one", "_tail_kernel", "_tail_kernel")
    )
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\ncat <<'EOF'\n{said}========= ERROR SUMMARY: 3 errors\nEOF\nexit 99\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    finding = sanitizer.examine("initcheck", [], tmp_path / "log", 10)
    assert str(finding) == f"3 errors, 2 in _tail_kernel, 1 in add_one, see {tmp_path / 'log'}"


@pytest.fixture(scope="module", params=["float16", "float32"])
def met(request):
    """(dtype, flags met by the calls, their results), but for those whose size is for a card's strips."""
    if not is_interpreted():
        pytest.skip("a card runs tests/sanitizer.py itself, which looks at its flags")
    with sanitizer.watching() as coverage:
        calls = [call for call in sanitizer.CALLS if "strips" not in call.name and not call.narrow]
        results = sanitizer.run_calls("descriptor", request.param, calls)
    return request.param, coverage, results


def test_the_calls_meet_every_flag_of_every_kernel(met):
    """And give PyTorch's results: `run_calls` compares them. The rest is for cards, each with its reason."""
    dtype, coverage, _ = met
    assert sanitizer.missing(coverage, dtype, sanitizer.IN_INTERPRETER) == []
    # Nothing stands among what cannot be met there that is met.
    excused = [line for line in sanitizer.IN_INTERPRETER if dtype in line[3]]
    assert len(sanitizer.missing(coverage, dtype, ())) == len(excused)


@pytest.mark.parametrize("dtype", sanitizer.DTYPES)
def test_a_cards_tiles_are_held_in_the_gradient_too(dtype):
    """And of two pieces of tokens: what the interpreter's tiles do says nothing of theirs."""
    (call,) = (call for call in sanitizer.CALLS if call.name == "held in the gradient")
    dtype = getattr(torch, dtype)
    config = _cuda_config((9, 0), dtype, "tf32x3")
    tokens, vocabulary, features = call.sizes(config)
    workspace = call.workspace_mib * 2**20
    assert tiles_held(tokens, vocabulary, features, dtype, 1, workspace, config) == 0
    assert tiles_in_gradient(tokens, vocabulary, features, dtype, 1, workspace, config) > 0
    tiles = ceil_div(vocabulary, config.forward_entries)
    assert workspace < bytes_beside(tokens, tiles, features, False, 1, config) < 2 * workspace


def test_a_flag_that_was_never_on_is_missed(met):
    dtype, coverage, _ = met
    less = sanitizer.Coverage.from_json(coverage.to_json())
    less.flags["_backward_kernel"]["workspace.masses"] = {False}
    del less.flags["_merge_kernel"]
    assert sorted(sanitizer.missing(less, dtype, sanitizer.IN_INTERPRETER)) == [
        f"_backward_kernel: workspace.masses was never True in {dtype}",
        f"_merge_kernel was never launched in {dtype}",
    ]
    assert "workspace.masses" in sanitizer.table({dtype: less})


def test_other_bits_than_without_the_tool_are_an_error(met):
    dtype, _, results = met
    (call,) = (call for call in sanitizer.CALLS if call.name == "one of everything")
    sanitizer.run_calls("descriptor", dtype, [call], results)
    results[call.name]["weight"][0, 0] += 1
    with pytest.raises(AssertionError, match="one of everything: weight has other bits"):
        sanitizer.run_calls("descriptor", dtype, [call], results)


def test_a_process_past_its_time_ends_with_its_children(tmp_path):
    """A tool is the parent of what it watches: killed alone, it would leave that on the card."""
    code = (
        "import subprocess, sys\nchild = subprocess.Popen(['sleep', '60'])\nprint(child.pid, flush=True)\nchild.wait()"
    )
    log = tmp_path / "log"
    assert sanitizer.run_limited([sys.executable, "-c", code], dict(os.environ), log, 2) == 124
    child = Path(f"/proc/{log.read_text().strip()}")
    begin = time.monotonic()
    while child.exists() and (child / "stat").read_text().split()[2] != "Z":
        assert time.monotonic() - begin < 10
        time.sleep(0.05)
