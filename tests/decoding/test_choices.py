"""Answers out of a set, against a trie of Python dicts and every answer's own log-probability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_decoder as toy

from big_vlm.decoding import choices
from big_vlm.decoding.choices import Choices
from big_vlm.decoding.generate import make_generate
from big_vlm.decoding.samplers import Temperature

VOCAB, EOS = 11, toy.EOS


def random_sets(rows, answers, seed):
    """Of every row, some answers: prefixes of one another and repetitions among them."""
    rng = np.random.default_rng(seed)
    make = lambda: [*rng.integers(2, 6, rng.integers(1, 5)).tolist(), EOS]  # noqa: E731
    return [[make() for _ in range(rng.integers(1, answers + 1))] for _ in range(rows)]


def python_trie(answers):
    root = {}
    for answer in answers:
        node = root
        for token in answer:
            node = node.setdefault(token, {})
    return root


def test_a_table_by_hand():
    expected = [[[5, 1, -1, -1], [5, 6, 1, -1]], [[7, 1, -1, -1], [-1, -1, -1, -1]]]
    np.testing.assert_array_equal(choices.table([[[5, 1], [5, 6, 1]], [[7, 1]]]), expected)


@pytest.mark.parametrize('seed', range(3))
def test_what_may_come_next_is_what_a_trie_of_dicts_says(seed):
    """Random walks; half of the tokens are illegal, after which nothing may come but the end."""
    rng = np.random.default_rng(seed)
    sets = random_sets(16, 9, seed)
    processor, nodes = Choices(EOS), [python_trie(answers) for answers in sets]
    state = processor.start({'choices': choices.table(sets)})
    for _ in range(7):
        logits = rng.normal(size=(16, VOCAB)).astype(np.float32)
        out = np.asarray(processor.apply(state, jnp.asarray(logits)))
        for row, node in enumerate(nodes):
            legal = sorted(node) or [EOS]
            np.testing.assert_array_equal(np.flatnonzero(np.isfinite(out[row])), legal)
            np.testing.assert_array_equal(out[row, legal], logits[row, legal])
        token = np.array([rng.choice(list(node)) if node and rng.random() < 0.8 else 9 for node in nodes], np.int32)
        nodes = [node.get(int(t), {}) for node, t in zip(nodes, token, strict=True)]
        state = processor.advance(state, jnp.asarray(token))


def oracle(params, prompt, answers):
    """Greedy through the trie, in float64, everything read anew for every token."""
    node, said, history = python_trie(answers), [], list(prompt)
    while EOS not in said:
        logits = toy.logits_after(params, history)
        said.append(max(node, key=lambda token: logits[token]))
        history.append(said[-1])
        node = node[said[-1]]
    return said


@pytest.fixture(scope='module')
def generate():
    return make_generate(toy.PREDICT, max_new_tokens=8, eos_id=EOS)


@pytest.mark.parametrize('seed', range(4))
def test_greedy_answers_are_of_each_rows_own_set(generate, seed):
    params, prompts, sets = toy.weights(seed), toy.random_prompts(8, seed), random_sets(8, 7, seed + 10)
    batch = toy.make_batch(prompts, choices=choices.table(sets))
    out = jax.device_get(generate(params, batch, processors=(Choices(EOS),)))
    free = jax.device_get(generate(params, batch))
    drawn = jax.device_get(generate(params, batch, processors=(Choices(EOS),), sampler=Temperature(5.0), seed=seed))
    for row, prompt in enumerate(prompts):
        assert out.ids[row, : out.length[row]].tolist() == oracle(params, prompt, sets[row])
        assert drawn.ids[row, : drawn.length[row]].tolist() in sets[row]
    assert np.isfinite(out.log_probs).all()
    assert (out.ids != free.ids).any(axis=1).sum() > 4


def test_sets_of_similar_size_share_one_program():
    traces = []

    def counted(params, batch, cache_size):
        traces.append(batch['choices'].shape)
        return toy.prefill(params, batch, cache_size)

    generate = make_generate(toy.PREDICT | {'prefill': counted}, max_new_tokens=8, eos_id=EOS)
    for sizes in ((5, 3), (8, 4), (7, 4)):
        sets = [[[2 + (i + j) % 4 for j in range(sizes[1] - 1)] + [EOS] for i in range(sizes[0])]] * 2
        batch = toy.make_batch([[3], [4, 5]], choices=choices.table(sets))
        out = jax.device_get(generate(toy.weights(1), batch, processors=(Choices(EOS),)))
        assert all(out.ids[row, : out.length[row]].tolist() in sets[row] for row in range(2))
    assert traces == [(2, 8, 4)]


@pytest.mark.parametrize('bad', [-np.inf, np.nan])
def test_a_row_with_nothing_left_ends_and_its_neighbours_do_not(bad):
    processor = Choices(EOS)
    state = processor.start({'choices': choices.table([[[5, EOS]], [[5, EOS]], []])})
    logits = np.zeros((3, VOCAB), np.float32)
    logits[0, 5], logits[:2, EOS], logits[2, EOS] = bad, -2, bad
    out = np.asarray(processor.apply(state, jnp.asarray(logits)))
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in out] == [[EOS], [5], [EOS]]
    assert not np.isnan(out).any()
    assert out[0, EOS] == -2 and out[2, EOS] == 0  # its own, where it has one: an end is not for nothing in a beam
