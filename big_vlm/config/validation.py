"""From nested dicts to checked dataclasses and back.

Everything that the schema can know to be wrong is refused here, in one line that names the dotted key. Names that only
a room knows (ops, variants, optimizers) are checked there, with `unknown`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from big_vlm.config.errors import UserError, unknown
from big_vlm.config.schema import (
    Contract,
    Decoder,
    Duration,
    ImageTower,
    InitFrom,
    Lora,
    Masks,
    Model,
    Optimizer,
    Pack,
    Stage,
)

# Settings of `model` that one task alone takes.
_OF_PAIRS = ('text', 'embed_dim', 'init_t', 'max_logit_scale', 'init_b', 'loss', 'direction', 'loss_form')
_OF_ANSWERS = ('projector', 'image_tokens', 'average', 'token_loss', 'token_chunk', 'label_smoothing')


def validate(config: Any) -> dict[str, Stage]:
    """All stages of a run, in their order.

    Args:
      config: a ConfigDict or dict. With `stages` (a tuple of names) it holds one sub-config per name; sub-configs that
        `stages` leaves out are checked too, but not returned. Without, it is one stage, called 'train'.

    Raises:
      UserError: an unknown key, a wrong type, a value out of range, a missing or doubled duration, a bad stage order.
    """
    raw = plain(config)
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
        earlier = names[: names.index(name)] if name in names else []
        for key, source in stage.init_from.given().items():
            if name in names and source.stage and source.stage not in earlier:
                raise unknown('earlier stage', source.stage, earlier, f'config.{name}.{key}.stage')
        stages[name] = stage
    return {name: stages[name] for name in names}


def parse_stage(config: Any, where: str = 'config', *, trained: bool = True) -> Stage:
    """One checked stage from a dict, as `to_dict` wrote it. Raises UserError with keys that begin with `where`.

    `trained`: False accepts the stage of a converted model, which has neither a duration nor data.
    """
    stage = _coerce(Stage, plain(config), where)
    if trained:
        _trainable(stage, where)
        _check_taken(stage, f'{where}.model')
    if stage.contract.value_range[0] >= stage.contract.value_range[1]:
        raise UserError(f'{where}.contract.value_range: must rise, got {stage.contract.value_range}')
    for name, unset in (('image_alone', False), ('causal_prompt', False), ('images', 1)):
        if getattr(stage.contract, name) != unset and stage.task != 'generative':
            raise UserError(f'{where}.contract.{name}: a {stage.task} stage has no prompts; leave it out')
    if stage.contract.images > 1 and (stage.contract.max_patches or stage.model.projector == 'none'):
        unfit = 'contract.max_patches' if stage.contract.max_patches else "model.projector 'none'"
        raise UserError(f'{where}.contract.images: several images do not go with {unfit}; leave it at 1')
    if stage.contract.max_patches and stage.contract.image_size != Contract.image_size:
        raise UserError(f'{where}.contract: image_size and max_patches are both given; keep one')
    _check_pack(stage, where)
    for key, source in stage.init_from.given().items():
        if source.stage and source.path:
            raise UserError(f'{where}.{key}: stage and path are both given; keep one')
    init = stage.init_from
    if init.state and init != InitFrom(stage=init.stage or '?', state=True, resize_method=init.resize_method):
        raise UserError(f'{where}.init_from.state: it takes all of one stage: give stage and nothing else beside it')
    _check_extras(stage, where)
    shares = {f'optimizer.{name}': getattr(stage.optimizer, name) for name in ('b1', 'b2', 'ema_decay')}
    shares |= {f'model.{name}.dropout': getattr(stage.model, name).dropout for name in ('image', 'text', 'decoder')}
    for key, share in shares.items():
        if share >= 1:
            raise UserError(f'{where}.{key}: must be below 1, got {share}')
    if init.state and stage.optimizer.ema_warmup:
        raise UserError(f'{where}.optimizer.ema_warmup: it would forget the averages that init_from.state goes on with')
    for name in ('ema_warmup', 'ema_use'):
        if not stage.optimizer.ema_decay and getattr(stage.optimizer, name) != getattr(Optimizer, name):
            raise UserError(
                f'{where}.optimizer.{name}: without ema_decay there is no average; give it, or leave {name} out'
            )
    start, end = stage.optimizer.curve
    if not 0 <= start < end <= 1:
        raise UserError(f'{where}.optimizer.curve: must rise between 0 and 1, got {stage.optimizer.curve}')
    if (start, end) != Optimizer.curve and stage.optimizer.schedule not in ('cosine', 'linear'):
        raise UserError(
            f"{where}.optimizer.curve: schedule='{stage.optimizer.schedule}' has no end to be part of; leave curve out"
        )
    _kept(stage, f'{where}.checkpoint')
    if stage.guards.spike_steps > 50:
        raise UserError(f'{where}.guards.spike_steps: at most 50, as a spike is told from the last 100 losses')
    if stage.guards.spike_steps and not stage.guards.spike:
        raise UserError(f'{where}.guards.spike_steps: guards.spike is 0, so nothing is a spike: set it')
    if stage.profile != Stage.profile and not 1 <= stage.profile[0] <= stage.profile[1]:
        raise UserError(f'{where}.profile: must be the first and the last step, from 1 on, got {stage.profile}')
    for name, evaluation in stage.evals.items():
        if evaluation.kind == 'zero_shot' and not (evaluation.classes and evaluation.templates):
            raise UserError(f'{where}.evals.{name}: zero_shot needs classes and templates')
        if evaluation.kind == 'generation' and not evaluation.metrics:
            raise UserError(f'{where}.evals.{name}.metrics is empty: name at least one metric')
        if evaluation.choices and evaluation.choices_field:
            raise UserError(f'{where}.evals.{name}: choices and choices_field are both given; keep one')
        if evaluation.kind in ('calibration', 'linear_probe') and evaluation.fit_split in ('', evaluation.split):
            raise UserError(
                f'{where}.evals.{name}.fit_split: {evaluation.fit_split!r}, but it has to be another split than '
                f'{evaluation.split!r}, on which the fit is judged'
            )
    patterns = {
        'optimizer.rules': [pattern for pattern, _ in stage.optimizer.rules],
        'lora.rules': [pattern for pattern, _ in stage.lora.rules],
        'lora.train': stage.lora.train,
    }
    for key, pattern in ((key, pattern) for key, group in patterns.items() for pattern in group):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f'{where}.{key}: {pattern!r} is no regular expression: {error}') from None
    if stage.lora.rules and stage.model.image.norm == 'batch':
        raise UserError(
            f'{where}.lora: adapters would not hold the running statistics that training moves: take model.image.norm='
            "'group'"
        )
    if not stage.lora.rules and stage.lora != Lora():
        raise UserError(f'{where}.lora: without rules there are no adapters; give rules, or leave the section out')
    return stage


def _check_taken(stage: Stage, where: str) -> None:
    """Refuses what of the model's section a stage makes no use of."""
    if stage.task == 'mask_autoencoder':
        return  # which makes use of nothing but its own, see `_check_extras`
    takers = dict.fromkeys(_OF_PAIRS, 'contrastive') | dict.fromkeys(_OF_ANSWERS, 'generative')
    for name, task in takers.items():
        if getattr(stage.model, name) != getattr(Model(), name) and stage.task != task:
            raise UserError(f'{where}.{name}: a {stage.task} stage makes no use of it; leave it out')
    if stage.task == 'contrastive' and stage.model.text.kind != 'gemma' and stage.model.decoder != Decoder():
        raise UserError(f'{where}.decoder: a text tower of kind {stage.model.text.kind!r} has none; leave it out')
    if stage.model.projector == 'none' and stage.model.image != ImageTower():
        raise UserError(f"{where}.image: with projector 'none' there is no image tower; leave it out")


def _check_pack(stage: Stage, where: str) -> None:
    pack, length = stage.pack, stage.contract.text_length
    if pack == Pack():
        return
    if pack.examples == 1:
        raise UserError(f'{where}.pack: one example a row is none packed: set pack.examples, or leave the section out')
    if stage.task != 'generative':
        raise UserError(f'{where}.pack: the batch of a {stage.task} stage has no rows to share; leave it out')
    if stage.contract.max_patches:
        raise UserError(f'{where}.pack: with contract.max_patches a row has one image; leave one of them out')
    if not length <= pack.text_length <= pack.examples * length:
        raise UserError(
            f'{where}.pack.text_length: {pack.examples} examples share at least the {length} text slots of '
            f'contract.text_length and need at most {pack.examples * length}, got {pack.text_length}'
        )
    if stage.batch_size % pack.examples:
        raise UserError(
            f'{where}.batch_size: {stage.batch_size} examples do not fill rows of pack.examples={pack.examples}: use '
            f'{-(-stage.batch_size // pack.examples) * pack.examples}'
        )


def _kept(stage: Stage, where: str) -> None:
    settings = stage.checkpoint
    if settings.keep_every % settings.every:
        raise UserError(f'{where}.keep_every: {settings.keep_every} is no multiple of every={settings.every}')
    evaluation, slash, metric = settings.best.partition('/')
    if settings.best and evaluation not in stage.evals:
        raise unknown('evaluation', evaluation, stage.evals, f'{where}.best')
    if settings.best and not (slash and metric):
        raise UserError(f'{where}.best: {settings.best!r} names no metric: write {evaluation}/METRIC')
    if settings.best and not stage.evals[evaluation].every:
        raise UserError(f'{where}.best: evals.{evaluation}.every is 0, so only the end has a score: set it')


def _check_extras(stage: Stage, where: str) -> None:
    """What is trained beside a contrastive loss, and the codebook of masks."""
    captioner, distill, key = stage.model.captioner, stage.model.distill, f'{where}.model'
    if stage.model.masks != Masks() and stage.task != 'mask_autoencoder':
        raise UserError(f'{key}.masks: a {stage.task} stage has no codebook; leave it out')
    given = [f.name for f in dataclasses.fields(Model) if getattr(stage.model, f.name) != getattr(Model(), f.name)]
    if stage.task == 'mask_autoencoder' and (others := [name for name in given if name != 'masks']):
        raise UserError(f'{key}.{others[0]}: a mask autoencoder has one form, in float32; leave all but masks out')
    if stage.model.masks.decay >= 1:
        raise UserError(f'{key}.masks.decay: must be below 1, got {stage.model.masks.decay}')
    weights = {'captioner': captioner.weight, 'distill': distill.local + distill.masked}
    for name, section in (('captioner', captioner), ('distill', distill)):
        if section != type(section)() and stage.task != 'contrastive':
            raise UserError(f'{key}.{name}: it trains the image tower of a dual encoder; leave it out')
        if section != type(section)() and not weights[name]:
            raise UserError(f'{key}.{name}: its weight is 0, so there is none: set it, or leave the rest out')
        if stage.lora.rules and weights[name]:
            raise UserError(f'{key}.{name}: what is trained beside a model has no adapters: leave it or lora.rules out')
        if stage.accumulate > 1 and weights[name]:
            raise UserError(
                f'{where}.accumulate={stage.accumulate}: {key}.{name} knows no micro-batches: use accumulate=1, or '
                "model.remat='full' to save memory"
            )
    if captioner.parallel > 1:
        raise UserError(f'{key}.captioner.parallel: must be a share, at most 1, got {captioner.parallel}')
    for name in ('share', 'decay', 'centre_decay'):
        if getattr(distill, name) >= 1:
            raise UserError(f'{key}.distill.{name}: must be below 1, got {getattr(distill, name)}')
    for name in ('temperature', 'teacher_temperature'):
        if not getattr(distill, name):
            raise UserError(f'{key}.distill.{name}: must be above 0')
    if weights['distill'] and stage.model.image.patch_dropout:
        raise UserError(f'{key}.distill: it compares all patches: leave {key}.image.patch_dropout at 0')


def _trainable(stage: Stage, where: str) -> None:
    if not stage.total.given():
        raise UserError(f'{where}.total: say how long to train: one of steps, examples, epochs')
    if stage.total.percent:
        raise UserError(f'{where}.total.percent: a percentage of what? Give steps, examples or epochs')
    if not stage.data.sources:
        raise UserError(f'{where}.data.sources is empty: name at least one source')
    if not any(source.weight for source in stage.data.sources.values()):
        raise UserError(f'{where}.data.sources: every weight is 0')


def to_dict(section: Any) -> dict[str, Any]:
    """Plain dicts, lists and numbers of a section, or of `validate`'s result: ready for JSON, and for `validate`."""
    if isinstance(section, Mapping):
        return {'stages': list(section), **{name: to_dict(stage) for name, stage in section.items()}}
    return plain(dataclasses.asdict(section))


def plain(value: Any) -> Any:
    """Plain dicts and lists of a ConfigDict or a dict, at any depth (a ConfigDict may hide inside a tuple)."""
    if hasattr(value, 'items'):
        value = value.to_dict() if hasattr(value, 'to_dict') else value
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


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
