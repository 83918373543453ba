"""Training: the optimiser, the state, one step, the loop over phases and what it logs."""
