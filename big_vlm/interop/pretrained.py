"""A public checkpoint as this project understands it: family, model, preprocessing and weights."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping

import jax

from big_vlm import config
from big_vlm.checkpoints import trees
from big_vlm.config import UserError
from big_vlm.data.contract import Contract
from big_vlm.data.coordinates import NUM_LOCATIONS, NUM_SEGMENTS
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.interop.lazy import LazyWeights, check_names
from big_vlm.models import gemma, paligemma, two_towers, vit
from big_vlm.models.gemma_variants import VARIANTS
from big_vlm.models.image_towers import naflex_patch_size

Model = two_towers.TwoTowers | paligemma.PaliGemma | gemma.Gemma

TOWERS = ('siglip', 'siglip2')  # families that are dual encoders; 'siglip2' are those with a NaFlex tower alone
DECODERS = ('gemma', 'gemma2', 'gemma3_text')  # families of a decoder alone, under Hugging Face's names
POSITION, TOKENS = 'img/pos_embedding', {'txt': 'txt/Embed_0/embedding', 'llm': 'llm/embedder/input_embedding'}

# (patch size, patches) → pixels, where patches do not cover the published image: 384 px hold 27 patches of 14.
_IMAGE_SIZES = {(14, 27 * 27): 384}
NAFLEX_PATCHES = 256  # that SigLIP 2's NaFlex towers are used with unless told otherwise
_CONTEXT = 8192  # tokens that Gemma 2 was trained with: a window of so many cuts nothing
OF_TEXT = config.Contract(lower=False, text_length=_CONTEXT, separator='', causal_prompt=True)  # of a decoder alone
OF_PROMPTS = ('causal_prompt', 'separator')  # what other projects' code takes for granted, a family at a time


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Everything but the tokenizer's pieces.

    Attributes:
      family: one of TOWERS, 'paligemma' (1 and 2), or one of DECODERS.
      model: the sizes, as a config says them.
      settings: the preprocessing, as a config says it.
      vocab_size: rows of the token table.
      weights: under our names: 'img/…', 'txt/…', 'llm/…', 't', 'b'.
      tokenizer: what came with it: a SentencePiece file, a tokenizer, a function that makes one, or None.
      decoder_of: the kind of model whose decoder alone was read; '': this is all of it.
      end_ids: that end an answer, eos among them or not.
    """

    family: str
    model: config.Model
    settings: config.Contract
    vocab_size: int
    weights: LazyWeights
    tokenizer: pathlib.Path | Tokenizer | Callable[[], Tokenizer | None] | None = None
    decoder_of: str = ''
    end_ids: tuple[int, ...] = ()

    @property
    def task(self) -> str:
        """Of the stage that such a model belongs to."""
        return 'contrastive' if self.family in TOWERS else 'generative'

    def stage(self, source: str) -> config.Stage:
        """The stage of a bundle of it: no training, first weights from `source`."""
        model = dataclasses.replace(self.model, projector='none') if self.family in DECODERS else self.model
        return config.Stage(task=self.task, model=model, contract=self.settings, init_from=config.InitFrom(path=source))

    def own_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that came with it. Raises UserError if that is none."""
        if isinstance(self.tokenizer, pathlib.Path):
            return Tokenizer.load(self.tokenizer)
        return self.tokenizer() if callable(self.tokenizer) else self.tokenizer

    def contract(self, tokenizer: Tokenizer) -> Contract:
        """The preprocessing contract. Raises UserError if the tokenizer's vocabulary is not the token table's."""
        built = self.build()
        image_tokens = built.image_tokens * self.settings.images if isinstance(built, paligemma.PaliGemma) else 0
        softcap, patch_size = self.model.decoder.final_softcap, naflex_patch_size(self.model, self.settings)
        contract = Contract.make(self.settings, self.fitted(tokenizer), image_tokens, softcap, patch_size)
        return dataclasses.replace(contract, vocab_size=self.vocab_size, end_ids=self.further_ends(tokenizer))

    def further_ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end an answer beside the tokenizer's eos."""
        return tuple(i for i in dict.fromkeys(self.end_ids) if i != tokenizer.eos_id)

    def fitted(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer, without location and segmentation tokens if the token table has no rows for them.

        A decoder alone may have rows of padding, as Gemma 3 has from 4B on. Raises UserError if its vocabulary is not
        the table's either way.
        """
        rows = {tokenizer.base, tokenizer.base + NUM_LOCATIONS + NUM_SEGMENTS}
        if self.vocab_size not in rows | ({padded(tokenizer.base)} if self.family in DECODERS else set()):
            raise UserError(
                f'{tokenizer.path or "the tokenizer"} has {tokenizer.base:,} pieces (with location and segmentation '
                f'tokens {tokenizer.base + NUM_LOCATIONS + NUM_SEGMENTS:,}), the token table of {self.weights.where} '
                f'{self.vocab_size:,} rows: name the tokenizer it was trained with, --tokenizer=FILE'
            )
        return tokenizer if self.vocab_size == tokenizer.vocab_size else tokenizer.without_locations()

    def build(self) -> Model:
        """The model. Raises UserError for sizes that cannot be."""
        return _build(self.family, self.model, self.settings, self.vocab_size)

    def expected(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Name → shape of every weight such a model has."""
        return expected(self.family, self.model, self.settings, self.vocab_size)

    def check(self) -> Pretrained:
        """Itself. Raises one UserError with everything that is missing, unexpected or of another shape."""
        check_names(self.expected(), self.weights.shapes, self.weights.where, f'a {self.family} of these sizes')
        return self


@functools.lru_cache(maxsize=4)  # a second of tracing, and reading and writing both ask
def expected(
    family: str, model: config.Model, settings: config.Contract, vocab_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Name → shape of every weight of a model. Raises UserError for sizes that cannot be."""
    built = _build(family, model, settings, vocab_size)
    if isinstance(built, gemma.Gemma):
        shapes = {'llm': jax.eval_shape(lambda rng: gemma.init(built, rng), jax.random.key(0))}
    else:
        shapes = trees.merged(*jax.eval_shape(built.init_with_stats, jax.random.key(0)))
    return trees.flat(shapes)


def _build(family: str, model: config.Model, settings: config.Contract, vocab_size: int) -> Model:
    if family in TOWERS:
        return two_towers.from_config(
            model,
            image_size=settings.image_size,
            text_length=settings.text_length,
            vocab_size=vocab_size,
            max_patches=settings.max_patches,
        )
    if family in DECODERS:
        decoder = gemma.Gemma(vocab_size=vocab_size, **dataclasses.asdict(model.decoder))
        _ = decoder.sizes
        return decoder
    where = dict(image_size=settings.image_size, max_patches=settings.max_patches)
    return paligemma.from_config(model, vocab_size=vocab_size, **where)


def from_shapes(weights: LazyWeights) -> Pretrained:
    """The model that weights under our names belong to, its sizes read off their shapes.

    What shapes cannot say is big_vision's: bilinear resize, with antialias for a NaFlex alone, pixels in −1..1, lower
    case for two towers, pooling of the last text position, output logits without a cap and, in a PaliGemma, no windows.
    A Gemma 2 or 3 of sizes that were never published has the window and scales of the smallest one.

    Raises:
      UserError: no model of ours, or weights missing, unexpected or misshapen.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in weights.shapes.items()}
    tops = {name.split('/')[0] for name in shapes}
    family = {
        frozenset({'img', 'txt', 't', 'b'}): 'siglip',
        frozenset({'img', 'llm'}): 'paligemma',
        frozenset({'llm'}): _decoder_family(shapes),
    }.get(frozenset(tops))
    if family is None:
        raise UserError(
            f'{weights.where} holds {", ".join(sorted(tops)[:6])}: a SigLIP has img, txt, t and b, a PaliGemma img and '
            'llm, a Gemma llm. A part of a model can be used through init_from.path'
        )
    try:
        model, image_size, max_patches = config.Model(), config.Contract().image_size, 0
        if 'img' in tops:
            if len(shapes['img/embedding/kernel']) == 2:
                image, max_patches = _naflex_tower(shapes, pooled=family == 'siglip'), NAFLEX_PATCHES
            else:
                image, image_size = _image_tower(shapes, pooled=family == 'siglip')
            if 'img/head/kernel' in shapes:
                image = dataclasses.replace(image, head_bias='img/head/bias' in shapes)
            model = dataclasses.replace(model, image=image)
        if family == 'siglip':
            model = dataclasses.replace(
                model, text=_text_tower(shapes), embed_dim=_embed_dim(shapes, shapes['img/embedding/kernel'][-1])
            )
            text_length, rows = shapes['txt/pos_embedding'][1], shapes[TOKENS['txt']][0]
        else:
            text_length, rows = paligemma_text_length(image_size), shapes[TOKENS['llm']][0]
            slots = (max_patches or shapes[POSITION][1]) + text_length if 'img' in tops else 0
            model = dataclasses.replace(model, decoder=_decoder(shapes, slots))
    except KeyError as error:
        raise UserError(f'{weights.where} is not a {family}: {error.args[0]} is missing') from None
    except (IndexError, ValueError, ZeroDivisionError):
        raise UserError(f'{weights.where} is not a {family}: its arrays have other numbers of axes') from None
    settings = config.Contract(
        image_size=image_size,
        max_patches=max_patches,
        resample='bilinear',
        antialias=max_patches > 0,
        text_length=text_length,
        lower=family == 'siglip',
    )
    if family == 'siglip':
        family = towers_family(settings)
    settings = OF_TEXT if family in DECODERS else settings
    return Pretrained(family, model, settings, rows, weights).check()


def family_of(stage: config.Stage) -> str:
    """Under which names others keep a stage's model: one of TOWERS, 'paligemma', or a decoder's alone."""
    if stage.task == 'contrastive':
        return towers_family(stage.contract)
    return 'paligemma' if stage.model.projector != 'none' else decoder_family(stage.model.decoder.variant)


def towers_family(settings: config.Contract) -> str:
    """Of a dual encoder with this preprocessing, one of TOWERS."""
    return 'siglip2' if settings.max_patches else 'siglip'


def padded(vocab_size: int, multiple: int = 64) -> int:
    """Rows of Hugging Face's token table: room for an image token, rounded up. 257,152 → 257,216."""
    return -(-(vocab_size + 1) // multiple) * multiple


def paligemma_text_length(image_size: int) -> int:
    """Text slots that PaliGemma was pretrained with (arXiv 2407.07726, section 3.2.1): 128 at 224 px, 512 above."""
    return 128 if image_size <= 224 else 512


def image_tower(patch_size: int, **sizes: int | str) -> config.ImageTower:
    """The section of a config: a variant by its name if there is one of these sizes."""
    name, rest = _named(vit.decode_variant, _VIT_NAMES, sizes)
    return config.ImageTower(variant=f'{name}/{patch_size}', **rest)


def text_tower(**sizes: int | str) -> config.TextTower:
    """The section of a config: a variant by its name if there is one of these sizes."""
    name, rest = _named(vit.decode_variant, _VIT_NAMES, sizes)
    return config.TextTower(variant=name, **rest)


def decoder(names: tuple[str, ...], **sizes: int) -> config.Decoder:
    """The section of a config: one of the variants `names` if it has these sizes, else sizes on top of the first."""
    name, rest = _named(gemma.decode_variant, names, sizes)
    return config.Decoder(variant=name, **rest)


def decoder_family(variant: str) -> str:
    """'gemma2_9b' → 'gemma2', one of DECODERS."""
    name = variant.split('_')[0]
    return 'gemma3_text' if name == 'gemma3' else name


def variants(family: str) -> tuple[str, ...]:
    """The published decoders of a family, the smallest first."""
    return tuple(name for name in VARIANTS if decoder_family(name) == family)


_VIT_NAMES = ('mu', 'omni_tiny', 'Ti', 'S', 'M', 'B', 'L', 'So400m', 'H', 'g', 'g-opt', 'G', 'G-opt', 'e')


def _named(decode, names, sizes):
    """(variant, the sizes that it does not say); what `sizes` leaves out is the variant's."""
    for name in names:
        variant = decode(name)
        if all(sizes.get(key, size) == size for key, size in variant.items()):
            return name, {key: size for key, size in sizes.items() if key not in variant}
    return names[0], sizes


def _image_tower(shapes: Mapping[str, tuple[int, ...]], pooled: bool) -> tuple[config.ImageTower, int]:
    """(the section, pixels per side)."""
    patch = shapes['img/embedding/kernel'][0]
    pool = 'map' if 'img/MAPHead_0/probe' in shapes else 'tok' if 'img/cls' in shapes else 'gap'
    pool = pool if pooled else 'none'
    tower = image_tower(patch, pool=pool, **_encoder(shapes, 'img/Transformer/'))
    patches = shapes[POSITION][1]
    return tower, _IMAGE_SIZES.get((patch, patches), math.isqrt(patches) * patch)


def _naflex_tower(shapes: Mapping[str, tuple[int, ...]], pooled: bool) -> config.ImageTower:
    patch = math.isqrt(shapes['img/embedding/kernel'][0] // 3)
    pool = 'map' if 'img/MAPHead_0/probe' in shapes else 'gap'
    return image_tower(patch, pool=pool if pooled else 'none', **_encoder(shapes, 'img/Transformer/'))


def _text_tower(shapes: Mapping[str, tuple[int, ...]]) -> config.TextTower:
    pool = 'map' if 'txt/MAPHead_0/probe' in shapes else 'last'
    return text_tower(pool=pool, **_encoder(shapes, 'txt/Encoder_0/'))


def _encoder(shapes: Mapping[str, tuple[int, ...]], at: str) -> dict[str, int]:
    depth, width, heads, _ = shapes[f'{at}encoderblock/MultiHeadDotProductAttention_0/query/kernel']
    mlp_dim = shapes[f'{at}encoderblock/MlpBlock_0/Dense_0/kernel'][-1]
    return dict(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=heads)


def _embed_dim(shapes: Mapping[str, tuple[int, ...]], width: int) -> int:
    """0 where it is the image tower's width."""
    embed_dim = shapes['txt/head/kernel'][-1]
    return 0 if embed_dim == width else embed_dim


def _decoder_family(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if 'llm/layers/attn/_query_norm/scale' in shapes:
        return 'gemma3_text'
    return 'gemma2' if 'llm/layers/post_ffw_norm/scale' in shapes else 'gemma'


def _decoder(shapes: Mapping[str, tuple[int, ...]], slots: int) -> config.Decoder:
    """`slots`: of a PaliGemma's rows, which no window cuts; 0 for a decoder alone."""
    depth, heads, head_dim, width = shapes['llm/layers/attn/attn_vec_einsum/w']
    kv_heads = heads
    if 'llm/layers/attn/kv_einsum/w' in shapes:
        kv_heads = shapes['llm/layers/attn/kv_einsum/w'][2]
    mlp_dim = shapes['llm/layers/mlp/linear'][1]
    sizes = dict(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    found = decoder(variants(_decoder_family(shapes)), **sizes)
    # Where it makes no difference, the published window is kept: others write it too.
    window = gemma.decode_variant(found.variant)['window']
    return dataclasses.replace(found, window=_CONTEXT) if 0 < window < slots else found
