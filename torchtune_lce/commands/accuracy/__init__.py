"""``tune-lce accuracy``: how far every implementation is from float64, beside PyTorch's own distance."""
