"""Samplers draw what their names say: the argmax, the softmax at a temperature, the k best tokens alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vlm.config import UserError
from big_vlm.decoding.samplers import Greedy, Temperature, from_temperature

LOGITS = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))


def draws(sampler, n=4000, seed=0):
    keys = jax.random.split(jax.random.key(seed), n)
    return np.bincount(sampler(jnp.tile(LOGITS, (n, 1)), keys), minlength=4) / n


def test_greedy_is_the_argmax_and_the_lowest_id_of_equals():
    logits = jnp.array([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]])
    np.testing.assert_array_equal(Greedy()(logits, jax.random.split(jax.random.key(0), 2)), [1, 0])


@pytest.mark.parametrize(
    'sampler, expected',
    [
        (Temperature(1.0), [0.1, 0.2, 0.3, 0.4]),
        (Temperature(0.5), np.square([0.1, 0.2, 0.3, 0.4]) / 0.3),  # p^(1/0.5), normalised
        (Temperature(1.0, top_k=2), [0, 0, 0.3 / 0.7, 0.4 / 0.7]),
        (Temperature(3.0, top_k=1), [0, 0, 0, 1]),
        (Temperature(1.0, top_k=9), [0.1, 0.2, 0.3, 0.4]),  # more than there are: all of them
    ],
)
def test_frequencies_follow_the_distribution(sampler, expected):
    # 4000 draws: a standard deviation of at most 0.008
    np.testing.assert_allclose(draws(sampler), expected, atol=0.032)


def test_a_row_draws_from_its_own_key_alone():
    keys = jax.random.split(jax.random.key(1), 6)
    logits = jax.random.normal(jax.random.key(2), (6, 50))
    together = Temperature(1.0)(logits, keys)
    order = np.array([4, 1, 5])
    np.testing.assert_array_equal(Temperature(1.0)(logits[order], keys[order]), together[order])


def test_a_temperature_does_not_compile_anew():
    traces = []

    @jax.jit
    def draw(sampler, keys):
        traces.append(sampler)
        return sampler(jnp.tile(LOGITS, (2, 1)), keys)

    keys = jax.random.split(jax.random.key(0), 2)
    for value in (0.1, 1.0, 7.5):
        draw(Temperature(value, top_k=3), keys)
    assert len(traces) == 1


@pytest.mark.parametrize('arguments', [(0.0,), (-1.0,), (float('nan'),), (float('inf'),), (1.0, -1)])
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(UserError, match='temperature|top_k'):
        Temperature(*arguments)


def test_from_temperature():
    assert from_temperature(0) == Greedy()
    assert from_temperature(0.7, 5) == Temperature(0.7, 5)
    with pytest.raises(UserError, match='temperature -1'):
        from_temperature(-1)
