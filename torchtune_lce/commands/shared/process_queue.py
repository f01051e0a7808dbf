"""The order of a comparison's processes: each may load what all of them load while the one before it runs."""

from itertools import pairwise
from pathlib import Path
from subprocess import Popen

from torchtune_lce.commands.compare.runs import Run
from torchtune_lce.commands.shared import recipe_runs


class Queue:
    """Which runs are done, and the processes of those that follow; stops what nobody took when it is left."""

    def __init__(self, runs: list[Run], fresh: bool, ahead: bool):
        self.done = {} if fresh else {run.folder: outcome for run in runs if (outcome := run.finished())}
        open_ = [run for run in runs if run.folder not in self.done]
        self._next = {run.folder: following for run, following in pairwise(open_)} if ahead else {}
        self._started: dict[Path, Popen] = {}

    def __enter__(self) -> "Queue":
        return self

    def __exit__(self, *_) -> None:
        for process in self._started.values():
            recipe_runs.stop(process)

    def take(self, run: Run) -> Popen:
        """The process of ``run``, waiting; that of the next one is started then."""
        process = self._started.pop(run.folder, None) or run.start()
        following = self._next.get(run.folder)
        if following is not None:
            self._started[following.folder] = following.start()
        return process
