"""What a patched model, its output projection and its loss function share."""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, fields

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

    def __reduce__(self):
        # Bound methods of the model are found by their names when it is loaded, which it would not have.
        raise TypeError(
            f"a patched {self.model} cannot be pickled as a whole: save its weights (save_pretrained, state_dict), or "
            "undo the patch before (torchtune_lce.transformers.unpatch)"
        )

    def __deepcopy__(self, memo: dict) -> "Switch":
        copied = memo[id(self)] = Switch(self.model, self.impl, self.options)
        for part in fields(self):
            setattr(copied, part.name, copy.deepcopy(getattr(self, part.name), memo))
        return copied

    def say(self, why: str, state: str = "computes its loss from whole logits, as before") -> None:
        """Warns, once a model, that its logits are whole again, or what else it does, and why."""
        if why not in self.said:
            self.said.add(why)
            _log.warning("%s %s: %s.", self.model, state, why)
