"""``tune-lce compare``: the same fine-tune with several losses, side by side."""
