"""Pictures that a web page can hold in its own text: pixels as data URIs, curves as inline SVG.

Colours of the SVG are the page's CSS variables, so that one picture suits a light and a dark page. No pyplot: figures
are objects, nothing global changes.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

# matplotlib wants colours it knows; each stands for a variable of the page and is replaced in the SVG's text.
_COLORS = {'#010101': '--ink', '#020202': '--muted', '#030303': '--line', '#040404': '--accent', '#050505': '--soft'}
_INK, _MUTED, _LINE, _ACCENT, _SOFT = _COLORS
_MOST_POINTS = 400
_MOST_PIXELS = 384
_SMALL = 128


def data_uri(image: np.ndarray) -> str:
    """Pixels as a 'data:' address.

    Args:
      image: uint8 [H, W, 3] or [H, W, 4]. Sides over 384 px are shrunk; opaque images over 128 px become JPEG, since
        a photograph as PNG is ten times larger; all else is PNG, pixel for pixel.

    Raises:
      ValueError: any other dtype or shape.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(f'uint8 [H, W, 3 or 4] expected, got {image.dtype} {image.shape}')
    picture = Image.fromarray(image)
    picture.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    kind = 'JPEG' if image.shape[2] == 3 and max(picture.size) > _SMALL else 'PNG'
    file = io.BytesIO()
    picture.save(file, kind, **({'quality': 88} if kind == 'JPEG' else {'optimize': True}))
    return f'data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}'


def exploded(image: np.ndarray, grid: tuple[int, int], size: int) -> np.ndarray:
    """The image cut into its patches, with transparent gaps between them.

    Args:
      image: uint8 [H, W, 3]; grid: (rows, columns) of patches of size x size px. Pixels at the right and the bottom
        that fill no patch are left out, as by a VALID convolution.

    Returns:
      uint8 [H', W', 4], each pixel of the image enlarged by a whole number.
    """
    rows, columns = grid
    zoom = max(1, round(0.8 * _MOST_PIXELS / (max(grid) * size)))
    cell = zoom * size
    gap = max(1, round(0.14 * cell))
    out = np.zeros((rows * (cell + gap) - gap, columns * (cell + gap) - gap, 4), np.uint8)
    for row, column in np.ndindex(rows, columns):
        patch = image[row * size : (row + 1) * size, column * size : (column + 1) * size]
        place = out[row * (cell + gap) :, column * (cell + gap) :][:cell, :cell]
        place[..., :3] = patch.repeat(zoom, axis=0).repeat(zoom, axis=1)
        place[..., 3] = 255
    return out


def heat(weights: np.ndarray) -> np.ndarray:
    """Attention weights as a picture to lay over the image: [h, w] of at least 0 -> uint8 [h, w, 4].

    The largest weight is the brightest and most opaque, zero is dark and lets the image through dimly.
    """
    share = np.asarray(weights, np.float64) / max(float(np.max(weights)), 1e-12)
    color = matplotlib.colormaps['inferno'](0.12 + 0.83 * share)
    color[..., 3] = 0.5 + 0.22 * share
    return (255 * color).round().astype(np.uint8)


def curves(
    lines: Mapping[str, Sequence[tuple[int, float]]], title: str, *, loss: bool = False, size: tuple = (5.2, 2.5)
) -> str:
    """Values over steps as an `<svg>` element.

    Args:
      lines: {name: [(step, value), …]}; values that are not finite leave a gap. The first line is drawn strongest.
      title: stands above, at the left.
      loss: draw the values faintly and their moving average over a twentieth of the points on top; make the vertical
        axis logarithmic where the values are positive and span a factor of fifty.
      size: inches, which sets the proportions and the size of the text; the page scales it.
    """
    style = {
        'svg.fonttype': 'none',
        'svg.hashsalt': title,
        'font.size': 9,
        'text.color': _INK,
        'axes.edgecolor': _LINE,
        'axes.labelcolor': _MUTED,
        'xtick.color': _MUTED,
        'ytick.color': _MUTED,
        'axes.spines.top': False,
        'axes.spines.right': False,
        'axes.spines.left': False,
        'grid.color': _LINE,
        'grid.linewidth': 0.7,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout='constrained')
        axes = figure.add_subplot()
        axes.grid(axis='y')
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        everything = []
        for number, (name, points) in enumerate(lines.items()):
            steps, values = _thin(np.array(points, np.float64).reshape(-1, 2))
            color = (_ACCENT, _MUTED, _INK)[number % 3]
            everything.extend(values[np.isfinite(values)])
            faint = loss and len(values) >= 20
            axes.plot(steps, values, color=_SOFT if faint else color, linewidth=1.1 if faint else 1.8, label=name)
            if faint:
                axes.plot(steps, _average(values, len(values) // 20), color=color, linewidth=1.8)
        if loss and everything and min(everything) > 0 and max(everything) / min(everything) >= 50:
            axes.set_yscale('log')
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: np.format_float_positional(float(f'{value:.4g}'), trim='-'))
        )
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(x=0.01)
        axes.set_title(title, loc='left', fontsize=10, color=_INK)
        axes.set_xlabel('step')
        if len(lines) > 1:
            legend = axes.legend(frameon=False, fontsize=8)
            for handle, color in zip(legend.get_lines(), (_ACCENT, _MUTED, _INK), strict=False):
                handle.set_color(color)
        file = io.StringIO()
        figure.savefig(file, format='svg', transparent=True, metadata={'Date': None, 'Creator': None, 'Type': None})
    return _inline(file.getvalue())


def _inline(svg: str) -> str:
    """An SVG file's text as an element of a page: no prologue, no namespaces (HTML knows them), the page's font."""
    svg = svg[svg.index('<svg') :]
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', '', svg)
    svg = re.sub(r' (?:width|height)="[^"]*pt"', '', svg)
    svg = re.sub(r'<!--.*?-->', '', svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', '<g>', svg)
    svg = re.sub(r'font-family: [^;"]*', 'font-family: inherit', svg)
    for color, variable in _COLORS.items():
        svg = svg.replace(color, f'var({variable})')
    return svg


def _thin(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most 400 points, each the mean of its neighbours: a page needs no more, and spikes stay visible as bumps."""
    size = -(-len(points) // _MOST_POINTS)
    if size > 1:
        starts = range(0, len(points), size)
        points = np.array([points[start : start + size].mean(axis=0) for start in starts])
    return points[:, 0], points[:, 1]


def _average(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over `reach` values to either side, fewer at the ends; values that are not finite do not count."""
    good = np.isfinite(values)
    window = np.ones(2 * reach + 1)
    total = np.convolve(np.where(good, values, 0.0), window, 'same')
    count = np.convolve(good, window, 'same')
    return np.where(good, total / np.maximum(count, 1), np.nan)
