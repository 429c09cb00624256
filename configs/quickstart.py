"""The main job in miniature: pretrain a SigLIP, grow it into a PaliGemma, transfer it, on handwriting that ships along.

Made for ten minutes on two CPU cores. Scenes hold one or two scanned digits in 16 px cells (`digit_scenes/cells`).

    --config=configs/quickstart.py              the real thing
    --config=configs/quickstart.py:smoke        a few steps of every stage, on tiny splits, to see that all of it runs
    --config=configs/quickstart.py:seed=1,split=validation
"""

from ml_collections import ConfigDict

from configs.arguments import parse_arg

COLORS = ('red', 'green', 'blue', 'yellow', 'magenta', 'cyan', 'orange', 'white')
DIGITS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
FIGURES = tuple(str(digit) for digit in range(10))
PLACES = (
    ('top left', 'top center', 'top right')
    + ('middle left', 'center', 'middle right')
    + ('bottom left', 'bottom center', 'bottom right')
)


def get_config(arg: str = '') -> ConfigDict:
    args = parse_arg(arg, smoke=False, seed=0, split='test') | {'layout': 'cells'}
    config = ConfigDict()
    config.stages = ('pretrain', 'multimodal', 'transfer')
    config.pretrain = pretrain(args)
    config.multimodal = multimodal(args)
    config.transfer = transfer(args)
    return config


def pretrain(args: dict, size: int = 48, text: int = 16) -> ConfigDict:
    """A dual encoder of scenes and their captions."""
    stage = base(args, size, text)
    stage.task = 'contrastive'
    stage.total = dict(steps=20 if args['smoke'] else 1000)
    stage.batch_size = 64
    stage.model.update(
        image=image_tower(),
        text=dict(variant='Ti', width=128, depth=2, mlp_dim=256, num_heads=4, pool='mean', mask=True, embed_init=0.5),
    )
    looks = f'decode | resize({size})'
    # Colour and place tell most scenes apart: texts of digits alone, in any colour, are the reason to read them.
    stage.data.sources = dict(
        captions=source(args, f'{looks} | text("caption")', weight=1.3),
        digits=source(args, f'{looks} | shuffle_channels | text("reading")', weight=1.0),
    )
    stage.optimizer = adamw(1e-3)
    one = dict(num_digits=1)
    stage.evals = dict(
        digit=evaluation(
            args,
            kind='zero_shot',
            pipeline=f'{looks} | first("objects/digit", "digit")',
            where=one,
            label='digit',
            classes=FIGURES,
            slices=('held_out',),
        ),
        color=evaluation(
            args,
            kind='zero_shot',
            pipeline=f'{looks} | first("objects/color", "color")',
            where=one,
            label='color',
            classes=COLORS,
            templates=tuple(f'a {{}} {digit} in the {place}' for digit in DIGITS for place in PLACES),
        ),
        retrieval=evaluation(args, kind='retrieval', pipeline=looks, label='caption', examples=500),
    )
    return stage


def multimodal(args: dict, size: int = 48, text: int = 20) -> ConfigDict:
    """The whole of a PaliGemma on a mixture: captions, questions, boxes, reading."""
    stage = base(args, size, text)
    stage.task = 'generative'
    stage.total = dict(steps=20 if args['smoke'] else 1150)
    stage.batch_size = 48
    stage.model.update(image=image_tower(), decoder=decoder())
    stage.init_from = dict(stage='pretrain', parts={'img': 'img'}, fresh=('img/head/.*',))
    stage.data.sources = dict(
        caption=source(args, train_pipeline(size, CAPTION), weight=1.5),
        question=source(args, train_pipeline(size, 'question'), weight=2.0),
        detect=source(args, train_pipeline(size, 'detect'), weight=0.6),
        read=source(args, train_pipeline(size, f'shuffle_channels | {READ}'), weight=1.65),
    )
    stage.optimizer = adamw(1.5e-3)
    one = dict(num_digits=1)
    stage.evals = dict(
        answer=generation(args, size, 'question', max_new_tokens=4),
        read_one=generation(args, size, READ, where=one, max_new_tokens=8, slices=('held_out',)),
        caption_one=generation(args, size, CAPTION, where=one, max_new_tokens=20, slices=('held_out',)),
        detect_one=generation(args, size, 'detect', where=one, max_new_tokens=12, metrics=('box_iou',)),
    )
    return stage


def transfer(args: dict, size: int = 64, text: int = 20) -> ConfigDict:
    """One task, naming colours, at a higher resolution: the position embedding is resized on the way in."""
    stage = base(args, size, text)
    stage.task = 'generative'
    stage.total = dict(steps=20 if args['smoke'] else 100)
    stage.batch_size = 32
    stage.model.update(image=image_tower(), decoder=decoder())
    stage.init_from = dict(stage='multimodal')
    task = 'question("color")'
    stage.data.sources = dict(color=source(args, train_pipeline(size, task)))
    stage.optimizer = adamw(1e-3)
    stage.evals = dict(color=generation(args, size, task, max_new_tokens=4))
    return stage


CAPTION = 'prefix("caption en") | suffix("{caption}")'
READ = 'prefix("ocr") | suffix("{reading}")'


def base(args: dict, size: int, text: int) -> ConfigDict:
    return ConfigDict(
        dict(
            seed=args['seed'],
            contract=dict(image_size=size, text_length=text),
            tokenizer=dict(vocab_size=512),  # a token per word
            model=dict(scan=False),  # so few layers compile as fast one by one, and run faster on a CPU
            data=dict(sources={}),
            log_every=10 if args['smoke'] else 25,
            checkpoint=dict(every=10 if args['smoke'] else 200),
        )
    )


def image_tower() -> dict:
    # Places are learnt late from the usual small position embedding, colours less surely from a large one.
    return dict(variant='Ti/16', width=128, depth=3, mlp_dim=512, num_heads=4, position_init=0.35)


def decoder() -> dict:
    return dict(variant='gemma_2b', width=128, depth=3, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=32)


def adamw(lr: float) -> dict:
    return dict(
        name='adamw',
        lr=lr,
        b2=0.99,
        weight_decay=1e-4,
        warmup=dict(percent=5.0),
    )


def dataset(args: dict) -> str:
    return f'digit_scenes/{args["layout"]}{"_tiny" if args["smoke"] else ""}'


def train_pipeline(size: int, task: str) -> str:
    return f'decode | resize({size}) | {task} | tokenize'


def source(args: dict, pipeline: str, weight: float = 1.0) -> dict:
    return dict(dataset=dataset(args), split='train', pipeline=pipeline, weight=weight)


def evaluation(args: dict, **settings) -> dict:
    return dict(dataset=dataset(args), split=args['split'], **settings)


def generation(args: dict, size: int, task: str, **settings) -> dict:
    settings = dict(examples=1000) | settings
    return evaluation(args, kind='generation', pipeline=train_pipeline(size, task), **settings)
