"""The published Gemmas: their sizes, and what tells the three generations apart.

Gemma (arXiv 2403.08295, table 1), Gemma 2 (arXiv 2408.00118, table 1), Gemma 3 (arXiv 2503.19786, section 2 and
table 1; its 270M from the published configuration).
"""

from __future__ import annotations

import dataclasses

from big_vlm.config import unknown


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a layer consists of, whatever its size.

    Attributes:
      period: every so many layers the last one is global and sees all; those before it are local and see a window.
      post_norms: each sublayer's output is normalised before it is added.
      qk_norm: queries and keys are normalised per head, before their rotation.
      softcap: tanh cap of the attention logits; 0 for none.
      global_rope: (base, scale) of the rotary positions of global layers, where they differ from the local layers'
        (10,000, 1); positions are divided by the scale.
      scale_by_width: queries are scaled by (D / N)^-0.5, not H^-0.5.
    """

    period: int = 1
    post_norms: bool = False
    qk_norm: bool = False
    softcap: float = 0.0
    global_rope: tuple[float, float] | None = None
    scale_by_width: bool = False


_GEMMA = Generation()
_GEMMA2 = Generation(period=2, post_norms=True, softcap=50.0)
_GEMMA3_SHORT = Generation(period=6, post_norms=True, qk_norm=True, global_rope=(1e6, 1.0))  # 32k tokens of context
_GEMMA3 = dataclasses.replace(_GEMMA3_SHORT, global_rope=(1e6, 8.0))  # 128k
_GEMMA2_27B, _GEMMA3_27B = (dataclasses.replace(g, scale_by_width=True) for g in (_GEMMA2, _GEMMA3))

SIZES = ('width', 'depth', 'mlp_dim', 'num_heads', 'num_kv_heads', 'head_dim', 'window')
VARIANTS = {
    'gemma_2b': (_GEMMA, 2048, 18, 16_384, 8, 1, 256, 0),
    'gemma_7b': (_GEMMA, 3072, 28, 24_576, 16, 16, 256, 0),
    'gemma2_2b': (_GEMMA2, 2304, 26, 9_216, 8, 4, 256, 4096),
    'gemma2_9b': (_GEMMA2, 3584, 42, 14_336, 16, 8, 256, 4096),
    'gemma2_27b': (_GEMMA2_27B, 4608, 46, 36_864, 32, 16, 128, 4096),
    'gemma3_270m': (_GEMMA3_SHORT, 640, 18, 2_048, 4, 1, 256, 512),
    'gemma3_1b': (_GEMMA3_SHORT, 1152, 26, 6_912, 4, 1, 256, 512),
    'gemma3_4b': (_GEMMA3, 2560, 34, 10_240, 8, 4, 256, 1024),
    'gemma3_12b': (_GEMMA3, 3840, 48, 15_360, 16, 8, 256, 1024),
    'gemma3_27b': (_GEMMA3_27B, 5376, 62, 21_504, 32, 16, 128, 1024),
}


def decode_variant(variant: str) -> dict[str, int]:
    """'gemma_2b' -> width, depth, mlp_dim, num_heads, num_kv_heads, head_dim, window (tokens a local layer sees, the
    query included; 0 where all layers are global). Raises UserError for an unknown name."""
    return dict(zip(SIZES, _entry(variant)[1:], strict=True))


def generation(variant: str) -> Generation:
    """The variant's generation. Raises UserError for an unknown name."""
    return _entry(variant)[0]


def _entry(variant):
    if variant not in VARIANTS:
        raise unknown('decoder variant', variant, VARIANTS)
    return VARIANTS[variant]
