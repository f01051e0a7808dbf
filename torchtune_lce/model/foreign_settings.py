"""Settings of torchtune's own losses, which a config keeps when only its loss is exchanged for one of these."""

from collections.abc import Callable
from functools import wraps

_INSTEAD = {
    "num_output_chunks": "workspace_mib takes its place, the memory in MiB that chunks may take",
    "mask_ignored_tokens": "ignored tokens have no loss and no gradient here, always",
    "tp_enabled": "tensor parallelism is read from the weight, or set by the recipe",
}


def refuses_settings_of_torchtune(init: Callable[..., None]) -> Callable[..., None]:
    """For a loss's ``__init__``, whose signature stays its own: each of those settings raises TypeError by name."""

    @wraps(init)
    def checked(self, *args, **settings) -> None:
        for name in settings.keys() & _INSTEAD.keys():
            raise TypeError(
                f"{type(self).__name__} takes no {name}, got {settings[name]}: {_INSTEAD[name]}. Leave it out of the "
                f"config, or add ~loss.{name} to the command line (~kd_loss.{name} or ~logprobs.{name} from there)"
            )
        init(self, *args, **settings)

    return checked
