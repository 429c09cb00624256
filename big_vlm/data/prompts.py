"""Token rows: contrastive text of fixed length, and PaliGemma's prompt row (arXiv:2407.07726, section 3.2).

    slot       image × P   <bos> prefix  separator   suffix <eos>   padding
    text       −1          ids           ids         ids            pad
    segment    1           1             1           1              0
    mask_ar    0           0             0           1              0
    mask_loss  0           0             0           1              0

With `causal_prompt` every token of the prompt has `mask_ar` 1, and of an image the first one. Several images fill the
image slots in order; those that an example lacks leave theirs as padding (`with_images`).

A row without a suffix ends after the separator: what follows is the model's to write. More turns about the same images
may follow the first. As a rule each sees itself and all before it:

    slot       prefix  separator   suffix <eos>
    text       ids     ids         ids
    segment    1       1           1
    mask_ar    1 0 0 …  0          1
    mask_loss  0       0           1

Where the contract's images see no prompt (`image_alone`), every turn k, the first too, sees the images and itself, at
the same positions, as if it had a row of its own:

    slot       image × P   <bos> prefix  separator   suffix <eos>
    text       −1          ids           ids         ids
    segment    −1          k             k           k
    mask_ar    0           1 0 0 …       0           1
    mask_loss  0           0             0           1

With several turns, `mask_loss` weighs every answer the same, however long, and is 1 on average.
"""

from collections.abc import Mapping, Sequence

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


def grounded_text(prompt: Sequence[int], answer: Sequence[int], contract: Contract) -> tuple[np.ndarray, np.ndarray]:
    """(text int32 [T], bool [T], True where it is supervised): prompt, then answer and eos, cut to T, and padding.

    With T = 5 and eos 1: [7, 8] and [9] → [7, 8, 9, 1, 0], supervised at 9 and 1.
    """
    length = contract.text_length
    ids = [*prompt, *answer, contract.eos_id][:length]
    text = np.full(length, contract.pad_id, np.int32)
    text[: len(ids)] = ids
    return text, (np.arange(length) >= len(prompt)) & (np.arange(length) < len(ids))


def prompt(prefix_ids: Sequence[int], contract: Contract, room: int = 0) -> list[int]:
    """bos, prefix, separator. Raises TooLong (a UserError) where they leave fewer than `room` text slots."""
    ids = [contract.bos_id, *prefix_ids, *contract.separator_ids]
    if len(ids) + room > contract.text_length:
        raise TooLong(
            f'the prompt takes {len(ids)} tokens of the {contract.text_length} text slots: shorten it, '
            'or raise contract.text_length'
        )
    return ids


def generative_row(
    prefix_ids: Sequence[int],
    suffix_ids: Sequence[int] | None,
    contract: Contract,
    more: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
) -> dict[str, np.ndarray]:
    """The row of one prompt, and its answer if given: int32 arrays [image_tokens + text_length], `mask_loss` float32.

    `more`: (prefix, suffix) of further turns; the first that does not fit whole ends the row. An answer that does not
    fit is cut, and then has no eos. Raises TooLong (a UserError) if the prompt does not fit, or leaves no slot for an
    answer that is given.
    """
    asked = prompt(prefix_ids, contract, room=int(suffix_ids is not None))
    answer = [] if suffix_ids is None else [*suffix_ids, contract.eos_id]
    alone, images, total = contract.image_alone, contract.image_tokens, contract.image_tokens + contract.text_length
    turns = [(asked, answer[: contract.text_length - len(asked)])]
    room = contract.text_length - len(asked) - len(answer)
    for prefix, suffix in more:
        turn = [contract.bos_id] * alone + [*prefix, *contract.separator_ids], [*suffix, contract.eos_id]
        room -= sum(map(len, turn))
        if room < 0:
            break
        turns.append(turn)
    ids, segment, position, starts, weights = [], [], [], [], []
    for number, (asked, answer) in enumerate(turns, start=1):
        ids += asked + answer
        segment += [number if alone else 1] * len(asked + answer)
        first = images if alone else images + len(position)
        position += range(first, first + len(asked + answer))
        causal = int(contract.causal_prompt)
        starts += [int(alone or number > 1 or causal)] + [causal] * (len(asked) - 1) + [1] * len(answer)
        weights += [0] * len(asked) + [1 / max(len(answer), 1)] * len(answer)
    supervised = np.count_nonzero(weights)
    image_starts = np.arange(images) % (images // contract.images or 1) == 0 if contract.causal_prompt else 0

    def row(values: Sequence[float], image: int | Sequence[int], padding: int, dtype: type = np.int32) -> np.ndarray:
        made = np.full(total, padding, dtype)
        made[:images] = image
        made[images : images + len(values)] = values
        return made

    return {
        'text': row(ids, -1, contract.pad_id),
        'segment': row(segment, -1 if alone and len(turns) > 1 else 1, 0),
        'position': row(position, range(images), 0),
        'mask_ar': row(starts, image_starts, 0),
        'mask_loss': row(np.array(weights) * supervised / len(turns), 0, 0, np.float32),
    }


def shorter_image(row: Mapping[str, np.ndarray], patches: int, contract: Contract) -> dict[str, np.ndarray]:
    """A row of `generative_row` about what fills only so many image slots: a NaFlex image, or fewer images than may be.

    The slots that it leaves are padding, and the text goes on counting where the image ends: with 3 image slots, of
    which 2 are filled, segments 1 1 1 1 1 and positions 0 1 2 3 4 become 1 1 0 1 1 and 0 1 0 2 3.
    """
    slot, images = np.arange(len(row['segment']), dtype=np.int32), contract.image_tokens
    segment = np.where((slot >= patches) & (slot < images), 0, row['segment'])
    position = row['position'] - np.where(slot < images, 0, images - patches).astype(np.int32)
    return {**row, 'segment': segment, 'position': np.where(segment == 0, 0, position)}


def with_images(row: Mapping[str, np.ndarray], pictures: np.ndarray, contract: Contract) -> dict[str, np.ndarray]:
    """A row of `generative_row` with its images: `image` uint8 [I,S,S,3], `image_mask` bool [I], I `contract.images`.

    `pictures` uint8 [n,S,S,3], of at most so many; the slots of those that are missing are padding. Raises ValueError
    for more.
    """
    count, room = len(pictures), contract.images
    if count > room:
        raise ValueError(f'{count} images, and contract.images is {room}: raise it, or take fewer')
    if count < room:
        row = shorter_image(row, count * (contract.image_tokens // room), contract)
        pictures = np.concatenate([pictures, np.zeros((room - count, *pictures.shape[1:]), np.uint8)])
    return {**row, 'image': pictures, 'image_mask': np.arange(room) < count}
