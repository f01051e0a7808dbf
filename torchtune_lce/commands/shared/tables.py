"""How the subcommands print their tables."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_table(console: Console, grid: Table) -> None:
    """Prints a table that is never cut: a terminal that is too narrow breaks the lines instead."""
    needed = Measurement.get(console, console.options.update(width=1000), grid).maximum
    Console(file=console.file, width=max(needed, console.width), highlight=False, markup=False).print(grid)
