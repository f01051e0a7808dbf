"""A torchtune model's head: what its output projection is made of, and how to reach it."""
