"""The full task: one to four scanned digits of any size anywhere, on plain or textured grounds (`digit_scenes/free`).

A vision transformer that starts on such scenes stays at chance for tens of thousands of them; one that has read digits
in cells goes on to read one anywhere (61 % of unseen scans after the stage `single`). So the first dual encoder and the
first steps of reading are of cells, and the dual encoder of free scenes comes after the multimodal stage.

Much longer than the quickstart. It may run in pieces, in the background: stopped (Ctrl-C, SIGTERM, SIGKILL) and
started again, it goes on where it was.

    --config=configs/digits.py
    --config=configs/digits.py:smoke
    --config=configs/digits.py:seed=1,split=validation
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.arguments import parse_arg
from configs.quickstart import CAPTION, READ, adamw, generation, source, train_pipeline

SIZE, CLOSER = 64, 80  # pixels, before and in the transfer stage
TEXT = 36
ONE = dict(num_digits=1)


def get_config(arg: str = '') -> ConfigDict:
    args = parse_arg(arg, smoke=False, seed=0, split='test') | {'layout': 'free'}
    config = ConfigDict()
    config.stages = ('pretrain', 'cells', 'single', 'multimodal', 'dual', 'transfer')
    config.pretrain = pretrain(args)
    config.cells = cells(args)
    config.single = single(args)
    config.multimodal = multimodal(args)
    config.dual = dual(args)
    config.transfer = transfer(args)
    return config


def pretrain(args: dict) -> ConfigDict:
    """The quickstart's dual encoder of digits in cells, in patches of the size that the free scenes need."""
    stage = quickstart.pretrain(args | {'layout': 'cells'}, text=TEXT)
    stage.total = dict(steps=20 if args['smoke'] else 1000)
    stage.data.sources.captions.weight = 1.2
    stage.model = towers()
    return stage


def cells(args: dict) -> ConfigDict:
    """The quickstart's PaliGemma, in these patches and mostly reading."""
    stage = quickstart.multimodal(args | {'layout': 'cells'}, text=TEXT)
    stage.total = dict(steps=20 if args['smoke'] else 800)
    stage.batch_size = 32
    stage.model.image = image_tower()
    stage.data.sources.read.weight = 4.0
    stage.optimizer = adamw(1e-3)
    return stage


def single(args: dict) -> ConfigDict:
    """Reading alone, of the free scenes that hold one digit: nothing else teaches as much in as few tokens."""
    stage = quickstart.base(args, SIZE, 8)
    stage.task = 'generative'
    stage.total = dict(steps=20 if args['smoke'] else 1500)
    stage.batch_size = 64
    stage.model.update(image=image_tower(), decoder=quickstart.decoder())
    stage.init_from = dict(stage='cells')
    read = train_pipeline(SIZE, f'shuffle_channels | {READ}')
    stage.data.sources = dict(read=source(args, read) | dict(where=ONE))
    stage.optimizer = adamw(1e-3)
    stage.evals = dict(read=generation(args, SIZE, READ, where=ONE, max_new_tokens=3, slices=('held_out',), every=500))
    return stage


def multimodal(args: dict) -> ConfigDict:
    """The whole of a PaliGemma on a mixture of free scenes: captions, questions, boxes, reading."""
    stage = quickstart.base(args, SIZE, TEXT)
    stage.task = 'generative'
    stage.total = dict(steps=20 if args['smoke'] else 5000)
    stage.batch_size = 32
    stage.model.update(image=image_tower(), decoder=quickstart.decoder())
    stage.init_from = dict(stage='single')
    read = train_pipeline(SIZE, f'shuffle_channels | {READ}')
    stage.data.sources = dict(
        caption=source(args, train_pipeline(SIZE, CAPTION), weight=1.0),
        question=source(args, train_pipeline(SIZE, 'question'), weight=2.0),
        detect=source(args, train_pipeline(SIZE, 'detect'), weight=1.0),
        # Reading several in order stays at chance for long when it is all there is to learn.
        read_one=source(args, read, weight=1.5) | dict(where=ONE),
        read=source(args, read, weight=1.0),
    )
    stage.optimizer = adamw(1e-3)
    stage.evals = dict(
        answer=generation(args, SIZE, 'question', examples=0, max_new_tokens=4, slices=('held_out',)),
        read=generation(args, SIZE, READ, examples=0, max_new_tokens=12, slices=('held_out', 'num_digits')),
        caption=generation(args, SIZE, CAPTION, examples=500, max_new_tokens=32, slices=('num_digits',)),
        detect=generation(
            args, SIZE, 'detect', examples=0, max_new_tokens=12, metrics=('box_iou',), slices=('held_out',)
        ),
    )
    return stage


def dual(args: dict) -> ConfigDict:
    """A dual encoder of free scenes, on the image tower that has learnt to read."""
    stage = quickstart.pretrain(args, SIZE, TEXT)
    stage.total = dict(steps=20 if args['smoke'] else 500)
    stage.model = towers()
    stage.init_from = dict(stage='multimodal', parts={'img': 'img'}, fresh=('img/MAPHead_0/.*',))
    return stage


def transfer(args: dict) -> ConfigDict:
    """Reading, looked at more closely."""
    stage = quickstart.base(args, CLOSER, TEXT)
    stage.task = 'generative'
    stage.total = dict(steps=20 if args['smoke'] else 400)
    stage.batch_size = 32
    stage.model.update(image=image_tower(), decoder=quickstart.decoder())
    stage.init_from = dict(stage='multimodal')
    stage.data.sources = dict(read=source(args, train_pipeline(CLOSER, f'shuffle_channels | {READ}')))
    stage.optimizer = adamw(5e-4)
    stage.evals = dict(
        read=generation(args, CLOSER, READ, examples=0, max_new_tokens=12, slices=('held_out', 'num_digits'))
    )
    return stage


def towers() -> dict:
    # Whole, not merged into the quickstart's: that one's image tower learns its position embedding.
    text = dict(variant='Ti', width=128, depth=2, mlp_dim=256, num_heads=4, pool='mean', mask=True, embed_init=0.5)
    return dict(scan=False, image=image_tower(), text=text)


def image_tower() -> dict:
    # Fixed sines: what it learns about a patch's neighbours in one place it knows in all of them.
    return dict(variant='Ti/8', width=128, depth=4, mlp_dim=512, num_heads=4, position='sincos2d')
