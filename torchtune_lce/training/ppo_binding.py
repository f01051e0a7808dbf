"""What a torchtune 0.6.1 PPO recipe lacks: log-probabilities from hidden states, in place of [B, S, V] logits."""

from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf import DictConfig

from torchtune_lce.training.logits_to_come import give_logits_to_come
from torchtune_lce.training.preference_binding import check_same_vocabulary, make_logprobs


class GivesLogitsToCome:
    """Put before torchtune's PPO recipe among the bases of a class; its loss, value and reward models stay torchtune's.

    Policy and reference return what stands for logits, and log-probabilities are made of it without them. To generate
    the policy gives logits: sampling needs those of the next token, and torchtune keeps them of all generated tokens,
    [B, R, V] in float32, until it has taken their log-probabilities.
    """

    def setup(self, cfg: DictConfig) -> None:
        # Before anything is loaded.
        policy, reference = make_logprobs(cfg), make_logprobs(cfg)
        super().setup(cfg)
        for logprobs, model in ((policy, self._policy_model), (reference, self._ref_policy_model)):
            logprobs.tokenizer_size = getattr(self._tokenizer, "vocab_size", None)
            give_logits_to_come(model, logprobs)
        check_same_vocabulary(policy, reference)
        with_caches = self.cache_ctx_manager

        @contextmanager
        def generating(*args, **kwargs) -> Iterator[None]:
            with policy.logits(), with_caches(*args, **kwargs):
                yield

        # What torchtune generates within, with caches or without.
        self.cache_ctx_manager = generating
