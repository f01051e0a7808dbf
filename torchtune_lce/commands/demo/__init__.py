"""``tune-lce demo``: torchtune's recipes on real text with torchtune's loss and with ours, compared step by step."""
