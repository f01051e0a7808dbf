"""Cut off in the middle: a run that is killed, an operation that finds no memory, a kernel that does not start."""

import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from project import SUPPORT
from property_cases import ASKED
from tally import tried
from tiny_models import (
    FULL,
    LORA,
    OUR_LOSS,
    STOCK_LOSS,
    build_model,
    logged_losses,
    our_recipe,
    recipe_config,
    stock_recipe,
    train,
    write_assets,
)
from torch.utils._python_dispatch import TorchDispatchMode

import torchtune_lce
from torchtune_lce import linear_cross_entropy
from torchtune_lce.loss import LinearCrossEntropyLoss

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
STEPS = 6  # of a whole epoch of tiny_models' data
KILLED_AT = STEPS + 3


class Interrupted:
    """A run of two epochs, killed in its second, and what comes of its folder."""

    def __init__(self, method: str, folder: Path):
        self.method, self.assets, self._folder = method, folder / "assets", folder
        write_assets(self.assets)

    def config(self, output: str, *overrides: str, loss: str = OUR_LOSS):
        overrides = ["epochs=2", "max_steps_per_epoch=null", *overrides]
        return recipe_config(self.assets, self._folder / output, self.method, tied=True, loss=loss, overrides=overrides)

    def unbroken(self) -> list[float]:
        train(our_recipe(self.method), self.config("unbroken"))
        return logged_losses(self._folder / "unbroken")

    def kill(self) -> list[float]:
        """The losses until a SIGKILL after a step in mid-epoch, in a process started as users start it."""
        dying = ["metric_logger._component_=dying_logger.DyingLogger", f"metric_logger.last_step={KILLED_AT}"]
        OmegaConf.save(self.config("killed", *dying), self._folder / "dying.yaml")
        found_in = Path(torchtune_lce.__file__).parent.parent, SUPPORT
        command = ["-m", f"torchtune_lce.recipes.{self.method}", "--config", str(self._folder / "dying.yaml")]
        run = subprocess.run(
            [sys.executable, *command],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, found_in))},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert not (self._folder / "killed" / "epoch_1").exists()
        return logged_losses(self._folder / "killed")

    def resume(self, recipe, loss: str) -> list[float]:
        """Losses of the epoch that was cut off, from a copy of what the dead run left."""
        output = f"resumed by {recipe.__module__}"
        shutil.copytree(self._folder / "killed", self._folder / output, ignore=shutil.ignore_patterns("steps.txt"))
        overrides = ["resume_from_checkpoint=True"]
        if self.method == FULL:
            overrides.append("checkpointer.checkpoint_files=[epoch_0/model-00001-of-00001.bin]")
        train(recipe, self.config(output, *overrides, loss=loss))
        return logged_losses(self._folder / output)


def test_killed_run_resumes_to_the_losses_of_an_unbroken_one(tmp_path):
    run = Interrupted(FULL, tmp_path)
    expected = run.unbroken()
    assert len(set(expected)) == 2 * STEPS
    assert run.kill() == expected[:KILLED_AT]
    assert run.resume(our_recipe(FULL), OUR_LOSS) == pytest.approx(expected[STEPS:], rel=1e-6)


@pytest.mark.skipif(ASKED is None, reason="asks for TORCHTUNE_LCE_EXAMPLES: another start of torchtune takes seconds")
def test_killed_lora_run_resumes_as_with_torchtune_alone(tmp_path):
    """Whose own LoRA recipe (0.6.1) goes on, but not with the losses of a run that was never stopped."""
    run = Interrupted(LORA, tmp_path)
    assert len(run.kill()) == KILLED_AT
    expected = run.resume(stock_recipe(LORA), STOCK_LOSS)
    assert len(set(expected)) == STEPS
    assert run.resume(our_recipe(LORA), OUR_LOSS) == pytest.approx(expected, rel=1.5e-6)


class FailingOperations(TorchDispatchMode):
    """Counts torch's operations, those inside this package's own ones too, and lets one of them find no memory."""

    def __init__(self, failing: int | None = None):
        super().__init__()
        self.count = 0
        self._failing = failing

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "torchtune_lce":
            # Torch switches a mode off while it handles an operation: on again for what that one is made of, and past
            # the mode for the operation itself.
            device = next(x for x in arguments if isinstance(x, torch.Tensor)).device
            with self:
                return function.redispatch(torch._C.DispatchKeySet(BACKENDS[device.type]), *arguments)
        self.count += 1
        if self.count - 1 == self._failing:
            raise torch.OutOfMemoryError("no memory for the test's sake")
        return function(*arguments, **(keywords or {}))


BACKENDS = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}


class FailingLaunches:
    """The same for launches of the package's kernels."""

    def __init__(self, failing: int | None = None):
        from torchtune_lce.kernels.launching import Repeated

        self._owner, self._name = Repeated, "__call__"
        self.count = 0
        self._failing = failing

    def __enter__(self):
        self._launch = getattr(self._owner, self._name)

        def launch(*arguments, **keywords):
            self.count += 1
            if self.count - 1 == self._failing:
                raise torch.OutOfMemoryError("no launch for the test's sake")
            return self._launch(*arguments, **keywords)

        setattr(self._owner, self._name, launch)
        return self

    def __exit__(self, *_):
        setattr(self._owner, self._name, self._launch)


def survives(step: Callable[[], list[torch.Tensor]], failing: type[AbstractContextManager], most: int) -> None:
    """Lets up to ``most`` of what a step consists of fail, one at a time; the step after must give the same bits."""
    expected = step()
    with failing() as counted:
        step()
    assert counted.count > 3
    stride = max(1, -(-counted.count // most))
    for number in range(0, counted.count, stride):
        tried[f"one failure: {failing.__name__}"] += 1
        with failing(number), pytest.raises(torch.OutOfMemoryError, match="for the test's sake"):
            step()
        for actual, wanted in zip(step(), expected, strict=True):
            assert torch.equal(actual, wanted), f"after failure {number}"


def make_step(impl: str, device: torch.device) -> Callable[[], list[torch.Tensor]]:
    """A forward and backward; its inputs are compared too."""
    hidden = torch.randn(20, 12, device=device, requires_grad=True)
    weight = torch.randn(50, 12, device=device, requires_grad=True)
    bias = torch.randn(50, device=device, requires_grad=True)
    targets = torch.randint(0, 50, (20,), device=device)
    targets[::3] = -100

    def step():
        loss, lse = linear_cross_entropy(hidden, weight, targets, bias, softcap=9.0, impl=impl, return_lse=True)
        gradients = torch.autograd.grad(loss + lse.sum(), (hidden, weight, bias))
        return [loss.detach(), *gradients, hidden.detach().clone(), weight.detach().clone(), targets.clone()]

    return step


@pytest.mark.parametrize(
    ("impl", "most"), [("reference", 1000), ("chunked", 1000), pytest.param("cce", 4, marks=needs_triton)]
)
def test_after_a_failed_operation_the_next_call_works(impl, most, device):
    survives(make_step(impl, device), FailingOperations, most)


@needs_triton
def test_after_a_failed_launch_the_next_call_works(device):
    survives(make_step("cce", device), FailingLaunches, 4)


def test_after_a_failure_the_bound_loss_works(device):
    """The model stays bound, and can be released."""
    model = build_model().to(device)
    tokens = torch.randint(0, 512, (2, 9), device=device)
    loss = LinearCrossEntropyLoss(impl="chunked")
    loss.set_model_output(model)
    hidden = model(tokens).detach().requires_grad_()

    def step():
        result = loss(hidden, tokens)
        return [result.detach(), *torch.autograd.grad(result, (hidden, model.tok_embeddings.weight))]

    survives(step, FailingOperations, 25)
    loss.release()
    assert model(tokens).shape == (2, 9, 512)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["cce", "cce_exact", "chunked", "reference"])
def test_after_running_out_of_memory_the_next_call_works(impl):
    """Really, at every depth of the call: the process may have so many MiB more than its inputs, and no others."""
    # The forward takes a copy of 28 MiB of the hidden states, more than the 20 that torch's allocator may have at hand.
    hidden = torch.randn(16_384, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50_000, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 50_000, (16_384,), device="cuda")
    reached, peaks = [], []

    def step():
        loss = linear_cross_entropy(hidden, weight, targets, impl=impl)
        reached.append("forward")
        peaks.append(torch.cuda.max_memory_reserved())
        gradients = torch.autograd.grad(loss, (hidden, weight))
        reached.append("backward")
        peaks.append(torch.cuda.max_memory_reserved())
        return [loss.detach(), *gradients]

    torch.cuda.empty_cache()
    inputs = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    expected = [x.cpu() for x in step()]
    # Between what the forward and what all of it takes, so that a backward runs out on any card.
    between = (peaks[0] + peaks[1]) // 2 - inputs
    # What other tests left in cycles would go away in the middle of this one.
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    outcomes = set()
    try:
        for mib in (1, 4, 16, 64, 128, 256, 512, 1024, 4096, between // 2**20):
            reached.clear()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + mib * 2**20) / total)
            try:
                step()
            except torch.OutOfMemoryError:
                pass
            outcomes.add(tuple(reached))
            torch.cuda.set_per_process_memory_fraction(1.0)
            for actual, wanted in zip(step(), expected, strict=True):
                assert torch.equal(actual.cpu(), wanted), f"after {mib} MiB"
            del actual
            gc.collect()
            # Frames of torch's own and the exceptions in them hold each other.
            assert torch.cuda.memory_allocated() == before, "what a failed call took is still held"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert () in outcomes, "no forward ran out of memory"
    # Where the forward is the worst moment, no limit lets it pass and the backward not.
    assert ("forward",) in outcomes or peaks[0] >= peaks[1], "no backward ran out of memory"
