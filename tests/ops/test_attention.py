"""Attention against the formula in float64, head by head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vlm.ops import attention


def oracle(q, k, v, mask, scale, softcap):
    """Loops over rows and heads in float64: (out [B,T,N,H], weights [B,N,T,S])."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    out, weights = np.zeros((*q.shape[:3], v.shape[-1])), np.zeros((batch, heads, queries, keys))
    for b in range(batch):
        for n in range(heads):
            kv = n // (heads // k.shape[2])
            logits = q[b, :, n] @ k[b, :, kv].T * scale
            logits = softcap * np.tanh(logits / softcap) if softcap else logits
            logits = np.where(mask[b], logits, -np.inf)
            p = np.exp(logits - logits.max(-1, keepdims=True))
            weights[b, n] = p / p.sum(-1, keepdims=True)
            out[b, :, n] = weights[b, n] @ v[b, :, kv]
    return out, weights


def random_inputs(seed, heads, kv_heads, batch=2, queries=4, keys=6, dim=8):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    mask = rng.random((batch, queries, keys)) < 0.6
    mask[..., 0] = True
    q, k, v = draw(batch, queries, heads, dim), draw(batch, keys, kv_heads, dim), draw(batch, keys, kv_heads, dim)
    return q * 3, k, v, mask


@pytest.mark.parametrize('softcap', [0.0, 2.0])
@pytest.mark.parametrize(('heads', 'kv_heads'), [(4, 4), (4, 2), (4, 1), (6, 3), (1, 1)])
def test_matches_float64(heads, kv_heads, softcap):
    q, k, v, mask = random_inputs(heads * 10 + kv_heads, heads, kv_heads)
    out, weights = attention.attention(q, k, v, mask, scale=0.3, softcap=softcap, weights=True)
    expected, expected_weights = oracle(q, k, v, mask, 0.3, softcap)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-6)


def test_no_mask_sees_all_and_no_weights_unless_asked():
    q, k, v, mask = random_inputs(1, 4, 2)
    out, weights = attention.attention(q, k, v, None, scale=1.0)
    assert weights is None
    np.testing.assert_allclose(out, oracle(q, k, v, np.ones_like(mask), 1.0, 0)[0], atol=2e-6)


def test_one_key_row_serves_every_query():
    q, k, v, mask = random_inputs(2, 4, 2)
    got, _ = attention.attention(q, k, v, mask[:, :1], scale=1.0)
    expected, _ = attention.attention(q, k, v, np.broadcast_to(mask[:, :1], mask.shape), scale=1.0)
    np.testing.assert_array_equal(got, expected)


def test_hidden_keys_have_no_influence_at_all():
    q, k, v, mask = random_inputs(3, 4, 2)
    mask[:, :, 3] = False
    before, _ = attention.attention(q, k, v, mask, scale=1.0)
    k[:, 3], v[:, 3] = 1e4, 1e4
    after, _ = attention.attention(q, k, v, mask, scale=1.0)
    np.testing.assert_array_equal(before, after)


def test_a_query_that_sees_nothing_is_finite_forward_and_backward():
    q, k, v, mask = random_inputs(4, 2, 1)
    mask[0, 1] = False
    f = lambda q: jnp.sum(attention.attention(q, k, v, mask, scale=1.0)[0])  # noqa: E731
    assert np.isfinite(jax.grad(f)(q)).all()
    out, _ = attention.attention(q, k, v, mask, scale=1.0)
    np.testing.assert_allclose(out[0, 1, 0], v[0, :, 0].mean(0), atol=1e-6)


def test_bfloat16_softmax_is_float32():
    q, k, v, mask = random_inputs(5, 4, 2, keys=64)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out, weights = attention.attention(*low, mask, scale=0.3, weights=True)
    assert out.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
    _, expected = oracle(*low, mask, 0.3, 0)
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
