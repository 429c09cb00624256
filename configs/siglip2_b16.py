"""The sigmoid loss of SigLIP 2, B/16 at 256 px (arXiv 2502.14786, section 2.1).

From the paper: Adam with learning rate 1e-3, decoupled weight decay 1e-4, gradients clipped to norm 1, batches of 32k,
a cosine after 20k steps of warmup, 40 B examples, 64 tokens in lower case, 256 patches of 16 px. `tokenizer` should be
Gemma's file, 256k pieces.

This is the dual encoder alone: the paper's captioning decoder (2.2), its self-distillation and masked prediction in the
last fifth (2.3), and the resolutions that leave the run at 95 % (2.4) are not here. Not published: b2, here SigLIP's
0.95. The paper speaks of attention pooling in both towers; the published text towers pool the last position, and so
does this one.

    --config=configs/siglip2_b16.py:data=photos/captions.jsonl,tokenizer=gemma/tokenizer.model
"""

from ml_collections import ConfigDict

from configs import recipe, siglip_b16


def get_config(arg: str = '') -> ConfigDict:
    args = recipe.parse(arg, **recipe.SCORED)
    towers = dict(image=dict(variant='B/16'), text=dict(variant='B'))
    return recipe.run(args, pretrain=siglip_b16.stage(args, towers, image_size=256, vocab_size=256_000))
