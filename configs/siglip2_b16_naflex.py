"""SigLIP 2's NaFlex, B/16 (arXiv 2502.14786, section 2.4.2): one model for images of any aspect ratio and length.

From the paper: training as in `siglip2_b16`, images squeezed to 256 px, for 90 % of its 40 B examples; then images keep
their aspect ratio, with 128, 256, 576, 784 or 1024 patches, each as often, and what is left of the learning rate's
cosine is stretched by 3.75; the decoder all along, no self-distillation and no masked prediction.

Different here: every image draws a length of its own, in rows of 1,024, where the paper draws one for a whole batch, of
which the longest are half as large and twice as many; so each length gets as many examples, at less than twice the
work. All else, and what is not here, is told in `siglip2_b16`. After `siglip` the decoder begins anew.

`siglip` is a checkpoint to begin the second stage from, SigLIP 2's of 256 px or a bundle of `siglip2_b16`; without, the
first stage comes first.

    --config=configs/siglip2_b16_naflex.py:data=photos/captions.jsonl,tokenizer=gemma/tokenizer.model
    --config=configs/siglip2_b16_naflex.py:siglip=siglip2-base-patch16-256,tokenizer=gemma/tokenizer.model
    --config=configs/siglip2_b16_naflex.py:runlocal
"""

from ml_collections import ConfigDict

from configs import recipe, siglip2_b16, siglip_b16

SWITCH, STRETCH = 0.9, 3.75


def get_config(arg: str = '') -> ConfigDict:
    args = recipe.parse(arg, **siglip2_b16.OWN, siglip='')
    pretrain, naflex = (
        siglip_b16.stage(args, siglip2_b16.TOWERS, image_size=256, vocab_size=256_000) for _ in range(2)
    )
    examples, there = pretrain.total.examples, siglip2_b16.along(pretrain, SWITCH)
    pretrain.total.examples = round(SWITCH * examples)
    pretrain.optimizer.curve = (0.0, there)
    naflex.total.examples = round((1 - SWITCH) * STRETCH * examples)
    naflex.optimizer.update(curve=(there, 1.0), warmup=dict(steps=0))
    naflex.contract = dict(max_patches=recipe.NAFLEX[-1], text_length=64)
    if args['siglip']:
        naflex.init_from = dict(path=recipe.path(args, 'siglip'), fresh=('captioner/.*',))
        return recipe.run(args, naflex=naflex)
    naflex.init_from = dict(stage='pretrain')
    return recipe.run(args, pretrain=pretrain, naflex=naflex)
