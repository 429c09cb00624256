"""CLIP's recipe for its ResNet-50 (arXiv 2103.00020), on a ResNet-50 of another kind.

From the paper: learning rate 5e-4, joint width 1024, 224 px, blocks of 3, 4, 6 and 3 units to a width of 2048 (table
19); b2 0.999, epsilon 1e-8 (table 18). All else, and what is different, is told in `clip_b16`.

The image tower is BiT's (arXiv 1912.11370): GroupNorm and standardised weights, one 7×7 convolution at the start, the
mean over the grid at the end. CLIP's has BatchNorm, three convolutions at the start, blurred strides and attention
pooling (section 2.4), so results will not be CLIP's, nor do its weights fit.

    --config=configs/clip_rn50.py:data=photos/captions.jsonl
"""

from ml_collections import ConfigDict

from configs import clip_b16, recipe


def get_config(arg: str = '') -> ConfigDict:
    args = recipe.parse(arg, **recipe.SCORED)
    return recipe.run(
        args, pretrain=clip_b16.stage(args, dict(variant='R50', pool='gap'), embed_dim=1024, b2=0.999, eps=1e-8)
    )
