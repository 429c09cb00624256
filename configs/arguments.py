"""The text after the colon of `--config=configs/NAME.py:ARG`."""

import difflib

_BOOLS = {'': True, 'true': True, '1': True, 'false': False, '0': False}


def parse_arg(arg: str, **defaults):
    """Reads 'name=value,flag' into a dict with the keys and types of `defaults`.

    A word without '=' sets a bool to True. Bools are true/false/1/0, in any case.

    >>> parse_arg('size=96,quick', size=48, quick=False, name='cells')
    {'size': 96, 'quick': True, 'name': 'cells'}

    Raises:
      ValueError: an unknown or repeated key, or a value of another type than the default's.
    """
    values = {}
    for word in filter(None, (word.strip() for word in (arg or '').split(','))):
        key, equals, text = (part.strip() for part in word.partition('='))
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f'did you mean {near[0]!r}? ' if near else ''
            raise ValueError(f'unknown argument {key!r}: {hint}Valid: {", ".join(sorted(defaults)) or "(none)"}')
        if key in values:
            raise ValueError(f'argument {key!r} is given twice')
        kind = type(defaults[key])
        if not equals and kind is not bool:
            raise ValueError(f'argument {key!r} needs a value: {key}={defaults[key]}')
        try:
            values[key] = _BOOLS[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise ValueError(f'argument {key!r} must be {kind.__name__}, got {text!r}') from None
    return {**defaults, **values}
