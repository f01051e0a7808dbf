"""``tune-lce bench``: this package's losses and other people's on one card, each checked before it is timed."""
