"""Reads stored examples as plain dicts: text as `str`, numbers as Python numbers or arrays, images as encoded bytes.

TFDS writes tf.train.Example protos and decodes them field by field, 0.7 ms for a digit scene. A plan made once from the
features does the common kinds in a tenth of that; whatever it does not know is left to TFDS.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from big_vlm.config import UserError

_Convert = Callable[[Any], Any]


def reader(features: tfds.features.FeaturesDict) -> Callable[[bytes], dict]:
    """A function from one stored example to a nested dict in the structure of `features`.

    Text → str, Image → its encoded bytes, scalars → int, float or bool, string tensors → list of str, other tensors →
    numpy array, Sequence → list of str, list of bytes or array with a leading dimension, Sequences within it → lists of
    these. Raises UserError for nested sequences where a feature is of another kind: TFDS needs TensorFlow for them.
    """
    plan = _plan(features, '')
    if plan is None:
        for name, feature in features.items():
            if any(info.sequence_rank > 1 for info in _infos(feature.get_tensor_info())):
                raise UserError(
                    f'feature {name!r} is a nested sequence, which beside features of rarer kinds cannot be read '
                    'without TensorFlow: write the dataset as JSON lines'
                )
        return lambda stored: _plain(features.deserialize_example_np(stored, decoders=_skip_images(features)))

    def read(stored: bytes) -> dict:
        fields = tf_example_pb2.Example.FromString(stored).features.feature
        return _fill(plan, fields)

    return read


def _infos(info: Any) -> list:
    return [part for value in info.values() for part in _infos(value)] if isinstance(info, dict) else [info]


def _fill(plan: Mapping, fields: Mapping) -> dict:
    return {key: _fill(step, fields) if isinstance(step, dict) else step(fields) for key, step in plan.items()}


def _plan(features: Mapping, prefix: str, depth: int = 0) -> dict | None:
    """{field: converter of the stored fields or a nested plan}, None where TFDS has to do it.

    Of features within `depth` sequences, whose stored names begin with `prefix`.
    """
    plan: dict = {}
    for key, feature in features.items():
        inner, rank = feature, depth
        while type(inner) is tfds.features.Sequence:
            inner, rank = inner.feature, rank + 1
        if type(inner) is tfds.features.FeaturesDict:
            step = _plan(inner, f'{prefix}{key}/', rank)
        else:
            step = _step(inner, prefix + key, rank)
        if step is None:
            return None
        plan[key] = step
    return plan


def _step(feature: Any, name: str, rank: int) -> _Convert | None:
    convert = _sequence(feature) if rank else _single(feature)
    if convert is None:
        return None
    if rank < 2:
        return lambda fields: convert(fields[name])
    # All items one after another and, level by level, the lengths of the sequences inside the outermost.
    lengths = [f'{name}/ragged_row_lengths_{level}' for level in range(rank - 1)]
    return lambda fields: _nested(
        convert(fields[f'{name}/ragged_flat_values']), [fields[level].int64_list.value for level in lengths]
    )


def _nested(items: Sequence, lengths: Sequence[Sequence[int]]) -> Sequence:
    for row_lengths in reversed(lengths):
        ends = itertools.accumulate(row_lengths, initial=0)
        items = [items[start:end] for start, end in itertools.pairwise(ends)]
    return items


def _single(feature: Any) -> _Convert | None:
    if type(feature) is tfds.features.Text:
        return lambda field: field.bytes_list.value[0].decode()
    if type(feature) is tfds.features.Image:
        return lambda field: field.bytes_list.value[0]
    return _tensor(feature, tuple(feature.shape) if _is_tensor(feature) else None)


def _sequence(feature: Any) -> _Convert | None:
    if type(feature) is tfds.features.Text:
        return lambda field: [value.decode() for value in field.bytes_list.value]
    if type(feature) is tfds.features.Image:
        return lambda field: list(field.bytes_list.value)
    return _tensor(feature, (None, *feature.shape) if _is_tensor(feature) else None)


def _is_tensor(feature: Any) -> bool:
    tensors = (tfds.features.Scalar, tfds.features.ClassLabel, tfds.features.BBoxFeature)
    # Encoded tensors (zlib, bytes) keep their dtype out of sight: they are TFDS's business.
    return type(feature) in tensors or (
        type(feature) is tfds.features.Tensor
        and feature.get_serialized_info().shape == feature.shape
        and feature.get_serialized_info().np_dtype == feature.np_dtype
    )


def _tensor(feature: Any, shape: tuple | None) -> _Convert | None:
    if shape is None or shape.count(None) > 1:
        return None
    dtype = np.dtype(feature.np_dtype)
    if dtype.kind in 'OSU':
        if shape == ():
            return lambda field: field.bytes_list.value[0].decode()
        return (lambda field: [value.decode() for value in field.bytes_list.value]) if len(shape) == 1 else None
    if dtype.kind not in 'iubf':
        return None
    kind = 'float_list' if dtype.kind == 'f' else 'int64_list'
    if shape == ():
        python = {'f': float, 'b': bool}.get(dtype.kind, int)
        return lambda field: python(getattr(field, kind).value[0])
    shape = tuple(-1 if n is None else n for n in shape)
    return lambda field: np.array(getattr(field, kind).value, dtype).reshape(shape)


def _skip_images(features: Mapping) -> dict:
    skip: dict = {}
    for key, feature in features.items():
        inner = feature.feature if type(feature) is tfds.features.Sequence else feature
        if isinstance(inner, tfds.features.FeaturesDict):
            nested = _skip_images(inner)
            if nested:
                skip[key] = nested
        elif isinstance(feature, tfds.features.Image):
            skip[key] = tfds.decode.SkipDecoding()
    return skip


def _plain(value: Any) -> Any:
    """TFDS's numpy values as plain ones; bytes that are text become str, image bytes stay."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.tolist()] if value.dtype == object else value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value
