"""Calls of linear_cross_entropy for Hypothesis to draw: shapes, layouts, dtypes, labels and every option.

``TORCHTUNE_LCE_EXAMPLES=2000`` asks for that many random cases of each property; without it a few fixed ones run.
"""

import os
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from tolerance import Settings, Upstream

ASKED = os.environ.get("TORCHTUNE_LCE_EXAMPLES")


def bounded(few: int) -> settings:
    """Settings of a property: ``few`` cases, the same ones everywhere, or as many random ones as asked for."""
    return settings(
        max_examples=int(ASKED or few),
        derandomize=ASKED is None,
        database=None,
        deadline=None,
        # Looking for the smallest case that fails takes minutes in Triton's interpreter.
        phases=tuple(Phase) if ASKED else (Phase.generate,),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )


INPUTS = ("hidden", "weight", "bias")
LAYOUTS = ("contiguous", "offset", "strided", "transposed", "expanded")


@dataclass(frozen=True)
class Call:
    """Arguments of one call; ``frozen`` inputs ask for no gradient, ``upstream`` names the results that get one."""

    impl: str
    tensors: dict[str, torch.Tensor | None]  # hidden, weight, targets, bias
    settings: Settings
    filter_eps: float | str | None
    upstream: Upstream
    frozen: frozenset[str]
    chunk: int  # entries that `chunked` takes at a time

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["hidden"].dtype

    def __repr__(self) -> str:
        shapes = {
            name: None if x is None else (x.dtype, list(x.shape), x.stride(), x.storage_offset())
            for name, x in self.tensors.items()
        }
        return f"Call({self.impl}, {shapes}, {self.settings}, {self.filter_eps=}, {self.frozen=}, {self.chunk=})"


def small_shapes() -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, 7), max_size=3).map(tuple)


@st.composite
def calls(draw, impl: str, dtypes: list[torch.dtype], device: torch.device) -> Call:
    dtype = draw(st.sampled_from(dtypes))
    # Mostly what has something to go wrong in, not the least that there is.
    tokens = draw(st.sampled_from(((29,), (5, 7), (3, 1, 11), (1,), (), (4, 0))) | small_shapes())
    vocabulary = draw(st.sampled_from((67, 33, 70, 1, 2)) | st.integers(1, 75))
    width = draw(st.sampled_from((17, 33, 1)) | st.integers(1, 37))
    ignore_index = draw(st.sampled_from((-100, -1, 0, vocabulary - 1, vocabulary, 2**31 - 1)))
    chosen = Settings(
        ignore_index=ignore_index,
        reduction=draw(st.sampled_from(("mean", "sum", "none"))),
        softcap=draw(st.none() | st.floats(0.3, 60)),
        shift=draw(st.sampled_from((0, 0, 1, 2, 9))) if tokens else 0,
        z_loss=draw(st.sampled_from((0.0, 0.0, 1e-3, 0.2))),
        label_smoothing=draw(st.sampled_from((0.0, 0.0, 0.1, 1.0))),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    scale = draw(st.sampled_from((0.0, 0.05, 1.0, 6.0)))
    values = {
        "hidden": random(*tokens, width).to(dtype),
        "weight": (random(vocabulary, width) * (scale / width**0.5)).to(dtype),
        "bias": random(vocabulary).to(dtype) if draw(st.booleans()) else None,
        "targets": _targets(draw, generator, tokens, vocabulary, ignore_index),
    }
    tensors = {
        name: None if value is None else lay_out(value.to(device), draw(st.sampled_from(LAYOUTS)))
        for name, value in values.items()
    }
    frozen = frozenset(draw(st.lists(st.sampled_from(INPUTS), max_size=3)))
    for name in INPUTS:
        if tensors[name] is not None and name not in frozen:
            tensors[name].requires_grad_()
    loss_shape = tokens if chosen.reduction == "none" else ()
    upstream = Upstream(
        lay_out(random(*loss_shape).to(device), draw(st.sampled_from(LAYOUTS))),
        random(*tokens).to(device) if draw(st.booleans()) else None,
    )
    eps = draw(st.sampled_from(("auto", None, 0, 0.01)))
    chunk = draw(st.sampled_from((8, 1, 64)) | st.integers(1, 80))
    return Call(impl, tensors, chosen, eps, upstream, frozen, chunk)


def _targets(draw, generator, tokens, vocabulary, ignore_index) -> torch.Tensor:
    targets = torch.randint(0, vocabulary, tokens, generator=generator)
    flat = targets.view(-1)
    match draw(st.sampled_from(("none", "all", "some", "first", "last", "every second"))):
        case "all":
            flat[:] = ignore_index
        case "some":
            flat[torch.rand(flat.shape, generator=generator) < 0.4] = ignore_index
        case "first":
            flat[: flat.numel() // 2] = ignore_index
        case "last":
            flat[flat.numel() // 2 :] = ignore_index
        case "every second":
            flat[::2] = ignore_index
    return targets.to(draw(st.sampled_from((torch.int64, torch.int32))))


def lay_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The values with other strides or another start, and what no call may look at around them."""
    if values.ndim == 0 or layout == "contiguous":
        return values
    if layout == "expanded":
        return values[:1].expand(values.shape) if values.shape[0] else values
    garbage = torch.nan if values.is_floating_point() else 77_777
    if layout == "transposed":
        values = values.transpose(0, -1)
    step = 2 if layout == "strided" else 1
    shape = [*values.shape[:-1], values.shape[-1] * step]
    around = torch.full((values.numel() * step + 12,), garbage, dtype=values.dtype, device=values.device)
    placed = around[5 : 5 + values.numel() * step].view(shape)[..., ::step]
    placed.copy_(values)
    return placed.transpose(0, -1) if layout == "transposed" else placed
