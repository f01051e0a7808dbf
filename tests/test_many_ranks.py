"""Meshes of four processes: a vocabulary split over ranks, FSDP2 in its kinds, both at once; and two cards."""

import os

import pytest
import torch
from distillation_checks import check_distillation
from distributed_processes import spawn
from sharding_checks import check_collectives, check_sharded
from tensor_parallel_checks import check_vocabulary_parallel, check_with_fsdp
from torch.distributed.device_mesh import init_device_mesh
from torchtune_main_checks import check_context_parallel, check_sequence_parallel, check_sequence_parallel_with_fsdp

FSDP2_RUNS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")


def check_four_processes(rank: int) -> None:
    flat = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    # On a machine with a card they are compiled for it.
    kernels = ("cce", "cce_exact") if os.environ.get("TRITON_INTERPRET") == "1" else ()
    check_vocabulary_parallel(square["tp"], ("reference", "chunked", *kernels))
    check_vocabulary_parallel(flat, ("chunked", *kernels))
    if FSDP2_RUNS_ON_CPU:
        check_with_fsdp(square)
        check_sharded(flat, square)
        check_distillation(flat)
        check_sequence_parallel_with_fsdp(square)
        check_context_parallel(flat)
    check_sequence_parallel(square["tp"])


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


def test_four_processes():
    """All cases in one spawn: starting the processes costs more than most of what they do."""
    spawn(check_four_processes, 4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA cards")
def test_two_cards():
    spawn(check_two_cards, 2, backend="cuda:nccl,cpu:gloo")
