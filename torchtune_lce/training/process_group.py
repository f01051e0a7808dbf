"""The processes of a distributed recipe: a launcher must have started them, and each joins the others' group."""

import torch
from omegaconf import DictConfig
from torch.distributed import init_process_group
from torchtune import training


def require_launcher() -> None:
    """Raises RuntimeError, saying what to add to the command, in a process that no launcher has started."""
    if not training.is_distributed():
        raise RuntimeError("several devices need torchtune's launcher: give `tune run` --nproc_per_node <devices>")


def join_processes(cfg: DictConfig) -> None:
    """Makes the process group, as ``recipe_main`` does in all of torchtune's distributed recipes but the full one.

    Raises RuntimeError without a launcher: see :func:`require_launcher`.
    """
    require_launcher()
    device = torch.device(cfg.device).type
    init_process_group(training.get_distributed_backend(device, offload_ops_to_cpu=device != "cpu"))
    if cfg.get("fsdp_cpu_offload", False):
        # The optimizer then steps on the CPU, with all of its cores.
        training.set_torch_num_threads()
