"""SigLIP So400m/14 (arXiv 2303.15343, section 4.6): as B/16, with towers of the shape-optimised size.

256 patches are 224 px here. The published checkpoint at 224 px reads 16 tokens, that at 384 px 64; the paper has 64
throughout, and so has this. Shapes: arXiv 2305.13035. All else, and what is not published, is told in `siglip_b16`.

    --config=configs/siglip_so400m.py:data=photos/captions.jsonl,fsdp=32
"""

from ml_collections import ConfigDict

from configs import recipe, siglip_b16


def get_config(arg: str = '') -> ConfigDict:
    args = recipe.parse(arg, **recipe.SCORED, fsdp=8)
    towers = dict(image=dict(variant='So400m/14'), text=dict(variant='So400m'))
    return siglip_b16.stages(args, towers, image_size=224)
