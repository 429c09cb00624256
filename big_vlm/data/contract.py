"""The preprocessing contract: how pixels and text become a model's arrays. It is stored with the weights."""

import dataclasses
from typing import Any

from big_vlm import config
from big_vlm.config import UserError, unknown
from big_vlm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Contract:
    """All that must be the same at inference as in training.

    image_size: pixels, square; of no use with max_patches.
    resample, antialias: what `resize` does ('bilinear' | 'bicubic'; low-pass before shrinking or not).
    value_range: what pixel values 0 and 255 become on the device.
    text_length: T of contrastive text; the text slots after the image slots of a generative row.
    lower: text is lower-cased.
    eos: contrastive text ends in eos, also where it is cut.
    separator, separator_ids: between prompt and answer, tokenized on its own.
    image_alone: image tokens do not see the prompt.
    causal_prompt: a token of the prompt sees those before it only, a token of an image all of the image.
    images: that a generative row has room for.
    image_tokens: image slots of a generative row, of all its images (0 for dual encoders and decoders alone).
    vocab_size: ids the tokenizer knows, location and segmentation tokens included.
    softcap: tanh cap of the decoder's output logits, 0 for none.
    end_ids: further ids that end an answer as eos does, such as <end_of_turn>; only generation knows them.
    max_patches, patch_size: pictures at their own aspect ratio, as so many patches of so many pixels a side (NaFlex);
      0 and 0 for squares.
    """

    image_size: int
    resample: str
    antialias: bool
    value_range: tuple[float, float]
    text_length: int
    lower: bool
    eos: bool
    separator: str
    separator_ids: tuple[int, ...]
    image_tokens: int
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    tokenizer_sha256: str
    softcap: float = 0.0
    end_ids: tuple[int, ...] = ()
    image_alone: bool = False
    causal_prompt: bool = False
    images: int = 1
    max_patches: int = 0
    patch_size: int = 0

    @classmethod
    def make(
        cls,
        settings: config.Contract,
        tokenizer: Tokenizer,
        image_tokens: int = 0,
        softcap: float = 0.0,
        patch_size: int = 0,
    ) -> 'Contract':
        """The contract of a stage: its settings, its tokenizer, and what its model adds.

        Raises UserError for a decoder whose tokenizer has no bos to start a prompt with.
        """
        if image_tokens and tokenizer.bos_id < 0:
            raise UserError(f'tokenizer {tokenizer.path} has no bos_id, and a decoder needs one: choose another model')
        return cls(
            **{f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)},
            separator_ids=tuple(tokenizer.encode(settings.separator)),
            image_tokens=image_tokens,
            vocab_size=tokenizer.vocab_size,
            pad_id=tokenizer.pad_id,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            tokenizer_sha256=tokenizer.sha256,
            softcap=softcap,
            patch_size=patch_size,
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """All ids that end an answer."""
        return self.eos_id, *self.end_ids

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> 'Contract':
        """The inverse of `to_dict`. Raises UserError for a missing or an unknown entry."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise unknown('entry of the preprocessing contract', name, names)
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in values and f.default is dataclasses.MISSING]
        if missing:
            raise UserError(f'the preprocessing contract lacks {", ".join(missing)}: the file is incomplete')
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
