"""PaliGemma 2 3B (arXiv 2412.03555, section 3): PaliGemma's stages with Gemma 2 2B.

From the report: half of PaliGemma's learning rate; the output logits capped in stages 1 and 2, at Gemma 2's 30 (arXiv
2408.00118, section 2). All else, and what is not published, is told in `paligemma_3b`.

    --config=configs/paligemma2_3b.py:siglip=siglip-so400m-patch14-224,gemma=gemma-2-2b,tokenizer=gemma-2-2b/tokenizer.model
"""

from ml_collections import ConfigDict

from configs import paligemma_3b


def get_config(arg: str = '') -> ConfigDict:
    return paligemma_3b.stages(paligemma_3b.parse(arg), dict(variant='gemma2_2b', final_softcap=30.0), lr=1e-5)
