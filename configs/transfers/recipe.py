"""What the transfers of PaliGemma share: the model, the optimizer, where data lies, how it is scored.

The settings are those of big_vision's configs/proj/paligemma/transfers (github.com/google-research/big_vision), the
best of the sweeps behind the report's transfers (arXiv 2407.07726): Adam with b2 = 0.999, a cosine after 5 % of linear
warmup, gradients clipped at 1, the mean of an example's answer and then of the batch as the loss. Weight decay there is
what a step takes off, here it is that over the learning rate, and it reaches what it reached there: parameters named
`kernel`, which are the image tower's. Captions there come from a beam search, here from greedy decoding. The frames of
a video lie a fixed stride apart there, from a random start, and here as far apart as can be.

Every transfer takes, after the colon of its name and separated by commas:

    weights=paligemma-3b-pt-224   what to begin from, of the resolution; weights=none for random ones; a bundle brings
                            its model, tokenizer and preprocessing, and if that is none of the three its resolution
    res=224                 224, 448 or 896 pixels; some settings depend on it
    model=paligemma_3b      or paligemma2_3b, paligemma2_10b, paligemma2_28b
    tokenizer=FILE          Gemma's SentencePiece model, if no tokenizer.model lies in the folder of weights
    data_dir=DIR            where the data lies (docs/transfers.md says in which form)
    data=NAME/{split}.jsonl any dataset of the same fields: with {split}, its files; without, its name; evaluations on
                            another dataset are then left out
    fsdp=8                  devices among which every weight is split
    seed=0
    runlocal                two steps of a tiny model from random weights, and 16 examples of each evaluation
"""

import json
import pathlib

from ml_collections import ConfigDict

from configs import recipe

RESOLUTIONS = (224, 448, 896)
DECODERS = dict(
    paligemma_3b='gemma_2b', paligemma2_3b='gemma2_2b', paligemma2_10b='gemma2_9b', paligemma2_28b='gemma2_27b'
)
ARGUMENTS = dict(weights='', res=224, model='paligemma_3b', tokenizer='', data_dir='', data='', fsdp=8, seed=0)


def transfer(
    arg: str,
    name: str,
    *,
    train: dict,
    evals: dict,
    epochs: float,
    text_length: int,
    batch_size: int = 256,
    lr: float = 1e-5,
    decay: float = 0.0,
    smoothing: float = 0.0,
    dropout: float = 0.0,
    freeze_image: bool = False,
    antialias: bool = True,
    images: int = 1,
    frames: bool = False,
    at: dict | None = None,
    own: dict | None = None,
) -> ConfigDict:
    """The config of a transfer.

    Args:
      arg: what follows the colon.
      name: of the folder that holds the data's files.
      train: source → (split, pipeline after resize, weight).
      evals: evaluation → dict(split, pipeline after resize, metrics, and what else `Eval` takes); `data` is a folder
        of other data, and such an evaluation is left out where the argument `data` is given.
      epochs … antialias: settings at 224 px, as big_vision has them.
      images: in each example; with `frames`, so many of a video.
      at: resolution → what is otherwise there; only these resolutions and 224 were published.
      own: further arguments of this transfer, with their defaults.
    """
    args = parse(arg, **(own or {}))
    settings = dict(batch_size=batch_size, lr=lr, decay=decay, freeze_image=freeze_image, epochs=epochs)
    settings['dropout'] = dropout
    settings |= (at or {}).get(args['res'], {})
    if args['model'] not in DECODERS:
        raise ValueError(f'model={args["model"]}: one of {", ".join(DECODERS)}')
    # The projection to the decoder is frozen with the tower, as it was there; no other parameter is a kernel.
    image = ('img/.*', dict(frozen=True)) if settings['freeze_image'] else ('.*/kernel', {})
    made = recipe.stage(
        args,
        task='generative',
        total=dict(epochs=settings['epochs']),
        batch_size=settings['batch_size'],
        contract=dict(image_size=args['res'], lower=False, text_length=text_length, antialias=antialias, images=images),
        tokenizer=dict(vocab_size=256_000),
        model=dict(
            image=dict(variant='So400m/14'),
            decoder=dict(variant=DECODERS[args['model']], dropout=settings['dropout']),
            label_smoothing=smoothing,
            dtype='bfloat16',
            remat='full',
        ),
        optimizer=dict(
            name='adamw',
            b2=0.999,
            clip=1.0,
            lr=settings['lr'],
            weight_decay=settings['decay'] / settings['lr'],
            warmup=dict(percent=5.0),
            rules=(image, ('.*', dict(decay=0.0))),
        ),
        init_from=dict(path=recipe.path(args, 'weights')),
    )
    folder = pathlib.Path(made.init_from.path).expanduser()
    if made.init_from.path and (folder / 'bundle.json').is_file():
        _take_model(made, folder / 'bundle.json')
    if made.init_from.path and not made.tokenizer.path and (folder / 'tokenizer.model').is_file():
        made.tokenizer.path = str(folder / 'tokenizer.model')
    if args['runlocal']:
        made.tokenizer.vocab_size = 512
        recipe.shrink(made)
        made.contract.text_length = max(2 * text_length, 128)  # a tokenizer of little text makes more of each word
        made.contract.images = min(images, 2)
    most = made.contract.get('max_patches', 0)
    begin = f'frames({made.contract.images})' if frames else 'decode'
    looks = f'{begin} | naflex({most})' if most else f'{begin} | resize({made.contract.image_size})'
    sources = {
        key: dict(_where(args, name, split), pipeline=f'{looks} | {pipeline} | tokenize', weight=weight)
        for key, (split, pipeline, weight) in train.items()
    }
    made.data = dict(data_dir=args['data_dir'], sources=sources)
    made.evals = {
        key: _eval(args, name, looks, made, dict(settings))
        for key, settings in evals.items()
        if not (args['data'] and 'data' in settings)
    }
    return made


def parse(arg: str, **own) -> dict:
    """The arguments of every transfer and its `own`."""
    args = recipe.parse_arg(arg, **ARGUMENTS, runlocal=False, **own)
    if args['res'] not in RESOLUTIONS:
        raise ValueError(f'res={args["res"]}: PaliGemma was trained for 224, 448 and 896')
    return args


def answers(pipeline: str, metric: str, split: str = 'val', field: str = 'answers', **more) -> dict:
    """An evaluation of short answers, judged by the texts of `field`."""
    return dict(split=split, pipeline=pipeline, metrics=(metric,), answers=field, **more)


def captions(pipeline: str, split: str = 'val', column: str = 'captions', **more) -> dict:
    """An evaluation of captions, judged by those of `column`."""
    return dict(split=split, pipeline=pipeline, metrics=('cider', 'bleu4', 'rouge_l'), answers=column, **more)


def _take_model(made: ConfigDict, bundle: pathlib.Path) -> None:
    """The model and preprocessing of a bundle, in the place of PaliGemma's; how it is trained stays."""
    stored = json.loads(bundle.read_text())['config']
    if stored['task'] != 'generative':
        raise ValueError(f'weights={bundle.parent}: the bundle of a {stored["task"]} model: take one that answers')
    kept = dict(label_smoothing=made.model.label_smoothing)
    decoder = stored['model']['decoder'] | dict(dropout=made.model.decoder.dropout)
    made.model = ConfigDict(stored['model'] | kept | dict(decoder=decoder))
    contract = stored['contract'] | dict(text_length=made.contract.text_length, images=made.contract.images)
    if contract['image_size'] in RESOLUTIONS and not contract['max_patches']:
        contract['image_size'] = made.contract.image_size
    made.contract = ConfigDict(contract)


def _where(args: dict, name: str, split: str) -> dict:
    data = args['data'] or name + '/{split}.jsonl'
    if '{split}' in data:
        return dict(dataset=data.replace('{split}', split), split='train')
    return dict(dataset=data, split=split)


def _eval(args: dict, name: str, looks: str, made: ConfigDict, settings: dict) -> dict:
    where = _where(args, settings.pop('data', name), settings.pop('split'))
    pipeline = f'{looks} | {settings.pop("pipeline")} | tokenize'
    longest = 8 if args['runlocal'] else made.contract.text_length
    shared = dict(kind='generation', batch_size=made.batch_size, max_new_tokens=longest)
    if args['runlocal']:
        settings['examples'] = 16
    return shared | where | dict(pipeline=pipeline) | settings
