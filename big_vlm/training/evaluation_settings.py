"""What the settings of an evaluation may be, by its kind: what could not run is refused before any data is read."""

from big_vlm.config import Eval, Stage, UserError, unknown
from big_vlm.data import sources, transforms
from big_vlm.evaluators import answer_metrics, calibration, perplexity, reconstruction, retrieval, zero_shot

NEEDS = {
    'zero_shot': 'contrastive',
    'retrieval': 'contrastive',
    'linear_probe': 'contrastive',
    'generation': 'generative',
    'calibration': 'generative',
    'perplexity': 'generative',
    'reconstruction': 'mask_autoencoder',
}
# What their scores are called, before the '/' of a slice; of generation what its `metrics` say.
METRICS = {
    'zero_shot': ('accuracy',),
    'retrieval': retrieval.METRICS,
    'linear_probe': ('accuracy',),
    'generation': (),
    'calibration': ('accuracy', *calibration.ERRORS, 'selective_accuracy'),
    'perplexity': (perplexity.NAME,),
    'reconstruction': (reconstruction.NAME,),
}
# Settings that not every kind takes, and what does instead what one might have meant.
TAKEN_BY = {
    'label': ('zero_shot', 'retrieval', 'linear_probe'),
    'classes': ('zero_shot',),
    'templates': ('zero_shot',),
    'metrics': ('generation',),
    'answers': ('generation',),
    'max_new_tokens': ('generation', 'calibration'),
    'choices': ('generation', 'calibration'),
    'choices_field': ('generation', 'calibration'),
    'grammar': ('generation',),
    'codes': ('generation',),
    'fit_split': ('calibration', 'linear_probe'),
    'shots': ('linear_probe',),
    'slices': ('zero_shot', 'linear_probe', 'generation', 'perplexity'),
}
INSTEAD = {
    ('generation', 'label'): ', the truth is the suffix(…) of its pipeline, or the field `answers`',
    ('retrieval', 'slices'): ', or make an evaluation with where={…} of each slice',
}


def check(stage: Stage, where: str) -> None:
    """Refuses, before any data is read, evaluations that could not run: UserError."""
    for name, settings in stage.evals.items():
        place = f'{where}.evals.{name}'
        if NEEDS[settings.kind] != stage.task:
            fitting = [kind for kind, task in NEEDS.items() if task == stage.task]
            raise UserError(
                f'{place}.kind: {settings.kind} needs a {NEEDS[settings.kind]} task, this stage is {stage.task}: '
                f'use {" or ".join(fitting)}'
            )
        for key, kinds in TAKEN_BY.items():
            value = getattr(settings, key)
            if settings.kind not in kinds and value != getattr(Eval, key):
                raise UserError(
                    f'{place}.{key}: {value!r} has no effect, it is for {" and ".join(kinds)}: leave {key} out'
                    f'{INSTEAD.get((settings.kind, key), "")}'
                )
        if settings.kind == 'zero_shot':
            zero_shot.check(settings.templates, settings.classes, where=f'{place}.')
        key = f'{place}.pipeline'
        transforms.parse(settings.pipeline, where=key).check_size(stage.contract, where=key)
        for split in (settings.split, *((settings.fit_split,) if settings.fit_split else ())):
            sources.check(settings.dataset, split, stage.data.data_dir, where=place)
        if settings.kind == 'generation':
            for metric in settings.metrics:
                answer_metrics.metric(metric, f'{place}.metrics', settings.codes)
    _check_best(stage, f'{where}.checkpoint.best')


def _check_best(stage: Stage, where: str) -> None:
    best = stage.checkpoint.best
    if not best:
        return
    which, _, name = best.partition('/')
    made = METRICS[stage.evals[which].kind] or stage.evals[which].metrics
    metric = next((metric for metric in made if f'{name}/'.startswith(f'{metric}/')), None)
    if metric is None:
        raise unknown('metric', name, made, where)
    errors = {name for name, known in answer_metrics.METRICS.items() if known.lower_is_better}
    if metric in errors | {*calibration.ERRORS, perplexity.NAME} and stage.checkpoint.best_is == 'max':
        raise UserError(f"{where}: of {best} less is better, and the highest would be kept: set best_is='min'")
