"""One PaliGemma of random weights, here and if asked in transformers: what the decoding benchmarks time."""

import dataclasses
import math
import pathlib
import tempfile
import zlib
from collections.abc import Callable
from typing import Any

NAMES = ('image_mask', 'text', 'segment', 'position', 'mask_ar')
_SMALL = dict(width=512, depth=8, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64)
_TINY = dict(width=64, depth=2, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=32)
# Name → image tower, decoder, vocabulary.
SHAPES = {
    'tiny': (dict(variant='mu/14', width=32, mlp_dim=32, depth=1), dict(variant='gemma_2b', **_TINY), 512),
    'small': (dict(variant='S/14', depth=6), dict(variant='gemma_2b', **_SMALL), 16_384),
    '3b': (dict(variant='So400m/14'), dict(variant='gemma_2b'), 257_152),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """`predict` and `params` as `decoding.generate` takes them; `theirs`, a torch module, or None."""

    model: Any
    predict: dict[str, Callable[..., Any]]
    params: Any
    parameters: int
    theirs: Any


def make(image_size: int = 224, transformers: bool = True, shape: str = 'small', dtype: str = 'float32') -> Pair:
    """One of SHAPES, weights and computation in `dtype`. 'small': a tower of S/14's width with 6 layers, a decoder of
    width 512 with 8; 49 M parameters at 224 px. '3b': PaliGemma 3B. On an accelerator its weights are drawn there."""
    import jax
    import jax.numpy as jnp

    from big_vlm import config
    from big_vlm.checkpoints import trees
    from big_vlm.interop.lazy import LazyWeights
    from big_vlm.interop.pretrained import Pretrained
    from big_vlm.models import paligemma
    from big_vlm.ops import pixels

    tower, decoder, vocab = SHAPES[shape]
    sections = dict(image=config.ImageTower(**tower), decoder=config.Decoder(**decoder))
    settings = config.Model(**sections, dtype=dtype)
    model = paligemma.from_config(settings, image_size=image_size, vocab_size=vocab)
    shapes = trees.flat(jax.eval_shape(model.init, jax.random.key(0)))
    draw = drawn if jax.default_backend() == 'cpu' else drawn_on_device
    flat = {path: draw(path, x.shape, dtype) for path, x in shapes.items()}

    def inputs(batch):
        return pixels.to_model_range(batch['image'], (-1, 1), jnp.dtype(dtype)), *(batch.get(name) for name in NAMES)

    predict = {
        'prefill': lambda params, batch, size: model.prefill(params, *inputs(batch), cache_size=size),
        'decode_step': lambda params, cache, token: model.decode_step(params, token, cache),
    }
    theirs = None
    if transformers:
        lazy = LazyWeights(shapes, flat.__getitem__, 'benchmark')
        pretrained = Pretrained('paligemma', settings, config.Contract(image_size=image_size), vocab, lazy)
        theirs = _theirs(pretrained)
    params = paligemma.unstack_layers(trees.nested(flat))
    return Pair(model, predict, params, sum(x.size for x in flat.values()), theirs)


def drawn(path: str, shape: tuple[int, ...], dtype: str) -> Any:
    """Normal, by numpy: to compile a model's own `init` takes longer than to measure."""
    import jax.numpy as jnp
    import numpy as np

    rng, (centre, deviation) = np.random.default_rng(zlib.crc32(path.encode())), _spread(path, shape)
    return (centre + deviation * rng.standard_normal(shape, np.float32)).astype(jnp.dtype(dtype))


def drawn_on_device(path: str, shape: tuple[int, ...], dtype: str) -> Any:
    """The like of `drawn`, of which nothing crosses to the device."""
    import jax

    centre, deviation = _spread(path, shape)
    draw = jax.jit(lambda key: (centre + deviation * jax.random.normal(key, shape)).astype(dtype))
    return draw(jax.random.key(zlib.crc32(path.encode())))


def _spread(path: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a parameter."""
    from big_vlm.models import matrices

    found = matrices.axes(path)
    deviation = math.prod(shape[axis] for axis in found[0]) ** -0.5 if found else 0.02
    if path.endswith('input_embedding'):
        deviation = shape[-1] ** -0.5
    # With smaller ones a decoder with tied embeddings repeats itself.
    deviation *= 2 if path.startswith('llm/layers') else 1
    return float(path.startswith('img') and path.endswith('scale')), deviation


def _theirs(pretrained: Any) -> Any:
    import torch
    import transformers

    from big_vlm.interop import hugging_face

    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder) / 'paligemma'
        hugging_face.write(place, pretrained)
        model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(place, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


def batch_of(pair: Pair, lengths: list[int], width: int, seed: int = 0) -> dict[str, Any]:
    """Random pictures and prompts of `lengths` tokens in `width` text slots, as numpy arrays."""
    import numpy as np

    rng, rows, image = np.random.default_rng(seed), len(lengths), pair.model.image_tokens
    slots = np.broadcast_to(np.arange(image + width, dtype=np.int32), (rows, image + width))
    real = slots < image + np.array(lengths)[:, None]
    text = np.where(real, rng.integers(10, pair.model.llm.vocab_size, real.shape), 0)
    text[:, :image] = -1
    size = pair.model.image_size
    return {
        'image': rng.integers(0, 256, (rows, 1, size, size, 3)).astype(np.uint8),
        'image_mask': np.ones((rows, 1), bool),
        'text': text.astype(np.int32),
        'segment': real.astype(np.int32),
        'position': slots,
        'mask_ar': np.zeros_like(slots),
        'id': np.stack([np.zeros(rows, np.int32), np.arange(rows, dtype=np.int32)], 1),
    }


def their_answer(pair: Pair, batch: dict[str, Any], new: int) -> Callable[[], Any]:
    """A function that decodes a batch greedily with transformers: ids [B, new]. Rows are padded in front, as it takes
    them, to the longest of the batch."""
    import numpy as np
    import torch

    lengths = batch['segment'].sum(1)
    text = np.zeros((len(lengths), lengths.max()), np.int64)
    real = np.arange(text.shape[1]) >= text.shape[1] - lengths[:, None]
    text[real] = batch['text'][batch['segment'] > 0]
    text = torch.tensor(np.where(text < 0, pair.theirs.config.image_token_index, text))
    images = torch.tensor(batch['image'][:, 0].transpose(0, 3, 1, 2))

    def answer():
        with torch.inference_mode():
            ids = pair.theirs.generate(
                input_ids=text,
                pixel_values=images.float() / 127.5 - 1,
                attention_mask=torch.tensor(real).long(),
                token_type_ids=torch.zeros_like(text),
                max_new_tokens=new,
                do_sample=False,
            )
        return ids[:, text.shape[1] :].numpy()

    return answer
