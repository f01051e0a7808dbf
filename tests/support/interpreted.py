"""Tests of the kernels on a CPU, by Triton's interpreter: beside a card they are compiled, for that alone."""

import os

import pytest

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED = pytest.mark.skipif(not IS_INTERPRETED, reason="on a CPU, where there is a card, the kernels do not run")
