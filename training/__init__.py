"""Training: the loop, and everything that a gradient step needs."""
