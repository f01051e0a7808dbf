"""The order of processes that run recipes: each may load what all of them load while the one before it runs."""

from collections.abc import Callable, Hashable
from itertools import pairwise
from subprocess import Popen

from torchtune_lce.commands.shared import recipe_runs


class ProcessQueue:
    """Processes that wait for :func:`recipe_runs.run`, by name; stops what nobody took when it is left."""

    def __init__(self, starts: dict[Hashable, Callable[[], Popen]], ahead: bool):
        """``starts``: what starts each, in the order in which they are to be taken. With ``ahead`` one is started
        along with the one before it.
        """
        self._starts = starts
        self._next = dict(pairwise(starts)) if ahead else {}
        self._started: dict[Hashable, Popen] = {}

    def __enter__(self) -> "ProcessQueue":
        return self

    def __exit__(self, *_) -> None:
        for process in self._started.values():
            recipe_runs.stop(process)

    def start(self, name: Hashable) -> None:
        """Before it is taken."""
        self._started[name] = self._starts[name]()

    def take(self, name: Hashable) -> Popen:
        """The process of that name, waiting; that of the next one is started then."""
        # What is started is the queue's until all have started.
        if name not in self._started:
            self.start(name)
        following = self._next.get(name)
        if following is not None:
            self.start(following)
        return self._started.pop(name)
