"""Training: one loop, and what it steps with."""
