"""``python -m torchtune_lce``: the same as the console script ``tune-lce``."""

from torchtune_lce.commands.cli import main

if __name__ == "__main__":
    main()
