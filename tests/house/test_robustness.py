"""The counts of tests/robustness.py: one for each test, by area, with the cases that the test tallies."""

from types import SimpleNamespace

import robustness
import tally


def report(nodeid: str, outcome: str, when: str = "call") -> SimpleNamespace:
    return SimpleNamespace(
        nodeid=nodeid, outcome=outcome, when=when, passed=outcome == "passed", failed=outcome == "failed"
    )


def test_counts_by_area():
    counting = robustness.Counting()
    for when in ("setup", "call", "teardown"):
        counting.pytest_runtest_logreport(report("tests/implementations/test_dtypes.py::test_a", "passed", when))
    counting.pytest_runtest_logreport(report("tests/implementations/test_dtypes.py::test_b[x::y]", "failed"))
    counting.pytest_runtest_logreport(report("tests/kernels/test_huge.py::test_c", "skipped", "setup"))
    calls = counting.pytest_runtest_call(SimpleNamespace(nodeid="tests/implementations/test_dtypes.py::test_a"))
    next(calls)
    tally.tried["a kind"] += 1200
    assert next(calls, None) is None
    tally.tried["a kind"] -= 1200
    lines = robustness.table(counting).splitlines()
    assert "| dtypes, autocast, gradient scaler | 2 | 1,200 | 1 | 1 | 0 |" in lines
    assert "| sizes past 2^31 | 0 | 0 | 0 | 0 | 1 |" in lines
    text = robustness.section(counting, "here")
    assert "- a kind: 1,200" in text
    assert "Lost: - `tests/implementations/test_dtypes.py::test_b[x::y]`" in text


def test_every_file_is_there():
    for files in robustness.AREAS.values():
        for file in files:
            assert len(list(robustness.ROOT.glob(f"tests/*/{file}.py"))) == 1
    assert robustness.BEGIN in robustness.PAGE.read_text()
