"""The scores of any weights by the evaluations that a config names: a bundle, an .npz or a Hugging Face folder."""

import argparse
import pathlib
import sys
import tempfile

from tools import command

EXAMPLES = r"""examples:
  A trained bundle by its own config, or by another one's evaluations:
    python -m tools.evaluate runs/quickstart/multimodal/bundle --config=configs/quickstart.py --stage=multimodal

  A public checkpoint, on one of the evaluations, with predictions and scores kept in a folder:
    python -m tools.evaluate paligemma-3b-ft-vqav2-224 \
        --config=configs/transfers/vqav2.py:weights=none,data_dir=data --evals=val --out=scored

  What another run answered otherwise, example by example, and whether the difference is more than chance:
    python -m tools.evaluate BUNDLE --config=FILE.py --out=new --against=old/predictions_val.jsonl

  What weights of 4 bits cost a bundle in answers:
    python -m tools.evaluate BUNDLE --config=FILE.py --quantize=int4 --out=small --against=scored

--config.KEY=VALUE overrides a field of the config, as in training. Preprocessing is the model's own: a pipeline that
resizes to another size is refused.
"""
_SHOWN = 10  # differing answers


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command.parser('evaluate', __doc__, EXAMPLES)
    result.add_argument('model', metavar='MODEL', help='a bundle, FILE.npz or a folder of transformers')
    result.add_argument('--config', required=True, metavar='FILE.py[:ARG]', help='whose evaluations are run')
    result.add_argument('--stage', default='', help="the config's stage; default: its last one that fits the model")
    result.add_argument('--evals', default='', metavar='A,B', help='names of evaluations (default: all of the stage)')
    result.add_argument('--tokenizer', default='', metavar='FILE', help='SentencePiece model, if MODEL has none')
    result.add_argument('--dtype', default='', metavar='bfloat16|float32', help="of weights and products (MODEL's own)")
    result.add_argument('--quantize', default='', metavar='int8|int4', help='score the decoder with such weights')
    result.add_argument('--out', default='', metavar='DIR', help='where evals.json and predictions_*.jsonl go')
    result.add_argument('--against', default='', metavar='FILE', help="another run's predictions, or their folder")
    return result


def run(argv: list[str]) -> None:
    """The tool. Raises UserError."""
    from big_vlm import config

    words, overrides = config.take_overrides(argv)
    args = parser().parse_args(words)
    import dataclasses

    from big_vlm import bundle
    from big_vlm.evaluators import generation
    from big_vlm.training import evaluation, evaluation_settings, workdirs

    stages = config.validate(config.load_config(args.config, overrides))
    model = bundle.load_any(args.model, tokenizer=args.tokenizer, dtype=args.dtype)
    if args.quantize:
        model = model.quantised(args.quantize)
    name = _stage(args.stage, stages, model.stage.task)
    chosen = _evals(args.evals, stages[name].evals, name)
    # The evaluations and the data are the config's, the preprocessing is the model's; no checkpoint goes by a score.
    others = dict(contract=model.stage.contract, checkpoint=config.Checkpoint())
    stage = dataclasses.replace(stages[name], evals=chosen, **others)
    evaluation_settings.check(stage, f'config.{name}')
    generating = [which for which, settings in chosen.items() if settings.kind == 'generation']
    if args.against and not generating:
        raise config.UserError(
            f'--against={args.against}: {", ".join(chosen)} write no answers; choose a generation evaluation'
        )
    earlier = {which: _earlier(args.against, which) for which in generating} if args.against else {}
    with tempfile.TemporaryDirectory() as nowhere:
        out = pathlib.Path(args.out or nowhere)
        out.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before hours of work
        evaluator = evaluation.Evaluator(stage, model.task, model.contract, model.tokenizer, model.mesh, out)
        evaluator.rehearse(f'config.{name}')
        before, scores, weights = (
            workdirs.scores(out),
            {},
            model.decode_params() if model.stage.task == 'generative' else model.params,
        )
        for which in chosen:
            with config.located(f'config.{name}.evals.{which}'):
                scores[which] = evaluator(which, weights)
            workdirs.write_scores(out, before | scores)  # what a later one that fails would lose
            if which in earlier:
                _report(generation.read_predictions(out / f'predictions_{which}.jsonl'), earlier[which])
        if args.out:
            print(f'{out}: {", ".join(sorted(path.name for path in out.iterdir()))}')


def _stage(name: str, stages: dict, task: str) -> str:
    from big_vlm.config import UserError, unknown

    if name and name not in stages:
        raise unknown('stage', name, stages, '--stage')
    fitting = [key for key, stage in stages.items() if stage.task == task and stage.evals and key in (name or key,)]
    if not fitting:
        which = f'stage {name!r}' if name else 'a stage'
        raise UserError(f'--config: the model is {task}, and {which} of that task with evaluations is not there')
    return fitting[-1]


def _evals(names: str, evals: dict, stage: str) -> dict:
    from big_vlm.config import unknown

    wanted = names.split(',') if names else list(evals)
    for name in wanted:
        if name not in evals:
            raise unknown('evaluation', name, evals, f'--evals, stage {stage}')
    return {name: evals[name] for name in wanted}


def _earlier(against: str, which: str) -> list[dict]:
    from big_vlm.evaluators import generation

    path = pathlib.Path(against)
    return generation.read_predictions(path / f'predictions_{which}.jsonl' if path.is_dir() else path)


def _report(ours: list[dict], theirs: list[dict]) -> None:
    from big_vlm.evaluators import comparison

    summary, differing = comparison.compare(ours, theirs)
    for name, entry in summary.items():
        print(
            f'against  {name}  {entry["difference"]:+.4f} [{entry["low"]:+.4f}, {entry["high"]:+.4f}]  '
            f'(better {entry["better"]}, worse {entry["worse"]}, n={entry["n"]})'
        )
    print(f'{len(differing)} answers differ{", the first of them:" if differing else ""}')
    for entry in differing[:_SHOWN]:
        print(f'  {entry["id"]} {entry["prompt"]!r}: {entry["ours"]!r}, was {entry["theirs"]!r} ({entry["truth"]!r})')


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line on stderr that says what to do."""
    return command.end(run, argv)


if __name__ == '__main__':
    sys.exit(main())
