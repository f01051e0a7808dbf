"""``tune-lce plan``: what a fine-tune will allocate, from its config alone."""
