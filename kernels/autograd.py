"""The autograd.Function of the ``cce`` implementations: what is saved, and how the work is cut to the workspace."""

import math
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from torchtune_lce.filtering import open_record
from torchtune_lce.implementations import Filtering
from torchtune_lce.kernels.backward import run_backward
from torchtune_lce.kernels.forward import Activity, lse_and_target_logit
from torchtune_lce.kernels.plan import make_plan
from torchtune_lce.kernels.tuning import Config, config_for
from torchtune_lce.options import Options


def token_losses(filtering: Filtering) -> Callable:
    """The preset's function, with the contract of :func:`torchtune_lce.reference.token_losses`."""

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options):
        return _CutCrossEntropy.apply(hidden, weight, bias, targets, options, filtering)

    return run


class _CutCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, options: Options, filtering: Filtering):
        hidden, weight = _rows_contiguous(hidden), _rows_contiguous(weight)
        bias = bias if bias is None else bias.contiguous()
        config = config_for(hidden.device, hidden.dtype)
        rows, labels, count = _compact(targets, options.ignore_index)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        eps = options.resolved_filter_eps(hidden.dtype)
        filters = (need_hidden and filtering.hidden) or ((need_weight or need_bias) and filtering.weight)
        activity = _empty_activity(rows.numel(), weight.shape[0], config, hidden.device) if filters and eps else None

        lse = torch.zeros_like(rows, dtype=torch.float32)
        target_logit = torch.zeros_like(lse)
        for piece in _pieces(rows.numel(), hidden.shape[1] * hidden.element_size() * 4, options.workspace_mib, config):
            blocks = slice(piece.start // config.row_block, triton.cdiv(piece.stop, config.row_block))
            lse[piece], target_logit[piece] = lse_and_target_logit(
                hidden[rows[piece]],
                weight,
                bias,
                labels[piece],
                (count - piece.start).clamp(0, piece.stop - piece.start),
                options.softcap,
                activity and activity.of(blocks, piece),
                math.log(eps) if activity else 0.0,
            )
        used = torch.arange(rows.numel(), device=rows.device) < count
        lse = lse.where(used, 0)
        ctx.record = open_record(rows.numel(), rows.device)
        if ctx.record and activity:
            ctx.record.dropped_mass[rows] = activity.dropped_mass
        recorded = (activity.words, activity.whole, activity.dropped_mass) if activity else (None, None, None)
        ctx.save_for_backward(hidden, weight, bias, rows, labels, count, lse, *recorded)
        ctx.options, ctx.filtering = options, filtering
        ctx.set_materialize_grads(False)
        nll = (lse - target_logit).where(used, 0)
        return torch.empty_like(nll).scatter_(0, rows, nll), torch.empty_like(lse).scatter_(0, rows, lse)

    @staticmethod
    def backward(ctx, d_nll, d_lse):
        # once_differentiable would let the gradients pass for constants where only the saved inputs ask for more.
        if torch.is_grad_enabled():
            raise RuntimeError("impl='cce' has no second derivative (create_graph=True); set impl='reference'")
        hidden, weight, bias, rows, labels, count, lse, *recorded = ctx.saved_tensors
        options, filtering = ctx.options, ctx.filtering
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        config = config_for(hidden.device, hidden.dtype)
        d_nll = torch.zeros_like(lse) if d_nll is None else d_nll[rows]
        d_lse = None if d_lse is None else d_lse[rows]
        d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else None
        d_bias = torch.empty_like(bias) if need_bias else None

        def run(piece: slice, d_hidden: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None) -> None:
            """Gradients from the places in `piece`."""
            tokens = piece.stop - piece.start
            row_blocks = triton.cdiv(tokens, config.row_block)
            columns = triton.cdiv(weight.shape[0], config.entry_tile)
            # Beside the strips' tiles: the plan's lists, and the sums of d_hidden over strips.
            left = options.workspace_mib * 2**20 - 24 * weight.shape[0] - 48 * columns * row_blocks
            if d_hidden is not None:
                left -= tokens * hidden.shape[1] * 4
            tile_bytes = config.row_block * config.entry_tile * hidden.element_size()
            strip_tiles = min(max(left // tile_bytes, 2 * row_blocks), (columns + 1) * row_blocks)
            first = piece.start // config.row_block
            activity = None
            if recorded[0] is not None:
                whole = Activity(*recorded, config.forward_entries)
                activity = whole.of(slice(first, first + row_blocks), piece)
            # A gradient that nobody wants must not make the plan keep more.
            filter_hidden = filtering.hidden or d_hidden is None
            filter_weight = filtering.weight or (d_weight is None and d_bias is None)
            used = (count - piece.start).clamp(0, piece.stop - piece.start)
            plan = make_plan(
                activity, filter_hidden, filter_weight, used, row_blocks, weight.shape[0], strip_tiles, config
            )
            if ctx.record:
                ctx.record.kept_tiles, ctx.record.tiles = plan.first_id[-1:], columns * row_blocks
            run_backward(
                plan,
                hidden,
                weight,
                bias,
                rows[piece],
                labels[piece],
                used,
                lse[piece],
                d_nll[piece],
                d_lse if d_lse is None else d_lse[piece],
                options.softcap,
                strip_tiles,
                d_hidden,
                d_weight,
                d_bias,
                config,
            )

        everything = slice(0, rows.numel())
        # The float32 sums of d_hidden over strips may take half of the workspace; past that the two gradients take a
        # pass each, and that of hidden goes by pieces of tokens.
        pieces = list(_pieces(rows.numel(), hidden.shape[1] * 4 * 2, options.workspace_mib, config))
        if len(pieces) == 1 or not need_hidden and pieces:
            run(everything, d_hidden, d_weight, d_bias)
        elif pieces:
            if need_weight or need_bias:
                run(everything, None, d_weight, d_bias)
            for piece in pieces:
                run(piece, d_hidden, None, None)
        else:
            for gradient in (d_weight, d_bias):
                if gradient is not None:
                    gradient.zero_()
        return d_hidden, d_weight, d_bias, None, None, None


def _rows_contiguous(matrix: Tensor) -> Tensor:
    """Kernels take any row stride; features must lie next to each other."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()


def _compact(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in use first, in their order, and how many: on the device, so that nothing waits for the count."""
    ignored = targets == ignore_index
    rows = ignored.to(torch.uint8).sort(stable=True).indices
    count = ignored.logical_not().sum(dtype=torch.int32).view(1)
    return rows, targets[rows], count


def _empty_activity(tokens: int, vocabulary: int, config: Config, device: torch.device) -> Activity:
    words = triton.cdiv(vocabulary, config.forward_entries) * config.forward_entries // 32
    shape = (triton.cdiv(tokens, config.row_block), words)
    return Activity(
        torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty(shape[0], dtype=torch.bool, device=device),
        torch.empty(tokens, dtype=torch.float32, device=device),
        config.forward_entries,
    )


def _pieces(tokens: int, bytes_a_token: int, workspace_mib: int, config: Config) -> Iterator[slice]:
    """Slices of whole row blocks whose bytes fit the workspace, at least one block each."""
    fitting = workspace_mib * 2**20 // bytes_a_token // config.row_block * config.row_block
    step = max(fitting, config.row_block)
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))
