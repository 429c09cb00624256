"""How every command of this folder ends: a user's mistake is one line on stderr and exit code 2."""

import sys
from collections.abc import Callable


def end(run: Callable[[list[str]], int | None], argv: list[str] | None) -> int:
    """The exit code of `run(argv)`; `argv` None: the program's own arguments."""
    from big_vlm.config import UserError

    try:
        return run(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0
