"""Next-token cross-entropy: numbers by hand, float64, both averages, exact gradients."""

import jax
import numpy as np
import pytest

from big_vlm.ops import token_loss


def oracle(logits, targets, mask, average):
    logits, mask = np.asarray(logits, np.float64), np.asarray(mask, np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logp, np.maximum(targets, 0)[..., None], -1)[..., 0] * mask
    if average == 'token':
        return nll.sum() / mask.sum()
    rows = mask.sum(-1) > 0
    return (nll[rows].sum(-1) / mask[rows].sum(-1)).mean()


def case(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(3, 5, 7)).astype(np.float32) * 3
    targets = rng.integers(0, 7, (3, 5)).astype(np.int32)
    mask = np.array([[0, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1]], np.float32)
    return logits, np.where(mask > 0, targets, -1), mask


def test_by_hand():
    # Uniform over two words, then certain: log 2 and 0. The rows have one and two supervised tokens.
    logits = np.array([[[0, 0], [9, 9]], [[0, 0], [50, 0]]], np.float32)
    targets, mask = np.array([[1, 1], [0, 0]]), np.array([[1, 0], [1, 1]])
    example, rows = token_loss.token_loss(logits, targets, mask)
    token, _ = token_loss.token_loss(logits, targets, mask, 'token')
    np.testing.assert_allclose(rows, [np.log(2), np.log(2) / 2], rtol=1e-6)
    np.testing.assert_allclose([example, token], [np.log(2) * 3 / 4, np.log(2) * 2 / 3], rtol=1e-6)


def test_tokens_count_the_same_whatever_they_weigh_in_their_example():
    """As those of several answers in a row do, of which each counts the same."""
    logits, targets, mask = case()
    weighed = mask * np.array([0.5, 1, 3, 0.25, 1], np.float32)
    expected, _ = token_loss.token_loss(logits, targets, mask, 'token')
    np.testing.assert_allclose(token_loss.token_loss(logits, targets, weighed, 'token')[0], expected, rtol=1e-6)


@pytest.mark.parametrize('average', ['example', 'token'])
def test_value_and_gradient(average):
    logits, targets, mask = case()
    loss, _ = token_loss.token_loss(logits, targets, mask, average)
    np.testing.assert_allclose(loss, oracle(logits, targets, mask, average), rtol=1e-6)
    gradient = jax.grad(lambda x: token_loss.token_loss(x, targets, mask, average)[0])(logits)
    # The closed form: weight of the token * (softmax - one hot).
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    weight = mask / mask.sum() if average == 'token' else mask / mask.sum(-1, keepdims=True) / len(mask)
    expected = weight[..., None] * (p - (targets[..., None] == np.arange(7)))
    np.testing.assert_allclose(gradient, expected, atol=1e-7)


@pytest.mark.parametrize('average', ['example', 'token'])
def test_unsupervised_positions_may_hold_anything(average):
    logits, targets, mask = case(1)
    clean, _ = token_loss.token_loss(logits, targets, mask, average)
    dirty = np.where(mask[..., None] > 0, logits, np.inf)
    got, _ = token_loss.token_loss(dirty, targets, mask, average)
    np.testing.assert_array_equal(got, clean)


def test_examples_without_supervision_do_not_dilute_the_mean():
    logits, targets, mask = case(2)
    mask[1] = 0
    loss, rows = token_loss.token_loss(logits, targets, mask)
    np.testing.assert_allclose(loss, oracle(logits, targets, mask, 'example'), rtol=1e-6)
    assert rows[1] == 0
    nothing, _ = token_loss.token_loss(logits, targets, mask * 0)
    assert nothing == 0


def test_huge_logits_stay_finite_and_unknown_averages_are_refused():
    logits = np.array([[[1e4, -1e4]]], np.float32)
    loss, _ = token_loss.token_loss(logits, np.array([[1]]), np.ones((1, 1)))
    np.testing.assert_allclose(loss, 2e4, rtol=1e-6)
    with pytest.raises(ValueError, match="'example' or 'token'"):
        token_loss.token_loss(logits, np.array([[1]]), np.ones((1, 1)), 'mean')


def test_label_smoothing():
    """Against the divergence written out in float64; 0 where the logits are the smoothed distribution itself."""
    logits, targets, mask = case()
    size, share = logits.shape[-1], 0.3
    logp = np.float64(logits) - np.log(np.exp(np.float64(logits)).sum(-1, keepdims=True))
    soft = np.full(logits.shape, share / (size - 1))
    np.put_along_axis(soft, np.maximum(targets, 0)[..., None], 1 - share, -1)
    each = (soft * (np.log(soft) - logp)).sum(-1) * mask
    expected = (each.sum(-1) / mask.sum(-1)).mean()
    loss, _ = token_loss.token_loss(logits, targets, mask, smoothing=share)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    best, _ = token_loss.token_loss(np.log(soft).astype(np.float32), targets, mask, smoothing=share)
    np.testing.assert_allclose(best, 0.0, atol=1e-6)
    np.testing.assert_allclose(
        token_loss.token_loss(logits, targets, mask, smoothing=1e-9)[0],
        token_loss.token_loss(logits, targets, mask)[0],
        rtol=1e-5,
    )
