"""Processes that find each other as torchrun's do; a module of its own, since each of them imports what it runs."""

import faulthandler
import gc
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor._random
from interpreter import make_faster
from project import SUPPORT
from tiny_models import our_recipe, stock_recipe, train
from torchtune import training
from torchtune.models.llama3_2._component_builders import llama3_2, lora_llama3_2

from torchtune_lce.training.stock_recipes import load_stock_recipe

TIMEOUT = timedelta(seconds=120)
# For tests that call `spawn` or `launch`. A rank has been seen to abort once in a dozen of the suite's runs on one
# machine, in code that is neither Python nor ours; what else fails is not run again.
RUN_AGAIN_AFTER_A_SIGNAL = pytest.mark.flaky(reruns=1, only_rerun="a rank died:")
LAST_WORDS = 4000
_deaths = []
# What every rank imports, for seconds: without a card once a session, by a process from which the ranks are forked.
multiprocessing.set_forkserver_preload(
    ["torchtune.training", "torchtune_lce.recipes.full_finetune_distributed", "torchtune_lce.loss", "pytest"]
)


def spawn(function: Callable, ranks: int, *arguments, backend: str = "gloo") -> None:
    """``function(rank, *arguments)`` in `ranks` processes of one process group; raises what one of them raised.

    Ranks of gloo alone see no card: torchtune's recipes put some tensors on one wherever there is one. Of one that dies
    the error holds what it last wrote, and where it was.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # With a card each rank starts from nothing: a process that has asked for cards leaves none to those forked from it.
    start_method = "spawn" if torch.cuda.is_available() else "forkserver"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if backend == "gloo":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        written = [Path(folder) / f"rank{rank}.txt" for rank in range(ranks)]
        try:
            torch.multiprocessing.start_processes(
                _run, args=(written, port, backend, function, arguments), nprocs=ranks, start_method=start_method
            )
        except torch.multiprocessing.ProcessExitedException as death:
            raise _of_dead_rank(str(death), written[death.error_index].read_text(errors="replace")) from None
        finally:
            for file in filter(Path.exists, written):
                sys.stderr.write(file.read_text(errors="replace"))


def launch(program: Path, ranks: int, *arguments: object, folder: Path) -> None:
    """``program run --nproc_per_node`` as a user types it, in ``folder``. Ranks of gloo as above."""
    # What a config names of here is found.
    environment = os.environ | {"PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [program, "run", "--nproc_per_node", str(ranks), *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as written:
        try:
            result = subprocess.run(
                command, env=environment, cwd=folder, stdout=written, stderr=subprocess.STDOUT, timeout=120
            )
        finally:
            written.seek(0)
            output = written.read()
            sys.stderr.write(output)
    # The launcher ends the others by a signal too.
    if signals := [found for found in re.findall(r"Signal \d+ \(\w+\)", output) if "SIGTERM" not in found]:
        raise _of_dead_rank(signals[0], output)
    assert result.returncode == 0, output[-LAST_WORDS:]


def _of_dead_rank(how: str, written: str) -> RuntimeError:
    # The second time it is no accident, and nothing is run again.
    what = "another rank died" if _deaths else "a rank died"
    _deaths.append(how)
    said = f"{what}: {how}; it last wrote:\n{written[-LAST_WORDS:]}"
    # Of what is run again and then passes, pytest shows warnings alone.
    warnings.warn(said, stacklevel=3)
    return RuntimeError(said)


def _run(rank: int, written: list[Path], port: int, backend: str, function: Callable, arguments: tuple) -> None:
    # For whatever writes to it, Python or not.
    os.dup2(os.open(written[rank], os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    faulthandler.enable()
    ranks = len(written)
    torch.set_num_threads(1)
    # torchtune's recipes collect garbage before they train: not among all that the imports have left.
    gc.freeze()
    make_faster()
    # What torchrun sets; torchtune and NCCL read it.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    dist.init_process_group(backend, timeout=TIMEOUT)
    function(rank, *arguments)
    dist.destroy_process_group()


def train_all(rank: int, runs: list, stock_recipe: Callable[[str], type] = stock_recipe) -> None:
    """Every ``(ours, method, config)`` of `runs` through its real distributed recipe, one after the other."""
    if runs[0][2].device == "cpu":
        let_recipes_run_on_a_cpu()
    for ours, method, cfg in runs:
        # On cards the first random DTensor of a process gives all ranks rank 0's generator; so in every run.
        torch.distributed.tensor._random._rng_tracker = None
        # One process group serves all runs: gloo may hang where groups come and go in one process.
        module = load_stock_recipe(method)
        module.init_process_group = module.destroy_process_group = lambda *arguments: None
        train(our_recipe(method) if ours else stock_recipe(method), cfg)


def lora_llama3_2_on_a_cpu(**settings) -> torch.nn.Module:
    """A model for configs: torchtune's, in processes that torchtune's own launcher has started."""
    let_recipes_run_on_a_cpu()
    return lora_llama3_2(**settings)


def llama3_2_on_a_cpu(**settings) -> torch.nn.Module:
    """As above, without LoRA."""
    let_recipes_run_on_a_cpu()
    return llama3_2(**settings)


def let_recipes_run_on_a_cpu() -> None:
    """torchtune 0.6.1's distributed recipes ask their device for what only cards have."""
    training.get_memory_stats = lambda *arguments, **settings: {}
    training.log_memory_stats = lambda *arguments, **settings: None
    torch.cpu.empty_cache = torch.cpu.reset_peak_memory_stats = lambda *arguments, **settings: None


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest entry."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
