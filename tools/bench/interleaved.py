"""Timing that a shared machine cannot bend: sides take turns, and only their ratios are told."""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Times = dict[str, list[float]]
_LEAST = 1e-6  # seconds: below it the clock of the CPU has not moved


def rounds(sides: Mapping[str, Callable[[], Any]], count: int) -> Times:
    """Seconds of each side in each of `count` rounds; see `both_clocks`."""
    return both_clocks(sides, count)[0]


def both_clocks(sides: Mapping[str, Callable[[], Any]], count: int, warm: bool = False) -> tuple[Times, Times]:
    """(seconds, seconds of all cores) of each side in each of `count` rounds. The latter tell more where others use the
    machine too, and nothing of how well its cores share the work.

    Args:
      sides: name → what to time; it returns only when its work is done. Called once more before, uncounted, unless
        `warm` says that all were already.
      count: every second round runs in reverse order, for what is first often finds a cooler machine.
      clock: `time.process_time` counts what all threads of this process take, and nothing of other programs.
    """
    for side in () if warm else sides.values():
        side()
    wall: Times = {name: [] for name in sides}
    cpu: Times = {name: [] for name in sides}
    for i in range(count):
        for name in list(sides) if i % 2 == 0 else reversed(sides):
            began = time.perf_counter(), time.process_time()
            sides[name]()
            wall[name].append(time.perf_counter() - began[0])
            cpu[name].append(max(time.process_time() - began[1], _LEAST))
    return wall, cpu


def peak_mib(side: Callable[[], Any]) -> float | None:
    """MiB that a call adds at its peak to what of this process is resident; None where the system does not say."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed would serve this one unseen
        pathlib.Path('/proc/self/clear_refs').write_text('5')  # forgets the highest so far
        before = _highest()
        side()
    except (AttributeError, OSError):
        return None
    return round((_highest() - before) / 1024, 1)


def _highest() -> int:
    """KiB that were resident at once."""
    return int(re.search(r'VmHWM:\s+(\d+)', pathlib.Path('/proc/self/status').read_text())[1])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """ours / theirs: of the minima, the median of the pairs of a round, and the quartiles of those."""
    pairs = sorted(x / y for x, y in zip(ours, theirs, strict=True))

    def quantile(share: float) -> float:
        place = share * (len(pairs) - 1)
        low = int(place)
        high = min(low + 1, len(pairs) - 1)
        return round(pairs[low] + (place - low) * (pairs[high] - pairs[low]), 4)

    return {
        'minima': round(min(ours) / min(theirs), 4),
        'median': quantile(0.5),
        'quartiles': [quantile(0.25), quantile(0.75)],
    }


def show(name: str, result: Mapping[str, Any]) -> None:
    """One line of a table."""
    low, high = result['quartiles']
    print(f'{name:52}{result["minima"]:8.3f}{result["median"]:9.3f}{low:9.3f} – {high:.3f}')


def header(what: str = 'ratio of times') -> None:
    """The table's first line."""
    print(f'{what:52}{"minima":>8}{"median":>9}{"quartiles":>15}')


def there(*libraries: str) -> bool:
    """Whether they can be imported; if not, says that the benchmark is skipped, and why."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        print(f"skipped: {' and '.join(missing)} not here (pip install -e '.[parity]' brings them)")
    return not missing


def report(
    bench: str,
    about: Mapping[str, Any],
    times: tuple[Times, Times],
    pairs: Sequence[tuple[str, str]],
    libraries: Sequence[str],
    tokens: int = 0,
) -> None:
    """The tables of the ratios `pairs` (above, below) of `both_clocks`, then all of it as one line of JSON. `tokens`:
    how many a side makes in a round, if that says something."""
    about = dict(about) | {name: importlib.metadata.version(name) for name in libraries}
    about |= {'python': platform.python_version(), 'cores': os.cpu_count()}
    print(', '.join(f'{name} {value}' for name, value in about.items()))
    told: dict[str, Any] = {}
    for clock, of_clock in zip(('', 'cpu_'), times, strict=True):
        header('ratio of CPU times' if clock else 'ratio of times')
        results = {f'{above} / {below}': ratio(of_clock[above], of_clock[below]) for above, below in pairs}
        for name, result in results.items():
            show(name, result)
        seconds = {name: round(min(values), 4) for name, values in of_clock.items()}
        spread = {name: round(max(values) / min(values), 3) for name, values in of_clock.items()}
        told |= {f'{clock}seconds': seconds, f'{clock}spread': spread, f'{clock}results': results}
    print(f'{"least seconds, of all cores, longest / shortest round":52}')
    for name in times[0]:
        rate = f'{tokens / told["seconds"][name]:10.2f} tokens/s' if tokens else ''
        values = told['seconds'][name], told['cpu_seconds'][name], told['spread'][name]
        print(f'  {name:50}{values[0]:8.3f}{values[1]:9.3f}{values[2]:9.3f}{rate}')
    print(json.dumps({'bench': bench, **about, **told}))
