"""Checkpoints: training states with Orbax, and other libraries' weights, both ways."""
