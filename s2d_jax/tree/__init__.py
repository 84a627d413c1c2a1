"""Trees of drafted tokens: how they grow, how the target verifies them, and what a round does differently for them."""
