"""What DPO's log-probabilities allocate, of policy and reference, in one step of torchtune's recipes and of ours.

N = 2BS tokens of the chosen and the rejected rows, V entries, D features, b bytes of an element.

stock: a model gives float32 logits, 4NV. Log-probabilities take these by the temperature, 4NV, and a log-softmax, 4NV,
which the policy keeps for its backward; its logits go before the reference's are made. The backward has the gradients
by a log-softmax and by what that is of, 8NV.
The LoRA recipes hold the reference's logits, 4NV, under a name that nothing reads until the next step has its own. The
full one lets go of them, and takes chosen and rejected rows one after the other.
ours: the policy's log-probabilities keep the gradient of its hidden states at most, bND, while the reference's are
made, in the same workspace; of a trained head where nothing is filtered, what is held of its exponentials too.
"""

from dataclasses import replace

from torchtune_lce.commands.plan.step import StepLoss
from torchtune_lce.implementations import choice
from torchtune_lce.implementations.memory import LossMemory, Problem, loss_memory

PLANNED = ("stock", "chunked", *choice.CCE_PRESETS)


def preference_memory(loss: str, problem: Problem, second_model: bool) -> StepLoss:
    """Of one of :data:`PLANNED`; ``problem`` is the policy's, and the reference a ``second_model`` or the policy itself
    without its adapters. The reference's hidden states are counted here, the policy's are not.
    """
    if loss == "stock":
        return _stock(problem, second_model)
    policy = loss_memory(loss, problem)
    reference = loss_memory(loss, replace(problem, trained_head=False, adapter=None))
    kept = problem.hidden_bytes + problem.adapter_kept + policy.held
    # Its hidden states are in the place of the gradient that is planned, and not kept.
    forward = max(policy.forward, kept + reference.forward)
    return StepLoss(LossMemory(forward, policy.backward), beside_other=kept)


def _stock(problem: Problem, second_model: bool) -> StepLoss:
    b, logits = problem.itemsize, problem.logits
    # What DoRA multiplies with its scale; it measures the rows of three copies of the weight.
    factors = 2 * b * logits if problem.scaled else 0
    of_the_weight = 3 * problem.vocabulary * problem.features * b if problem.scaled else 0
    kept = 4 * logits + factors + problem.adapter_kept
    left_over = 0 if second_model else 4 * logits
    at_once = logits // 2 if second_model else logits
    forward = max(kept + 4 * logits + 8 * at_once, factors + of_the_weight + problem.adapter_kept)
    # By the log-softmaxes, and when these are gone by the head; float32 logits have that of 16 bits beside theirs.
    of_head = b * logits * (1 if problem.adapter is None else 2) + _gradients(problem)
    first = kept + 8 * at_once + (2 * logits if second_model else 0)
    backward = max(first, (4 + b) * logits if b < 4 else 0, of_head)
    return StepLoss(LossMemory(left_over + forward, left_over + backward), left_over + kept, left_over)


def _gradients(problem: Problem) -> int:
    return problem.hidden_bytes + problem.head_bytes + problem.adapter_bytes
