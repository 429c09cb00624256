"""Token rows: contrastive text of fixed length, and PaliGemma's prompt row (PARITY: prompts, masks, loss).

    slot       image × P   <bos> prefix  separator   suffix <eos>   padding
    text       −1          ids           ids         ids            pad
    segment    1           1             1           1              0
    mask_ar    0           0             0           1              0
    mask_loss  0           0             0           1              0

A row without a suffix ends after the separator: what follows is the model's to write.
"""

from collections.abc import Sequence

import numpy as np

from big_vlm.config import UserError
from big_vlm.data.contract import Contract


class TooLong(UserError):
    """A prompt leaves no room in the row."""


def contrastive_text(ids: Sequence[int], contract: Contract) -> tuple[np.ndarray, np.ndarray]:
    """(text int32 [T], text_mask bool [T]): ids, eos if the contract wants it (also where the text is cut), padding.

    With T = 4 and eos 1: [7, 8] → [7, 8, 1, 0]; [5, 6, 7, 8, 9] → [5, 6, 7, 1].
    """
    length = contract.text_length
    ids = [*ids[: length - 1], contract.eos_id] if contract.eos else list(ids[:length])
    text = np.full(length, contract.pad_id, np.int32)
    text[: len(ids)] = ids
    return text, np.arange(length) < len(ids)


def generative_row(
    prefix_ids: Sequence[int], suffix_ids: Sequence[int] | None, contract: Contract
) -> dict[str, np.ndarray]:
    """The row of one prompt, and its answer if given, as int32 arrays [image_tokens + text_length].

    `position` counts the real tokens from 0. An answer that does not fit is cut, and then has no eos. Raises TooLong (a
    UserError) if the prompt does not fit, or leaves no slot for an answer that is given.
    """
    prompt = [contract.bos_id, *prefix_ids, *contract.separator_ids]
    answer = [] if suffix_ids is None else [*suffix_ids, contract.eos_id]
    if len(prompt) + (suffix_ids is not None) > contract.text_length:
        raise TooLong(
            f'the prompt takes {len(prompt)} tokens of the {contract.text_length} text slots: shorten it, '
            'or raise contract.text_length'
        )
    answer = answer[: contract.text_length - len(prompt)]
    images, prompted = contract.image_tokens, contract.image_tokens + len(prompt)
    used, total = prompted + len(answer), contract.image_tokens + contract.text_length
    text = np.full(total, contract.pad_id, np.int32)
    text[:images] = -1
    text[images:used] = prompt + answer
    slots = np.arange(total, dtype=np.int32)
    real, supervised = slots < used, (slots >= prompted) & (slots < used)
    return {
        'text': text,
        'segment': real.astype(np.int32),
        'position': np.where(real, slots, 0),
        'mask_ar': supervised.astype(np.int32),
        'mask_loss': supervised.astype(np.int32),
    }
