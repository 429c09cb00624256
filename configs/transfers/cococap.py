"""Captions of COCO, scored on its validation images and on NoCaps.

`captions=captions/text` names another column of them: as TFDS has them, with `data=coco_captions`.
"""

from ml_collections import ConfigDict

from configs.transfers import recipe

SAY = 'prefix("caption en")'
COLUMN = dict(captions='captions')


def get_config(arg: str = '') -> ConfigDict:
    column = recipe.parse(arg, **COLUMN)['captions']
    return recipe.transfer(
        arg,
        'cococap',
        train=dict(train=('train', f'{SAY} | choice("{column}", "drawn") | suffix("{{drawn}}")', 1.0)),
        evals=dict(val=recipe.captions(SAY, column=column), nocaps=recipe.captions(SAY, data='nocaps')),
        epochs=5,
        text_length=32,
        decay=1e-6,
        antialias=False,
        own=COLUMN,
    )
