"""Compiles kernels for a card that is not here: `python tests/support/compile_kernels.py 90:bfloat16`, not interpreted.

A call of the operators runs on the CPU with a driver that says which card it is and launches nothing: what is compiled
is what that card would be given, with its blocks, flags and alignments. Each line printed is one kernel: its name, its
flags that are on, and the bytes of shared memory and of the stack that it takes. The last line is of a kernel that
takes a named tuple: how many values in it the compiler knows to be multiples of 16.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from torchtune_lce.inputs.call import checked
from torchtune_lce.inputs.filtering import Filtering
from torchtune_lce.inputs.options import Options
from torchtune_lce.kernels import (
    autograd,
    backward,
    compiling,
    divergence_gradients,
    divergence_operators,
    divergence_rows,
    divergence_tiles,
    divergence_walk,
    division,
    exponentials,
    forward,
    launching,
    mean_gradients,
    overflow,
    plan,
    strip_again,
    strip_operators,
    strip_product,
    strips,
    tail,
    tuning,
    weight_product,
)
from torchtune_lce.kernels.operands import Gradients, Operands

# The vocabulary ends within a tile of its one strip. No softcap: it takes registers, and thrice the time.
TOKENS, VOCABULARY, WIDTH, RANK = 2048, 1_000, 2048, 8
OPTIONS = Options(workspace_mib=4096)
# Cards for which means' gradients and divergences are compiled as well: with pointer loads, with as little shared
# memory as any, and with a copy engine. Their tiles are others' or smaller.
WHOLE = (80, 86, 90)
# They ask the card how many programs run at once.
LAUNCHERS = (
    backward,
    divergence_gradients,
    divergence_rows,
    divergence_walk,
    division,
    exponentials,
    forward,
    mean_gradients,
    overflow,
    plan,
    strip_again,
    strip_product,
    strips,
    tail,
    weight_product,
)


class Forgetful(dict):
    """Of what was launched, so that nothing is launched a second time without a look at what it is compiled for."""

    def get(self, key):
        return None


class Elsewhere:
    """A Triton driver of a card that is not here."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiled_for(capability: int, dtype: torch.dtype) -> list[dict]:
    """What a forward and a backward would launch there, each kernel once."""
    config = tuning._cuda_config((capability // 10, capability % 10), dtype, "tf32x3")
    found = {}
    run = jit.JITFunction.run

    def compile_alone(kernel, *arguments, grid, warmup, **options):
        # What is kept is kept for a device, whatever card it was when another case asked.
        kernel.device_caches.clear()
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        flags = [name for name, value in options.items() if name.isupper() and value is True]
        found[compiled.hash] = {
            "kernel": kernel.fn.__name__,
            "flags": flags,
            "shared": compiled.metadata.shared,
            "stack": stack_bytes(compiled.asm["cubin"]),
        }

    with contextlib.ExitStack() as undo:
        for module, name, value in (
            (jit.JITFunction, "run", compile_alone),
            # Compiled where they are seen.
            (compiling, "_threads", lambda: 1),
            (launching, "_compiled", Forgetful()),
            *(
                (module, "config_for", lambda *_: config)
                for module in (autograd, divergence_tiles, forward, strip_operators)
            ),
            # A tile of the vocabulary is held in either memory, and the others are made again.
            (strips, "tiles_held", lambda *_: 1),
            (strip_operators, "tiles_in_gradient", lambda *_: 1),
            # What nothing computed names no row.
            (autograd, "compact", in_place),
            # A CPU has no product of 16 bits with a float32 result.
            (mean_gradients, "_product", lambda left, right: left.float() @ right.float()),
            *((module, "programs", lambda _: 132) for module in LAUNCHERS),
        ):
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        # Nothing is read: memory that is never touched is never there.
        hidden = torch.empty(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
        weight = torch.empty(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
        bias = torch.empty(VOCABULARY, dtype=dtype, requires_grad=True)
        targets = torch.zeros(TOKENS, dtype=torch.int64)
        # With a filter they take more. The rest for one card alone, of those for which it is done soonest: entropies
        # without one, and with one and a trained head tiles.
        is_soonest = capability == 80
        for eps in (None, 2.0**-12) if is_soonest else (2.0**-12,):
            losses = strip_operators.token_losses(hidden, weight, bias, targets, eps, True, eps is None, False, OPTIONS)
            (losses.nll + losses.log_total).sum().backward()
        if is_soonest:
            call = checked(hidden, weight, targets, bias, options=OPTIONS)
            losses = autograd.token_losses(Filtering(hidden=True, weight=True))(call)
            (losses.nll + losses.log_total).sum().backward()
        if capability not in WHOLE:
            return list(found.values())
        make_mean_gradients(hidden.detach(), weight.detach(), bias.detach(), config, of_all=is_soonest)
        # Both divergences take more than one does, and with the labels' cross-entropy most of all.
        student, labels = (hidden, weight, bias), torch.empty(TOKENS, dtype=torch.int64)
        teacher = tuple(torch.empty(x.shape, dtype=dtype) for x in student)
        divergence_operators.total(student, teacher, labels, -100, 0.5, 0.5, OPTIONS.workspace_mib, 0.5)
    return list(found.values())


def in_place(targets: torch.Tensor, *_) -> tuple[torch.Tensor, ...]:
    """What places.compact returns, of one token."""
    rows, labels = torch.zeros_like(targets), torch.zeros_like(targets)
    return rows, labels, torch.zeros(1, dtype=torch.int32), torch.zeros((), dtype=torch.int32)


def make_mean_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, config: tuning.Config, of_all: bool
) -> None:
    """By hidden states; or ``of_all`` operands, with DoRA on the head."""
    low, up = hidden.new_empty(TOKENS, RANK), hidden.new_empty(VOCABULARY, RANK)
    scale, numbers = (torch.empty(size) for size in (VOCABULARY, TOKENS))
    rows, count = torch.zeros(TOKENS, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    if of_all:
        operands = Operands(hidden, weight, bias, low, up, 30.0, 1.0, scale)
        gradients = Gradients(hidden, weight, bias, low.float(), up, scale)
    else:
        operands = Operands(hidden, weight, bias, None, None, 30.0)
        gradients = Gradients(hidden, *[None] * 5)
    mean_gradients.add_mean_gradients(numbers, operands, rows, count, gradients, 2**32, config)


class Copy(NamedTuple):
    source: torch.Tensor
    target: torch.Tensor
    unaligned: torch.Tensor
    stride: int
    nothing: None


@triton.jit
def _copy_kernel(copy, BLOCK: tl.constexpr):
    if copy.nothing is None:
        at = tl.program_id(0) * copy.stride + tl.arange(0, BLOCK)
        tl.store(copy.target + at, tl.load(copy.source + at) + tl.load(copy.unaligned + at))


def multiples_in_a_tuple() -> int:
    memory = torch.empty(64)
    copy = Copy(memory, memory, memory[1:], 64, None)
    text = _copy_kernel.run(copy, grid=(1,), warmup=True, BLOCK=64).asm["ttir"]
    (signature,) = (line for line in text.splitlines() if "tt.func public" in line)
    return signature.count("tt.divisibility = 16")


def stack_bytes(cubin: bytes) -> int:
    """Of a thread: registers that had no room."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(bytes_) for bytes_ in re.findall(r"STACK:(\d+)", usage))


def main(*cases: str) -> None:
    for case in cases:
        capability, dtype = case.split(":")
        driver.set_active(Elsewhere(int(capability)))
        for kernel in compiled_for(int(capability), getattr(torch, dtype)):
            print(json.dumps({"capability": capability, "dtype": dtype, **kernel}), flush=True)
    print(json.dumps({"multiples": multiples_in_a_tuple()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
