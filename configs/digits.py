"""The full task: one to four scanned digits of any size anywhere, on plain or textured grounds (`digit_scenes/free`).

The stages of `quickstart.py`, longer and larger: about 90 minutes on two CPU cores. It may run in pieces, in the
background: stopped (Ctrl-C, SIGTERM, SIGKILL) and started again, it goes on where it was.

    --config=configs/digits.py
    --config=configs/digits.py:smoke
    --config=configs/digits.py:seed=1,split=validation
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.arguments import parse_arg
from configs.quickstart import CAPTION, COLORS, DIGITS, READ, adamw, source, train_pipeline

SIZE, CLOSER = 64, 96  # pixels, before and in the transfer stage
TEXT = 48


def get_config(arg: str = '') -> ConfigDict:
    args = parse_arg(arg, smoke=False, seed=0, split='test') | {'layout': 'free'}
    config = ConfigDict()
    config.stages = ('pretrain', 'multimodal', 'transfer')
    config.pretrain = pretrain(args)
    config.multimodal = multimodal(args)
    config.transfer = transfer(args)
    return config


def pretrain(args: dict) -> ConfigDict:
    """A dual encoder. Half of the texts are captions, half just the digits, in any colour: colours and places alone
    tell most scenes apart, and would leave little reason to learn to read."""
    stage = quickstart.base(args, SIZE, TEXT)
    stage.task = 'contrastive'
    stage.total = dict(steps=20 if args['smoke'] else 5000)
    stage.batch_size = 64
    stage.model = dict(
        image=image_tower(),
        text=dict(variant='Ti', width=128, depth=2, mlp_dim=512, num_heads=4, pool='mean', mask=True, embed_init=0.5),
    )
    looks = f'decode | resize({SIZE})'
    stage.data.sources = dict(
        captions=source(args, f'{looks} | text("caption")'),
        digits=source(args, f'{looks} | shuffle_channels | text("reading")'),
    )
    stage.optimizer = adamw(1e-3)
    one = dict(num_digits=1)
    stage.evals = dict(
        digit=quickstart.evaluation(
            args,
            kind='zero_shot',
            pipeline=f'{looks} | first("objects/digit", "digit")',
            where=one,
            label='digit',
            classes=quickstart.FIGURES,
            slices=('held_out',),
            every=0 if args['smoke'] else 1000,
        ),
        color=quickstart.evaluation(
            args,
            kind='zero_shot',
            pipeline=f'{looks} | first("objects/color", "color")',
            where=one,
            label='color',
            classes=COLORS,
            templates=tuple(f'a {{}} {digit} in the {place}' for digit in DIGITS for place in quickstart.PLACES),
        ),
        retrieval=quickstart.evaluation(args, kind='retrieval', pipeline=looks, label='caption', examples=500),
    )
    return stage


def multimodal(args: dict) -> ConfigDict:
    """The whole of a PaliGemma on a mixture: captions, questions, boxes, reading."""
    stage = quickstart.base(args, SIZE, TEXT)
    stage.task = 'generative'
    stage.total = dict(steps=20 if args['smoke'] else 9000)
    stage.batch_size = 48
    stage.model = dict(image=image_tower(), decoder=decoder())
    stage.init_from = dict(stage='pretrain', parts={'img': 'img'}, fresh=('img/head/.*',))
    stage.data.sources = dict(
        caption=source(args, train_pipeline(SIZE, CAPTION), weight=1.0),
        question=source(args, train_pipeline(SIZE, 'question'), weight=2.0),
        detect=source(args, train_pipeline(SIZE, 'detect'), weight=1.0),
        detect_all=source(args, train_pipeline(SIZE, 'detect("digit")'), weight=1.0),
        read=source(args, train_pipeline(SIZE, f'shuffle_channels | {READ}'), weight=1.0),
    )
    stage.optimizer = adamw(1e-3)
    stage.evals = answers(args, SIZE)
    return stage


def transfer(args: dict) -> ConfigDict:
    """Reading, looked at more closely: the position embedding is resized on the way in."""
    stage = quickstart.base(args, CLOSER, TEXT)
    stage.task = 'generative'
    stage.total = dict(steps=20 if args['smoke'] else 800)
    stage.batch_size = 32
    stage.model = dict(image=image_tower(), decoder=decoder())
    stage.init_from = dict(stage='multimodal')
    stage.data.sources = dict(read=source(args, train_pipeline(CLOSER, f'shuffle_channels | {READ}')))
    stage.optimizer = adamw(3e-4)
    stage.evals = dict(
        read=quickstart.generation(args, CLOSER, READ, examples=0, max_new_tokens=12, slices=('held_out', 'num_digits'))
    )
    return stage


def answers(args: dict, size: int) -> dict:
    """Every kind of answer."""
    generation = quickstart.generation
    return dict(
        answer=generation(args, size, 'question', examples=0, max_new_tokens=4, slices=('held_out',)),
        read=generation(args, size, READ, examples=0, max_new_tokens=12, slices=('held_out', 'num_digits')),
        caption=generation(args, size, CAPTION, examples=500, max_new_tokens=40, slices=('num_digits',)),
        detect=generation(
            args, size, 'detect', examples=0, max_new_tokens=12, metrics=('box_iou',), slices=('held_out',)
        ),
    )


def image_tower() -> dict:
    return dict(variant='Ti/8', width=128, depth=4, mlp_dim=512, num_heads=4)


def decoder() -> dict:
    return dict(variant='gemma_2b', width=128, depth=4, mlp_dim=384, num_heads=4, num_kv_heads=1, head_dim=32)
