"""Stages checked: what does not go together, beyond the types and ranges that `coercion` checks.

Everything that the schema can know to be wrong is refused here, in one line that names the dotted key. Names that only
a room knows (ops, variants, optimizers) are checked there, with `unknown`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from big_vlm.config.coercion import coerce, plain
from big_vlm.config.errors import UserError, unknown
from big_vlm.config.schema import (
    Contract,
    Decoder,
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
    names = coerce(tuple[str, ...], raw['stages'], 'config.stages')
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
    stage = coerce(Stage, plain(config), where)
    if trained:
        _trainable(stage, where)
    _check_contract(stage, f'{where}.contract')
    _check_pack(stage, where)
    _check_init(stage, where)
    _check_extras(stage, where)
    _check_optimizer(stage, where)
    _kept(stage, f'{where}.checkpoint')
    _check_guards(stage, where)
    _check_evals(stage, f'{where}.evals')
    _check_lora(stage, where)
    if trained:
        _check_taken(stage, f'{where}.model')
    return stage


def _check_contract(stage: Stage, where: str) -> None:
    contract = stage.contract
    if contract.value_range[0] >= contract.value_range[1]:
        raise UserError(f'{where}.value_range: must rise, got {contract.value_range}')
    for name, unset in (('image_alone', False), ('causal_prompt', False), ('images', 1)):
        if getattr(contract, name) != unset and stage.task != 'generative':
            raise UserError(f'{where}.{name}: a {stage.task} stage has no prompts; leave it out')
    if contract.images > 1 and (contract.max_patches or stage.model.projector == 'none'):
        unfit = 'contract.max_patches' if contract.max_patches else "model.projector 'none'"
        raise UserError(f'{where}.images: several images do not go with {unfit}; leave it at 1')
    if contract.max_patches and contract.image_size != Contract.image_size:
        raise UserError(f'{where}: image_size and max_patches are both given; keep one')


def _check_init(stage: Stage, where: str) -> None:
    init = stage.init_from
    for key, source in init.given().items():
        if source.stage and source.path:
            raise UserError(f'{where}.{key}: stage and path are both given; keep one')
    if init.state and init != InitFrom(stage=init.stage or '?', state=True, resize_method=init.resize_method):
        raise UserError(f'{where}.init_from.state: it takes all of one stage: give stage and nothing else beside it')
    if init.state and stage.optimizer.ema_warmup:
        raise UserError(f'{where}.optimizer.ema_warmup: it would forget the averages that init_from.state goes on with')


def _check_optimizer(stage: Stage, where: str) -> None:
    optimizer, model = stage.optimizer, stage.model
    shares = {f'optimizer.{name}': getattr(optimizer, name) for name in ('b1', 'b2', 'ema_decay')}
    shares |= {f'model.{name}.dropout': getattr(model, name).dropout for name in ('image', 'text', 'decoder')}
    for key, share in shares.items():
        if share is not None and share >= 1:
            raise UserError(f'{where}.{key}: must be below 1, got {share}')
    for name in ('ema_warmup', 'ema_use'):
        if not optimizer.ema_decay and getattr(optimizer, name) != getattr(Optimizer, name):
            raise UserError(
                f'{where}.optimizer.{name}: without ema_decay there is no average; give it, or leave {name} out'
            )
    start, end = optimizer.curve
    if not 0 <= start < end <= 1:
        raise UserError(f'{where}.optimizer.curve: must rise between 0 and 1, got {optimizer.curve}')
    if (start, end) != Optimizer.curve and optimizer.schedule not in ('cosine', 'linear'):
        raise UserError(
            f"{where}.optimizer.curve: schedule='{optimizer.schedule}' has no end to be part of; leave curve out"
        )
    _check_patterns([pattern for pattern, _ in optimizer.rules], f'{where}.optimizer.rules')


def _check_guards(stage: Stage, where: str) -> None:
    if stage.guards.spike_steps > 50:
        raise UserError(f'{where}.guards.spike_steps: at most 50, as a spike is told from the last 100 losses')
    if stage.guards.spike_steps and not stage.guards.spike:
        raise UserError(f'{where}.guards.spike_steps: guards.spike is 0, so nothing is a spike: set it')
    if stage.profile != Stage.profile and not 1 <= stage.profile[0] <= stage.profile[1]:
        raise UserError(f'{where}.profile: must be the first and the last step, from 1 on, got {stage.profile}')


def _check_evals(stage: Stage, where: str) -> None:
    for name, evaluation in stage.evals.items():
        if evaluation.kind == 'zero_shot' and not (evaluation.classes and evaluation.templates):
            raise UserError(f'{where}.{name}: zero_shot needs classes and templates')
        if evaluation.kind == 'generation' and not evaluation.metrics:
            raise UserError(f'{where}.{name}.metrics is empty: name at least one metric')
        if evaluation.choices and evaluation.choices_field:
            raise UserError(f'{where}.{name}: choices and choices_field are both given; keep one')
        if evaluation.kind in ('calibration', 'linear_probe') and evaluation.fit_split in ('', evaluation.split):
            raise UserError(
                f'{where}.{name}.fit_split: {evaluation.fit_split!r}, but it has to be another split than '
                f'{evaluation.split!r}, on which the fit is judged'
            )


def _check_lora(stage: Stage, where: str) -> None:
    _check_patterns([pattern for pattern, _ in stage.lora.rules], f'{where}.lora.rules')
    _check_patterns(stage.lora.train, f'{where}.lora.train')
    if stage.lora.rules and stage.model.image.norm == 'batch':
        raise UserError(
            f'{where}.lora: adapters would not hold the running statistics that training moves: take model.image.norm='
            "'group'"
        )
    if not stage.lora.rules and stage.lora != Lora():
        raise UserError(f'{where}.lora: without rules there are no adapters; give rules, or leave the section out')


def _check_patterns(patterns: Iterable[str], where: str) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f'{where}: {pattern!r} is no regular expression: {error}') from None


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
    if stage.task == 'mask_autoencoder' and stage.accumulate > 1:
        raise UserError(
            f'{where}.accumulate={stage.accumulate}: the codebook of a mask autoencoder would follow every micro-batch '
            'as a step: use accumulate=1'
        )


def to_dict(section: Any) -> dict[str, Any]:
    """Plain dicts, lists and numbers of a section, or of `validate`'s result: ready for JSON, and for `validate`."""
    if isinstance(section, Mapping):
        return {'stages': list(section), **{name: to_dict(stage) for name, stage in section.items()}}
    return plain(dataclasses.asdict(section))
