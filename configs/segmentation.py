"""Segmentation on the digit scenes: 'segment red three' → its box and the 16 codes of its mask, `<loc…>×4 <seg…>×16`.

A transfer of the quickstart's PaliGemma (`python tools/start.py job` makes it), which knows boxes and digits. The codes
are those of the mask VQ-VAE that configs/mask_vqvae.py trains, or of PaliGemma's vae-oid.npz.

    --config=configs/segmentation.py:codes=runs/codes/masks/masks.npz
    --config=configs/segmentation.py:codes=runs/codes/masks/masks.npz,bundle=DIR,smoke
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.arguments import parse_arg

SIZE = 48  # pixels
TEXT = 64  # text slots: two objects of one name


def get_config(arg: str = '') -> ConfigDict:
    own = dict(codes='', bundle='runs/quickstart/multimodal/bundle')
    args = parse_arg(arg, smoke=False, seed=0, split='test', **own) | {'layout': 'cells'}
    if not args['codes']:
        raise ValueError('codes=FILE.npz: the mask VQ-VAE, as configs/mask_vqvae.py makes it')
    return ConfigDict(dict(stages=('segment',), segment=segment(args)))


def segment(args: dict) -> ConfigDict:
    """Boxes and masks of what is named."""
    stage = quickstart.multimodal(args, SIZE, TEXT)
    ask = f'masks | segment({args["codes"]!r})'
    stage.total = dict(steps=20 if args['smoke'] else 500)
    stage.batch_size = 32
    stage.init_from = dict(path=args['bundle'])
    stage.tokenizer.path = f'{args["bundle"]}/tokenizer.model'
    stage.data.sources = dict(
        segment=quickstart.source(args, quickstart.train_pipeline(SIZE, ask), weight=4.0),
        detect=quickstart.source(args, quickstart.train_pipeline(SIZE, 'detect')),
    )
    stage.optimizer = quickstart.adamw(1e-3)
    scored = dict(answers='true_masks', metrics=('mask_iou', 'box_accuracy'), codes=args['codes'], max_new_tokens=32)
    if args['smoke']:
        scored['examples'] = 16
    stage.evals = dict(
        segment_one=quickstart.generation(args, SIZE, ask, where=dict(num_digits=1), **scored),
        segment=quickstart.generation(args, SIZE, ask, grammar='boxes', slices=('held_out',), **scored),
    )
    return stage
