"""What the recipes of published models share: their arguments, their data, their scores, their size on a laptop.

Every recipe takes, after the colon of its name and separated by commas:

    data=coco_captions      TFDS name or FILE.jsonl; the reports' own data are private
    split=train             of `data`
    text=caption            field of the text, or column of several (captions/text), of which one is drawn
    data_dir=DIR            where `data` lies
    tokenizer=FILE          SentencePiece model; else one of the published size is trained on the texts
    fsdp=1                  devices among which every weight is split, 8 for large models; all others hold copies
    seed=0
    runlocal                two steps of a tiny model per stage, from no other weights, on digit scenes unless `data`
                            is given

A recipe with a dual encoder is scored every 10,000 steps and at the end, and takes:

    retrieval=coco_captions  whose texts and images have to find each other, the first 5,000; if not given, what `data`
                             holds out (coco_captions, digit_scenes), or nothing, as is retrieval=none
    zero_shot=cifar10        whose images are classified; if not given, digit_scenes if `data` is, as zero_shot=none
    label=label              of other data, the field with the class, by name or index
    classes=a cat+a dog      of other data, all classes
    templates=clip           of classes without an article, CLIP's seven best for ImageNet; else 'a photo of {}', and
                             CLIP's own eighteen of cifar10
    eval_split=validation    of both; else the usual one of a name known here, and `train` of FILE.jsonl

A recipe with a decoder is scored as often, on the perplexity of 5,000 true answers and on 1,000 of its own, and takes:

    answered=coco_captions   what is asked and answered as `data` is; if not given, what `data` holds out, or nothing
    metric=cider             of its answers, by name
    eval_split=validation    as above

A number without a source is ours. A tokenizer has 1,152 pieces for places and shapes besides those of its file, so text
towers have as many rows more than the published ones.
"""

from ml_collections import ConfigDict

from configs.arguments import parse_arg
from configs.quickstart import COLORS, DIGITS

SCORED = dict(retrieval='', zero_shot='', label='', classes='', templates='', eval_split='')
ANSWERED = dict(answered='', metric='cider', eval_split='')
SPLITS = {'coco_captions': 'val', 'cifar10': 'test'}
NAFLEX = (128, 256, 576, 784, 1024)  # SigLIP 2's lengths (arXiv 2502.14786, section 2.4.2)
# CLIP's templates (github.com/openai/CLIP): data/prompts.md, and the seven that its notebook of ImageNet ends with.
_KINDS = ('', 'blurry ', 'black and white ', 'low contrast ', 'high contrast ', 'bad ', 'good ')
CLIP_CIFAR10 = tuple(
    template
    for article in ('a', 'the')
    for template in (
        *(f'a {kind}photo of {article} {{}}.' for kind in _KINDS),
        f'a photo of {article} small {{}}.',
        f'a photo of {article} big {{}}.',
    )
)
CLIP_BEST = (
    'itap of a {}.', 'a bad photo of the {}.', 'a origami {}.', 'a photo of the large {}.', 'a {} in a video game.',
    'art of the {}.', 'a photo of the small {}.',
)  # fmt: skip
CIFAR10 = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')


def parse(arg: str, **own) -> dict:
    """The arguments of every recipe and its `own`, SCORED among them, with their defaults, which may replace those."""
    shared = dict(data='', split='train', text='', data_dir='', tokenizer='', fsdp=1, seed=0, runlocal=False)
    args = parse_arg(arg, **shared | own)
    args['data'] = args['data'] or ('digit_scenes/cells_tiny' if args['runlocal'] else 'coco_captions')
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
            shrink(made)
        source = dict(dataset=args['data'], split=args['split'], pipeline=_pipeline(args, made))
        made.data = dict(data_dir=args['data_dir'], sources=dict(data=source))
        made.evals = _evals(args, made) if made.task == 'contrastive' else _answered(args, made)
    return ConfigDict(dict(stages=tuple(stages), **stages))


def path(args: dict, name: str) -> str:
    """The checkpoint that the argument `name` gives, '' for 'none' and for a model too small for any. Raises ValueError
    if nothing was said."""
    if args['runlocal']:
        return ''
    if not args[name]:
        raise ValueError(f"this model begins from another's weights: give {name}=PATH, or {name}=none for random ones")
    return '' if args[name] == 'none' else args[name]


def _pipeline(args: dict, made: ConfigDict) -> str:
    steps, field = [_looks(made, NAFLEX)], _text(args, args['data'])
    if 'distill' in made.model:
        steps[0] = steps[0].replace('decode', f'decode | views(8, {min(96, made.contract.image_size // 2)})')
    if '/' in field:
        steps.append(f'choice({field!r}, "drawn")')
        field = 'drawn'
    if made.task == 'contrastive':
        steps.append(f'text({field!r})')
        if 'captioner' in made.model and (args['boxes'] or args['data'].startswith('digit_scenes')):
            steps.append('ground')
    else:
        steps += [f'prefix({args["prefix"]!r})', f'suffix("{{{field}}}")', 'tokenize']
    return ' | '.join(steps)


def _looks(made: ConfigDict, lengths: tuple[int, ...]) -> str:
    """From bytes to pixels; a NaFlex model's pictures are as long as one of `lengths`, of rows of 1,024."""
    most = made.contract.get('max_patches', 0)
    if not most:
        return f'decode | resize({made.contract.image_size})'
    return f'decode | naflex({", ".join(str(n) for n in (most, *(n * most // NAFLEX[-1] for n in lengths)))})'


def _text(args: dict, dataset: str) -> str:
    return args['text'] or ('captions/text' if dataset.startswith('coco_captions') else 'caption')


def _evals(args: dict, made: ConfigDict) -> dict:
    """What the arguments ask for, or the data holds out."""
    looks, evals = _looks(made, (256,)), {}
    retrieval, zero_shot = (_scored(args, name) for name in ('retrieval', 'zero_shot'))
    for name, needs in (
        *((name, zero_shot) for name in ('label', 'classes', 'templates')),
        ('eval_split', retrieval or zero_shot),
    ):
        if args[name] and not needs:
            either = 'retrieval=DATASET or ' if name == 'eval_split' else ''
            raise ValueError(f'{name}={args[name]} has no effect: give {either}zero_shot=DATASET')
    if retrieval:
        field = _text(args, retrieval)
        evals['retrieval'] = _eval(args, made, retrieval, 'retrieval', looks, field) | dict(examples=5000)
    if zero_shot.startswith('digit_scenes') and not (args['label'] or args['classes']):
        pipeline = f'{looks} | first("objects/color", "color")'
        evals['zero_shot'] = _eval(args, made, zero_shot, 'zero_shot', pipeline, 'color')
        evals['zero_shot'].update(where=dict(num_digits=1), classes=COLORS)
        evals['zero_shot']['templates'] = tuple(f'a {{}} {digit} in the center' for digit in DIGITS)
    elif zero_shot:
        classes = tuple(args['classes'].split('+')) if args['classes'] else CIFAR10 if zero_shot == 'cifar10' else ()
        if not classes:
            raise ValueError(f'zero_shot={zero_shot}: name its classes: classes=a cat+a dog')
        evals['zero_shot'] = _eval(args, made, zero_shot, 'zero_shot', looks, args['label'] or 'label')
        evals['zero_shot'].update(classes=classes, templates=_templates(args, zero_shot))
    return evals


def _templates(args: dict, zero_shot: str) -> tuple[str, ...]:
    if args['templates'] not in ('', 'clip'):
        raise ValueError(f"templates={args['templates']}: only clip has a name: set the evaluation's `templates`")
    if args['templates']:
        return CLIP_BEST
    return CLIP_CIFAR10 if zero_shot == 'cifar10' and not args['classes'] else ('a photo of {}',)


def _answered(args: dict, made: ConfigDict) -> dict:
    """How well a decoder predicts, and gives, the answers that the arguments name, or the data holds out."""
    dataset = _scored(args, 'answered')
    if not dataset:
        if args['eval_split'] and not args.get('retrieval') and not args.get('zero_shot'):
            raise ValueError(f'eval_split={args["eval_split"]} has no effect: give answered=DATASET')
        return {}
    field, steps, several = _text(args, dataset), [_looks(made, NAFLEX)], {}
    if '/' in field:
        steps.append(f'first({field!r}, "first")')
        field, several = 'first', dict(answers=field)
    steps += [f'prefix({args["prefix"]!r})', f'suffix("{{{field}}}")', 'tokenize']
    settings = _eval(args, made, dataset, '', ' | '.join(steps), 'label')
    few = dict(examples=16) if args['runlocal'] else {}
    answers = dict(kind='generation', metrics=(args['metric'],), examples=1000, **several)
    return dict(
        answers=settings | answers | few,
        perplexity=settings | dict(kind='perplexity', examples=5000) | few,
    )


def _scored(args: dict, name: str) -> str:
    """The dataset of an evaluation, '' for none."""
    if args[name]:
        return '' if args[name] == 'none' else args[name]
    held_out = ('digit_scenes',) if name == 'zero_shot' else ('digit_scenes', 'coco_captions')
    return args['data'] if args['data'].split('/')[0] in held_out else ''


def _eval(args: dict, made: ConfigDict, dataset: str, kind: str, pipeline: str, label: str) -> dict:
    split = 'train' if dataset.endswith('.jsonl') else SPLITS.get(dataset.split('/')[0], 'validation')
    split, batch_size = args['eval_split'] or split, min(made.batch_size, 1024)
    settings = dict(dataset=dataset, split=split, pipeline=pipeline, label=label, batch_size=batch_size)
    return dict(kind=kind, every=10_000, **settings)


def shrink(made: ConfigDict) -> None:
    """Two steps that a laptop takes in seconds, through the same kinds of layers."""
    made.total = dict(steps=2)
    made.batch_size = 8
    made.log_every = 1
    made.mesh.fsdp = 1
    made.tokenizer.vocab_size = 512
    if 'max_patches' in made.contract:
        made.contract.max_patches //= 64
    else:
        made.contract.image_size //= 8
    made.contract.text_length = 32
    made.optimizer.warmup = dict(steps=1)
    model = made.model
    model.update(dtype='float32', remat='none', scan=False)
    name, _, patch = model.image.variant.partition('/')
    model.image.update(dict(variant=f'mu/{patch}') if patch else dict(variant='R26', width=4))
    if 'distill' in model:
        model.distill.update(hidden=32, bottleneck=16, prototypes=64)
    if made.task == 'contrastive':
        model.text.update(variant='mu', width=0, depth=0, mlp_dim=0, num_heads=0)
        # A tower as wide as the joint space has no head, which one without a bias is said to have.
        model.update(embed_dim=32 if model.image.get('head_bias', True) else 16, loss_form='dense')
    else:
        model.decoder.update(width=32, depth=2, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16)
