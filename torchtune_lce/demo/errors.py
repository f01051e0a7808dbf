"""The one exception of the demo whose message is meant for the person at the terminal."""


class DemoError(Exception):
    """Stops the demo; ``tune-lce demo`` prints the message and exits with status 2."""
