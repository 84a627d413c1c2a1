"""What the backward pass computes again: the policies of rematerialisation, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

RematPolicy = Literal["none", "products", "block"]

# The name of what a product with a weight returns.
_PRODUCT = "product"


def as_product(out: jax.Array) -> jax.Array:
    """Marks the result of a product with a weight, which the policy "products" keeps.

    It is marked in the dtype that the next operation reads. JAX's own policies for products would keep the f32 sums.
    """
    return checkpoint_name(out, _PRODUCT)


def recomputed(run: Callable[..., Any], policy: RematPolicy) -> Callable[..., Any]:
    """`run(module, ...)`, differentiated as `policy` says; the results are the same.

    Args:
        run: a function whose first argument is a Linen module.
        policy: "none" keeps all that the backward pass reads; "products" keeps the results of products with weights, and
            computes norms, attention and activation functions again; "block" keeps the arguments only.
    """
    if policy == "none":
        return run
    if policy == "products":
        return nn.remat(run, policy=jax.checkpoint_policies.save_only_these_names(_PRODUCT))
    return nn.remat(run)
