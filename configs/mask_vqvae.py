"""The mask VQ-VAE of segmentation tokens, from scratch: objects' masks, and shapes of nobody's beside them.

The network is that of PaliGemma's vae-oid.npz (All in Tokens, arXiv 2301.02229; github.com/SwinTransformer/AiT,
vae/configs/insseg/ait_insseg_vqvae.py: AdamW at 3e-4, no weight decay, batches of 512, cosine). Steps, batch and rate
here are ours, for the digit scenes on a laptop.

WORKDIR/masks/masks.npz has the published names. Pipelines write it into answers, segment("…/masks.npz"), and
configs/segmentation.py:codes=… trains a decoder to say them.

    --config=configs/mask_vqvae.py
    --config=configs/mask_vqvae.py:smoke
    --config=configs/mask_vqvae.py:data=mine.jsonl,held_out=mine_val.jsonl    with a column objects/mask
"""

from ml_collections import ConfigDict

from configs.arguments import parse_arg


def get_config(arg: str = '') -> ConfigDict:
    args = parse_arg(arg, smoke=False, seed=0, split='test', data='', held_out='', data_dir='', tokenizer='')
    own = bool(args['data'])
    if own != bool(args['held_out']):
        raise ValueError('data and held_out: give both, or neither for the digit scenes')
    scenes = 'digit_scenes/free_tiny' if args['smoke'] else 'digit_scenes/free'
    data, held_out = args['data'] or scenes, args['held_out'] or scenes
    looks = 'decode | masks | flip_lr | mask' if own else 'masks | mask'  # a digit in a mirror is none
    scored = dict(kind='reconstruction', dataset=held_out, split='train' if own else args['split'], examples=1000)
    masks = dict(
        task='mask_autoencoder',
        seed=args['seed'],
        total=dict(steps=4 if args['smoke'] else 300),
        batch_size=8 if args['smoke'] else 32,
        tokenizer=dict(path=args['tokenizer']),
        data=dict(
            data_dir=args['data_dir'],
            sources=dict(
                objects=dict(dataset=data, pipeline=looks, weight=0.7),
                shapes=dict(dataset=data, pipeline='mask("shape")', weight=0.3),
            ),
        ),
        optimizer=dict(name='adamw', lr=1e-3, b2=0.999, warmup=dict(percent=5.0)),
        log_every=1 if args['smoke'] else 25,
        checkpoint=dict(every=2 if args['smoke'] else 100),
        evals=dict(objects=dict(scored, pipeline='masks | mask'), shapes=dict(scored, pipeline='mask("shape")')),
    )
    return ConfigDict(dict(stages=('masks',), masks=masks))
