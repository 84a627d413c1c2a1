"""One file per way of drafting, all behind `s2d_jax.proposal.Drafter`."""

from s2d_jax.drafters.independent import IndependentDrafter
from s2d_jax.drafters.none import NoDrafter
from s2d_jax.drafters.sorted import SortedDrafter
from s2d_jax.drafters.tree import TreeDrafter

__all__ = ["IndependentDrafter", "NoDrafter", "SortedDrafter", "TreeDrafter"]
