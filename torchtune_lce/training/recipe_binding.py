"""What a torchtune 0.6.1 recipe lacks: it tells no loss its model, and leaves no step without labels out."""

import os

from omegaconf import DictConfig
from torch import Tensor, nn
from torchtune import config

from torchtune_lce.logprobs import LinearTokenLogprobs
from torchtune_lce.loss import LinearCrossEntropyLoss
from torchtune_lce.model.model_output import uncompiled
from torchtune_lce.training import live_feedback
from torchtune_lce.training.empty_steps import SkipsEmptySteps
from torchtune_lce.training.joint_losses import JointLosses, may_be_joint


class BindsLossToModel:
    """Put before a torchtune fine-tuning recipe among the bases of a class.

    A loss without ``set_model_output`` (torchtune's own of 0.6.1) is left alone: the recipe is then stock's.
    """

    def setup(self, cfg: DictConfig) -> None:
        # Before anything is loaded.
        _check(cfg, "loss", config.instantiate(cfg.loss))
        live_feedback.is_asked_for(cfg)
        super().setup(cfg)
        loss = uncompiled(self._loss_fn)
        if not isinstance(loss, LinearCrossEntropyLoss):
            live_feedback.say_nothing_comes(
                cfg, f"the loss is {cfg.loss._component_}, which does not tell what it does"
            )
        if not hasattr(loss, "set_model_output"):
            return
        self._loss_fn = _compiled_its_own_way(self._loss_fn)
        if isinstance(loss, LinearCrossEntropyLoss):
            loss.bound_by_our_recipe = True
            loss.tokenizer_size = getattr(self._tokenizer, "vocab_size", None)
            live_feedback.attach(self, cfg, loss)
        # After torchtune has sharded the model. torchtune main has done this already, and once more changes nothing.
        self._loss_fn.set_model_output(self._model)
        self._dataloader = SkipsEmptySteps(self)


class BindsLossesToModels(BindsLossToModel):
    """The same for a torchtune knowledge distillation recipe, whose second loss sees the teacher as well.

    Either both losses take hidden states or neither does, and the recipe is then stock's: they share what the student
    returns.
    """

    _one_walk = False

    def setup(self, cfg: DictConfig) -> None:
        # Before anything is loaded, and before torchtune compares settings that our losses do not have.
        losses = {name: config.instantiate(cfg[name]) for name in ("loss", "kd_loss")}
        ours = {name: hasattr(loss, "set_model_output") for name, loss in losses.items()}
        if len(set(ours.values())) == 2:
            alone, other = sorted(ours, key=ours.get, reverse=True)
            raise ValueError(
                f"loss and kd_loss must both take hidden states or both logits, got {cfg[alone]._component_} as "
                f"{alone}, which takes hidden states, and {cfg[other]._component_} as {other}: set "
                "loss=torchtune_lce.LinearCrossEntropyLoss and kd_loss=torchtune_lce.LinearForwardKLLoss "
                "(or LinearReverseKLLoss, LinearSymmetricKLLoss)"
            )
        for name, loss in losses.items():
            _check(cfg, name, loss)
        super().setup(cfg)
        if not ours["kd_loss"]:
            return
        self._kd_loss_fn = _compiled_its_own_way(self._kd_loss_fn)
        self._kd_loss_fn.set_model_output(self._model)
        self._kd_loss_fn.set_teacher_output(self._teacher_model)
        self._one_walk = may_be_joint(self._loss_fn, self._kd_loss_fn, cfg)

    def _loss_step(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """torchtune's, whose two losses are one where they can be."""
        if not self._one_walk:
            return super()._loss_step(batch)
        own = self._loss_fn, self._kd_loss_fn
        joint = JointLosses(*own, self._kd_ratio)
        self._loss_fn, self._kd_loss_fn = joint.of_labels, joint.of_teacher
        try:
            return super()._loss_step(batch)
        finally:
            self._loss_fn, self._kd_loss_fn = own


def _check(cfg: DictConfig, name: str, loss: nn.Module) -> None:
    """Raises ValueError for a loss of hidden states that a recipe cannot call as its ``name``."""
    if not hasattr(loss, "set_model_output"):
        return
    component, compares_models = cfg[name]._component_, hasattr(loss, "set_teacher_output")
    if name == "loss" and isinstance(loss, LinearTokenLogprobs):
        raise ValueError(
            "loss must be a loss of labels, such as torchtune_lce.LinearCrossEntropyLoss, "
            f"got {component}, which is none: it is for the section logprobs of preference recipes"
        )
    if name == "loss" and compares_models:
        raise ValueError(
            "loss must be a loss of labels, such as torchtune_lce.LinearCrossEntropyLoss, "
            f"got {component}, which compares two models: that is a kd_loss, of the knowledge_distillation recipes"
        )
    if name == "kd_loss" and not compares_models:
        raise ValueError(
            "kd_loss must compare student and teacher, as torchtune_lce.LinearForwardKLLoss, LinearReverseKLLoss and "
            f"LinearSymmetricKLLoss do, got {component}"
        )
    if isinstance(loss, LinearCrossEntropyLoss) and loss.reduction != "mean":
        raise ValueError(
            "loss.reduction must be mean in a torchtune recipe, which multiplies the loss by the number of tokens, "
            f"got {loss.reduction}"
        )


def _compiled_its_own_way(loss: nn.Module) -> nn.Module:
    """torchtune 0.6.1 wraps any loss that it does not know in torch.compile; ours say themselves what to compile."""
    own = uncompiled(loss)
    if own is loss:
        return loss
    return own.apply_compile_strategy(backend=os.environ.get("TORCH_COMPILE_BACKEND", "inductor"))
