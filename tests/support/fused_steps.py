"""What impl="torch_compile" compiles, without the seconds that generating code takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from torchtune_lce.implementations import fused


@contextmanager
def steps_as(made_of: Callable[..., Callable] = lambda step, shared=(): step) -> Iterator[None]:
    """Each step as ``made_of`` makes it of the plain function; as that is."""
    fused.steps.cache_clear()
    with mock.patch.object(fused, "of_any_tokens", made_of):
        try:
            yield
        finally:
            fused.steps.cache_clear()
