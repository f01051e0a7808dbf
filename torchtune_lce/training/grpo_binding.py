"""What torchtune main's GRPO recipe lacks: log-probabilities from hidden states, in place of [B x G, S, V] logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchtune import rlhf

from torchtune_lce.logprobs import LinearTokenLogprobs
from torchtune_lce.training.preference_binding import check_same_vocabulary, make_logprobs


class BindsLogprobsToGRPO:
    """Put before torchtune's GRPO recipe among the bases of a class, and its module through :func:`take_hidden_states`.

    The recipe's own code runs: what it calls for logits gives it, except in generation, :class:`UnmadeLogits`.
    """

    def setup(self, cfg: DictConfig) -> None:
        # Before anything is loaded.
        _at_temperature(cfg)
        super().setup(cfg)
        # After torchtune has sharded the models.
        self._logprobs = [self._bound(cfg, model) for model in (self._model, self._ref_model)]
        check_same_vocabulary(*self._logprobs)

    def generate_trajectory(self, *args, **kwargs):
        with self._without_logits():
            return super().generate_trajectory(*args, **kwargs)

    def grpo_step(self, *args, **kwargs):
        with self._without_logits():
            return super().grpo_step(*args, **kwargs)

    @contextmanager
    def _without_logits(self) -> Iterator[None]:
        models = self._model, self._ref_model
        self._model, self._ref_model = map(_LogitsToSampleFrom, models, self._logprobs)
        try:
            yield
        finally:
            self._model, self._ref_model = models

    def _bound(self, cfg: DictConfig, model: nn.Module) -> LinearTokenLogprobs:
        logprobs = _at_temperature(cfg)
        logprobs.tokenizer_size = getattr(self._tokenizer, "vocab_size", None)
        logprobs.set_model_output(model)
        return logprobs


def take_hidden_states(recipe: ModuleType) -> None:
    """Has the module of torchtune's GRPO recipe make log-probabilities of :class:`UnmadeLogits` too."""
    recipe.rlhf = _RLHF()


class UnmadeLogits:
    """Stands for logits [B, S, V]: positions may be taken out of it, and log-probabilities made."""

    def __init__(self, hidden: Tensor, logprobs: LinearTokenLogprobs):
        self._hidden, self._logprobs = hidden, logprobs

    def __getitem__(self, positions) -> "UnmadeLogits":
        return UnmadeLogits(self._hidden[positions], self._logprobs)

    def logprobs(self, sequences: Tensor) -> Tensor:
        """[B, L] of ``sequences``, [B, L], which the first L positions predict."""
        return self._logprobs(self._hidden[:, : sequences.shape[1]], sequences)


class _RLHF:
    """torchtune.rlhf as the recipe calls it."""

    def __getattr__(self, name: str):
        return getattr(rlhf, name)

    def batched_logits_to_logprobs(self, logits: Tensor | UnmadeLogits, sequences: Tensor, *args, **kwargs) -> Tensor:
        # The temperature is in the logit_scale already; and there are no logits to take in chunks.
        if isinstance(logits, UnmadeLogits):
            return logits.logprobs(sequences)
        return rlhf.batched_logits_to_logprobs(logits, sequences, *args, **kwargs)


class _LogitsToSampleFrom:
    """A bound model as the recipe calls it: with its caches on it generates, and gives logits."""

    # For whoever asks whether hidden states could be taken for logits.
    skip_output_layer = False

    def __init__(self, model: nn.Module, logprobs: LinearTokenLogprobs):
        self._bound_model, self._logprobs = model, logprobs

    def __call__(self, *args, **kwargs) -> Tensor | UnmadeLogits:
        if self._bound_model.caches_are_enabled():
            with self._logprobs.logits():
                return self._bound_model(*args, **kwargs)
        return UnmadeLogits(self._bound_model(*args, **kwargs), self._logprobs)

    def __getattr__(self, name: str):
        return getattr(self._bound_model, name)


def _at_temperature(cfg: DictConfig) -> LinearTokenLogprobs:
    """Of the logits that completions are sampled from, as the recipe takes them.

    Raises:
        TypeError, ValueError: see :func:`make_logprobs`; or a temperature that nothing can be divided by.
    """
    if not cfg.temperature > 0:
        raise ValueError(f"temperature must be > 0, since logits are divided by it, got {cfg.temperature}")
    if "logit_scale" in (cfg.get("logprobs") or {}):
        raise ValueError(
            f"logprobs.logit_scale must be left out, since the recipe makes it 1 / temperature, got "
            f"{cfg.logprobs.logit_scale}: set temperature"
        )
    return make_logprobs(OmegaConf.merge(cfg, {"logprobs": {"logit_scale": 1 / cfg.temperature}}))
