"""What ``tune-lce doctor`` prints."""

import platform

import torch
from rich.console import Console
from rich.table import Table

from torchtune_lce.commands.doctor import selftest, versions
from torchtune_lce.implementations import choice


def devices() -> list[tuple[torch.device, torch.dtype]]:
    """Every device that torch sees here, with the dtype that one trains in there."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        capable = torch.cuda.get_device_capability(index) >= (8, 0)
        found.append((torch.device("cuda", index), torch.bfloat16 if capable else torch.float16))
    if torch.backends.mps.is_available():
        found.append((torch.device("mps"), torch.float32))
    return [*found, (torch.device("cpu"), torch.float32)]


def describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type}, {platform.machine()}"
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {capability}"


def show(console: Console | None = None) -> bool:
    """Prints everything; whether the versions fit and every self-test passed."""
    console = console or Console(highlight=False, soft_wrap=True)
    found = versions.installed()
    main_branch = versions.is_main_branch()
    numbers = {name: "not installed" if number is None else number or "''" for name, number in found.items()}
    if main_branch:
        numbers["torchtune"] += " (its main branch)"
    console.print("  ".join(f"{name} {number}" for name, number in numbers.items()))
    complaints = versions.complaints(found, main_branch)
    error = versions.import_error()
    if error is not None:
        complaints.append(versions.of_import(found, error, bool(complaints)))
    for complaint in complaints:
        console.print(complaint, style="red", markup=False)
    passed = [examine(console, device, dtype) for device, dtype in devices()]
    well = not complaints and all(passed)
    console.print("All is well." if well else "[red]Not all is well: see above.[/red]")
    return well


def examine(console: Console, device: torch.device, dtype: torch.dtype) -> bool:
    """One device: what ``auto`` takes, the self-test of it, what stands against the kernels."""
    impl, why = choice.automatic(device, dtype)
    console.print(f"\n[bold]{device}[/bold] ({describe(device)}): impl 'auto' takes '{impl}' ({why})")
    outcome = selftest.run(impl, device, dtype)
    name = str(dtype).removeprefix("torch.")
    table = Table("self-test", f"error of '{impl}'", f"torch's own, {name}", title_justify="left")
    for quantity, error in outcome.errors.items():
        table.add_row(quantity, f"{error:.1e}", f"{outcome.torch_errors[quantity]:.1e}")
    console.print(table)
    verdict = "[green]passed[/green]" if outcome.passed else "[red]FAILED[/red]: set loss.impl=reference and report it"
    console.print(f"  {verdict} in {outcome.seconds:.1f} s, relative errors against float64")
    against = choice.obstacle("cce", device, dtype)
    if against:
        console.print(f"  cce {against}")
    return outcome.passed
