"""What a torchtune 0.6.1 DPO recipe lacks: log-probabilities from hidden states, in place of [2B, S, V] logits."""

from contextlib import nullcontext

import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchtune import config
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.utils import get_logger

from torchtune_lce.logprobs import LinearTokenLogprobs
from torchtune_lce.training.live_feedback import say_nothing_comes
from torchtune_lce.training.token_range import check_tokens

_DEFAULT = {"_component_": "torchtune_lce.LinearTokenLogprobs"}
NOT_OF_LOGPROBS = "it is of torchtune_lce.LinearCrossEntropyLoss, and this recipe takes log-probabilities"


def make_logprobs(cfg: DictConfig) -> LinearTokenLogprobs:
    """What the config's optional section ``logprobs`` describes; without one, with the defaults.

    Raises:
        TypeError, ValueError: a section, or a ``loss``, that a preference recipe cannot use.
    """
    given = cfg.get("logprobs")
    if given is not None and not OmegaConf.is_dict(given):
        raise TypeError(
            f"logprobs must be a section of settings, got {given}: leave it out for their defaults, or give settings "
            "one by one, such as logprobs.impl=cce_exact"
        )
    # In its place in the config, of which it may name other parts.
    section = OmegaConf.merge(cfg, {"logprobs": OmegaConf.merge(_DEFAULT, given or {})}).logprobs
    logprobs = config.instantiate(section)
    if not isinstance(logprobs, LinearTokenLogprobs):
        raise TypeError(
            f"logprobs must be torchtune_lce.LinearTokenLogprobs, got {section._component_}: leave the section out for "
            "its defaults"
        )
    if logprobs.ignore_index != CROSS_ENTROPY_IGNORE_IDX:
        raise ValueError(
            f"logprobs.ignore_index must be {CROSS_ENTROPY_IGNORE_IDX}, which torchtune's preference data sets mark "
            f"prompts and padding with, got {logprobs.ignore_index}"
        )
    if "temperature" in cfg:
        _check_sampled_alike(cfg, section)
    if "loss" in cfg and hasattr(config.instantiate(cfg.loss), "set_model_output"):
        raise TypeError(
            "loss must be torchtune's own in a preference recipe, such as torchtune.rlhf.loss.DPOLoss, got "
            f"{cfg.loss._component_}, which takes hidden states: what spares the logits is the section logprobs"
        )
    return logprobs


def _check_sampled_alike(cfg: DictConfig, section: DictConfig) -> None:
    """Raises ValueError where a recipe that samples would take log-probabilities of other logits than it samples by."""
    if not cfg.temperature > 0:
        raise ValueError(f"temperature must be > 0, since logits are divided by it, got {cfg.temperature}")
    for name, unset in (("logit_scale", 1), ("softcap", None)):
        if section.get(name, unset) != unset:
            raise ValueError(
                f"logprobs.{name} must be left out, since answers are sampled by the model's own logits, divided by "
                f"temperature, got {section[name]}"
            )


class BindsLogprobsToModels:
    """Put before a torchtune DPO recipe among the bases of a class; its loss stays torchtune's."""

    def setup(self, cfg: DictConfig) -> None:
        # Before anything is loaded.
        make_logprobs(cfg)
        say_nothing_comes(cfg, NOT_OF_LOGPROBS)
        super().setup(cfg)
        # LoRA's reference is the policy itself, with its adapters disabled. After torchtune has sharded the models.
        models = filter(None, (self._model, getattr(self, "_ref_model", None)))
        self._logprobs = {model: self._bound(cfg, model) for model in models}
        check_same_vocabulary(*self._logprobs.values())
        self._said = False

    def concatenated_forward(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], activations_handling: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As torchtune's, but for the last two, which are the mean of each position's logits, [B, S]: only the mean of
        them all is ever taken.
        """
        tokens, labels = batch
        # Where the loader puts them, so that no device is waited for.
        check_tokens(tokens, model, self._tokenizer)
        self._say_if_unlabelled(labels)
        tokens, labels = tokens.to(self._device), labels.to(self._device)
        # Moved to the hidden states that predict them, which nothing does; the last one predicts none.
        targets = F.pad(labels[:, 1:], (0, 1), value=CROSS_ENTROPY_IGNORE_IDX)
        # Stock offloads activations where the step has a backward.
        with self.activations_handling_ctx if activations_handling else nullcontext():
            hidden = model(tokens)
        figures = self._logprobs[model].with_figures(hidden, targets, entropy=False)
        log_probs, pairs = figures.logprobs.sum(-1), len(tokens) // 2
        return *log_probs.split(pairs), *figures.mean_logits.split(pairs)

    def _bound(self, cfg: DictConfig, model: nn.Module) -> LinearTokenLogprobs:
        logprobs = make_logprobs(cfg)
        logprobs.tokenizer_size = getattr(self._tokenizer, "vocab_size", None)
        logprobs.set_model_output(model)
        return logprobs

    def _say_if_unlabelled(self, labels: Tensor) -> None:
        """Each rank of its own rows: another one has not seen them."""
        if self._said or (labels[:, 1:] != CROSS_ENTROPY_IGNORE_IDX).any(-1).all():
            return
        self._said = True
        get_logger().warning(
            f"An answer of a pair has no label: all of its targets are {CROSS_ENTROPY_IGNORE_IDX}. Its log-probability "
            "counts as 0, as in torchtune's recipe, and only the other answer is learnt from, if that has labels; this "
            "is not said again. The usual cause is a prompt longer than tokenizer.max_seq_len, whose answer is cut off"
        )


def check_same_vocabulary(policy: LinearTokenLogprobs, reference: LinearTokenLogprobs | None = None) -> None:
    """Raises ValueError where the two bound models are of different ones."""
    if reference is not None and policy.rows != reference.rows:
        raise ValueError(
            "policy and reference must have the same vocabulary, got a policy whose output has "
            f"{policy.rows} rows, and {reference.rows} in the reference's"
        )
