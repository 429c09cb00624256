"""Continuous scheduling: the tokens of static batches, in order, whatever the slot, the neighbours and the devices."""

import itertools

import jax
import numpy as np
import pytest
from toy_decoder import EOS, PAD, PREDICT, decode_step, make_batch, oracle, prefill, random_prompts, weights

from big_vlm.config import UserError
from big_vlm.decoding.generate import make_generate
from big_vlm.decoding.repetition import RepetitionPenalty
from big_vlm.decoding.samplers import Greedy, Temperature
from big_vlm.decoding.scheduler import make_scheduler

NEW = 12


def prepare(requests, rows=1, width=6):
    """Requests are (number, prompt, limit)."""
    mask = np.arange(rows) < len(requests)
    requests = [*requests, *[requests[0]] * (rows - len(requests))]
    ids = np.array([[0, number] for number, _, _ in requests], np.int32)
    limit = np.array([limit for _, _, limit in requests], np.int32)
    return make_batch([prompt for _, prompt, _ in requests], width, id=ids, limit=limit, _mask=mask)


def scheduler(slots=3, predict=PREDICT, together=1, eos_id=EOS):
    return make_scheduler(
        predict, slots=slots, cache_size=18, max_new_tokens=NEW, eos_id=eos_id, pad_id=PAD, together=together
    )


def requests_of(prompts, limits=None):
    return list(zip(range(len(prompts)), prompts, limits or itertools.repeat(NEW), strict=False))


@pytest.mark.parametrize(
    'sampler, processors, slots',
    [(Greedy(), (), 3), (Greedy(), (), 1), (Temperature(1.5), (RepetitionPenalty(1.3, 11),), 4)],
)
def test_rows_are_those_of_one_static_batch_in_order(sampler, processors, slots):
    params, prompts = weights(6), random_prompts(11, 6)
    limits = [1 + (5 * i) % NEW for i in range(11)]
    how = dict(sampler=sampler, processors=processors, seed=5)
    generate = make_generate(PREDICT, max_new_tokens=NEW, eos_id=EOS, pad_id=PAD)
    whole = jax.device_get(generate(params, make_batch(prompts), limit=np.array(limits), **how))
    got = list(scheduler(slots)(params, requests_of(prompts, limits), prepare, **how))
    assert len(got) == 11
    assert len(set(whole.length.tolist())) > 3 and (whole.length < limits).any()  # ended by eos and by limits
    for row, finished in enumerate(got):
        assert finished.ids.tolist() == whole.ids[row, : whole.length[row]].tolist()
        np.testing.assert_allclose(finished.log_probs, whole.log_probs[row, : whole.length[row]], atol=1e-5)


def test_a_slot_is_free_at_any_of_several_ends():
    params, prompts, ends = weights(6), random_prompts(8, 6), (EOS, 5, 7)
    got = [row.ids.tolist() for row in scheduler(eos_id=ends)(params, requests_of(prompts), prepare)]
    assert got == [oracle(params, prompt, NEW, ends=ends)[0] for prompt in prompts]
    assert set(ends) <= {ids[-1] for ids in got}


def test_several_rows_of_a_prefill_and_none():
    params, prompts = weights(6), random_prompts(7, 6)
    one = list(scheduler()(params, requests_of(prompts), prepare))
    two = list(scheduler(4, together=2)(params, requests_of(prompts), lambda some: prepare(some, 2)))
    assert [f.ids.tolist() for f in one] == [f.ids.tolist() for f in two]
    assert list(scheduler()(params, [], prepare)) == []
    with pytest.raises(UserError, match='slots 3.*multiple of the 2'):
        scheduler(3, together=2)


def test_slots_are_refilled_and_the_host_asked_once_a_row():
    """Nine rows whose limits are 12, 2, 2, … in three slots: one slot serves the long row, and steps are not waited
    for; requests are taken as slots come free."""
    steps, taken = [], []

    def counted(params, cache, token):
        jax.debug.callback(lambda: steps.append(1))
        return decode_step(params, cache, token)

    def lazily():
        for request in requests_of([[2, 3]] * 9, [12, *[2] * 8]):
            taken.append(request[0])
            yield request

    never_ends = dict(predict=PREDICT | {'decode_step': counted})
    serve = make_scheduler(**never_ends, slots=3, cache_size=18, max_new_tokens=NEW, eos_id=-1)
    results = serve({'w': weights(0)['w']}, lazily(), prepare)
    first = next(results)
    assert len(first.ids) == 12 and len(taken) == 9
    assert [len(f.ids) for f in results] == [2] * 8
    jax.effects_barrier()
    assert len(steps) == 11  # the long row's; eight short ones need four steps beside it


def test_a_cut_ends_a_row_and_frees_its_slot():
    """A row ends with its first even token, or by itself."""
    params, prompts = weights(6), random_prompts(9, 6)

    def cut(ids):
        even = [i for i, token in enumerate(ids) if token % 2 == 0]
        return even[0] + 1 if even else None

    whole = list(scheduler()(params, requests_of(prompts), prepare))
    for row, finished in zip(whole, scheduler(2)(params, requests_of(prompts), prepare, cut=cut), strict=True):
        ids = row.ids.tolist()
        assert finished.ids.tolist() == ids[: cut(ids) or len(ids)]
        assert len(finished.log_probs) == len(finished.ids)


def test_widths_decide_what_is_compiled():
    """40 prompts of 1 to 24 tokens in widths of 6, 12 and 24: three prefills and one step."""
    traced = []

    def counting(name, function):
        def counted(*arguments):
            traced.append(name)
            return function(*arguments)

        return counted

    def bucketed(requests):
        return prepare(requests, width=next(w for w in (6, 12, 24) if len(requests[0][1]) <= w))

    predict = {'prefill': counting('prefill', prefill), 'decode_step': counting('step', decode_step)}
    serve = make_scheduler(predict, slots=4, cache_size=40, max_new_tokens=NEW, eos_id=EOS)
    list(serve(weights(6), requests_of(random_prompts(40, 1, longest=24)), bucketed))
    assert traced.count('prefill') == 3 and traced.count('step') == 1
