"""Label smoothing on top of an implementation that holds no logits, from their mean for each token.

With smoothing e the target's one-hot becomes (1 - e) one-hot + e / V (Szegedy et al. 2016, arXiv 1512.00567, section 7;
``label_smoothing`` of ``torch.nn.functional.cross_entropy``), and the loss of a token

    (1 - e) nll + e (lse - mean of the logits),    mean of the logits = hidden . mean of weight's rows + mean of bias.

Both of the latter are measured from the token's largest logit, the mean before it is rounded: what all logits share, be
it large, costs no digits. The uniform part is exact, whatever an implementation leaves out of its gradients, and costs
O(N D + V D).
"""

from __future__ import annotations  # torch 2.8 compiles nested functions, but not `Tensor | None`

from torch import Tensor

from torchtune_lce.implementations.choice import TokenLosses
from torchtune_lce.inputs.call import Call
from torchtune_lce.inputs.losses import Losses
from torchtune_lce.inputs.options import Options
from torchtune_lce.terms.mean_logits import mean_logits


def with_mean_logits(token_losses: TokenLosses) -> TokenLosses:
    """The same, with the mean of each token's logits. For calls without a softcap."""

    def run(call: Call) -> Losses:
        # Before the losses: autograd goes backwards, and adds the means' gradients to those that the implementation has
        # just made, in place. That by the weight, one row for all, takes no memory of its own; unless rows are scaled.
        means = mean_logits(call, call.valid)
        nll, peak, log_total, _, *others = token_losses(call)
        # No _replace, into which Dynamo of torch 2.8 does not look.
        return Losses(nll, peak, log_total, (means - peak).to(peak.dtype), *others)

    return run


def smooth(losses: Losses, options: Options) -> Tensor:
    """The smoothed loss of each token, [N], from what an implementation returns; 0 where ignored."""
    share = options.label_smoothing
    return (1 - share) * losses.nll + share * (losses.log_total - losses.mean)
