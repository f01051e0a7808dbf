"""GRPO (Shao et al. 2024, arXiv 2402.03300) without logits, complete and small: a tiny model learns to end an alphabet.

python docs/examples/grpo.py

The prompt is one of the last letters; right is to say each that follows, and then to stop. A completion's reward is how
many of these tokens it has right, by its length where that is more: a few lines verify it. Ten seconds on one core.
"""

import copy
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchtune.generation import generate
from torchtune.models.llama2 import llama2

from torchtune_lce import LinearTokenLogprobs

PAD, STOP, FIRST, LETTERS = 0, 1, 2, 16
VOCABULARY = FIRST + LETTERS
LONGEST = 5  # tokens of a right completion, its STOP included


@dataclass(frozen=True)
class Settings:
    steps: int = 40
    prompts: int = 16  # a step
    group: int = 16  # completions of each prompt, among which rewards are compared
    updates: int = 2  # of the policy by each batch of completions
    temperature: float = 0.9
    clip: float = 0.2
    kl_weight: float = 0.01
    learning_rate: float = 3e-3


class Completions(NamedTuple):
    """What one step samples; N is prompts times group, S what a prompt and its completion take."""

    tokens: Tensor  # [N, S]
    targets: Tensor  # [N, S]: the token that each position is to predict, ignored but for those of completions
    rewards: Tensor  # [N]
    old: Tensor  # [N, S]: log-probabilities of the targets under the policy that sampled them
    reference: Tensor  # [N, S]: and under the model that training started from


class GRPO:
    """The policy, its reference, and what gives the log-probabilities of either."""

    def __init__(self, settings: Settings, seed: int = 0):
        torch.manual_seed(seed)
        self.settings = settings
        self.policy = llama2(
            VOCABULARY, num_layers=2, num_heads=2, num_kv_heads=2, embed_dim=32, max_seq_len=16, intermediate_dim=64
        )
        # Before anything is bound: a copy of a bound model would be bound by halves.
        self.reference = copy.deepcopy(self.policy).requires_grad_(False).eval()
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=settings.learning_rate)
        self.rng = torch.Generator().manual_seed(seed)
        # What was sampled at a temperature has the probabilities of logits divided by it.
        self.of_policy, self.of_reference = (
            LinearTokenLogprobs(logit_scale=1 / settings.temperature) for _ in range(2)
        )
        # From now on both models return hidden states [N, S, D], and nobody holds logits [N, S, V].
        self.of_policy.set_model_output(self.policy)
        self.of_reference.set_model_output(self.reference)

    @torch.no_grad()
    def sample(self) -> Completions:
        settings = self.settings
        prompts = VOCABULARY - torch.randint(1, LONGEST + 1, (settings.prompts, 1), generator=self.rng)
        prompts = prompts.repeat_interleave(settings.group, 0)
        with self.of_policy.logits():  # the model gives logits in here, to sample from
            tokens, _ = generate(
                self.policy,
                prompts,
                max_generated_tokens=LONGEST,
                pad_id=PAD,
                temperature=settings.temperature,
                stop_tokens=[STOP],
                rng=self.rng,
            )
        targets = next_tokens(tokens, prompts.shape[1], self.of_policy.ignore_index)
        return Completions(
            tokens,
            targets,
            rewards(tokens, targets, self.of_policy.ignore_index),
            old=self.of_policy(self.policy(tokens), targets),
            reference=self.of_reference(self.reference(tokens), targets),
        )

    def loss(self, batch: Completions) -> tuple[Tensor, Tensor]:
        """To minimise, and the mean entropy in nats of the predictions of a completion's tokens, for a log."""
        used = batch.targets != self.of_policy.ignore_index
        # The entropy comes from the same pass, without a gradient.
        found = self.of_policy.with_figures(self.policy(batch.tokens), batch.targets, mean_logits=False)
        loss = grpo_loss(found.logprobs, batch, used, self.settings)
        return loss, found.entropy.sum() / used.sum()

    def step(self) -> tuple[float, float]:
        """The mean reward of what the policy samples, before it learns from that, and its entropy."""
        batch = self.sample()
        for _ in range(self.settings.updates):
            loss, entropy = self.loss(batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return batch.rewards.mean().item(), entropy.item()


def next_tokens(tokens: Tensor, prompt_length: int, ignore_index: int) -> Tensor:
    """The token after each position; ignored where that is of the prompt, or behind the first STOP."""
    targets = torch.full_like(tokens, ignore_index)
    completions = tokens[:, prompt_length:]
    stops = (completions == STOP).long()
    until_stop = stops.cumsum(1) - stops == 0
    targets[:, prompt_length - 1 : -1] = completions.where(until_stop, ignore_index)
    return targets


def rewards(tokens: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """[N]: the right tokens of each completion, by the longer of its length and that of the right one."""
    right = tokens[:, :1] + torch.arange(1, LONGEST + 1)
    right = right.where(right < VOCABULARY, STOP)
    longest = VOCABULARY - tokens[:, 0]
    lengths = (targets != ignore_index).sum(1)
    # The prompt is one token, so that the first target is the completion's first; all may have stopped early.
    hits = (targets[:, :LONGEST] == right[:, : targets.shape[1]]).sum(1)
    return hits / torch.maximum(lengths, longest)


def advantages(rewards: Tensor, group: int) -> Tensor:
    """[N]: how much better each completion is than the others of its prompt, in their standard deviations."""
    rewards = rewards.view(-1, group)
    return ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()


def grpo_loss(logprobs: Tensor, batch: Completions, used: Tensor, settings: Settings) -> Tensor:
    """Clipped policy term and KL term of each token, their mean over each completion, and the mean of these."""
    advantage = advantages(batch.rewards, settings.group)[:, None]
    ratio = (logprobs - batch.old).exp()
    clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
    apart = batch.reference - logprobs
    kl = apart.exp() - apart - 1  # an estimate of the divergence that is never negative
    objective = torch.minimum(ratio * advantage, clipped * advantage) - settings.kl_weight * kl
    # Where ignored the ratio is 1 and the KL is 0, but an advantage would count.
    return -((objective * used).sum(1) / used.sum(1)).mean()


def train(settings: Settings, seed: int = 0, log=print) -> list[float]:
    """The mean reward of each step."""
    grpo, means = GRPO(settings, seed), []
    for step in range(settings.steps):
        reward, entropy = grpo.step()
        means.append(reward)
        if step % 10 == 0 or step == settings.steps - 1:
            log(f"step {step:3}: mean reward {reward:.2f}, entropy {entropy:.2f} nats")
    return means


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Settings())
    sys.exit(0)
