"""SigLIP 2, B/16 at 256 px (arXiv 2502.14786, section 2): a decoder beside the towers, at the end self-distillation.

From the paper: Adam with learning rate 1e-3, decoupled weight decay 1e-4, gradients clipped to norm 1, batches of 32k,
a cosine after 20k steps of warmup, 40 B examples, 64 tokens in lower case, 256 patches of 16 px (2.1). `tokenizer`
should be Gemma's file, 256k pieces. LocCa's decoder of half the text tower's layers, its loss added with weight 1, half
of the captions predicted in parallel (2.2). From 80 % of the examples on, one teacher's view and eight local ones of
each image, and half of the patches masked, at weights 1 and 0.25, both times 0.25 for size B; teacher and heads begin
there (2.3). Views as SILC's (arXiv 2310.13355), heads and temperatures as DINO's (arXiv 2104.14294).

Different here: the optimizer's moments begin anew at 80 %. The resolutions that leave the run at 95 % (2.4) are not
here. Not published: b2, here SigLIP's 0.95; how much each of the decoder's three targets counts, here every row of text
as much; what the decoder is asked with; the teacher's decay, here DINO's first, 0.996. The paper speaks of attention
pooling in both towers; the published text towers pool the last position, and so does this one.

Boxes need data that has them: digit scenes, and `boxes` says that the other's `objects` have `bbox` and `label`.

    --config=configs/siglip2_b16.py:data=photos/captions.jsonl,tokenizer=gemma/tokenizer.model
    --config=configs/siglip2_b16.py:runlocal
"""

from ml_collections import ConfigDict

from configs import recipe, siglip_b16

OWN = dict(**recipe.SCORED, boxes=False)
TOWERS = dict(image=dict(variant='B/16'), text=dict(variant='B'), captioner=dict(weight=1.0))
SWITCH = 0.8


def get_config(arg: str = '') -> ConfigDict:
    args = recipe.parse(arg, **OWN)
    pretrain, distill = (siglip_b16.stage(args, TOWERS, image_size=256, vocab_size=256_000) for _ in range(2))
    examples, there = pretrain.total.examples, along(pretrain, SWITCH)
    pretrain.total.examples = round(SWITCH * examples)
    pretrain.optimizer.curve = (0.0, there)
    distill.total.examples = examples - pretrain.total.examples
    distill.optimizer.update(curve=(there, 1.0), warmup=dict(steps=0))
    distill.model.distill = dict(local=0.25, masked=0.0625, share=0.5)
    distill.init_from = dict(stage='pretrain', fresh=('distill/.*',))
    return recipe.run(args, pretrain=pretrain, distill=distill)


def along(stage: ConfigDict, share: float) -> float:
    """How far along its cosine, which begins after the warmup, a stage is after `share` of its examples."""
    warmup = stage.optimizer.warmup.steps * stage.batch_size / stage.total.examples
    return (share - warmup) / (1 - warmup)
