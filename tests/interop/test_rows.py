"""The language of the mapping tables: each kind of row by hand, then both directions against one another."""

import jax
import numpy as np
import pytest

from big_vlm.config import UserError
from big_vlm.interop import rows
from big_vlm.interop.lazy import LazyWeights, check_names, with_rows
from big_vlm.interop.rows import Row


def weights(**arrays):
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    return LazyWeights(shapes, arrays.__getitem__, 'here')


def ours(table, shapes, **arrays):
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    found = rows.to_ours(table, shapes, weights(**arrays))
    return {name: found.read(name) for name in found.shapes}


def test_a_pattern_moves_axes():
    # Two heads of two numbers each, from three: theirs is [N·H, D].
    table = [Row('q', '(N H) D -> D N H', 'query', (('N', 2),))]
    q = np.arange(12, dtype=np.float32).reshape(4, 3)
    got = ours(table, {'query': (3, 2, 2)}, q=q)['query']
    assert got[1].tolist() == [[1, 4], [7, 10]]  # what input 1 gives to head 0 and to head 1


def test_layers_are_stacked():
    table = [Row('layer.{i}.b', '', 'bias')]
    got = ours(table, {'bias': (3, 2)}, **{f'layer.{i}.b': np.full(2, i, np.float32) for i in range(3)})
    assert got['bias'].tolist() == [[0, 0], [1, 1], [2, 2]]


def test_two_of_theirs_fill_one_of_ours():
    table = [Row('{i}.gate', 'F D -> D F', 'gating[0]'), Row('{i}.up', 'F D -> D F', 'gating[1]')]
    gate, up = np.float32([[1, 2]]), np.float32([[3, 4]])
    assert ours(table, {'gating': (1, 2, 2, 1)}, **{'0.gate': gate, '0.up': up})['gating'].tolist() == [
        [[[1], [2]], [[3], [4]]]
    ]


def test_one_of_theirs_fills_three_of_ours():
    table = [Row(f'packed[{i}/3]', '', name) for i, name in enumerate('qkv')]
    got = ours(table, dict.fromkeys('qkv', (2,)), packed=np.float32([1, 2, 3, 4, 5, 6]))
    assert [got[name].tolist() for name in 'qkv'] == [[1, 2], [3, 4], [5, 6]]


def test_the_way_out_is_the_way_in_backwards():
    table = rows.below(
        'x.', 'y/', [Row('{i}.k', '(K H) D -> K D H', 'kv[0]'), Row('{i}.v', '(K H) D -> K D H', 'kv[1]')], K=2
    )
    table += [Row(f'packed[{i}/2]', 'F D -> D F', name) for i, name in enumerate('ab')]
    rng = np.random.default_rng(0)
    arrays = {'y/kv': (3, 2, 2, 5, 4), 'a': (5, 2), 'b': (5, 2)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in arrays.items()}
    reads = []
    source = weights(**arrays)
    source = LazyWeights(source.shapes, lambda name: (reads.append(name), arrays[name])[1], 'here')
    out = rows.to_theirs(table, source)
    theirs = {name: out.read(name) for name in out.shapes}
    assert sorted(reads) == ['a', 'b', 'y/kv'], 'each of ours is read once'
    assert {name: x.shape for name, x in theirs.items()} == {
        **{f'x.{i}.{name}': (8, 5) for i in range(3) for name in 'kv'},
        'packed': (4, 5),
    }
    assert {name: leaf.shape for name, leaf in out.shapes.items()} == {name: x.shape for name, x in theirs.items()}
    back = ours(table, {name: x.shape for name, x in arrays.items()}, **theirs)
    for name, x in arrays.items():
        np.testing.assert_array_equal(back[name], x)


def test_appended_rows_are_the_mean_and_are_cut_off_again():
    table = np.float32([[1, 2], [3, 6]])
    longer = with_rows(weights(table=table), 'table', 4)
    assert longer.read('table').tolist() == [[1, 2], [3, 6], [2, 4], [2, 4]]
    assert longer.shapes['table'].shape == (4, 2)
    np.testing.assert_array_equal(with_rows(longer, 'table', 2).read('table'), table)


def test_all_that_is_wrong_is_said_at_once():
    wanted = weights(a=np.zeros(2), b=np.zeros((2, 3)), c=np.zeros(1))
    found = weights(b=np.zeros((3, 2)), c=np.zeros(1), d=np.zeros(1), e=np.zeros(1))
    with pytest.raises(UserError) as error:
        check_names(wanted.shapes, found.shapes, 'FILE', 'a model')
    assert str(error.value) == (
        'FILE is not a model: 1 missing (a); 2 not expected (d, e); 1 of another shape (b [3, 2] instead of [2, 3])'
    )
