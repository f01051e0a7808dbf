"""What torchtune main's GRPO recipe lacks: log-probabilities from hidden states, in place of [B x G, S, V] logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from omegaconf import DictConfig
from torch import Tensor, nn
from torchtune import rlhf

from torchtune_lce.logprobs import LinearTokenLogprobs
from torchtune_lce.training.live_feedback import say_nothing_comes
from torchtune_lce.training.logits_to_come import LogitsToCome
from torchtune_lce.training.preference_binding import NOT_OF_LOGPROBS, check_same_vocabulary, make_logprobs


class BindsLogprobsToGRPO:
    """Put before torchtune's GRPO recipe among the bases of a class, and its module through :func:`take_hidden_states`.

    The recipe's own code runs: what it calls for logits gives it, except in generation, :class:`LogitsToCome`.
    """

    def setup(self, cfg: DictConfig) -> None:
        # Before anything is loaded.
        make_logprobs(cfg)
        say_nothing_comes(cfg, NOT_OF_LOGPROBS)
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
        logprobs = make_logprobs(cfg)
        logprobs.tokenizer_size = getattr(self._tokenizer, "vocab_size", None)
        logprobs.set_model_output(model)
        return logprobs


def take_hidden_states(recipe: ModuleType) -> None:
    """Has the module of torchtune's GRPO recipe make log-probabilities of :class:`LogitsToCome` too."""
    recipe.rlhf = _RLHF()


class _RLHF:
    """torchtune.rlhf as the recipe calls it."""

    def __getattr__(self, name: str):
        return getattr(rlhf, name)

    def batched_logits_to_logprobs(
        self, logits: Tensor | LogitsToCome, sequences: Tensor, temperature: float = 1.0, **chunks
    ) -> Tensor:
        if isinstance(logits, LogitsToCome):
            # At once, as no chunk saves memory; one more position than there are tokens may have been given.
            return rlhf.logits_to_logprobs(logits[:, : sequences.shape[1]], sequences, temperature)
        return rlhf.batched_logits_to_logprobs(logits, sequences, temperature, **chunks)


class _LogitsToSampleFrom:
    """A bound model as the recipe calls it: with its caches on it generates, and gives logits."""

    # For whoever asks whether hidden states could be taken for logits.
    skip_output_layer = False

    def __init__(self, model: nn.Module, logprobs: LinearTokenLogprobs):
        self._bound_model, self._logprobs = model, logprobs

    def __call__(self, *args, **kwargs) -> Tensor | LogitsToCome:
        if self._bound_model.caches_are_enabled():
            with self._logprobs.logits():
                return self._bound_model(*args, **kwargs)
        return LogitsToCome(self._bound_model(*args, **kwargs), self._logprobs)

    def __getattr__(self, name: str):
        return getattr(self._bound_model, name)
