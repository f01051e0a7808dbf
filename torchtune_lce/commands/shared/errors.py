"""The one exception of the subcommands whose message is meant for the person at the terminal."""


class CommandError(Exception):
    """Stops a subcommand of ``tune-lce``, which prints the message and exits with status 2."""
