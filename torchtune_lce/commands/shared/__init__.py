"""What two or more subcommands use."""
