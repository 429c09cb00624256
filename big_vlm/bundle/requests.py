"""A file of requests, a JSON object on every line, answered into another, line by line.

    {"image": "harbour/001.png", "prompt": "caption en"}
    {"line": 1, "image": "harbour/001.png", "prompt": "caption en", "text": "two boats", "ids": […], "log_probs": […]}

`image` is a list where a model takes several images with a prompt; a decoder alone is asked without.

A request that cannot be answered gets `error` instead of text, ids and log-probabilities, and its neighbours theirs.
Answers stand in the order of the requests, one line each, written as soon as they are there; so what is in the file is
done, and a run that was cut off goes on behind it.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from big_vlm.bundle.answers import Answer
from big_vlm.bundle.model import Bundle
from big_vlm.config import UserError
from big_vlm.data import jsonl
from big_vlm.data.indexed import BadRecord


@dataclasses.dataclass(frozen=True)
class Request:
    """One line of the file. `given`: what its answer repeats. Without `error`, `image` can be opened, if there is one,
    and `prompt` is text; with one, that is what was wrong with the line."""

    given: dict[str, Any]
    image: Path | list[Path] | None = None
    prompt: str = ''
    error: str = ''


def read(path: Path, folder: Path | None = None) -> list[Request]:
    """The requests of a file, empty lines left out; images are named relative to `folder`, or to that of the file.

    Raises UserError for a file that cannot be read or holds no line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b'\n')
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from None
    requests = [_request(line, number, folder or path.parent) for number, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise UserError(f'{path}: no lines')
    return requests


def _request(line: bytes, number: int, folder: Path) -> Request:
    given: dict[str, Any] = {'line': number}
    try:
        record = jsonl.parse(line, folder, f'line {number}')
        image = record.get('image')
        if image is not None:
            names = [os.path.relpath(path, folder) for path in (image if isinstance(image, list) else [image])]
            given['image'] = names if isinstance(image, list) else names[0]
        given['prompt'] = record.get('prompt')
        if not isinstance(given['prompt'], str):
            raise UserError(f"line {number}: no text in 'prompt'; there is {list(record)[:10]}")
    except (UserError, BadRecord) as error:
        return Request(given, error=str(error))
    return Request(given, image, given['prompt'])


def answer(
    bundle: Bundle,
    requests: list[Request],
    out: Path,
    settings: Mapping[str, Any],
    *,
    name: str = '',
    folder: Path | None = None,
) -> Iterator[int]:
    """Answers what `out` does not hold yet, and yields how many requests it holds, first and each time it has grown.

    Args:
      settings: of `Bundle.generate`. `out`.settings.json keeps those that decide answers, to refuse going on with
        others.
      name, folder: of the bundle, and where images are; kept with them, the folder if a request has an image.

    Raises:
      UserError: `out` cannot be written, or holds answers to other requests or of other settings.
    """
    deciding = {key: value for key, value in settings.items() if key not in ('batch_size', 'prompt_lookup')}
    seen = os.path.realpath(folder) if folder and any(request.image for request in requests) else ''
    done = finished(requests, out, {'bundle': name, 'images': seen, **deciding})
    yield done
    sees = bool(bundle.contract.image_tokens)
    rest = [_suiting(request, sees) for request in requests[done:]]
    if not rest:
        return
    # What is wrong with a line has no image, and its prompt is never read: it keeps its place, of which draws depend.
    images = [request.image or '' for request in rest] if sees else None
    prompts = ['' if request.error else request.prompt for request in rest]
    answers = bundle.generate_each(images, prompts, **settings, first=done, errors='return')
    for request, said in zip(rest, answers, strict=True):
        line = json.dumps(request.given | _answered(request, said), ensure_ascii=False)
        try:
            with open(out, 'ab') as file:
                file.write(line.encode() + b'\n')
        except OSError as error:
            raise UserError(f'cannot write {out}: {error.strerror}; what it holds is whole, to go on from') from None
        done += 1
        yield done


def _suiting(request: Request, sees: bool) -> Request:
    """With an error if a model that sees images, or none, cannot answer it."""
    if request.error or (request.image is not None) == sees:
        return request
    wrong = "no 'image', and this model answers about one" if sees else "this model sees no images: leave 'image' out"
    return dataclasses.replace(request, error=f'line {request.given["line"]}: {wrong}')


def _answered(request: Request, said: Answer) -> dict[str, Any]:
    if error := request.error or said.error:
        return {'error': error}
    return {'text': said.text, 'ids': said.ids, 'log_probs': [round(value, 6) + 0.0 for value in said.log_probs]}


def finished(requests: list[Request], out: Path, settings: Mapping[str, Any]) -> int:
    """How many requests `out` holds the answers of; what a killed run left of a line is cut off. Made ready if absent.

    Raises UserError as `answer` does; what holds anything else is left as it is.
    """
    beside = out.with_name(out.name + '.settings.json')
    stored = json.dumps(dict(settings), indent=1, sort_keys=True)
    try:
        content = out.read_bytes() if out.exists() else b''
        if content and not beside.exists():
            raise UserError(f'{out} holds no answers, or has lost its {beside.name}: name another file')
        if content and beside.read_text() != stored:
            raise UserError(f'{out} was begun with other settings ({beside}): name another file, or delete it')
        whole = content[: content.rfind(b'\n') + 1]
        lines = whole.splitlines()
        for i, line in enumerate(lines):
            if i >= len(requests) or not _answers(line, requests[i]):
                raise UserError(f'{out}:{i + 1} does not answer request {i + 1}: name another file, or delete it')
        if not content:
            out.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(stored)  # before the first answer, and never again
        if whole != content or not out.exists():
            with open(out, 'ab') as file:
                file.truncate(len(whole))
    except OSError as error:
        raise UserError(f'cannot write {out}: {error.strerror}') from None
    return len(lines)


def _answers(line: bytes, request: Request) -> bool:
    try:
        return request.given.items() <= json.loads(line).items()
    except (ValueError, AttributeError):
        return False


def failures(out: Path) -> int:
    """How many lines of `out` hold an error."""
    return sum('error' in json.loads(line) for line in out.read_bytes().splitlines())
