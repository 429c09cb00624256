"""Every example of an evaluation once, in order, in batches of one size."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from big_vlm.config import UserError
from big_vlm.data import loader, transforms
from big_vlm.data.contract import Contract
from big_vlm.data.failures import Failures, is_for_all
from big_vlm.data.tokenizer import Tokenizer


def eval_batches(
    source: Any,
    pipeline: transforms.Pipeline,
    contract: Contract,
    tokenizer: Tokenizer,
    batch_size: int,
    examples: int = 0,
    seed: int = 0,
    *,
    check: Callable[[dict], Any] = lambda example: None,
    failures: Failures | None = None,
    anywhere: Callable[[np.ndarray], np.ndarray] = lambda failed: failed,
) -> Iterator[tuple[loader.Batch, list[dict]]]:
    """(batch, records) over the first `examples` of a source (0: all), in order, each once.

    Batches have a fixed size; one with fewer examples is padded with copies of its first row, and `_mask` bool [B] is
    False there. `records` are the examples of the real rows, pictures left out: the source's fields and what the
    pipeline added (`prefix`, `suffix`, `kind`, `boxes` …). Random operations draw from (seed, record).

    An example that fails, in the pipeline or in `check`, which gets what the pipeline made, is left out and counted in
    `failures`; the default's limit is a tenth of the examples. Raises UserError for more, and for a wrong pipeline.
    `anywhere`: which rows of a batch failed here, bool [b] → which did in any process; so all get the same batches.
    """
    total = min(examples, len(source)) if examples else len(source)
    failures = failures or Failures(source.name, 'left out', total)

    def load(index: int, i: int) -> tuple[loader.Batch, dict] | Exception:
        record = None
        try:
            record = source[i]
            example = pipeline(record, transforms.Context(contract, tokenizer, train=False, seed=(seed, index)))
            made = loader.arrays(example)
            kept = {k: v for k, v in example.items() if k not in loader.ARRAYS and not isinstance(v, bytes)}
            check(kept)
        except Exception as error:
            if is_for_all(error, record, source):
                raise UserError(f'{source.name}: {error} (record {index})') from error
            return error
        return made | {'id': np.array([0, index], np.int32)}, kept

    for start in range(0, total, batch_size):
        tried = [(index := source.original(i), load(index, i)) for i in range(start, min(start + batch_size, total))]
        failed = anywhere(np.array([isinstance(one, Exception) for _, one in tried]))
        loaded = []
        for (index, one), without in zip(tried, failed, strict=True):
            if without:
                failures.bad(index, one if isinstance(one, Exception) else OSError('another process cannot read it'))
            else:
                failures.good()
                loaded.append(one)
        if not loaded:
            continue
        made = [arrays for arrays, _ in loaded]
        batch = loader.stack(made + made[:1] * (batch_size - len(made)))
        batch['_mask'] = np.arange(batch_size) < len(made)
        yield batch, [record for _, record in loaded]
