"""The reference: all scores at once, masked. It takes everything."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from s2d_jax.model.attention_forms.request import Request


def takes(request: Request) -> bool:
    return True


def attend(request: Request) -> Float[Array, "B T N H"]:
    """Scores and their softmax in f32 (Vaswani et al. 2017, eq. 1), products in the dtype of the queries."""
    q_BTNH = request.q_BTNH
    k_BKSH, v_BKSH = (x.astype(q_BTNH.dtype) for x in (request.k_BKSH, request.v_BKSH))
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    Q = N // K
    # The queries that share a key head are the rows (A = Q * T) of one product per row and key head.
    q_BKAH = q_BTNH.reshape(B, T, K, Q, H).transpose(0, 2, 3, 1, 4).reshape(B, K, Q * T, H)
    scores_BKAS = jnp.einsum("BKAH,BKSH->BKAS", q_BKAH, k_BKSH, preferred_element_type=jnp.float32)
    # A division, to the last bit what it has always been.
    scale = request.scale
    scores_BKAS = scores_BKAS / math.sqrt(H) if scale is None else scores_BKAS * scale
    if request.soft_cap is not None:
        scores_BKAS = request.soft_cap * jnp.tanh(scores_BKAS / request.soft_cap)
    scores_BKQTS = scores_BKAS.reshape(B, K, Q, T, S)
    mask_BTS = request.mask_BTS
    scores_BKQTS = jnp.where(mask_BTS[:, None, None], scores_BKQTS, jnp.finfo(jnp.float32).min)
    weights_BKQTS = jax.nn.softmax(scores_BKQTS, axis=-1).astype(q_BTNH.dtype)
    weights_BKAS = weights_BKQTS.reshape(B, K, Q * T, S)
    mixed_BKAH = jnp.einsum(
        "BKAS,BKSH->BKAH", weights_BKAS, v_BKSH, preferred_element_type=jnp.float32
    )
    mixed_BTKQH = mixed_BKAH.reshape(B, K, Q, T, H).transpose(0, 3, 1, 2, 4)
    return mixed_BTKQH.astype(q_BTNH.dtype).reshape(B, T, N, H)
