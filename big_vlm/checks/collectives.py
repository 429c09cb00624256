"""The collectives of a compiled program, from its text: how many bytes they carry, and what runs meanwhile.

A collective that is scheduled as two instructions, a start and a done, is under way while what stands between them
runs. A matrix product there hides it.
"""

import re
from collections import Counter
from typing import NamedTuple

_KINDS = 'all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|ragged-all-to-all|reduce-scatter'


class Collective(NamedTuple):
    """One collective of one device.

    Attributes:
      kind: 'all-gather', 'all-reduce', 'collective-permute' …
      computation: the name of what it stands in, such as a loop's body.
      name: of its start.
      times: how often one run of the program takes it; loops whose length the compiler does not tell count once.
      bytes: of what goes in or what comes out, whichever is more; of one time.
      matmuls: matrix products scheduled while it is under way.
    """

    kind: str
    computation: str
    name: str
    times: int
    bytes: int
    matmuls: int


def collectives(schedule: str) -> list[Collective]:
    """Every collective of a scheduled HLO module, given as text, by computation and in the order of their starts."""
    computations, entry = _computations(schedule)
    times = _times(computations, entry)

    def multiplies(line: str) -> bool:
        """An instruction that is a matrix product, or calls a computation that has one."""
        if re.search(r'\s(convolution|dot)\(', line):
            return True
        return any(multiplies(inner) for name in _called(line) for inner in computations.get(name, ()))

    found = []
    for computation, lines in computations.items():
        sizes: dict[str, int] = {}
        started: dict[str, int] = {}
        for i, line in enumerate(lines):
            assigned = re.match(rf'\s+(?:ROOT )?%?([\w.-]+) = (.*?)\s({_KINDS})(-start|-done)?\((.*?)\)(?:, |$)', line)
            if not assigned:
                if defined := re.match(r'\s+(?:ROOT )?%?([\w.-]+) = (.*?)\s[\w-]+\(', line):
                    sizes[defined[1]] = _bytes(defined[2])
                continue
            name, result, kind, half, operands = assigned.groups()
            names = re.findall(r'%([\w.-]+)', operands)
            if half == '-start':
                started[name] = i
                sizes[name] = sum(sizes.get(operand, 0) for operand in names)
                continue
            size = max(_bytes(result), sum(sizes.get(operand, 0) for operand in names))
            sizes[name] = _bytes(result)
            start = started[names[0]] if half else i
            matmuls = sum(map(multiplies, lines[start + 1 : i])) if half else 0
            row = Collective(kind, computation, names[0] if half else name, times[computation], size, matmuls)
            found.append((start, row))
    return [row for _, row in sorted(found, key=lambda x: (x[1].computation, x[0]))]


def _computations(schedule: str) -> tuple[dict[str, list[str]], str]:
    """(name → instructions, the name where the program begins)."""
    computations: dict[str, list[str]] = {}
    entry = ''
    for line in schedule.splitlines():
        opened = re.match(r'(ENTRY )?%?([\w.-]+) .*\{$', line)
        if opened:
            lines = computations.setdefault(opened[2], [])
            entry = opened[2] if opened[1] else entry
        elif line.startswith('  ') and computations:
            lines.append(line)
    return computations, entry


def _times(computations: dict[str, list[str]], entry: str) -> Counter:
    """How often each computation runs in one run of the program."""
    times: Counter = Counter()

    def run(name: str, count: int) -> None:
        times[name] += count
        lines = computations.get(name, [])
        for line in lines:
            trips = _trips(line, lines, computations) if ' while(' in line else 1
            for called in _called(line):
                run(called, count * trips)

    run(entry, 1)
    return times


def _trips(line: str, around: list[str], computations: dict[str, list[str]]) -> int:
    """How often a loop runs its body; 1 where that is not to be seen.

    Compilers for CPUs say so. Those for TPUs leave it to what counts: an entry of the loop's state, from a constant up
    to a constant of the condition, by a constant of the body.
    """
    if told := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(told[1])
    loop = re.search(r' while\(%([\w.-]+)\), condition=%?([\w.-]+), body=%?([\w.-]+)', line)
    if loop is None:
        return 1
    outside, condition, body = map(_defined, (around, computations.get(loop[2], []), computations.get(loop[3], [])))
    ends = re.search(r' compare\(%([\w.-]+), %([\w.-]+)\), direction=LT', condition.get('ROOT', ''))
    entry = re.search(r' get-tuple-element\(.*index=(\d+)', condition.get(ends[1], '') if ends else '')
    if entry is None:
        return 1
    first, following = (_operand(text, int(entry[1])) for text in (outside.get(loop[1], ''), body.get('ROOT', '')))
    added = [_constant(body, _operand(body.get(following, ''), i)) for i in (0, 1)]
    begin, end, step = _constant(outside, first), _constant(condition, ends[2]), added[0] or added[1]
    if begin is None or end is None or not step or ' add(' not in body[following]:
        return 1
    return max(-(-(end - begin) // step), 0)


def _defined(lines: list[str]) -> dict[str, str]:
    """Name → instruction; the last one is 'ROOT' too."""
    found = {}
    for line in lines:
        root, name, text = re.match(r'\s+(ROOT )?%?([\w.-]+) =( .*)', line).groups()
        found |= {name: text, 'ROOT': text} if root else {name: text}
    return found


def _operand(instruction: str, index: int) -> str:
    """Its name, '' if there are not so many."""
    names = re.findall(r'%([\w.-]+)', (re.search(r' [\w-]+\((%.*?)\)', instruction) or ['', ''])[1])
    return names[index] if index < len(names) else ''


def _constant(defined: dict[str, str], name: str) -> int | None:
    """The value of an integer, through copies; None if it is none that is known."""
    if copied := re.search(r' copy\(%([\w.-]+)\)', defined.get(name, '')):
        return _constant(defined, copied[1])
    value = re.search(r' constant\((-?\d+)\)', defined.get(name, ''))
    return int(value[1]) if value else None


def _called(line: str) -> list[str]:
    branches = re.search(r'branch_computations=\{(.*?)\}', line)
    called = re.findall(r'(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)', line)
    return called + re.findall(r'[\w.-]+', branches[1] if branches else '')


def _bytes(shape: str) -> int:
    """Of 'bf16[8,128]{1,0}', or of all parts of a tuple."""
    total = 0
    for kind, sizes in re.findall(r'\b([a-z]\w*)\[([\d,]*)\]', shape):
        bits = 8 if kind == 'pred' else int((re.search(r'\d+', kind) or ['0'])[0])
        for size in filter(None, sizes.split(',')):
            bits *= int(size)
        total += bits // 8
    return total
