"""What every command of this folder shares: how its help looks; a mistake, or what the disk refuses, is one line and
exit code 2, Ctrl-C 130."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class _Parser(argparse.ArgumentParser):
    """Its errors are one line, like all others; of --flag=~/file, which shells leave as it is, the ~ is the home."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        def expanded(word: str) -> str:
            flag, equals, value = word.partition('=')
            return flag + equals + os.path.expanduser(value) if flag.startswith('--') else word

        return super().parse_args([expanded(word) for word in (sys.argv[1:] if args is None else args)], namespace)

    def error(self, message: str) -> NoReturn:
        from big_vlm.config import UserError, unknown

        if found := re.match(r'unrecognized arguments: (-[^\s=]*)', message):
            raise unknown('flag', found[1], re.findall(r'--\w+', self.format_usage()))
        raise UserError(f'{message}; {self.prog} --help tells more')


def parser(name: str, description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of `python -m tools.<name>`, without arguments yet; both texts are shown as they are."""
    return _Parser(
        prog=f'python -m tools.{name}',
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def end(run: Callable[[list[str]], int | None], argv: list[str] | None) -> int:
    """The exit code of `run(argv)`; `argv` None: the program's own arguments."""
    from big_vlm.config import UserError

    try:
        return run(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, a folder that may not be written
        where = f'{error.filename}: ' if error.filename else ''
        print(f'error: {where}{error.strerror or error}', file=sys.stderr)
        return 2
