"""Models of transformers that are spread over processes train as without the patch."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("torchtune")  # the processes' own module imports its recipes

from distributed_processes import RUN_AGAIN_AFTER_A_SIGNAL, spawn
from transformers_sharding_checks import RANKS, check_two_processes


@RUN_AGAIN_AFTER_A_SIGNAL
def test_two_processes():
    spawn(check_two_processes, RANKS)


@RUN_AGAIN_AFTER_A_SIGNAL
def test_zero3(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    import zero3_checks

    spawn(zero3_checks.check_two_processes, zero3_checks.RANKS)
