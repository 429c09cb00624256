"""Generation with the toy decoder against its closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_decoder import (
    EOS,
    PAD,
    PREDICT,
    SLOTS,
    VOCAB,
    decode_step,
    log_probs_after,
    make_batch,
    oracle,
    prefill,
    random_prompts,
    weights,
)

from big_vlm.config import UserError
from big_vlm.decoding.generate import make_generate, make_stream
from big_vlm.decoding.samplers import Greedy, Temperature


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Less:
    """A processor: what was said counts less."""

    penalty: float

    def start(self, batch):
        return jnp.zeros((batch['segment'].shape[0], VOCAB), bool)

    def apply(self, said, logits):
        return logits - self.penalty * said

    def advance(self, said, token):
        return said.at[jnp.arange(token.shape[0]), token].set(True)


@pytest.fixture(scope='module')
def generate():
    return make_generate(PREDICT, max_new_tokens=12, eos_id=EOS, pad_id=PAD)


@pytest.mark.parametrize('rows, seed', [(1, 0), (3, 1), (8, 6)])
def test_greedy_equals_the_uncached_oracle(generate, rows, seed):
    params, prompts = weights(seed), random_prompts(rows, seed)
    out = jax.device_get(generate(params, make_batch(prompts)))
    lengths = set()
    for row, prompt in enumerate(prompts):
        ids, log_probs = oracle(params, prompt, 12)
        n = len(ids)
        lengths.add(n)
        assert out.length[row] == n
        assert out.ids[row].tolist() == ids + [PAD] * (12 - n)
        np.testing.assert_allclose(out.log_probs[row, :n], log_probs, atol=1e-4)
        np.testing.assert_array_equal(out.log_probs[row, n:], 0)
    if rows == 8:
        assert 12 in lengths and len(lengths) > 1  # some rows were cut off, some ended by themselves


def test_a_row_ends_at_any_of_several_ids():
    params, prompts, ends = weights(6), random_prompts(8, 6), (EOS, 5, 7)
    made = dict(max_new_tokens=12, eos_id=ends, pad_id=PAD)
    out = jax.device_get(make_generate(PREDICT, **made)(params, make_batch(prompts)))
    for row, prompt in enumerate(prompts):
        ids, _ = oracle(params, prompt, 12, ends=ends)
        assert out.ids[row].tolist() == ids + [PAD] * (12 - len(ids)) and out.length[row] == len(ids)
    last = out.ids[np.arange(8), out.length - 1]
    assert set(ends) <= set(last.tolist())
    tokens = [step.token for step in make_stream(PREDICT, **made)(params, make_batch(prompts))]
    np.testing.assert_array_equal(np.stack(tokens, axis=1), out.ids[:, : out.length.max()])


def test_processors_see_what_each_row_has_said(generate):
    params, prompts = weights(6), random_prompts(8, 6)
    batch, less = make_batch(prompts), Less(2.5)
    out = jax.device_get(generate(params, batch, processors=(less,)))
    for row, prompt in enumerate(prompts):
        ids, log_probs = oracle(params, prompt, 12, penalty=2.5)
        assert out.ids[row, : out.length[row]].tolist() == ids
        np.testing.assert_allclose(out.log_probs[row, : len(ids)], log_probs, atol=1e-4)  # the model's own
    assert (out.ids != jax.device_get(generate(params, batch)).ids).any()
    stream = make_stream(PREDICT, max_new_tokens=12, eos_id=EOS, pad_id=PAD)
    streamed = np.stack([step.token for step in stream(params, batch, processors=(less,))], axis=1)
    np.testing.assert_array_equal(streamed, out.ids[:, : streamed.shape[1]])


def test_a_limit_is_a_prefix_and_costs_no_compilation():
    traces = []

    def counted(params, batch, cache_size):
        traces.append(cache_size)
        return prefill(params, batch, cache_size)

    generate = make_generate(PREDICT | {'prefill': counted}, max_new_tokens=12, eos_id=EOS)
    params, batch = weights(6), make_batch(random_prompts(8, 6))
    whole = jax.device_get(generate(params, batch))
    for limit in (1, 5):
        part = jax.device_get(generate(params, batch, limit=limit, seed=limit))
        np.testing.assert_array_equal(part.ids[:, :limit], whole.ids[:, :limit])
        np.testing.assert_array_equal(part.ids[:, limit:], PAD)
        np.testing.assert_array_equal(part.length, np.minimum(whole.length, limit))
    assert traces == [SLOTS + 12]
    with pytest.raises(UserError, match='limit 13.*1 … 12'):
        generate(params, batch, limit=13)


def test_every_row_may_have_a_limit_of_its_own(generate):
    params, batch = weights(6), make_batch(random_prompts(8, 6))
    whole, limit = jax.device_get(generate(params, batch)), np.arange(1, 9)
    out = jax.device_get(generate(params, batch, limit=limit))
    np.testing.assert_array_equal(out.length, np.minimum(whole.length, limit))
    for row, n in enumerate(out.length):
        assert out.ids[row].tolist() == whole.ids[row, :n].tolist() + [PAD] * (12 - n)
    with pytest.raises(UserError, match='limit 0'):
        generate(params, batch, limit=np.arange(8))


def test_the_loop_ends_with_its_last_row():
    """Steps are counted on the device's behalf: prefill gives the first token, the last one is never read back."""
    steps = []

    def counted(params, cache, token):
        jax.debug.callback(lambda: steps.append(1))
        return decode_step(params, cache, token)

    params, prompts = weights(6), random_prompts(8, 6)
    short = [p for p in prompts if len(oracle(params, p, 12)[0]) < 12]
    longest = max(len(oracle(params, p, 12)[0]) for p in short)
    generate = make_generate(PREDICT | {'decode_step': counted}, max_new_tokens=12, eos_id=EOS)
    jax.block_until_ready(generate(params, make_batch(short)))
    jax.effects_barrier()
    assert 0 < len(steps) == longest - 1


def test_masked_rows_come_back_empty_and_hold_nobody_up(generate):
    params, prompts = weights(1), random_prompts(4, 5)
    mask = np.array([True, False, True, False])
    out = jax.device_get(generate(params, make_batch(prompts, _mask=mask)))
    whole = jax.device_get(generate(params, make_batch(prompts)))
    np.testing.assert_array_equal(out.ids[mask], whole.ids[mask])
    np.testing.assert_array_equal(out.ids[~mask], PAD)
    np.testing.assert_array_equal(out.length[~mask], 0)


def test_sampling_is_seeded_and_a_row_knows_no_neighbours(generate):
    params, prompts = weights(3), random_prompts(8, 3)
    ids = np.stack([np.zeros(8, np.int32), np.arange(8, dtype=np.int32) * 7], axis=1)
    batch = make_batch(prompts, id=ids)
    warm = Temperature(1.5)
    one = jax.device_get(generate(params, batch, sampler=warm, seed=4))
    again = jax.device_get(generate(params, batch, sampler=warm, seed=4))
    other = jax.device_get(generate(params, batch, sampler=warm, seed=5))
    np.testing.assert_array_equal(one.ids, again.ids)
    assert (one.ids != other.ids).any(axis=1).sum() >= 6
    order = np.array([5, 2, 7])
    some = jax.device_get(generate(params, {k: v[order] for k, v in batch.items()}, sampler=warm, seed=4))
    np.testing.assert_array_equal(some.ids, one.ids[order])
    np.testing.assert_allclose(some.log_probs, one.log_probs[order], atol=1e-5)


def test_equal_prompts_with_different_ids_draw_differently(generate):
    batch = make_batch([[3, 4]] * 6)
    out = jax.device_get(generate(weights(1), batch, sampler=Temperature(2.0), seed=0))
    assert len({tuple(row) for row in out.ids.tolist()}) > 3


def test_every_token_has_a_key_of_its_own(generate):
    """Uniform logits: a key used twice in a row would draw the same token twice."""
    out = jax.device_get(
        generate({'w': np.zeros((VOCAB, VOCAB), np.float32)}, make_batch([[3]] * 8), sampler=Temperature(1.0))
    )
    pairs = [
        (a, b) for row, n in zip(out.ids, out.length, strict=True) for a, b in zip(row[: n - 1], row[1:n], strict=True)
    ]
    assert len(pairs) > 20
    assert np.mean([a == b for a, b in pairs]) < 0.4  # 1 in 11 by chance


def test_sampled_log_probs_are_the_models_own(generate):
    """Whatever the temperature, a row's log-probabilities are those of its tokens under softmax(logits)."""
    params, prompts = weights(3), random_prompts(4, 3)
    out = jax.device_get(generate(params, make_batch(prompts), sampler=Temperature(3.0), seed=1))
    for row, prompt in enumerate(prompts):
        history = list(prompt)
        for column in range(out.length[row]):
            token = int(out.ids[row, column])
            np.testing.assert_allclose(out.log_probs[row, column], log_probs_after(params, history)[token], atol=1e-4)
            history.append(token)


@pytest.mark.parametrize('sampler', [Greedy(), Temperature(1.0, top_k=4)])
def test_a_stream_gives_the_same_tokens_one_by_one(generate, sampler):
    params, batch = weights(6), make_batch(random_prompts(4, 6), _mask=np.array([True, True, False, True]))
    whole = jax.device_get(generate(params, batch, sampler=sampler, seed=9))
    stream = make_stream(PREDICT, max_new_tokens=12, eos_id=EOS, pad_id=PAD)
    tokens = list(stream(params, batch, sampler=sampler, seed=9))
    assert len(tokens) == whole.length.max()
    for column, item in enumerate(tokens):
        np.testing.assert_array_equal(item.token, whole.ids[:, column])
        np.testing.assert_array_equal(item.live, column < whole.length)
        np.testing.assert_allclose(item.log_prob, whole.log_probs[:, column], atol=1e-5)


def test_a_prompt_must_fit_into_the_cache():
    params = weights(0)
    batch = make_batch([[2, 3], [2, 3, 4, 5, 6]])
    fits = make_generate(PREDICT, max_new_tokens=4, eos_id=EOS, cache_size=8)  # 5 tokens, 3 of the 4 new ones
    assert jax.device_get(fits(params, batch)).length.max() >= 1
    tight = make_generate(PREDICT, max_new_tokens=4, eos_id=EOS, cache_size=7)
    with pytest.raises(UserError, match='row 1: a prompt of 5 tokens and 4 new ones need 8 slots, the cache has 7'):
        tight(params, batch)
    assert tight(params, batch, limit=3).ids.shape == (2, 4)
    small = make_generate(PREDICT, max_new_tokens=4, eos_id=EOS, cache_size=5)
    with pytest.raises(UserError, match='prompts of 6 slots do not fit into a cache of 5'):
        small(params, batch)
    with pytest.raises(UserError, match='max_new_tokens 0'):
        make_generate(PREDICT, max_new_tokens=0, eos_id=EOS)
