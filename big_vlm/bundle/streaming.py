"""An answer's text as it is said: what `Bundle.stream` does with tokens."""

from collections.abc import Callable, Iterable, Iterator, Sequence

_UNFINISHED = '\ufffd'  # what bytes spell that are no character, or not yet


def pieces(tokens: Iterable[int], text_of: Callable[[list[int]], str], stop: Sequence[str] = ()) -> Iterator[str]:
    """Pieces of the text that `tokens` spell up to the first of the strings `stop`, each as soon as no later token can
    change it; the tokens behind a stop string are not asked for.

    text_of: a list of tokens → their text. One token more changes nothing of it but unfinished characters at its end.
    """
    ids: list[int] = []
    text, told = '', 0
    for token in tokens:
        ids.append(token)
        text = text_of(ids)
        if any(end in text for end in stop):
            break
        sure = text.rstrip(_UNFINISHED)
        begun = (size for end in stop for size in range(1, len(end)) if sure.endswith(end[:size]))
        until = len(sure) - max(begun, default=0)
        if until > told:
            yield text[told:until]
            told = until
    rest = text[told : min((text.index(end) for end in stop if end in text), default=len(text))]
    if rest:
        yield rest
