"""What is added to the cross-entropy, or read beside it."""
