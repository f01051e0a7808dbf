"""What gradient filtering left out: the public name of :mod:`torchtune_lce.inputs.filtering`."""

from torchtune_lce.inputs.filtering import FilterRecord, recording

__all__ = ["FilterRecord", "recording"]
