"""The one exception of the benchmark whose message is meant for the person at the terminal."""

from torchtune_lce.commands.shared.errors import CommandError


class BenchError(CommandError):
    """Stops the benchmark; ``tune-lce bench`` prints the message and exits with status 2."""
