"""Settings of other losses, which a config keeps when only its component is exchanged for one of these."""

from collections.abc import Callable, Mapping
from functools import wraps

_OF_TORCHTUNE = {
    "num_output_chunks": "workspace_mib takes its place, the memory in MiB that chunks may take",
    "mask_ignored_tokens": "ignored tokens have no loss and no gradient here, always",
    "tp_enabled": "tensor parallelism is read from the weight, or set by the recipe",
}
_ONE_LOSS = "that is a loss's, and this gives each target's own log-probability"
_OF_LOSSES = dict.fromkeys(("reduction", "z_loss", "label_smoothing", "metrics"), _ONE_LOSS)


def refuses_settings_of_torchtune(init: Callable[..., None]) -> Callable[..., None]:
    """For a loss's ``__init__``, whose signature stays its own: each of those settings raises TypeError by name."""
    return _refusing(init, _OF_TORCHTUNE, "~loss.{name} to the command line (~kd_loss.{name} if it is the kd_loss)")


def refuses_settings_of_losses(init: Callable[..., None]) -> Callable[..., None]:
    """The same for what a config's section ``logprobs`` names, which is no loss."""
    return _refusing(init, _OF_TORCHTUNE | _OF_LOSSES, "~logprobs.{name} to the command line")


def _refusing(init: Callable[..., None], instead: Mapping[str, str], way_out: str) -> Callable[..., None]:
    @wraps(init)
    def checked(self, *args, **settings) -> None:
        for name in settings.keys() & instead.keys():
            raise TypeError(
                f"{type(self).__name__} takes no {name}, got {settings[name]}: {instead[name]}. Leave it out of the "
                f"config, or add {way_out.format(name=name)}"
            )
        init(self, *args, **settings)

    return checked
