"""A metric logger that ends its own process as the kernel's OOM killer does: at once, nothing flushed or cleaned up."""

import os
import signal

from torchtune.training.metric_logging import DiskLogger


class DyingLogger(DiskLogger):
    """Kills the process by SIGKILL when the losses of ``last_step`` steps are in the file."""

    def __init__(self, last_step: int, **settings):
        super().__init__(**settings)
        self._last_step = last_step

    def log_dict(self, payload, step: int) -> None:
        super().log_dict(payload, step)
        if step == self._last_step:
            os.kill(os.getpid(), signal.SIGKILL)
