"""Answers from a model: a static cache, a prefill and a compiled loop."""
