"""What a call is given, checked once."""
