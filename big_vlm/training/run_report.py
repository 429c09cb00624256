"""Gathers a finished run into its report: curves, scores, and what the trained models say about unseen images."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from big_vlm import bundle, config
from big_vlm.bundle import Bundle
from big_vlm.checkpoints import trees
from big_vlm.config import Eval, Stage
from big_vlm.data import coordinates, naflex, prompts
from big_vlm.evaluators import answer_metrics, generation
from big_vlm.reports import report, writers
from big_vlm.sharding import mesh as meshes
from big_vlm.training import workdirs
from big_vlm.training.evaluation import Evaluator

_PAIRS = 16  # of the similarity matrix
_ANSWERS = 8  # per evaluation


def make(
    stages: Mapping[str, Stage], workdir: pathlib.Path, bundles: Mapping[str, pathlib.Path], title: str
) -> tuple[pathlib.Path, dict[str, str]]:
    """Writes WORKDIR/report.html from the stages' folders and bundles, and beside each bundle an image to try it on.

    Pictures that cannot be made, for want of memory or of data, are left out, with a line here and on the page. Returns
    the report's path, and {what for: command line} to talk to the models.
    """
    workdir = pathlib.Path(workdir)
    scores: dict[str, Any] = {}
    drawn: dict[str, Any] = {'calibration': [], 'answers': [], 'attention': [], 'patches': None, 'similarity': None}
    curves, parameters, commands = [], {}, {}
    for name, stage in stages.items():
        folder = workdir / name
        scores |= {f'{name}: {key}': value for key, value in workdirs.scores(folder).items()}
        rows = writers.read_csv(folder / 'metrics.csv') if (folder / 'metrics.csv').is_file() else {}
        steps = max((step for column in rows.values() for step, _ in column), default=0)
        facts = {'task': stage.task, 'steps': f'{steps:,}', 'batch': str(stage.batch_size)}
        curves.append(report.Stage(name, rows, facts))
        described = json.loads((bundles[name] / 'bundle.json').read_text(encoding='utf-8'))
        parameters[f'{name}: parameters'] = f'{described["parameters"]:,}'
        for which in stage.evals:
            if (file := folder / f'calibration_{which}.json').is_file():
                drawn['calibration'].append(report.Calibration(f'{name}: {which}', **json.loads(file.read_text())))
        talked = len(drawn['answers'])
        try:
            _draw(bundles[name], stage, folder, drawn)
        except Exception as error:  # of whatever kind: the scores are worth a page without it
            facts['pictures'] = f'not all could be made: {trees.one_line(error)}'
            workdirs.say(f'{name}: pictures of the report {facts["pictures"]}')
        for answer in drawn['answers'][talked : talked + 1]:
            Image.fromarray(answer.image).save(folder / 'example.png')
            words = (str(bundles[name]), f'--image={folder / "example.png"}', f'--prompt={answer.prompt}')
            commands[f'ask {name}'] = shlex.join(['python', '-m', 'tools.generate', *words])
    path = workdir / 'report.html'
    report.write(
        path,
        report.Report(
            title=f'big_vlm: {pathlib.PurePath(title.partition(":")[0]).stem}',
            summary=f'Stages: {", ".join(stages)}. Scores are of images that training never saw.',
            facts=parameters | {'devices': f'{jax.device_count()} × {jax.devices()[0].device_kind}'},
            scores=scores,
            stages=curves,
            commands=commands,
            config={name: config.to_dict(stage) for name, stage in stages.items()},
            **drawn,
        ),
    )
    return path, commands


def _draw(path: pathlib.Path, stage: Stage, folder: pathlib.Path, drawn: dict[str, Any]) -> None:
    """The pictures of one stage, those first that take no weights.

    Weights lie in parts on all devices of this process: the model may be too large for one of them.
    """
    devices = jax.local_devices()
    mesh = meshes.make_mesh(data=1, fsdp=len(devices), devices=devices)
    retrievals = [settings for settings in stage.evals.values() if settings.kind == 'retrieval']
    if stage.task == 'contrastive' and retrievals:
        drawn['similarity'] = _similarity(bundle.load(path, mesh=mesh), stage, retrievals[0])
    elif stage.task == 'generative':
        trained, contract, tokenizer, _ = bundle.read(path)
        looks = _talk(Bundle(trained, contract, tokenizer, None, mesh), stage, folder, drawn)
        if looks := looks[: 3 - len(drawn['attention'])]:
            model = bundle.load(path, mesh=mesh)
            attend = jax.jit(model.task.predict['attention'])
            drawn['attention'] += [_attention(model, attend, *look) for look in looks]


def _examples(model: Bundle, stage: Stage, settings: Eval, count: int) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """(image uint8 [H,W,3], record) of the first examples of an evaluation.

    `stage`: today's; where the data lies and what is evaluated may have changed since the bundle was made.
    """
    mesh = meshes.make_mesh(data=1, devices=jax.local_devices()[:1])
    batches = Evaluator(stage, model.task, model.contract, model.tokenizer, mesh).batches(settings, count)
    pairs = ((_picture(batch, i), record) for batch, records in batches for i, record in enumerate(records))
    return list(itertools.islice(pairs, count))


def _picture(batch: dict[str, np.ndarray], i: int) -> np.ndarray:
    if 'patches' in batch:
        return naflex.picture(batch['patches'][i], batch['patch_grid'][i])
    image = batch['image'][i]
    return image[0] if image.ndim == 4 else image


def _similarity(model: Bundle, stage: Stage, settings: Eval) -> report.Similarity:
    """Of an evaluation that has captions, one pair per caption; of several of one image the first counts."""
    pairs: dict[str, np.ndarray] = {}
    for image, record in _examples(model, stage, settings, 2 * _PAIRS):
        text = generation.truth_of(record, settings.label)
        pairs.setdefault(text if isinstance(text, str) else text[0], image)
    captions, images = list(pairs)[:_PAIRS], list(pairs.values())[:_PAIRS]
    z = model.embed(images=images, texts=captions)
    return report.Similarity(z['image'] @ z['text'].T, images, captions)


def _talk(
    model: Bundle, stage: Stage, folder: pathlib.Path, drawn: dict[str, Any]
) -> list[tuple[np.ndarray, str, str]]:
    """The first answers of every generative evaluation, as it stored them; needs no weights.

    Of several images, the first; a decoder alone has nothing to show. Returns (image, prompt, answer) of the first of
    each whose attention can be shown.
    """
    looks = []
    if not model.contract.image_tokens:
        return looks
    for name, settings in stage.evals.items():
        file = folder / f'predictions_{name}.jsonl'
        if settings.kind != 'generation' or not file.is_file():
            continue
        with file.open(encoding='utf-8') as lines:
            said = [json.loads(line) for line in itertools.islice(lines, _ANSWERS)]
        metric = answer_metrics.metric(settings.metrics[0], codes=settings.codes)
        for (image, record), entry in zip(_examples(model, stage, settings, _ANSWERS), said, strict=False):
            prompt, answer, truth = entry['prompt'], entry['prediction'], entry['truth']
            if (prompt, truth) != (record['prefix'], generation.truth_of(record, settings.answers or 'suffix')):
                continue  # of other settings than today's
            score = entry['score'].get(metric.name)
            correct = score >= 0.5 if metric.judges and score is not None else None
            truth = truth if isinstance(truth, str) else ' | '.join(dict.fromkeys(truth))
            found, true = _boxes(answer), _boxes(truth)
            note = f'IoU {score:.2f}' if len(true) and metric.name == 'box_iou' else ''
            drawn['answers'].append(report.Answer(image, prompt, answer, truth, correct, found, true, note))
            if entry is said[0] and model.contract.images == 1:
                looks.append((image, prompt, answer))
            if drawn['patches'] is None:
                size = model.task.model.img.sizes['patch_size']
                drawn['patches'] = report.Patches(image, (image.shape[0] // size, image.shape[1] // size), size)
    return looks


def _boxes(text: str) -> np.ndarray:
    return np.array([box for box, _ in coordinates.text_to_boxes(text)], np.float64).reshape(-1, 4)


def _attention(
    model: Bundle, attend: Callable[..., jax.Array], image: np.ndarray, prompt: str, answer: str
) -> report.Attention:
    """What the query that predicts each token of the answer pays to each patch, averaged over layers and heads."""
    contract = model.contract
    ids = model.tokenizer.encode(answer)[:12]
    prefix = model.tokenizer.encode(prompt.lower() if contract.lower else prompt)
    row = prompts.generative_row(prefix, ids, contract)
    picture = {'image': image[None], 'image_mask': np.ones(1, bool)}
    grid = (round(contract.image_tokens**0.5),) * 2
    if contract.max_patches:
        picture = naflex.rows(image, contract)
        grid = tuple(picture['patch_grid'].tolist())
        row = prompts.shorter_image(row, math.prod(grid), contract)
    batch = {key: value[None] for key, value in (row | picture).items()}
    weights = np.asarray(attend(model.params, batch))[:, 0].mean(axis=(0, 1))
    start = int(np.argmax(row['mask_loss'] > 0)) - 1
    count = min(len(ids), int(row['mask_loss'].sum()))
    maps = weights[start : start + count, : math.prod(grid)].reshape(count, *grid)
    return report.Attention(image, prompt, [model.tokenizer.piece(i) for i in ids[:count]], maps)
