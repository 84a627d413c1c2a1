"""Trees of drafted tokens: how they grow, how the target judges them, and what a round does differently for them."""
