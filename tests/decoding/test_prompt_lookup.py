"""Prompt-lookup speculation: greedy decoding's tokens, in fewer passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vlm.config import UserError
from big_vlm.decoding.generate import make_generate
from big_vlm.decoding.prompt_lookup import History
from big_vlm.decoding.repetition import RepetitionPenalty
from big_vlm.decoding.samplers import Temperature
from big_vlm.decoding.scheduler import make_scheduler
from big_vlm.models import gemma, paligemma, vit
from big_vlm.ops import kv_cache

VOCAB, SLOTS, NEW, EOS, PAD = 24, 14, 20, 1, 0


@functools.cache
def model_and_params(variant, depth, window, seed=0):
    heads = dict(num_heads=2, num_kv_heads=1, head_dim=8)
    decoder = gemma.Gemma(VOCAB, variant, width=16, mlp_dim=24, depth=depth, window=window, **heads)
    model = paligemma.PaliGemma(vit.ViT('mu/4', width=8, mlp_dim=8, pool='none', head=16), decoder, image_size=8)
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), shapes)
    return model, paligemma.unstack_layers(params)


def predict(model, passes=None):
    def prefill(params, batch, cache_size, ahead=0):
        rows = (batch[name] for name in ('text', 'segment', 'position', 'mask_ar'))
        return model.prefill(params, None, None, *rows, cache_size=cache_size, ahead=ahead)

    def extend(params, cache, tokens):
        if passes is not None:
            jax.debug.callback(lambda: passes.append(1))
        return model.extend(params, tokens, cache)

    def decode_step(params, cache, token):
        return model.decode_step(params, token, cache)

    return {'prefill': prefill, 'decode_step': decode_step, 'extend': extend, 'rewind': kv_cache.rewind}


def make_batch(rows=6, seed=0):
    """Prompts of 2 to SLOTS tokens with padding at random places, half of which say everything twice."""
    rng = np.random.default_rng(seed)
    batch = {name: np.zeros((rows, SLOTS), np.int32) for name in ('text', 'segment', 'position', 'mask_ar')}
    for row in range(rows):
        words = rng.integers(2, VOCAB, rng.integers(1, SLOTS // 2 + 1))
        prompt = np.concatenate([words, words if row % 2 else words[:1]])
        place = np.sort(rng.choice(SLOTS, len(prompt), replace=False))
        batch['text'][row, place], batch['segment'][row, place] = prompt, 1
        batch['position'][row, place] = np.arange(len(prompt))
    batch['_mask'] = np.arange(rows) != 2
    batch['id'] = np.stack([np.zeros(rows, np.int32), np.arange(rows, dtype=np.int32)], 1)
    return batch


def test_a_guess_is_what_followed_the_last_tokens():
    rows = [
        ([5, 6, 7, 8, 5, 6], [7, 8, 5, 6]),  # two tokens match, and the guess goes round
        ([5, 6, 7, 9, 6, 8, 5, 6], [7, 9, 6, 8]),  # two tokens match before, one later
        ([5, 6, 7, 5, 6, 8, 5, 6], [8, 5, 6, 8]),  # of two equal matches the later one
        ([5, 5], [5, 5, 5, 5]),
        ([5, 6, 7], [-1] * 4),
        ([-1, -1, 4, 3, -1, -1], [-1] * 4),  # image slots are no words
        ([4], [-1] * 4),
    ]
    tokens = np.full((len(rows), 9), -1, np.int32)
    for row, (said, _) in enumerate(rows):
        tokens[row, : len(said)] = said
    history = History(jnp.array(tokens), jnp.array([len(said) for said, _ in rows]))
    np.testing.assert_array_equal(jax.jit(lambda h: h.guess(4))(history), [guess for _, guess in rows])


# Windows that prompts fill and wrap, narrower and wider than a guess.
MODELS = [('gemma2_2b', 2, 3), ('gemma3_270m', 7, 6), ('gemma2_27b', 3, 1)]


def ended(out, ends):
    """The same with what follows the first of `ends` of each row cut off."""
    length = [
        next((i + 1 for i, token in enumerate(row[:n]) if token in ends), n) for row, n in zip(*out[::2], strict=True)
    ]
    kept = np.arange(NEW) < np.array(length)[:, None]
    return out._replace(ids=np.where(kept, out.ids, PAD), log_probs=out.log_probs * kept, length=np.array(length))


@pytest.mark.parametrize(
    'model, drafts', [(MODELS[0], 5), *(pytest.param(model, 2, marks=pytest.mark.slow) for model in MODELS[1:])]
)
def test_the_tokens_are_those_of_greedy_decoding(model, drafts):
    model, params = model_and_params(*model)
    batch, passes = make_batch(), []
    limit = np.array([NEW, 3, NEW, NEW - 1, NEW, 1])
    ends = dict(max_new_tokens=NEW, pad_id=PAD)
    plain = jax.device_get(make_generate(predict(model), eos_id=-1, **ends)(params, batch, limit=limit))
    last = plain.ids[4, 7]  # now row 4 says its end of text
    ends_too = plain.ids[1, 1]  # and row 1, in another way
    plain = ended(plain, (last, ends_too))
    lookup = make_generate(predict(model, passes), eos_id=(last, ends_too), prompt_lookup=drafts, **ends)
    got = jax.device_get(lookup(params, batch, limit=limit))
    jax.effects_barrier()
    np.testing.assert_array_equal(got.ids, plain.ids)
    np.testing.assert_array_equal(got.length, plain.length)
    np.testing.assert_allclose(got.log_probs, plain.log_probs, atol=1e-5)
    assert plain.length[4] <= 8 and (plain.ids[4] == last).sum() == 1 and plain.length[2] == 0
    assert plain.length.max() / (drafts + 1) < 1 + len(passes) < plain.length.max()  # some guesses hold, some do not


@pytest.mark.slow
def test_in_slots_the_tokens_are_the_same():
    """Rows whose guesses hold and fail at different times, in the place of others."""
    model, params = model_and_params(*MODELS[0])
    batch = make_batch()
    kept = np.flatnonzero(batch.pop('_mask'))
    batch['limit'] = np.array([NEW, 3, NEW, NEW - 1, NEW, 1])
    ends = dict(max_new_tokens=NEW, eos_id=-1, pad_id=PAD)
    plain = jax.device_get(make_generate(predict(model), **ends)(params, batch, limit=batch['limit']))
    serve = make_scheduler(predict(model), slots=2, cache_size=SLOTS + NEW, prompt_lookup=5, **ends)
    rows = serve(params, kept.tolist(), lambda some: {name: value[some] for name, value in batch.items()})
    for row, got in zip(kept, rows, strict=True):
        assert got.ids.tolist() == plain.ids[row, : plain.length[row]].tolist()
        np.testing.assert_allclose(got.log_probs, plain.log_probs[row, : plain.length[row]], atol=1e-5)


def test_what_is_not_greedy_is_refused():
    model, params = model_and_params(*MODELS[0])
    generate = make_generate(predict(model), max_new_tokens=2, eos_id=EOS, prompt_lookup=2)
    for how in ({'sampler': Temperature(1.0)}, {'processors': (RepetitionPenalty(1.2, VOCAB),)}):
        with pytest.raises(UserError, match='prompt_lookup is greedy decoding'):
            generate(params, make_batch(), **how)
    with pytest.raises(UserError, match='prompt_lookup -1'):
        make_generate(predict(model), max_new_tokens=2, eos_id=EOS, prompt_lookup=-1)
