"""Training: the state, one step, the optimizer and its schedules, and the loop around them."""
