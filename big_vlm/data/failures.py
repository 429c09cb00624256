"""Records that fail: whose fault that is, which ones the log names, and how many of them are too many."""

import logging
from typing import Any

from big_vlm.config import UserError

_log = logging.getLogger(__name__)
_SHARE = 0.1  # of a source's examples
_FIRST = 100  # examples, one of which has to be good
NAMED = 5  # per source


class Failures:
    """The examples of one source that were tried in this process, and those that failed.

    Args:
      where: what messages begin with.
      outcome: what becomes of one that fails, in the log: 'replaced'.
      examples: so many, a tenth of which may fail; where more are tried, a tenth of those.
    """

    def __init__(self, where: str, outcome: str, examples: int):
        self.where, self.outcome, self.examples = where, outcome, examples
        self.tried = self.failed = 0

    def good(self) -> None:
        """Counts an example that is as it should be."""
        self.tried += 1

    def bad(self, record: int, error: Exception) -> None:
        """Counts one that is not, and names it in the log. Raises UserError if that is one too many."""
        self.tried += 1
        self.failed += 1
        if self.failed <= NAMED:
            more = ' (further ones are only counted)' if self.failed == NAMED else ''
            _log.warning('%s: record %d %s: %s%s', self.where, record, self.outcome, error, more)
        none_yet = self.failed == self.tried >= _FIRST
        if none_yet or self.failed > _SHARE * max(self.tried, self.examples):
            raise UserError(
                f'{self.where}: {self.failed} of {self.tried} examples failed, the last one, record {record}, with: '
                f'{error}; check the pipeline and the data'
            )


def is_for_all(error: Exception, record: dict | None, source: Any) -> bool:
    """Whether every record fails so, and not this one alone.

    A wrong pipeline, a UserError, is wrong for every record; but of one that lacks a field of the others, the record
    is. `record`: as `source` gave it, None where it could not.
    """
    return isinstance(error, UserError) and (record is None or record.keys() >= {*source.features})
