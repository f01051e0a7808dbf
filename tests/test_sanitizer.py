"""The verdict of tests/sanitizer.py: it reads the tools' summaries, and a run without one is not clean."""

from pathlib import Path

import pytest
import sanitizer

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
        (None, 124, False, "did not run to its end (status 124), see a.log"),
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
