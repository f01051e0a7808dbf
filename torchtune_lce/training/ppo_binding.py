"""What a torchtune 0.6.1 PPO recipe lacks: log-probabilities from hidden states, in place of [B, S, V] logits."""

from omegaconf import DictConfig
from torch import Tensor, nn
from torchtune.rlhf import Trajectory

from torchtune_lce.training.live_feedback import say_nothing_comes
from torchtune_lce.training.logits_to_come import give_logits_to_come
from torchtune_lce.training.preference_binding import NOT_OF_LOGPROBS, make_logprobs
from torchtune_lce.training.token_range import check_tokens

_EMBEDDING = "tok_embeddings.weight"


class GivesLogitsToCome:
    """Put before torchtune's PPO recipe among the bases of a class; its loss, value and reward models stay torchtune's.

    Policy and reference return what stands for logits: log-probabilities are made of it without them, and tokens are
    sampled from those of one position at a time, [B, V]. What torchtune's generation keeps of its R tokens is [B, R, D]
    hidden states in place of [B, R, V] logits in float32.
    """

    def setup(self, cfg: DictConfig) -> None:
        # Before anything is loaded.
        make_logprobs(cfg)
        say_nothing_comes(cfg, NOT_OF_LOGPROBS)
        super().setup(cfg)
        for model in (self._policy_model, self._ref_policy_model):
            give_logits_to_come(model, make_logprobs(cfg))

    def _setup_models(
        self, *args, policy_state_dict: dict[str, Tensor], ref_policy_state_dict: dict[str, Tensor], **kwargs
    ) -> tuple[nn.Module, ...]:
        # Before models are built, and before load_state_dict lists every shape that it finds.
        rows, reference_rows = (len(weights[_EMBEDDING]) for weights in (policy_state_dict, ref_policy_state_dict))
        if rows != reference_rows:
            raise ValueError(
                f"policy and reference must have the same vocabulary, got {rows} embeddings in checkpointer's weights "
                f"and {reference_rows} in ref_policy_checkpointer's: that one must read the policy as it was before "
                "training"
            )
        return super()._setup_models(
            *args, policy_state_dict=policy_state_dict, ref_policy_state_dict=ref_policy_state_dict, **kwargs
        )

    def generate_trajectory(self, input_ids: Tensor) -> Trajectory:
        """As torchtune's, of prompts [b, S] whose tokens the policy knows.

        Raises ValueError for others, which torchtune's embedding ends on, on a GPU with the whole process.
        """
        check_tokens(input_ids, self._policy_model, self._tokenizer)
        return super().generate_trajectory(input_ids)
