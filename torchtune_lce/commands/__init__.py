"""``tune-lce``: a package each subcommand, ``shared`` for what two or more of them use."""
