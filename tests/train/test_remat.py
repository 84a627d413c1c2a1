"""What the backward pass computes again changes memory and work, never results."""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_tiny import expect_user_error
from tiny import tiny_config, tiny_params

from s2d_jax.model.remat import RematPolicy
from s2d_jax.model.transformer import Transformer
from train.config.files import load_config
from train.config.sections import ModelSection

MODEL = tiny_config(num_layers=2)
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 12)).astype(np.int32)
POLICIES = get_args(RematPolicy)


def loss(params, policy):
    model = Transformer(MODEL)
    hiddens = model.apply(
        {"params": params}, TOKENS, exit_layers=(1, 2), remat=policy, method="exit_hiddens"
    )
    return sum(jnp.mean(jnp.square(h)) for h in hiddens)


def products_of(policy) -> int:
    """How many products the traced gradient has, recomputed ones included."""
    traced = jax.make_jaxpr(jax.grad(lambda params: loss(params, policy)))(tiny_params(MODEL))
    return str(traced).count("dot_general[")


def test_results_do_not_depend_on_the_policy():
    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = gradient(tiny_params(MODEL), "none")
    for policy in POLICIES:
        found = gradient(tiny_params(MODEL), policy)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
        )


def test_policies_differ_in_what_is_computed_again():
    """A layer has seven products with weights and two of attention; forwards once, backwards twice each."""
    none, products, block = (products_of(policy) for policy in ("none", "products", "block"))
    assert none < products < block
    assert POLICIES == ("none", "products", "block")


@pytest.mark.parametrize(
    ("said", "policy"),
    [("true", "block"), ("false", "none"), ("products", "products"), ("none", "none")],
)
def test_files_may_say_true_or_false_as_before(tmp_path, said, policy):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: x, remat: {said}}}\ndata: {{paths: [x]}}\n")
    assert load_config(path).model.remat == policy


def test_an_unknown_policy_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: x, remat: some}\ndata: {paths: [x]}\n")
    with expect_user_error("model.remat='some' is unknown; use one of none, products, block"):
        load_config(path)
    with expect_user_error("model.remat='half' is unknown; use one of none, products, block"):
        ModelSection(path="x", remat="half")  # pyright: ignore[reportArgumentType]
