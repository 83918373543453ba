"""Pure functions of arrays. They import jax and nothing of this package."""
