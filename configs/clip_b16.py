"""CLIP ViT-B/16 (arXiv 2103.00020).

From the paper: batches of 32,768, 32 epochs of 400 M pairs, 49,408 pieces, weight decay 0.2, 2,000 steps of warmup, b1
0.9, b2 0.98, epsilon 1e-6 (table 18); learning rate 5e-4, joint width 512, 224 px, a text tower of 12 layers, width 512
and 8 heads (table 20); decay of all weights that are not gains or biases, cosine, temperature 0.07 at first, logits
scaled by 100 at most (section 2.5); a causal text tower that pools its end token, in lower case (2.4). 77 tokens are
the code's; the paper says 76.

Different here: images are resized to a square, not cropped at random, and pixels range over -1 … 1, not by mean and
deviation; the ViT has no norm before its first layer, and GELU is the tanh one; the text's projection has a bias, which
the image's has not, nor either of CLIP's; the tokenizer is SentencePiece, not CLIP's byte pairs. The paper mentions no
gradient clipping. WIT, its data, is private.

    --config=configs/clip_b16.py:data=photos/captions.jsonl
    --config=configs/clip_b16.py:runlocal
"""

import math

from ml_collections import ConfigDict

from configs import recipe


def get_config(arg: str = '') -> ConfigDict:
    args = recipe.parse(arg, **recipe.SCORED)
    return recipe.run(args, pretrain=stage(args, dict(variant='B/16', pool='tok'), embed_dim=512, b2=0.98, eps=1e-6))


def stage(args: dict, image: dict, embed_dim: int, b2: float, eps: float) -> ConfigDict:
    """CLIP's run: `image` is `model.image`, the numbers are those in which its models differ."""
    text = dict(variant='B', width=512, mlp_dim=2048, num_heads=8, causal=True, mask=True, pool='last')
    return recipe.stage(
        args,
        task='contrastive',
        total=dict(examples=32 * 400_000_000),
        batch_size=32_768,
        contract=dict(image_size=224, resample='bicubic', text_length=77),
        tokenizer=dict(vocab_size=49_408),
        model=dict(
            image=dict(head_bias=False, **image),
            text=text,
            embed_dim=embed_dim,
            init_t=math.log(1 / 0.07),
            max_logit_scale=100.0,
            loss='softmax',
            loss_form='ring',
            dtype='bfloat16',
            remat='full',
        ),
        optimizer=dict(
            name='adamw',
            lr=5e-4,
            b1=0.9,
            b2=b2,
            eps=eps,
            weight_decay=0.2,
            clip=0.0,
            schedule='cosine',
            warmup=dict(steps=2000),
            rules=(('.*(embedding|cls)', dict(decay=1.0)), ('.*', {})),
        ),
    )
