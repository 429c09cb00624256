"""The operations of the pipeline language. Each changes an example in place: `operation(example, context, …)`.

What they raise decides what happens: a UserError is a wrong pipeline and stops the run; anything else is a bad example,
which training replaces and evaluation leaves out; both count it and name the first ones.

    decode            the picture's bytes → uint8 RGB; several pictures, a list of them, → a list
    frames            of a video instead: some frames, as far apart as can be
    resize            to a square, as the contract says unless told otherwise
    decode_resize     decode and resize in one, much faster, and off by a grey level here and there
    naflex            to patches at its own aspect ratio, as the contract says
    value_range       what 0 and 255 become: checked against the contract
    resize_small, resize_long, central_crop, random_crop, inception_crop, flip_lr, randaugment, random_jpeg,
    shuffle_channels, draw_boxes
                      see `augmentations`; boxes move with the pixels
    views             crops in other colours, for self-distillation (training)
    text              a dual encoder's text and text_mask
    ground            what its captioner learns of an object: from the name to the box, and back (training)
    copy              a field under a second name: of a picture called otherwise, copy('img', 'image')
    first, choice, majority, pick, join, lower, options
                      fields of fields: one of several captions, the commonest answer, lettered options (see `fields`)
    prefix, suffix    prompt and answer, from a field or a template: suffix('{caption}')
    question          prompt and answer from the example's questions, one at random
    dialogue          several of them, one after another in one row (training)
    also              what follows asks something else about the same image, in the same row (training)
    detect            prompt and answer for boxes of an object, or of every digit
    masks             the objects' masks, before what moves pixels
    segment           prompt and answer for masks of an object
    mask              what a mask VQ-VAE learns from
    tokenize          the decoder's rows from prefix and suffix

An example may carry `objects` (columns bbox, and label or color and digit; masks: see `data/objects.py`) and
`questions` (columns question, answer, kind).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from big_vlm.config import UserError, unknown
from big_vlm.data import antialias as smoothing
from big_vlm.data import augmentations, fields, images, mask_codes, objects, prompts, segmentation, videos
from big_vlm.data import naflex as patches
from big_vlm.data import views as crops
from big_vlm.data.builders import scene_language
from big_vlm.data.coordinates import box_to_text, boxes_to_text

if TYPE_CHECKING:
    from big_vlm.data.transforms import Context

Example = dict[str, Any]


def decode(example: Example, context: 'Context', key: str = 'image') -> None:
    """Encoded picture → uint8 [H,W,3] (`images.decode`), a list of them → a list. `decoded_size` is its (H, W)."""
    picture = fields.get(example, key)
    several = isinstance(picture, list | tuple)
    decoded = [images.decode(images.of_record(one, key)) for one in (picture if several else [picture])]
    example[key] = decoded if several else decoded[0]
    if key == 'image' and not several:
        example['decoded_size'] = decoded[0].shape[:2]


def frames(example: Example, context: 'Context', count: Annotated[int, 1]) -> None:
    """A video's file or bytes, or a list of its frames → a list of `count` uint8 [H,W,3], or all (`videos.frames`)."""
    video = fields.get(example, 'image')
    for one in video if isinstance(video, list | tuple) else [video]:
        images.of_record(one, 'image')
    example['image'] = videos.frames(video, count)


def check_frames(contract: Any, count: int) -> None:
    """Refuses more frames than an example may have images: UserError."""
    if count > contract.images:
        raise UserError(f'frames({count}), but contract.images is {contract.images}: raise it, or take fewer')


def resize(
    example: Example,
    context: 'Context',
    size: int,
    method: Literal['', 'bilinear', 'bicubic'] = '',
    antialias: bool | None = None,
) -> None:
    """uint8 [H,W,3] → uint8 [size,size,3], several → [n,size,size,3]; the contract decides what is left open.

    More pictures than `contract.images` are a bad example.
    """
    contract = context.contract
    check_size(contract, size)
    found = fields.pictures(example, 'resize')
    several = isinstance(found, list) or found.ndim == 4
    smooth = contract.antialias if antialias is None else antialias
    resized = [
        images.resize(picture, size, method or contract.resample, smooth) for picture in (found if several else [found])
    ]
    _set_resized(example, context, resized, several)


def decode_resize(example: Example, context: 'Context', size: int) -> None:
    """`decode | resize(size)` for contracts with antialias, in less time: under half of it for large pictures.

    The pixels are not quite the same. The filter is computed in float32 (`antialias`), and of a JPEG at least four
    times as large only the low frequencies are decoded; docs/benchmarks.md says what both save and cost.
    """
    contract = context.contract
    check_size(contract, size)
    if not contract.antialias:
        raise UserError(f'decode_resize({size}), but contract.antialias is False: write decode | resize({size})')
    found = fields.get(example, 'image')
    several = isinstance(found, list | tuple)
    decoded = [images.decode(images.of_record(one, 'image'), least=2 * size) for one in (found if several else [found])]
    resized = [smoothing.resize(picture, size, contract.resample) for picture in decoded]
    _set_resized(example, context, resized, several)
    if not several:
        example['decoded_size'] = decoded[0].shape[:2]


def _set_resized(example: Example, context: 'Context', resized: list[np.ndarray], several: bool) -> None:
    """As `image`, one or an array of several."""
    if not 0 < len(resized) <= context.contract.images:
        raise ValueError(f'{len(resized)} pictures, and contract.images is {context.contract.images}')
    example['image'] = np.stack(resized) if several else resized[0]


def check_size(contract: Any, size: int, *_: Any, **__: Any) -> None:
    """Refuses a resize to another size than the contract's: UserError."""
    if contract.max_patches:
        raise UserError(f'resize({size}), but contract.max_patches is set: write naflex({contract.max_patches})')
    if size != contract.image_size:
        raise UserError(f'resize({size}), but contract.image_size is {contract.image_size}: make them the same')


def value_range(example: Example, context: 'Context', low: float, high: float) -> None:
    """What 0 and 255 become on the device; only checked here, the contract has it."""
    check_range(context.contract, low, high)


def check_range(contract: Any, low: float, high: float) -> None:
    """Refuses another range of values than the contract's: UserError."""
    if (low, high) != tuple(contract.value_range):
        raise UserError(
            f'value_range({low}, {high}), but contract.value_range is {tuple(contract.value_range)}: make them the same'
        )


def naflex(example: Example, context: 'Context', max_patches: int, *lengths: Annotated[int, 1]) -> None:
    """uint8 [H,W,3] → `patches`, `patch_mask` and `patch_grid` instead of `image` (`naflex.rows`).

    With `lengths`, of at most as many patches as one of them says, at random, in the same rows: the first if not in
    training.
    """
    patches.check(context.contract, max_patches, *lengths)
    length = 0
    if lengths:
        length = lengths[context.rng.integers(len(lengths)) if context.train else 0]
    example.update(patches.rows(fields.picture(example, 'naflex'), context.contract, length))
    del example['image']


def views(
    example: Example,
    context: 'Context',
    count: Annotated[int, 1],
    size: Annotated[int, 1],
    area: float = 0.4,
    augment: bool = True,
) -> None:
    """`global_view` uint8 [S,S,3], S the contract's, and `local_views` uint8 [count,size,size,3]. Training only.

    Before resize, of the picture as it was. The global view covers at least the share `area` of it, local ones at most;
    `augment` changes their colours (`views.views`).
    """
    if not context.train:
        return
    if not crops.SMALLEST <= area <= 1:
        raise UserError(f'views(area={area:g}): a share of the picture, from {crops.SMALLEST:g} to 1')
    sizes, method = (context.contract.image_size, size), context.contract.resample
    picture = fields.picture(example, 'views')
    made = crops.views(picture, sizes, count, area, augment, method, context.rng)
    example['global_view'], example['local_views'] = made


def text(example: Example, context: 'Context', source: str) -> None:
    """`text` int32 [T] and `text_mask` bool [T] of a field ('caption') or a template ('a photo of {caption}').

    In training an empty text is a bad example. `full_text` is what was not cut yet.
    """
    words = fields.cased(_fill(example, source), context)
    if context.train and not words.strip():
        raise ValueError('the text is empty')
    example['full_text'], ids = words, context.tokenizer.encode(words)
    example['text'], example['text_mask'] = prompts.contrastive_text(ids, context.contract)


def ground(example: Example, context: 'Context') -> None:
    """`grounded` int32 [2,T] and `grounded_mask` bool [2,T] about an object at random; without any, nothing to learn.

    Referring expressions, 'refer red three' → '<loc…><loc…><loc…><loc…>', and grounded captions, 'describe <loc…>…' →
    'red three' (LocCa, arXiv 2403.19596, section 3). Objects whose name no other has go first; boxes are cut as
    `detect` does. Training only.
    """
    if not context.train:
        return
    encode, contract = context.tokenizer.encode, context.contract
    names, boxes = objects.inside(fields.get(example, 'objects'))
    names = [fields.cased(name, context) for name in names]
    if not names:
        example['grounded'] = np.full((2, contract.text_length), contract.pad_id, np.int32)
        example['grounded_mask'] = np.zeros((2, contract.text_length), bool)
        return
    told_apart = [i for i, name in enumerate(names) if names.count(name) == 1] or range(len(names))
    i = told_apart[context.rng.integers(len(told_apart))]
    box = box_to_text(*map(float, boxes[i]))
    pairs = (f'refer {names[i]}', box), (f'describe {box}', names[i])
    rows = [prompts.grounded_text(encode(prompt), encode(answer), contract) for prompt, answer in pairs]
    example['grounded'], example['grounded_mask'] = map(np.stack, zip(*rows, strict=True))


def prefix(example: Example, context: 'Context', template: str) -> None:
    """The prompt: plain words ('caption en') or a template with fields ('{question}')."""
    example['prefix'] = fields.cased(fields.fill(example, template), context)


def suffix(example: Example, context: 'Context', template: str) -> None:
    """The answer, from a template with fields ('{caption}')."""
    example['suffix'] = fields.cased(fields.fill(example, template), context)


def question(example: Example, context: 'Context', *kinds: str) -> None:
    """Prompt, answer and `kind` of one of the example's questions: a kind at random, then one of that kind.

    With `kinds`, only of those; an example that has none is a bad one.
    """
    _ask(example, context, 1, kinds)


def dialogue(example: Example, context: 'Context', turns: Annotated[int, 1], *kinds: str) -> None:
    """`question`, and in training up to `turns` of them, all different: the image is encoded once for all answers."""
    _ask(example, context, turns if context.train else 1, kinds)


def _ask(example: Example, context: 'Context', turns: int, kinds: Sequence[str]) -> None:
    """`prefix`, `suffix` and `kind` of a first question, and (prefix, suffix) of others as `more`."""
    every, questions, answers = (
        fields.texts(fields.column(example, f'questions/{key}'), f'questions/{key}')
        for key in ('kind', 'question', 'answer')
    )
    present = list(dict.fromkeys(every))
    for kind in kinds:
        if kind not in present and kind not in scene_language.KINDS:
            raise ValueError(unknown('question kind', kind, {*present, *scene_language.KINDS}))
    left = {kind: [i for i, k in enumerate(every) if k == kind] for kind in present if not kinds or kind in kinds}
    if not left:
        raise ValueError(f'no question of kind {", ".join(kinds) or "any"} (it has {", ".join(present) or "none"})')
    example['more'] = []
    for turn in range(turns):
        eligible = [kind for kind, rows in left.items() if rows]
        if not eligible:
            break
        kind = eligible[context.rng.integers(len(eligible))]
        row = left[kind].pop(context.rng.integers(len(left[kind])))
        texts = fields.cased(questions[row], context), fields.cased(answers[row], context)
        if turn:
            example['more'].append(texts)
        else:
            example['kind'] = kind
            example['prefix'], example['suffix'] = texts


def also(example: Example, context: 'Context') -> None:
    """Ends a turn: what follows asks something else about the same image. Training only."""
    if not context.train:
        raise UserError('also: an evaluation asks one thing about an image')
    turns = example.setdefault('turns', [])
    turns.append((fields.get(example, 'prefix'), fields.get(example, 'suffix')))
    turns.extend(example.pop('more', ()))
    del example['prefix'], example['suffix']


def detect(example: Example, context: 'Context', what: Literal['object', 'digit'] = 'object') -> None:
    """Prompt and answer for boxes: 'detect red three', an object at random, or 'detect digit', all of them.

    The answer names each box: '<loc…><loc…><loc…><loc…> red three', several joined by ' ; ', in the scene's order.
    `boxes` float [N,4] (y1 x1 y2 x2 in 0..1) stay in the record. A box is cut at the picture's edge; what is left of
    one outside, or of one with its ends the wrong way round, is no object.
    """
    names, boxes = objects.inside(fields.get(example, 'objects'))
    if not names:
        raise ValueError('nothing to detect: the example has no objects inside its picture')
    if what == 'digit':
        target, chosen = 'digit', list(range(len(names)))
    else:
        target = names[context.rng.integers(len(names))]
        chosen = [i for i, name in enumerate(names) if name == target]
    example['boxes'] = boxes[chosen]
    example['prefix'] = fields.cased(f'detect {target}', context)
    labels = [names[i] for i in chosen]
    example['suffix'] = fields.cased(
        boxes_to_text([tuple(map(float, box)) for box in example['boxes']], labels), context
    )


def tokenize(example: Example, context: 'Context') -> None:
    """The decoder's rows (`prompts.generative_row`) from `prefix` and, in training, `suffix` and further turns.

    The picture gets its leading axis, and `image_mask` says which images are real; the slots of those that are missing,
    and where it is NaFlex's, slots without a patch, become padding. A decoder alone gets no picture. A prompt that does
    not fit makes a bad example; so does, in training, an empty answer. All turns of
    the row are left in `turns`, those that did not fit too.
    """
    encode = context.tokenizer.encode
    last = fields.get(example, 'prefix'), fields.get(example, 'suffix') if context.train else None
    example['turns'] = [*example.pop('turns', ()), last, *example.pop('more', ())]
    (prefix, suffix), *more = example['turns']
    if suffix is not None and not suffix.strip():
        raise ValueError('the answer is empty')
    try:
        answer = None if suffix is None else encode(suffix)
        more = [tuple(map(encode, turn)) for turn in more]
        row = prompts.generative_row(encode(prefix), answer, context.contract, more)
    except prompts.TooLong as error:
        raise ValueError(str(error)) from error
    if count := context.contract.max_patches:
        if 'patches' not in example:
            raise UserError(f'tokenize before naflex: write naflex({count}) first')
        example.update(prompts.shorter_image(row, int(example['patch_mask'].sum()), context.contract))
    elif context.contract.image_tokens:
        found = fields.alike(example, 'tokenize')
        example.update(prompts.with_images(row, found if found.ndim == 4 else found[None], context.contract))
    else:
        example.pop('image', None)
        example.update(row)


_ALL = (
    decode, frames, resize, decode_resize, value_range, naflex, *augmentations.OPERATIONS, views, text, ground,
    *fields.OPERATIONS, prefix, suffix, question, dialogue, also, detect, *segmentation.OPERATIONS, tokenize,
)  # fmt: skip
# Operations whose arguments the contract has to agree with.
CHECKS: dict[str, Callable[..., None]] = {
    'resize': check_size,
    'decode_resize': check_size,
    'frames': check_frames,
    'inception_crop': check_size,
    'naflex': patches.check,
    'value_range': check_range,
}
OPERATIONS: dict[str, Callable[..., None]] = {operation.__name__: operation for operation in _ALL}

# Which operations must not come after which others, and why. Resizing moves nothing: places are parts of the picture.
_MOVES = ('central_crop', 'random_crop', 'inception_crop', 'flip_lr', 'randaugment')
_PLACES = ('detect', 'segment', 'ground')
_TAKES_ONE = ('naflex', 'views', 'resize_small', 'resize_long', 'draw_boxes', 'random_jpeg', 'randaugment')
ORDER: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (_MOVES, ('masks',), 'masks that are read later would not fit: write masks before {before}'),
    (_PLACES, _MOVES, 'what {before} has written would not fit: write {after} before {before}'),
    (('frames',), _TAKES_ONE, '{after} takes one picture, and frames makes several: leave {after} out'),
)

# operation → the arrays that it adds to what the model reads of the picture and the text: (shape, dtype) by name.
ADDS: dict[str, Callable[..., dict[str, tuple[tuple[int, ...], type]]]] = {
    'views': lambda contract, count, size, *_, **__: {
        'global_view': ((contract.image_size, contract.image_size, 3), np.uint8),
        'local_views': ((count, size, size, 3), np.uint8),
    },
    'ground': lambda contract: {
        'grounded': ((2, contract.text_length), np.int32),
        'grounded_mask': ((2, contract.text_length), bool),
    },
    'mask': lambda contract, what='object': {'mask': ((mask_codes.SIDE, mask_codes.SIDE), np.uint8)},
}


def _question_texts(record: dict, *kinds: str) -> Iterator[str]:
    for key in ('question', 'answer'):
        yield from fields.texts(fields.column(record, f'questions/{key}'), f'questions/{key}')


def _detect_texts(record: dict, what: str = 'object') -> Iterator[str]:
    for name in dict.fromkeys(objects.names(fields.get(record, 'objects'))):
        yield f'detect {name if what == "object" else what}'
        # As an answer holds it: after a location token, with a space in front, and the joint between two.
        yield f' {name} ; '


def _ground_texts(record: dict) -> Iterator[str]:
    for name in dict.fromkeys(objects.names(fields.get(record, 'objects'))):
        yield f'refer {name}'
        yield f'describe {name}'


def _segment_texts(record: dict, codes: str, what: str = 'object') -> Iterator[str]:
    for name in dict.fromkeys(objects.names(fields.get(record, 'objects'))):
        yield name if what == 'phrase' else f'segment {name}'
        yield f' {name} ; '


def _mask_texts(record: dict, what: str = 'object') -> Iterator[str]:
    # A mask has no text, and a run has a tokenizer: it learns what the masks are of.
    if what == 'object':
        yield from objects.names(fields.get(record, 'objects'))


# The texts that an operation takes from a record.
TEXTS: dict[str, Callable[..., Iterator[str]]] = {
    'text': lambda record, source: iter([_fill(record, source)]),
    'prefix': lambda record, template: iter([fields.fill(record, template)]),
    'suffix': lambda record, template: iter([fields.fill(record, template)]),
    'question': _question_texts,
    'dialogue': lambda record, turns, *kinds: _question_texts(record, *kinds),
    'detect': _detect_texts,
    'segment': _segment_texts,
    'mask': _mask_texts,
    'ground': _ground_texts,
}


def _fill(example: Example, source: str) -> str:
    """A field, or a template of fields."""
    return fields.fill(example, source) if '{' in source else fields.text(example, source)
