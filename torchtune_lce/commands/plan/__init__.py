"""``tune-lce plan``: what a fine-tune, a distillation or DPO will allocate, from its config alone."""
