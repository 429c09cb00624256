"""Matrices with their outputs first: the same products, and a decoding step that writes none of them anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vlm.models import gemma, matrices, paligemma
from big_vlm.models.matrices import OutputsFirst


@pytest.mark.parametrize(
    ('path', 'equation', 'weight', 'rows'),
    [
        ('layers/attn/q_einsum/w', 'RD,NDH->RNH', (4, 6, 8), (3, 6)),
        ('layers/attn/kv_einsum/w', 'RD,CKDH->CRKH', (2, 3, 6, 8), (3, 6)),
        ('layers/attn/qkv_einsum/w', 'RD,CNDH->CRNH', (3, 4, 6, 8), (3, 6)),
        ('layers/attn/attn_vec_einsum/w', 'RNH,NHD->RD', (4, 8, 6), (3, 4, 8)),
        ('layers/mlp/gating_einsum', 'RD,CDF->CRF', (2, 6, 5), (3, 6)),
        ('layers/mlp/linear', 'RF,FD->RD', (5, 6), (3, 5)),
    ],
)
def test_products_are_those_of_the_published_layout(path, equation, weight, rows):
    rng = np.random.default_rng(0)
    weight, rows = rng.normal(size=weight), rng.normal(size=rows)

    @jax.jit
    def product(weight, rows):
        return OutputsFirst.of(weight, matrices.axes(path)).einsum(equation, rows)

    np.testing.assert_allclose(product(weight, rows), np.einsum(equation, rows, weight), atol=1e-5)


def test_a_step_writes_no_matrix_anew():
    """Its temporary memory is less than the smallest matrix."""
    sizes = dict(width=64, depth=2, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=32)
    model = paligemma.PaliGemma(None, gemma.Gemma(256, 'gemma3_270m', **sizes), image_size=8)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    layers = jax.eval_shape(paligemma.unstack_layers, shapes)
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    rows = [jax.ShapeDtypeStruct((1, 4), jnp.int32)] * 4
    _, cache = jax.eval_shape(lambda p, *rows: model.prefill(p, None, None, *rows, cache_size=8), layers, *rows)
    memory = jax.jit(model.decode_step).lower(layers, token, cache).compile().memory_analysis()
    found = [x for x in jax.tree.leaves(layers['llm']['layers']) if x.size > 64]
    assert len(found) == 2 * 5
    assert memory.temp_size_in_bytes < 4 * min(x.size for x in found)
