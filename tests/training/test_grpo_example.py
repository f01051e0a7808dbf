"""docs/examples/grpo.py, the loop that docs/grpo.md explains: it learns, and its loss is the one that logits give."""

import copy
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from project import ROOT
from torch import Tensor, nn


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grpo_example", ROOT / "docs" / "examples" / "grpo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_it_learns(example):
    """From chance to most of the reward: the policy says the rest of the alphabet, and stops."""
    said = []
    means = example.train(example.Settings(steps=21), log=said.append)
    assert sum(means[:3]) / 3 < 0.2
    assert sum(means[-3:]) / 3 > 0.6
    assert [line.split(":")[0] for line in said] == ["step   0", "step  10", "step  20"]


def by_logits(model: nn.Module, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probability of every next token, [N, S - 1]; the loop that this replaces."""
    every = (model(tokens)[:, :-1] / temperature).log_softmax(-1)
    return every.gather(-1, tokens[:, 1:, None])[..., 0]


def test_loss_and_gradients_are_those_of_full_logits(example):
    """Of a policy that has moved since it sampled, so that ratios differ from one, and some are clipped."""
    settings = example.Settings(prompts=4, group=8, kl_weight=0.3, learning_rate=0.01)
    grpo = example.GRPO(settings)
    for _ in range(4):
        grpo.step()
    grpo.of_policy.release()
    sampler = copy.deepcopy(grpo.policy)
    grpo.of_policy.set_model_output(grpo.policy)
    batch = grpo.sample()
    first, _ = grpo.loss(batch)
    first.backward()
    grpo.optimizer.step()
    grpo.optimizer.zero_grad()
    loss, entropy = grpo.loss(batch)
    loss.backward()
    found = {name: parameter.grad for name, parameter in grpo.policy.named_parameters()}

    grpo.of_policy.release()
    grpo.of_reference.release()
    grpo.policy.zero_grad()
    new = by_logits(grpo.policy, batch.tokens, settings.temperature)
    with torch.no_grad():
        old = by_logits(sampler, batch.tokens, settings.temperature)
        reference = by_logits(grpo.reference, batch.tokens, settings.temperature)
    answers = batch.tokens[:, 1:]
    stopped = (answers == example.STOP).cumsum(1)
    used = (stopped == 0) | ((stopped == 1) & (answers == example.STOP))
    rewards = batch.rewards.view(settings.prompts, settings.group)
    advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    advantage = advantage.view(-1, 1)
    ratio = torch.exp(new - old)
    bounded = ratio.clamp(0.8, 1.2)
    assert ((ratio != bounded) & used).any()
    assert (~used).any()
    kl = torch.exp(reference - new) - (reference - new) - 1
    token_losses = -(torch.minimum(ratio * advantage, bounded * advantage) - settings.kl_weight * kl)
    expected = torch.stack([row[mask].mean() for row, mask in zip(token_losses, used, strict=True)]).mean()
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in grpo.policy.named_parameters():
        scale = parameter.grad.abs().max()
        assert scale > 0, name
        assert (found[name] - parameter.grad).abs().max() <= 1e-5 * scale, name
    entropies = torch.distributions.Categorical(
        logits=grpo.policy(batch.tokens)[:, :-1] / settings.temperature
    ).entropy()
    torch.testing.assert_close(entropy, entropies[used].mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ([15, 16, 17, "stop", "pad"], 1.0),
        ([15, 16, 17, 17, 17], 3 / 5),
        ([15, "stop", "pad", "pad", "pad"], 1 / 4),
        ([16, 16, 17, "stop", "pad"], 3 / 4),
        (["stop"], 0.0),
    ],
)
def test_rewards(example, completion, reward):
    """Of the last letters but three: three to say, and to stop."""
    names = {"stop": example.STOP, "pad": example.PAD}
    tokens = torch.tensor([[14, *(names.get(token, token) for token in completion)]])
    targets = example.next_tokens(tokens, 1, -100)
    assert example.rewards(tokens, targets, -100).tolist() == pytest.approx([reward])
