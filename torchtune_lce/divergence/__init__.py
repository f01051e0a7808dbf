"""The divergences of the distillation losses."""
