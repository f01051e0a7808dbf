"""Training for minutes: AdamW with a warm-up and a linear decay, by steps or time, whichever runs out first."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchtune_lce.commands.shared.errors import CommandError

_TOLD_EVERY = 20  # steps: reading a loss waits for the device


@dataclass(frozen=True)
class Schedule:
    batch: int = 16  # sequences a step
    steps: int = 900
    seconds: float = 180.0
    learning_rate: float = 1e-3
    warmup: int = 50  # steps


def train(
    groups: list[dict],
    rows: Tensor,  # [R, tokens of a sequence], on the CPU
    device: torch.device,
    schedule: Schedule,
    loss_of: Callable[[Tensor], Tensor],
    on_step: Callable[[int, float], None],
) -> int:
    """Trains the parameters of ``groups``, whose learning rate is the schedule's times their "scale", if they have one.

    ``loss_of`` gets a batch of rows on the device, each row once before any comes again. ``on_step`` is told every
    twentieth step and its loss. Returns the number of steps; raises CommandError for a loss that is not finite.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(
        groups, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.05, fused=device.type == "cuda"
    )
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows), generator=generator)
    begin, at = time.perf_counter(), 0
    for step in range(schedule.steps):
        spent = (time.perf_counter() - begin) / schedule.seconds
        if spent >= 1:
            return step
        decay = 1 - 0.97 * max(step / schedule.steps, spent)
        for group in optimizer.param_groups:
            group["lr"] = (
                schedule.learning_rate * group.get("scale", 1.0) * min(1, (step + 1) / schedule.warmup) * decay
            )
        if at + schedule.batch > len(rows):
            order, at = torch.randperm(len(rows), generator=generator), 0
        batch = rows[order[at : at + schedule.batch]].to(device)
        at += schedule.batch
        loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % _TOLD_EVERY == 0 or step == schedule.steps - 1:
            on_step(step, value := loss.item())
            if not math.isfinite(value):
                raise CommandError(f"the loss of the training became {value} in step {step}")
    return schedule.steps
