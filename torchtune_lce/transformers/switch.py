"""What a patched model, its output projection and its loss function share."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from torch.utils.hooks import RemovableHandle

from torchtune_lce.inputs.options import Options

_log = logging.getLogger(__package__)
# The name of a patched model's Switch among its attributes and among those of its output projection.
NAME = "_lce_switch"


@dataclass(eq=False)
class Switch:
    """``on`` while a training forward runs, in which the output projection may put its product off."""

    model: str  # the name of its class
    impl: str
    options: Options
    on: bool = False
    # The model's forward by which its patched forward was last called: that one, or one around it.
    called_by: Callable | None = None
    watch: RemovableHandle | None = None
    said: set[str] = field(default_factory=set)

    def say(self, why: str, state: str = "computes its loss from whole logits, as before") -> None:
        """Warns, once a model, that its logits are whole again, or what else it does, and why."""
        if why not in self.said:
            self.said.add(why)
            _log.warning("%s %s: %s.", self.model, state, why)
