"""Beam search with the toy decoder against one written with lists, and, with beams for all, against every answer."""

import itertools

import jax
import numpy as np
import pytest
from toy_decoder import EOS, PAD, PREDICT, VOCAB, log_probs_after, make_batch, random_prompts, weights

from big_vlm.config import UserError
from big_vlm.decoding.beam import make_beam_search
from big_vlm.decoding.generate import make_generate
from big_vlm.decoding.repetition import RepetitionPenalty

NEW = 6


def penalised(values, said, penalty):
    return np.where(np.isin(np.arange(VOCAB), said), values * penalty, values)  # log-probabilities are negative


def naive(params, prompt, beams, length_penalty, limit=NEW, penalty=1.0, ends=(EOS,)):
    """(score, ids, log-probabilities) of the best answer; no stopping early, nothing shared between beams."""
    live, ended = [(0.0, [], [])], []
    for _ in range(limit):
        grown = []
        for total, ids, own in live:
            values = log_probs_after(params, [*prompt, *ids])
            changed = penalised(values, [*prompt, *ids], penalty)
            grown += [(total + changed[v], [*ids, v], [*own, values[v]]) for v in range(VOCAB)]
        grown = sorted(grown, key=lambda h: -h[0])[: (1 + len(ends)) * beams]
        ended += [h for h in grown[:beams] if h[1][-1] in ends]
        live = [h for h in grown if h[1][-1] not in ends][:beams]
    return max(((t / len(ids) ** length_penalty, ids, own) for t, ids, own in ended + live), key=lambda h: h[0])


@pytest.fixture(scope='module')
def searches():
    return {k: make_beam_search(PREDICT, beams=k, max_new_tokens=NEW, eos_id=EOS, pad_id=PAD) for k in (1, 3)}


@pytest.mark.parametrize('beams, length_penalty', [(1, 0.0), (3, 0.0), (3, 1.0), (3, -1.0), (3, 2.5)])
def test_answers_are_those_of_a_search_with_lists(searches, beams, length_penalty):
    lengths = set()
    for seed in (1, 6):
        params, prompts = weights(seed), random_prompts(8, seed)
        out = jax.device_get(searches[beams](params, make_batch(prompts), length_penalty=length_penalty))
        for row, prompt in enumerate(prompts):
            _, ids, log_probs = naive(params, prompt, beams, length_penalty)
            lengths.add(len(ids))
            assert out.length[row] == len(ids)
            assert out.ids[row].tolist() == ids + [PAD] * (NEW - len(ids))
            np.testing.assert_allclose(out.log_probs[row, : len(ids)], log_probs, atol=1e-4)
            np.testing.assert_array_equal(out.log_probs[row, len(ids) :], 0)
    assert len(lengths) > 1 or length_penalty > 2


def test_several_ends_leave_room_for_what_goes_on():
    ends = (EOS, 3, 4, 7, 9)
    search = make_beam_search(PREDICT, beams=3, max_new_tokens=NEW, eos_id=ends, pad_id=PAD)
    params, prompts = weights(1), random_prompts(16, 1)
    out = jax.device_get(search(params, make_batch(prompts), length_penalty=2.5))
    for row, prompt in enumerate(prompts):
        _, ids, _ = naive(params, prompt, 3, 2.5, ends=ends)
        assert out.ids[row].tolist() == ids + [PAD] * (NEW - len(ids))
    assert len(set(ends) & set(out.ids[np.arange(16), out.length - 1].tolist())) > 1


def test_enough_beams_find_the_best_of_all_answers():
    """121 beams hold every beginning of two tokens: of all answers of three, the likeliest."""
    search = make_beam_search(PREDICT, beams=121, max_new_tokens=3, eos_id=EOS, pad_id=PAD)
    params, prompts = weights(2), random_prompts(3, 2)
    out = jax.device_get(search(params, make_batch(prompts), length_penalty=0.0))
    for row, prompt in enumerate(prompts):
        totals = {}
        for first, second in itertools.product(range(VOCAB), repeat=2):
            one, two = log_probs_after(params, prompt), log_probs_after(params, [*prompt, first])
            if first == EOS:
                totals[(first,)] = one[first]
            elif second == EOS:
                totals[(first, second)] = one[first] + two[second]
            else:
                three = log_probs_after(params, [*prompt, first, second])
                totals |= {(first, second, v): one[first] + two[second] + three[v] for v in range(VOCAB)}
        best = max(totals, key=totals.get)
        assert tuple(out.ids[row, : out.length[row]].tolist()) == best
        np.testing.assert_allclose(out.log_probs[row].sum(), totals[best], atol=1e-4)


def test_beams_beat_greedy_and_a_row_knows_no_neighbours(searches):
    params, prompts = weights(6), random_prompts(8, 6)
    batch = make_batch(prompts, _mask=np.arange(8) != 2)
    out = jax.device_get(searches[3](params, batch, length_penalty=0.0, limit=4))
    greedy = make_generate(PREDICT, max_new_tokens=NEW, eos_id=EOS, pad_id=PAD)
    greedy = jax.device_get(greedy(params, batch, limit=4))
    gain = out.log_probs.sum(1) - greedy.log_probs.sum(1)
    assert (gain > -1e-4).all() and (gain > 0.1).any()
    assert out.length[2] == 0 and (out.ids[2] == PAD).all() and out.length.max() == 4
    order = np.array([6, 1, 3])
    some = jax.device_get(searches[3](params, {k: v[order] for k, v in batch.items()}, length_penalty=0.0, limit=4))
    np.testing.assert_array_equal(some.ids, out.ids[order])


def test_processors_change_what_is_searched(searches):
    params, prompts = weights(6), random_prompts(6, 6)
    penalty = RepetitionPenalty(1.8, VOCAB)
    out = jax.device_get(searches[3](params, make_batch(prompts), processors=(penalty,)))
    changed = 0
    for row, prompt in enumerate(prompts):
        _, ids, log_probs = naive(params, prompt, 3, 1.0, penalty=1.8)
        assert out.ids[row, : out.length[row]].tolist() == ids
        np.testing.assert_allclose(out.log_probs[row, : len(ids)], log_probs, atol=1e-4)  # the model's own
        changed += ids != naive(params, prompt, 3, 1.0)[1]
    assert changed


def test_no_beam_is_refused():
    with pytest.raises(UserError, match='beams 0'):
        make_beam_search(PREDICT, beams=0, max_new_tokens=2, eos_id=EOS)
