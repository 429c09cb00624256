"""LiT, a text tower tuned to a locked image tower (arXiv 2111.07991), on COCO captions with the sigmoid loss.

From big_vision's `configs/proj/image_text/siglip_lit_coco.py`: 5,000 steps of 512, 16 tokens, 224 px, Adam with
learning rate 1e-3, weight decay 0.01, gradients clipped to norm 1, a cosine after 3 % of warmup, temperature 10 and
bias -2.71 at first, B/16 frozen and without a head, its text width 768.

Different here: `image` is a checkpoint with a B/16 under `img` (SigLIP's, or a bundle; `pool=tok` for one with a class
token), where big_vision takes one trained on ImageNet-21k; the text tower, of BERT base's size, starts at random, not
as BERT; images are neither flipped nor augmented.

    --config=configs/lit_coco.py:image=siglip-base-patch16-224
    --config=configs/lit_coco.py:runlocal
"""

from ml_collections import ConfigDict

from configs import recipe


def get_config(arg: str = '') -> ConfigDict:
    args = recipe.parse(arg, **recipe.SCORED, image='', pool='map')
    stage = recipe.stage(
        args,
        task='contrastive',
        total=dict(steps=5000),
        batch_size=512,
        contract=dict(image_size=224, antialias=False, text_length=16),
        tokenizer=dict(vocab_size=30_522),  # BERT's
        model=dict(
            image=dict(variant='B/16', pool=args['pool']),
            text=dict(variant='B', mask=True, pool='first'),
            loss='sigmoid',
            init_b=-2.71,
            dtype='bfloat16',
        ),
        optimizer=dict(
            name='adamw',
            lr=1e-3,
            b2=0.999,
            weight_decay=0.01,
            clip=1.0,
            schedule='cosine',
            warmup=dict(percent=3.0),
            rules=(('img/.*', dict(frozen=True)), ('.*', {})),
        ),
    )
    stage.init_from = dict(path=recipe.path(args, 'image'), parts={'img': 'img'})
    return recipe.run(args, tune=stage)
