"""Flax Linen modules: vision tower, projector, decoder, phantom dimension. They know no config file or tokenizer."""
