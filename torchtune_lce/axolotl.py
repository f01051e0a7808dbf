"""For Axolotl, whose config names it: ``plugins: [torchtune_lce.axolotl.Plugin]``. It needs Axolotl itself."""

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, model_validator

from torchtune_lce.implementations import choice
from torchtune_lce.inputs import validation
from torchtune_lce.inputs.options import Options
from torchtune_lce.transformers import patch

# Keys of Axolotl's config that put another loss into the model, where True.
OTHER_LOSSES = (
    "cut_cross_entropy",
    "chunked_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
)


class LinearCrossEntropyArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's config: the arguments of :func:`torchtune_lce.transformers.patch`."""

    lce_impl: str = "auto"
    # From the left: YAML 1.1 takes 1e-3 for a string.
    lce_filter_eps: float | str | None = Field("auto", union_mode="left_to_right")
    lce_workspace_mib: int = 128

    @model_validator(mode="after")
    def check_lce(self):
        """Before a model is loaded. Axolotl merges this class with its own and those of the other plugins."""
        choice.check_name(self.lce_impl)
        validation.check_options(Options(filter_eps=self.lce_filter_eps, workspace_mib=self.lce_workspace_mib))
        for name in OTHER_LOSSES:
            if getattr(self, name, None):
                raise ValueError(f"torchtune_lce.axolotl.Plugin and {name} are two losses for one model: take one out")
        return self


class Plugin(BasePlugin):
    """Patches the model that Axolotl has loaded, adapters included."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the keys of its config that are ours."""
        return f"{__name__}.{LinearCrossEntropyArgs.__name__}"

    def post_model_load(self, cfg, model) -> None:
        """Called by Axolotl with its config and a model of transformers, or PEFT's around one."""
        patch(model, impl=cfg.lce_impl, filter_eps=cfg.lce_filter_eps, workspace_mib=cfg.lce_workspace_mib)
