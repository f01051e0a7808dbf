"""Meshes of four processes: a vocabulary split over ranks, FSDP2 in its kinds, both at once; and two cards."""

import os
from pathlib import Path

import pytest
import torch
from distillation_checks import check_distillation
from distributed_processes import RUN_AGAIN_AFTER_A_SIGNAL, spawn, train_all
from sharding_checks import check_collectives, check_sharded
from tensor_parallel_checks import check_vocabulary_parallel, check_with_fsdp
from tiny_models import FULL_DISTRIBUTED, FULL_DPO_DISTRIBUTED, OUR_LOSS, STOCK_LOSS, logged_losses, recipe_config
from tiny_preferences import assert_equal_steps, preference_config, write_preference_assets
from torch.distributed.device_mesh import init_device_mesh
from torchtune_main_checks import check_context_parallel, check_sequence_parallel, check_sequence_parallel_with_fsdp

pytestmark = RUN_AGAIN_AFTER_A_SIGNAL

FSDP2_RUNS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")

# What docs/distributed.md has one add to a bundled config for tensor parallelism.
SPLIT = (
    "tensor_parallel_dim=2",
    "tensor_parallel_plan._component_=torchtune.models.llama3.base_llama_tp_plan",
    "optimizer.fused=False",
)


def check_four_processes(rank: int, recipes: list) -> None:
    flat = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    # On a machine with a card they are compiled for it.
    kernels = ("cce", "cce_exact") if os.environ.get("TRITON_INTERPRET") == "1" else ()
    # Of the kernels that filter nothing once, where the most shards are merged.
    check_vocabulary_parallel(
        square["tp"], ("reference", "chunked", *kernels), digits=("reference", "chunked", *kernels[:1])
    )
    check_vocabulary_parallel(flat, ("chunked", *(kernels and ("cce_kahan_full_c", "cce_exact"))))
    if FSDP2_RUNS_ON_CPU:
        check_with_fsdp(square)
        check_sharded(flat, square)
        check_distillation(flat)
        check_sequence_parallel_with_fsdp(square)
        check_context_parallel(flat)
    check_sequence_parallel(square["tp"])
    if FSDP2_RUNS_ON_CPU:
        train_all(rank, recipes)


def check_two_cards(rank: int) -> None:
    torch.cuda.set_device(rank)
    mesh = init_device_mesh("cuda", (2,))
    # Not torch_compile: it would compile each case, on both ranks, for minutes.
    check_vocabulary_parallel(mesh, ("reference", "chunked", "cce", "cce_exact"))
    check_sharded(mesh, init_device_mesh("cuda", (1, 2), mesh_dim_names=("dp", "shard")))
    check_collectives(mesh)
    check_distillation(mesh)
    check_sequence_parallel(mesh)
    check_context_parallel(mesh)


def recipes_on_two_axes(folder: Path) -> list:
    """torchtune's full recipe with its own loss, then ours: tensor parallelism over two ranks, FSDP2 over two."""
    steps = "max_steps_per_epoch=2", "gradient_accumulation_steps=1", "optimizer.foreach=True"  # as on a card
    configs = [
        recipe_config(
            folder / "assets", folder / loss, FULL_DISTRIBUTED, tied=False, loss=loss, overrides=(*SPLIT, *steps)
        )
        for loss in (STOCK_LOSS, OUR_LOSS)
    ]
    return [(cfg.loss._component_ == OUR_LOSS, FULL_DISTRIBUTED, cfg) for cfg in configs]


def preference_recipes(folder: Path) -> list:
    """torchtune's full DPO recipe, then ours, policy and reference sharded over all four ranks."""
    overrides = "gradient_accumulation_steps=1", "batch_size=1"
    return [
        (
            ours,
            FULL_DPO_DISTRIBUTED,
            preference_config(
                folder / "assets", folder / name, FULL_DPO_DISTRIBUTED, tied=True, steps=2, overrides=overrides
            ),
        )
        for name, ours in (("stock DPO", False), ("our DPO", True))
    ]


def test_four_processes(tmp_path):
    """All cases in one spawn: starting the processes costs more than most of what they do."""
    write_preference_assets(tmp_path / "assets")
    spawn(check_four_processes, 4, [*recipes_on_two_axes(tmp_path), *preference_recipes(tmp_path)])
    if FSDP2_RUNS_ON_CPU:
        stock, ours = (logged_losses(tmp_path / loss) for loss in (STOCK_LOSS, OUR_LOSS))
        assert len(set(stock)) == 2
        assert ours == pytest.approx(stock, rel=1.5e-6)
        assert_equal_steps(tmp_path / "our DPO", tmp_path / "stock DPO", steps=2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA cards")
def test_two_cards():
    spawn(check_two_cards, 2, backend="cuda:nccl,cpu:gloo")
