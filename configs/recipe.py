"""What the recipes of published models share: their arguments, their data, and their size on a laptop.

Every recipe takes, after the colon of its name and separated by commas:

    data=coco_captions      TFDS name or FILE.jsonl; the reports' own data are private
    split=train             of `data`
    text=caption            field of the text, or column of several (captions/text), of which one is drawn
    data_dir=DIR            where `data` lies
    tokenizer=FILE          SentencePiece model; else one of the published size is trained on the texts
    fsdp=1                  devices among which every weight is split, 8 for large models; all others hold copies
    seed=0
    runlocal                two steps of a tiny model per stage, on digit scenes unless `data` is given

A number without a source is ours. A tokenizer has 1,152 pieces for places and shapes besides those of its file, so text
towers have as many rows more than the published ones.
"""

from ml_collections import ConfigDict

from configs.arguments import parse_arg


def parse(arg: str, **own) -> dict:
    """The arguments above and a recipe's `own`, given with their defaults, which may replace the above."""
    shared = dict(data='', split='train', text='', data_dir='', tokenizer='', fsdp=1, seed=0, runlocal=False)
    args = parse_arg(arg, **shared | own)
    args['data'] = args['data'] or ('digit_scenes/cells_tiny' if args['runlocal'] else 'coco_captions')
    args['text'] = args['text'] or ('captions/text' if args['data'].startswith('coco_captions') else 'caption')
    return args


def stage(args: dict, **settings) -> ConfigDict:
    """A stage of these published settings; `run` adds its data."""
    made = ConfigDict(settings)
    made.update(seed=args['seed'], mesh=dict(fsdp=args['fsdp']), checkpoint=dict(every=1000))
    made.tokenizer.path = args['tokenizer']
    return made


def run(args: dict, **stages: ConfigDict) -> ConfigDict:
    """A run of these stages, in this order, each on the data and at the size that `args` asks for."""
    for made in stages.values():
        if args['runlocal']:
            _shrink(made)
        source = dict(dataset=args['data'], split=args['split'], pipeline=_pipeline(args, made))
        made.data = dict(data_dir=args['data_dir'], sources=dict(data=source))
    return ConfigDict(dict(stages=tuple(stages), **stages))


def path(args: dict, name: str) -> str:
    """The checkpoint that the argument `name` gives, '' for 'none'. Raises ValueError if nothing was said."""
    if not args[name] and not args['runlocal']:
        raise ValueError(f"this model begins from another's weights: give {name}=PATH, or {name}=none for random ones")
    return '' if args[name] == 'none' else args[name]


def _pipeline(args: dict, made: ConfigDict) -> str:
    steps, field = ['decode', f'resize({made.contract.image_size})'], args['text']
    if '/' in field:
        steps.append(f'choice({field!r}, "drawn")')
        field = 'drawn'
    if made.task == 'contrastive':
        steps.append(f'text({field!r})')
    else:
        steps += [f'prefix({args["prefix"]!r})', f'suffix("{{{field}}}")', 'tokenize']
    return ' | '.join(steps)


def _shrink(made: ConfigDict) -> None:
    """Two steps that a laptop takes in seconds, through the same kinds of layers."""
    made.total = dict(steps=2)
    made.batch_size = 8
    made.log_every = 1
    made.mesh.fsdp = 1
    made.tokenizer.vocab_size = 512
    made.contract.image_size //= 8
    made.contract.text_length = 32
    made.optimizer.warmup = dict(steps=1)
    model = made.model
    model.update(dtype='float32', remat='none', loss_form='dense', scan=False)
    name, _, patch = model.image.variant.partition('/')
    model.image.update(dict(variant=f'mu/{patch}') if patch else dict(variant='R26', width=4))
    if made.task == 'contrastive':
        model.text.update(variant='mu', width=0, depth=0, mlp_dim=0, num_heads=0)
        model.embed_dim = 32
    else:
        model.decoder.update(width=32, depth=2, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16)
