"""``tune-lce doctor``: what runs here, why, whether it computes right, and what to change."""
