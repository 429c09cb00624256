"""Token rows: contrastive text of fixed length, and PaliGemma's prompt row (PARITY: prompts, masks, loss).

    slot       image × P   <bos> prefix  separator   suffix <eos>   padding
    text       −1          ids           ids         ids            pad
    segment    1           1             1           1              0
    mask_ar    0           0             0           1              0
    mask_loss  0           0             0           1              0

A row without a suffix ends after the separator: what follows is the model's to write. More turns about the same images
may follow the first, each a prompt that sees itself and all before it, and its answer:

    slot       prefix  separator   suffix <eos>
    text       ids     ids         ids
    segment    1       1           1
    mask_ar    1 0 0 …  0          1
    mask_loss  0       0           1
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
    prefix_ids: Sequence[int],
    suffix_ids: Sequence[int] | None,
    contract: Contract,
    more: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
) -> dict[str, np.ndarray]:
    """The row of one prompt, and its answer if given, as int32 arrays [image_tokens + text_length].

    `more`: (prefix, suffix) of further turns; the first that does not fit whole ends the row. `position` counts the
    real tokens from 0. An answer that does not fit is cut, and then has no eos. Raises TooLong (a UserError) if the
    prompt does not fit, or leaves no slot for an answer that is given.
    """
    prompt = [contract.bos_id, *prefix_ids, *contract.separator_ids]
    answer = [] if suffix_ids is None else [*suffix_ids, contract.eos_id]
    if len(prompt) + (suffix_ids is not None) > contract.text_length:
        raise TooLong(
            f'the prompt takes {len(prompt)} tokens of the {contract.text_length} text slots: shorten it, '
            'or raise contract.text_length'
        )
    ids = (prompt + answer)[: contract.text_length]
    answered = len(ids) - len(prompt)
    supervised = [0] * len(prompt) + [1] * answered
    starts = list(supervised)
    for prefix, suffix in more:
        prompt, answer = [*prefix, *contract.separator_ids], [*suffix, contract.eos_id]
        if len(ids) + len(prompt) + len(answer) > contract.text_length:
            break
        ids += prompt + answer
        starts += [1] + [0] * (len(prompt) - 1) + [1] * len(answer)
        supervised += [0] * len(prompt) + [1] * len(answer)
    images, total = contract.image_tokens, contract.image_tokens + contract.text_length

    def row(values: Sequence[int], image: int, padding: int) -> np.ndarray:
        made = np.full(total, padding, np.int32)
        made[:images] = image
        made[images : images + len(values)] = values
        return made

    segment = row([1] * len(ids), 1, 0)
    return {
        'text': row(ids, -1, contract.pad_id),
        'segment': segment,
        'position': np.arange(total, dtype=np.int32) * segment,
        'mask_ar': row(starts, 0, 0),
        'mask_loss': row(supervised, 0, 0),
    }
