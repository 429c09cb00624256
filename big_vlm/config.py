"""The schema of a run: one dataclass per section, and the errors a person reads.

A config file's `get_config(arg)` returns a `ConfigDict` (or a dict) with the keys below: one `Stage`, or several of
them named by `stages`. `validate` turns it into nested dataclasses and refuses, in one line that names the dotted key,
everything that this file can know to be wrong. Names that only a room knows (ops, variants, optimizers) are checked
there, with `unknown`. Reading the file and the command line's overrides is `config_file`'s work.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal


class UserError(Exception):
    """One line for a person: what is wrong, where, and the fix. Printed without a traceback, exit code 2."""


def unknown(kind: str, name: str, valid: Iterable[str], where: str = '') -> UserError:
    """The error for a name that does not exist: says what was meant, or lists the valid names. To be raised.

    >>> str(unknown('optimizer', 'adamww', ['adamw', 'adafactor'], 'config.optimizer.name'))
    "unknown optimizer 'adamww' (config.optimizer.name): did you mean 'adamw'? Valid: adafactor, adamw"
    """
    valid = sorted({str(v) for v in valid})
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    meant = f'did you mean {near[0]!r}? Valid: ' if near else 'valid: '
    shown = ', '.join(valid[:20]) + (f', … ({len(valid)} in all)' if len(valid) > 20 else '') if valid else '(none)'
    return UserError(f'unknown {kind} {name!r}{f" ({where})" if where else ""}: {meant}{shown}')


# A number's annotation carries the least value it may take.
Positive = Annotated[int, 1]
Count = Annotated[int, 0]
Amount = Annotated[float, 0.0]


@dataclass(frozen=True)
class Duration:
    """A length of training in one unit; giving two is an error. All zero: none."""

    steps: Count = 0  # global batches
    examples: Count = 0  # training examples seen
    epochs: Amount = 0.0  # passes over the stage's training examples
    percent: Amount = 0.0  # of the stage's total steps (not for `total` itself)

    def given(self) -> list[str]:
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name)]


@dataclass(frozen=True)
class Mesh:
    """Devices per axis; one axis may be -1, the rest of them."""

    data: int = -1  # batch shards with a full copy of the weights
    fsdp: int = 1  # batch shards among which each weight is split
    model: int = 1  # split inside layers (heads, mlp, vocabulary)


@dataclass(frozen=True)
class Contract:
    """How pixels and text become arrays; it travels with the weights."""

    image_size: Positive = 224  # pixels, square
    resample: Literal['bilinear', 'bicubic'] = 'bilinear'  # what `resize` uses
    antialias: bool = True  # low-pass before shrinking (PIL); False is big_vision's plain resize
    value_range: tuple[float, float] = (-1.0, 1.0)  # what 0 and 255 map to
    text_length: Positive = 64  # contrastive: text tokens; generative: text slots after the image slots
    lower: bool = True  # lower-case the text
    eos: bool = True  # contrastive text ends in eos, kept when the text is cut
    separator: str = '\n'  # between prompt and answer, tokenized on its own


@dataclass(frozen=True)
class Tokenizer:
    """A SentencePiece model."""

    path: str = ''  # '': train one from the training text of the stages
    vocab_size: Positive = 384  # pieces of a trained one, before the location and segmentation tokens


@dataclass(frozen=True)
class ImageTower:
    """A vision transformer. A size of 0 is the variant's own."""

    variant: str = 'B/16'  # name/patch size
    width: Count = 0
    depth: Count = 0
    mlp_dim: Count = 0
    num_heads: Count = 0
    pool: Literal['map', 'gap', 'tok', 'none'] = 'map'  # attention head, mean, class token, all patches
    position: Literal['learn', 'sincos2d'] = 'learn'  # position embedding
    dropout: Amount = 0.0


@dataclass(frozen=True)
class TextTower:
    """The dual encoder's text transformer. A size of 0 is the variant's own."""

    variant: str = 'B'
    width: Count = 0
    depth: Count = 0
    mlp_dim: Count = 0
    num_heads: Count = 0
    pool: Literal['last', 'first', 'mean', 'max', 'map'] = 'last'  # over positions; 'last' is SigLIP's
    mask: bool = False  # attend to and pool real tokens only; SigLIP attends to padding
    embed_init: Amount = 0.0  # stddev of the token embedding's init; 0: 1/sqrt(width)


@dataclass(frozen=True)
class Decoder:
    """The Gemma decoder. A size of 0 is the variant's own."""

    variant: str = 'gemma_2b'
    width: Count = 0
    depth: Count = 0
    mlp_dim: Count = 0
    num_heads: Count = 0
    num_kv_heads: Count = 0
    head_dim: Count = 0
    final_softcap: Amount = 0.0  # tanh cap of the output logits; 0: none (Gemma 2: 30)
    dropout: Amount = 0.0


@dataclass(frozen=True)
class Model:
    """The network and its loss."""

    image: ImageTower = ImageTower()
    text: TextTower = TextTower()  # contrastive only
    decoder: Decoder = Decoder()  # generative only
    embed_dim: Count = 0  # contrastive: joint embedding width; 0: the image tower's
    init_t: float = math.log(10.0)  # contrastive: log of the logit scale at init
    init_b: float = -10.0  # contrastive: logit bias at init
    loss: str = 'sigmoid'  # contrastive loss
    loss_form: Literal['dense', 'ring'] = 'dense'  # whole matrix of pairs, or blocks that travel around the devices
    average: Literal['example', 'token'] = 'example'  # generative loss: mean per example then batch, or over all tokens
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of activations and matmuls; parameters are float32
    remat: Literal['none', 'full'] = 'none'  # recompute each block in the backward pass
    scan: bool = True  # one compiled block for all layers


@dataclass(frozen=True)
class Source:
    """One source of the training mixture."""

    dataset: str = 'digit_scenes/cells'  # TFDS name
    split: str = 'train'
    weight: Amount = 1.0  # relative rate in the mixture
    pipeline: str = ''  # 'decode | resize(48) | ...'


@dataclass(frozen=True)
class Data:
    """Training data and how it is read."""

    sources: dict[str, Source] = field(default_factory=dict)
    data_dir: str = ''  # prepared datasets; '': ~/.cache/big_vlm
    workers: Count = 0  # processes; 0: threads of this one
    threads: Positive = 2  # decoding threads
    prefetch: Positive = 2  # batches made ahead


@dataclass(frozen=True)
class ParamRule:
    """What the optimizer does otherwise with the parameters that a regex matches."""

    lr: Amount = 1.0  # multiplies the learning rate
    decay: Amount | None = None  # multiplies the weight decay; None: 1 for weights, 0 for biases, norms, positions
    frozen: bool = False  # never updated, and no optimizer memory
    warmup: Duration = Duration()  # none: the optimizer's
    schedule: Literal['', 'cosine', 'linear', 'constant', 'rsqrt'] = ''  # '': the optimizer's


@dataclass(frozen=True)
class Optimizer:
    """The optimizer, its schedule, and exceptions by parameter."""

    name: str = 'adamw'  # or 'adafactor'
    lr: Amount = 1e-3  # peak
    b1: Amount = 0.9  # adamw: decay of the first moment (adafactor keeps none)
    b2: Amount = 0.99  # decay of the second moment (adafactor: its cap)
    eps: Amount = 1e-8  # adamw
    weight_decay: Amount = 0.0  # per step, times the learning rate
    clip: Amount = 1.0  # global gradient norm; 0: no clipping
    schedule: Literal['cosine', 'linear', 'constant', 'rsqrt'] = 'cosine'  # after the warmup, down to 0
    warmup: Duration = Duration()  # linear, from 0
    rules: tuple[tuple[str, ParamRule], ...] = ()  # (regex over the whole path, dict); the first match wins
    ema_decay: Amount = 0.0  # moving average of the parameters, per step; 0: none is kept


@dataclass(frozen=True)
class Checkpoint:
    """When the whole state is saved. The end of a stage always is."""

    every: Positive = 500  # steps
    keep: Positive = 1  # newest checkpoints kept


@dataclass(frozen=True)
class Eval:
    """One evaluation."""

    kind: Literal['zero_shot', 'retrieval', 'generation']
    dataset: str = 'digit_scenes/cells'
    split: str = 'validation'
    pipeline: str = ''
    where: dict[str, Any] = field(default_factory=dict)  # only records whose fields have these values
    examples: Count = 0  # the first so many; 0: all
    batch_size: Count = 0  # 0: the stage's
    every: Count = 0  # steps; 0: at the end only
    label: str = 'label'  # record field of the truth: class name (zero_shot), text that groups (retrieval), answer
    classes: tuple[str, ...] = ()  # zero_shot: the class names
    templates: tuple[str, ...] = ('{}',)  # zero_shot: prompts, '{}' is the class name
    metrics: tuple[str, ...] = ('exact_match',)  # generation
    max_new_tokens: Positive = 32  # generation


@dataclass(frozen=True)
class InitFrom:
    """Where the first weights come from. Both empty: random."""

    stage: str = ''  # an earlier stage of this run
    path: str = ''  # a bundle or a checkpoint
    parts: dict[str, str] = field(default_factory=dict)  # our subtree: theirs; '' is the whole tree; {}: everything
    resize_position: bool = True  # resize learned position embeddings to our resolution


@dataclass(frozen=True)
class Stage:
    """One training stage, complete in itself."""

    task: Literal['contrastive', 'generative']
    total: Duration = Duration()  # how long; required
    batch_size: Positive = 64  # global, examples
    seed: int = 0  # of the init, the data order and dropout
    mesh: Mesh = Mesh()
    contract: Contract = Contract()
    tokenizer: Tokenizer = Tokenizer()
    model: Model = Model()
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = Optimizer()
    checkpoint: Checkpoint = Checkpoint()
    log_every: Positive = 50  # steps
    evals: dict[str, Eval] = field(default_factory=dict)
    init_from: InitFrom = field(default_factory=InitFrom)


def validate(config: Any) -> dict[str, Stage]:
    """All stages of a run, in their order.

    Args:
      config: a ConfigDict or dict. With `stages` (a tuple of names) it holds one sub-config per name; sub-configs that
        `stages` leaves out are checked too, but not returned. Without, it is one stage, called 'train'.

    Raises:
      UserError: an unknown key, a wrong type, a value out of range, a missing or doubled duration, a bad stage order.
    """
    raw = _plain(config)
    if not isinstance(raw, dict):
        raise UserError(f'config: get_config must return a ConfigDict, not {type(config).__name__}')
    if 'stages' not in raw:
        return {'train': parse_stage(raw, 'config')}
    names = _coerce(tuple[str, ...], raw['stages'], 'config.stages')
    if not names or len(set(names)) != len(names):
        raise UserError(f'config.stages: name every stage once, got {names!r}')
    stages = {}
    for name in [*names, *sorted(set(raw) - {'stages', *names})]:
        if not re.fullmatch(r'\w+', name):
            raise UserError(f'config.stages: {name!r} is no name for a folder: use letters, digits and _')
        if not isinstance(raw.get(name), dict):
            if name in names:
                raise unknown('stage', name, [k for k in raw if isinstance(raw[k], dict)], 'config.stages')
            raise unknown('key', name, ['stages', *names], 'config')
        stage = parse_stage(raw[name], f'config.{name}')
        source = stage.init_from.stage
        if name in names and source and source not in names[: names.index(name)]:
            raise unknown('earlier stage', source, names[: names.index(name)], f'config.{name}.init_from.stage')
        stages[name] = stage
    return {name: stages[name] for name in names}


def parse_stage(config: Any, where: str = 'config') -> Stage:
    """One checked stage from a dict, as `to_dict` wrote it. Raises UserError with keys that begin with `where`."""
    stage = _coerce(Stage, _plain(config), where)
    if not stage.total.given():
        raise UserError(f'{where}.total: say how long to train: one of steps, examples, epochs')
    if stage.total.percent:
        raise UserError(f'{where}.total.percent: a percentage of what? Give steps, examples or epochs')
    if not stage.data.sources:
        raise UserError(f'{where}.data.sources is empty: name at least one source')
    if not any(source.weight for source in stage.data.sources.values()):
        raise UserError(f'{where}.data.sources: every weight is 0')
    if stage.contract.value_range[0] >= stage.contract.value_range[1]:
        raise UserError(f'{where}.contract.value_range: must rise, got {stage.contract.value_range}')
    if stage.init_from.stage and stage.init_from.path:
        raise UserError(f'{where}.init_from: stage and path are both given; keep one')
    for name in ('b1', 'b2', 'ema_decay'):
        if getattr(stage.optimizer, name) >= 1:
            raise UserError(f'{where}.optimizer.{name}: must be below 1, got {getattr(stage.optimizer, name)}')
    for name, evaluation in stage.evals.items():
        if evaluation.kind == 'zero_shot' and not (evaluation.classes and evaluation.templates):
            raise UserError(f'{where}.evals.{name}: zero_shot needs classes and templates')
        if evaluation.kind == 'generation' and not evaluation.metrics:
            raise UserError(f'{where}.evals.{name}.metrics is empty: name at least one metric')
    for pattern, _ in stage.optimizer.rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f'{where}.optimizer.rules: {pattern!r} is no regular expression: {error}') from None
    return stage


def to_dict(section: Any) -> dict[str, Any]:
    """Plain dicts, lists and numbers of a section, or of `validate`'s result: ready for JSON, and for `validate`."""
    if isinstance(section, Mapping):
        return {'stages': list(section), **{name: to_dict(stage) for name, stage in section.items()}}
    return _plain(dataclasses.asdict(section))


def _plain(value: Any) -> Any:
    if hasattr(value, 'items'):
        value = value.to_dict() if hasattr(value, 'to_dict') else value
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def section_types(section: type) -> dict[str, Any]:
    """Field name → annotated type of a section."""
    return typing.get_type_hints(section, include_extras=True)


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`, or a UserError that names `where`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        return _section(kind, _want(dict, value, where, 'a section'), where)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _coerce(args[0], value, where)
    if origin is Annotated:
        number = _coerce(args[0], value, where)
        if number < args[1]:
            raise UserError(f'{where}: must be at least {args[1]}, got {value!r}')
        return number
    if origin is Literal:
        if value not in args:
            raise unknown('value', value, args, where)
        return value
    if origin is dict:
        items = _want(dict, value, where, 'a dict').items()
        return {str(key): _coerce(args[1], item, f'{where}.{key}') for key, item in items}
    if origin is tuple:
        items = _want((list, tuple), value, where, 'a tuple')
        inner = [args[0]] * len(items) if args[-1] is Ellipsis else args
        if len(items) != len(inner):
            raise UserError(f'{where}: must have {len(inner)} entries, got {value!r}')
        return tuple(_coerce(k, item, f'{where}[{i}]') for i, (k, item) in enumerate(zip(inner, items, strict=True)))
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f'{where}: must be finite, got {value!r}')
        return float(value)
    if kind is int and isinstance(value, bool):
        raise UserError(f'{where}: must be int, got {value!r}')
    return _want(kind, value, where, kind.__name__)


def _want(kind: Any, value: Any, where: str, what: str) -> Any:
    if not isinstance(value, kind):
        raise UserError(f'{where}: must be {what}, got {value!r}')
    return value


def _section(kind: type, value: dict[str, Any], where: str) -> Any:
    hints = section_types(kind)
    for key in value:
        if key not in hints:
            raise unknown('key', key, hints, where)
    for f in dataclasses.fields(kind):
        if f.name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f'{where}.{f.name} is missing')
    section = kind(**{key: _coerce(hints[key], item, f'{where}.{key}') for key, item in value.items()})
    if kind is Duration and len(section.given()) > 1:
        both = ' and '.join(section.given())
        raise UserError(f'{where}: {both} are both given; keep one and set the other to 0')
    return section
