"""The main job at its smallest: a dual encoder, a PaliGemma grown from it, a transfer to twice the resolution.

--config=tests/micro_config.py:DATA_DIR     prepared datasets live there
"""

TOWER = dict(variant='mu/16', width=16, depth=1, mlp_dim=32, num_heads=2)
SCENES = dict(dataset='digit_scenes/cells_tiny')
CAPTION = 'prefix("caption en") | suffix("{caption}")'
COLORS = ('red', 'green', 'blue', 'yellow', 'magenta', 'cyan', 'orange', 'white')


def get_config(data_dir=''):
    return dict(
        stages=('pretrain', 'multimodal', 'transfer'),
        pretrain=pretrain(data_dir),
        multimodal=multimodal(data_dir),
        transfer=transfer(data_dir),
    )


def pretrain(data_dir, steps=6):
    looks = 'decode | resize(32)'
    return dict(
        task='contrastive',
        **base(32, steps),
        model=dict(image=TOWER, text=dict(variant='mu', width=16, depth=1, mlp_dim=32, num_heads=2, pool='mean')),
        data=data(data_dir, captions=f'{looks} | text("caption")'),
        evals=dict(
            color=dict(
                SCENES,
                kind='zero_shot',
                pipeline=f'{looks} | first("objects/color", "color")',
                where=dict(num_digits=1),
                label='color',
                classes=COLORS,
                templates=('a {} three', 'a {} seven'),
                slices=('held_out',),
            ),
            retrieval=dict(SCENES, kind='retrieval', pipeline=looks, label='caption', examples=16),
        ),
    )


def multimodal(data_dir, steps=6, size=32):
    looks = f'decode | resize({size})'
    decoder = dict(variant='gemma_2b', width=16, depth=1, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
    return dict(
        task='generative',
        **base(size, steps),
        model=dict(image=TOWER, decoder=decoder),
        init_from=dict(stage='pretrain', parts={'img': 'img'}, fresh=('img/head/.*',)),
        data=data(data_dir, caption=f'{looks} | {CAPTION} | tokenize', ask=f'{looks} | question | tokenize'),
        evals=dict(answer=dict(SCENES, kind='generation', pipeline=f'{looks} | question | tokenize', max_new_tokens=3)),
    )


def transfer(data_dir):
    """Half way to the end, it is evaluated once more."""
    stage = multimodal(data_dir, steps=4, size=64)
    stage['init_from'] = dict(stage='multimodal')
    stage['evals']['answer']['every'] = 2
    return stage


def base(size, steps):
    return dict(
        total=dict(steps=steps),
        batch_size=8,
        contract=dict(image_size=size, text_length=32),
        optimizer=dict(lr=3e-3, warmup=dict(steps=2)),
        checkpoint=dict(every=3),
        log_every=1,
    )


def data(data_dir, **pipelines):
    return dict(data_dir=data_dir, sources={name: dict(SCENES, pipeline=pipelines[name]) for name in pipelines})
