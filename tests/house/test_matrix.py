"""The table of tests/matrix.py: what it asks pip for, and that its page keeps what was not run again."""

import matrix
import pytest


def test_asks_for_builds_without_cuda():
    oldest = matrix.PAIRS[0]
    assert matrix.torch_requirement(oldest, allow_cuda=False, system="Linux") == "torch==2.8.0+cpu"
    assert matrix.torch_requirement(oldest, allow_cuda=True, system="Linux") == "torch==2.8.0"
    assert matrix.torch_requirement(oldest, allow_cuda=False, system="Darwin") == "torch==2.8.0"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("....\n==== 12 passed, 3 skipped in 4.21s ====\n", "12 passed, 3 skipped"),
        ("F\n1 failed, 2 passed, 1 warning in 93.10s (0:01:33)\n\n", "1 failed, 2 passed, 1 warning"),
        ("", "said nothing"),
    ],
)
def test_summary(output, said):
    assert matrix.summary(output) == said


def test_page_keeps_the_other_rows(tmp_path, monkeypatch):
    page = tmp_path / "matrix.md"
    page.write_text(matrix.PAGE.read_text())
    monkeypatch.setattr(matrix, "PAGE", page)
    first, second = ("oldest", "3.11.7", *"abcde"), ("newest", "3.11.7", *"fghij")
    matrix.write([first])
    matrix.write([second])
    assert matrix.written()["oldest"] == first
    assert matrix.written()["newest"] == second
    assert page.read_text().count(matrix.BEGIN) == page.read_text().count(matrix.END) == 1


def test_every_pair_has_a_row():
    assert matrix.written().keys() == {pair.name for pair in matrix.PAIRS}
