"""A toy decoder whose logits are a closed form of everything a row has read."""

import math

import jax.numpy as jnp
import numpy as np

VOCAB, EOS, PAD = 11, 1, 0
SLOTS = 6  # of a prompt


def weights(seed=0):
    return {'w': np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)).astype(np.float32)}


def prefill(params, batch, cache_size):
    """The cache is the sum of what was read, token i weighing cos(position): order counts, as in a real decoder."""
    real = jnp.asarray(batch['segment']) > 0
    weight = jnp.where(real, jnp.cos(batch['position'] * 1.0), 0.0)
    read = jnp.einsum('bt,btv->bv', weight, params['w'][batch['text']])
    # One slot a token, to see that none is written outside of the cache.
    slots = jnp.zeros((read.shape[0], cache_size), jnp.int32)
    slots = slots.at[:, : real.shape[1]].set(jnp.where(real, batch['text'], 0)[:, :cache_size])
    return read, {'read': read, 'length': real.sum(1), 'slots': slots}


def decode_step(params, cache, token):
    read = cache['read'] + jnp.cos(cache['length'] * 1.0)[:, None] * params['w'][token]
    slots = cache['slots'].at[jnp.arange(token.shape[0]), cache['length']].set(token, mode='drop')
    return read, {'read': read, 'length': cache['length'] + 1, 'slots': slots}


PREDICT = {'prefill': prefill, 'decode_step': decode_step}


def logits_after(params, history):
    """What the decoder says after a row of tokens, float64 [V]."""
    return sum(math.cos(i) * params['w'][t].astype(np.float64) for i, t in enumerate(history))


def log_probs_after(params, history):
    logits = logits_after(params, history)
    return logits - np.log(np.exp(logits).sum())


def oracle(params, prompt, max_new_tokens, penalty=0.0, ends=(EOS,)):
    """Greedy decoding in float64, the whole history read anew for every token -> ids, log-probabilities. A token that
    the row has said before weighs `penalty` less."""
    ids, log_probs, history = [], [], list(prompt)
    while len(ids) < max_new_tokens and not set(ends) & set(ids):
        logits = logits_after(params, history)
        said = np.isin(np.arange(VOCAB), ids)
        ids.append(int(np.argmax(logits - penalty * said)))
        log_probs.append(logits[ids[-1]] - np.log(np.exp(logits).sum()))
        history.append(ids[-1])
    return ids, log_probs


def make_batch(prompts, width=SLOTS, **more):
    batch = {k: np.zeros((len(prompts), width), np.int32) for k in ('text', 'segment', 'position')}
    for row, prompt in enumerate(prompts):
        batch['text'][row, : len(prompt)] = prompt
        batch['segment'][row, : len(prompt)] = 1
        batch['position'][row] = np.arange(width)
    return batch | more


def random_prompts(n, seed=0, longest=SLOTS):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, rng.integers(1, longest + 1)).tolist() for _ in range(n)]
