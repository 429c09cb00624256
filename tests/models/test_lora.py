"""Adapters beside the matrices of every kind of model, against the dense formula."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vlm.checkpoints import trees
from big_vlm.config import Lora, LoraRule, UserError
from big_vlm.models import gemma, lora, matrices, quantised, vit

EVERYTHING = Lora(rules=(('.*', LoraRule(rank=3, alpha=6.0)),))
# A kernel's layout as a matrix [outputs of a stack, in, out].
PATTERNS = {
    'layers/attn/q_einsum/w': 'L N D H -> L D (N H)',
    'layers/attn/kv_einsum/w': 'L two K D H -> (L two) D (K H)',
    'layers/attn/attn_vec_einsum/w': 'L N H D -> L (N H) D',
    'layers/mlp/gating_einsum': 'L two D F -> (L two) D F',
    'layers/mlp/linear': 'L F D -> L F D',
}


def decoder(**options):
    sizes = dict(width=8, depth=2, mlp_dim=12, num_heads=4, num_kv_heads=1, head_dim=6)
    return gemma.Gemma(vocab_size=11, **(sizes | options))


def adapted(params, rules=EVERYTHING, seed=1):
    """With adapters, `b` random too: a fresh one is zero, and shows nothing."""
    params = trees.flat(lora.add(params, rules, jax.random.key(seed)))
    for i, path in enumerate(params):
        if path.endswith(lora.B):
            params[path] = 0.3 * jax.random.normal(jax.random.key(i), params[path].shape)
    return trees.nested(params)


@pytest.fixture(scope='module')
def base():
    return jax.jit(lambda: gemma.init(decoder(), jax.random.key(0)))()


def logits(model, params, tokens=((3, 5, 7, 2),)):
    return model.apply({'params': params}, jnp.asarray(tokens), method='init_everything')


def test_the_product_is_the_matrices(base):
    """W + alpha / r · A B of every single matrix, in numpy."""
    params = adapted(base)
    merged, leaves = trees.flat(lora.merge(params)), trees.flat(params)
    assert set(PATTERNS) == {path for path in trees.flat(base) if matrices.axes(path)}
    assert set(merged) == set(trees.flat(base))
    for path, pattern in PATTERNS.items():
        a, b = (np.asarray(leaves[path + end]) for end in (lora.A, lora.B))
        a = einops.rearrange(a, f'{pattern.split(" -> ")[0]} r -> {pattern.split(" -> ")[1]} r')
        b = einops.rearrange(b, f'{pattern.split(" -> ")[0]} r -> {pattern.split(" -> ")[1]} r')
        assert a.shape[2] == 1 and b.shape[1] == 1  # of a, no outputs; of b, no inputs
        delta = np.einsum('lir,lor->lio', a[:, :, 0], b[:, 0])
        w, found = (einops.rearrange(np.asarray(x[path]), pattern) for x in (leaves, merged))
        np.testing.assert_allclose(found, w + 2.0 * delta, atol=1e-6)


def test_a_fresh_adapter_changes_no_bit(base):
    params = lora.add(base, EVERYTHING, jax.random.key(1))
    np.testing.assert_array_equal(logits(decoder(), params), logits(decoder(), base))
    leaves = trees.flat(params)
    for path in PATTERNS:
        bound = np.prod([leaves[path].shape[axis] for axis in matrices.axes(path)[0]]) ** -0.5
        assert 0.7 * bound < np.abs(leaves[path + lora.A]).max() <= bound


@pytest.mark.parametrize(
    'options',
    [dict(scan=True), dict(scan=False), dict(remat='full'), dict(num_kv_heads=4), dict(variant='gemma3_1b', window=2)],
    ids=str,
)
def test_merged_computes_what_unmerged_does(options):
    model = decoder(**options)
    params = adapted(jax.jit(lambda: gemma.init(model, jax.random.key(0)))())
    np.testing.assert_allclose(logits(model, lora.merge(params)), logits(model, params), atol=1e-6)
    back = trees.flat(lora.unmerge(lora.merge(params), lora.adapters(params)))
    for path, leaf in back.items():
        np.testing.assert_allclose(leaf, trees.flat(params)[path], atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_a_vision_transformer():
    model = vit.ViT('mu/4', depth=2, width=8, mlp_dim=12, pool='map', head=5)
    image = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    params = adapted(jax.jit(lambda: model.init(jax.random.key(0), image))()['params'])
    merged = lora.merge(params)
    count = sum(path.endswith(lora.A) for path in trees.flat(params))
    assert count == 2 * 6 + 1  # layers and attention pooling, query to Dense_1; the head
    base = trees.nested({path: leaf for path, leaf in trees.flat(params).items() if not lora.is_adapter(path)})
    found, expected, without = (model.apply({'params': p}, image)[0] for p in (params, merged, base))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - without).max() > 1e-3


def test_gradients_of_the_factors(base):
    """Those of autodiff through the dense formula, layer by layer inside the scan."""
    params = adapted(base)
    factors = {path: leaf for path, leaf in lora.adapters(params).items() if lora.is_trained(path)}
    leaves = trees.flat(params)

    def inside(factors):
        return jnp.sum(jnp.sin(logits(decoder(), trees.nested(leaves | factors))))

    def dense(factors):
        merged = {path: leaf for path, leaf in leaves.items() if not lora.is_adapter(path)}
        for path, pattern in PATTERNS.items():
            old, new = pattern.split(' -> ')
            a, b = (einops.rearrange(factors[path + end], f'{old} r -> {new} r') for end in (lora.A, lora.B))
            delta = 2.0 * jnp.einsum('lir,lor->lio', a[:, :, 0], b[:, 0])
            shape = dict(zip(old.split(), leaves[path].shape, strict=True))
            merged[path] += einops.rearrange(delta, f'{new} -> {old}', **{k: shape[k] for k in 'NKL' if k in shape})
        return jnp.sum(jnp.sin(logits(decoder(), trees.nested(merged))))

    found, expected = (jax.jit(jax.grad(f))(factors) for f in (inside, dense))
    for path in found:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_rules_give_each_matrix_its_rank(base):
    rules = (('.*/attn/q_einsum/w', LoraRule(rank=2)), ('.*/attn/.*', LoraRule(rank=5, alpha=10.0)))
    leaves = trees.flat(lora.add(base, Lora(rules=rules), jax.random.key(0)))
    ranks = {path: leaf.shape[-1] for path, leaf in leaves.items() if path.endswith(lora.A)}
    assert ranks == {
        'layers/attn/q_einsum/w_lora_a': 2,
        'layers/attn/kv_einsum/w_lora_a': 5,
        'layers/attn/attn_vec_einsum/w_lora_a': 5,
    }
    assert float(leaves['layers/attn/kv_einsum/w_lora_scale'].ravel()[0]) == 2.0


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        (
            dict(rules=(('layers/attn/q_proj/w', LoraRule()),)),
            r"lora\.rules\[0\]: 'layers/attn/q_proj/w' matches no parameter: did you mean layers/attn/\w+/w\?",
        ),
        (dict(rules=(('.*scale', LoraRule()),)), r"'\.\*scale' matches final_norm/scale, which is no matrix"),
        (dict(rules=(('.*', LoraRule()), ('.*/w', LoraRule()))), 'decides for no matrix, earlier rules took'),
        (dict(rules=(('.*', LoraRule()),), train=('head.*',)), r'lora\.train\[0\]: \'head\.\*\' matches no parameter'),
    ],
)
def test_rules_that_mean_nothing(base, section, message):
    with pytest.raises(UserError, match=message):
        lora.add(base, Lora(**section), jax.random.key(0))


def test_an_int4_base_is_near_and_every_32_inputs_have_their_scale():
    """Of two matrices in one stack, whose inputs are two axes; the last has 3 groups of 32."""
    w = np.random.default_rng(0).normal(size=(2, 3, 96, 5)).astype(np.float32)
    values, scale = quantised.narrow(w, (-3, -2), 'int4')
    assert (values.dtype, values.shape) == (jnp.int4, w.shape)
    assert (scale.dtype, scale.shape) == (jnp.bfloat16, (2, 3, 3, 5))
    found = np.asarray(quantised.wide(values, scale)).reshape(2, 3, 3, 32, 5)
    w, step = w.reshape(2, 3, 3, 32, 5), np.float32(scale)[:, :, :, None]
    largest = np.take_along_axis(w, np.abs(w).argmax(axis=3, keepdims=True), 3)
    np.testing.assert_allclose(step, largest / -8, rtol=2**-8)
    near = w / step
    assert (np.abs(found / step - near) <= np.where(near > 7.5, 1.05, 0.501)).all()
    assert set(np.unique(found / step)) <= set(range(-8, 8))


@pytest.mark.parametrize('kind', [pytest.param('int8', marks=pytest.mark.slow), 'int4'])
def test_a_narrow_base_computes_what_its_sum_does(kind, base):
    params = lora.add(base, Lora(rules=EVERYTHING.rules, base_dtype=kind), jax.random.key(0))
    leaves, dense = trees.flat(params), trees.flat(lora.merge(params))
    for path in PATTERNS:
        assert leaves[path].dtype.name == kind
        worst = np.abs(dense[path] - trees.flat(base)[path]).max() / np.abs(dense[path]).max()
        assert 0 < worst < (1 / 100 if kind == 'int8' else 1 / 6), path
    np.testing.assert_allclose(logits(decoder(), params), logits(decoder(), lora.merge(params)), atol=1e-6)

    params = adapted(base, Lora(rules=EVERYTHING.rules, base_dtype=kind))
    dense, layers = trees.flat(lora.merge(params)), gemma.unstack_layers(params, jnp.bfloat16)['layers']
    for path in PATTERNS:
        node = layers[1]
        for key in path.split('/')[1:]:
            node = node[key]
        expected = matrices.OutputsFirst.of(dense[path][1], matrices.axes(path)).values
        assert node.values.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(node.values), expected, rtol=2**-8, atol=1e-6, err_msg=path)


def test_an_int8_base_is_near_and_each_output_has_its_scale(base):
    params = lora.add(base, Lora(rules=EVERYTHING.rules, base_dtype='int8'), jax.random.key(0))
    leaves, dense = trees.flat(params), trees.flat(lora.merge(params))
    for path, pattern in PATTERNS.items():
        assert leaves[path].dtype == jnp.int8
        w, found = (einops.rearrange(np.asarray(x[path]), pattern) for x in (trees.flat(base), dense))
        step = np.abs(w).max(axis=1, keepdims=True) / 127
        assert (np.abs(found - w) <= step / 2 + 1e-6).all()
    assert leaves['embedder/input_embedding'].dtype == jnp.bfloat16
    assert leaves['final_norm/scale'].dtype == jnp.float32


@pytest.mark.parametrize('kind', ['bfloat16', pytest.param('int8', marks=pytest.mark.slow)])
def test_to_decode_takes_the_layers_in_the_dtype_of_activations_and_one_in_float32(kind):
    """Beside the base; as the compiler tells, when it orders a program by its memory, as those of accelerators do."""
    model = decoder(width=64, depth=4, mlp_dim=256, head_dim=16)

    def make(rng):
        base = gemma.init(model, rng)
        return base, lora.add(base, Lora(rules=EVERYTHING.rules, base_dtype=kind), rng)

    base, params = (trees.flat(tree) for tree in jax.eval_shape(make, jax.random.key(0)))
    count = sum(leaf.size for path, leaf in base.items() if matrices.axes(path))
    stored = sum(leaf.size * leaf.dtype.itemsize for path, leaf in params.items() if path in base)
    assert stored < (1.1 if kind == 'int8' else 2.1) * count + 2**13
    lowered = jax.jit(gemma.unstack_layers, static_argnums=1).lower(trees.nested(params), jnp.bfloat16)
    scheduler = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}
    memory = lowered.compile(compiler_options=scheduler).memory_analysis()
    assert 2 * count < memory.output_size_in_bytes < 2 * count + 2**13
    assert memory.temp_size_in_bytes < 4 * count / 4
