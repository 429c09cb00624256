"""A page made from random data: everything that goes in can be found, and nothing reaches out of it."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from big_vlm.reports import pictures
from big_vlm.reports.report import Answer, Attention, Calibration, Patches, Report, Similarity, Stage, render, write

VOID = {'meta', 'img', 'input', 'br', 'link'}


class Outline(HTMLParser):
    """Checks that every tag is closed in order; collects attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != 'style':
            self.text.append(data)


def outline(page):
    parser = Outline()
    parser.feed(page)
    assert parser.open == []
    return parser


def decoded(page):
    found = re.findall(r'"data:image/(png|jpeg);base64,([^"]*)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert('RGBA') for _, data in found]


def random_report(rng):
    def image(side=12):
        return rng.integers(0, 256, (side, side, 3), np.uint8)

    return Report(
        title='Digits & <letters>',
        summary='One tower & a <b>decoder</b>.',
        facts={'parameters': '1.25 M'},
        scores={
            'transfer / questions': {
                'exact_match': {'score': 0.9137, 'chance': 0.3126, 'n': 2000},
                'exact_match/held_out=True': {'score': 0.8512, 'chance': 0.2998, 'n': 417},
            },
            'captions': {'cider': {'score': 1.234, 'chance': 0.01, 'n': 5}},
        },
        answers=[
            Answer(image(), 'caption en', 'a red three', 'a red three', True),
            Answer(image(), 'which "one"?', '<script>alert(1)</script>', 'four', False),
            Answer(
                image(), 'detect', '<loc0001><loc0002> two', 'x', None, [[0, 0, 0.5, 0.25]], [[0, 0, 1, 1]], 'IoU 0.13'
            ),
        ],
        attention=[Attention(image(), 'what?', ['<tok>', ' red'], np.array([np.eye(3) / 12, np.eye(3) / 4]))],
        patches=Patches(image(13), (3, 3), 4),
        similarity=Similarity(np.array([[0.61, -0.0001], [0.72, 0.53]]), [image(), image()], ['cap & one', 'cap two']),
        stages=[
            Stage(
                'pretrain',
                {
                    'loss': [(s, float(v)) for s, v in enumerate(rng.random(1500) + 0.1)] + [(1500, float('nan'))],
                    'val_loss': [(0, 1.0), (1000, 0.5)],
                    'learning_rate': [(0, 0.0), (1000, 1e-3)],
                    'grad_norm': [(0, 1.0), (1000, 2.0)],
                    'updates_skipped': [(0, 0.0), (1000, 0.0)],
                    'empty_column': [],
                },
                {'steps': '1,500'},
            )
        ],
        commands={'Ask': "python -m tools.answer --prompt='a < b & c'"},
        config={'batch_size': 64, 'name': '</pre><i>'},
    )


EXPECTED = """Digits & <letters>
One tower & a <b>decoder</b>.
1.25 M
91.4
31.3%
2,000 examples
0.914
0.313
held out: True
0.851
0.300
417
1.234
exact match
a red three
<script>alert(1)</script>
which "one"?
four
IoU 0.13
<loc0001><loc0002>
1 of the 2 judged answers
<tok>
25% on the image
75% on the image
13 × 13 pixels
9 image tokens
cap & one
0.72
0.00
1 of 2 images find their own caption
pretrain
1,500
val_loss
grad_norm
python -m tools.answer --prompt='a < b & c'
"batch_size": 64
</pre><i>""".splitlines()


@pytest.mark.filterwarnings('error')
def test_everything_that_goes_in_can_be_found(tmp_path):
    report = random_report(np.random.default_rng(0))
    write(tmp_path / 'run' / 'report.html', report)
    page = (tmp_path / 'run' / 'report.html').read_text(encoding='utf-8')
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['report.html']
    text = '\n'.join(outline(page).text)
    for expected in EXPECTED:
        assert expected in text, expected
    assert '-0.00' not in text and 'empty_column' not in text


def test_nothing_reaches_out_of_the_page():
    page = render(random_report(np.random.default_rng(1)))
    assert 'http:' not in page and 'https:' not in page and '<script' not in page and '@import' not in page
    for tag, name, value in outline(page).attributes:
        assert not name.startswith('on'), (tag, name)
        if name in ('src', 'href', 'xlink:href'):
            assert value.startswith(('data:image/', '#')), (tag, name, value[:40])
    assert len(page) < 6e6


def test_every_picture_decodes_to_its_pixels():
    report = random_report(np.random.default_rng(2))
    images = decoded(render(report))
    pixels = [np.asarray(image)[..., :3] for image in images]
    wanted = [shot.image for shot in report.answers] + list(report.similarity.images) + [report.patches.image]
    for image in wanted:
        assert any(image.shape == other.shape and (image == other).all() for other in pixels)
    # The hero, 3 answers, 1 plain and 2 of each token, the patches whole and cut, 2 images with captions.
    assert len(images) == 1 + 3 + 5 + 2 + 2


def test_right_and_wrong_look_different_and_boxes_are_drawn_to_scale():
    page = render(random_report(np.random.default_rng(3)))
    grid = page[page.index('<div class="grid">') :]
    marks = re.findall(r'class="card shot (\w*)"', grid)
    assert marks == ['good', 'bad', '']
    assert '✓' in grid and '✗' in grid
    assert 'x="0.00" y="0.00" width="3.00" height="6.00"' in grid  # A quarter of 12 px across, a half down.
    assert 'x="0.00" y="0.00" width="12.00" height="12.00"' in grid


def test_bars_and_ticks_stand_where_score_and_chance_are():
    page = render(Report('t', scores={'e': {'m': {'score': 0.25, 'chance': 0.5, 'n': 4}}}))
    assert '<div class="bar below"><i style="width:25.0%"></i><b style="left:calc(50.0% - 1px)"></b></div>' in page


def test_an_error_is_good_where_it_is_low():
    entry = {'score': 0.05, 'chance': 0.2, 'n': 4, 'lower_is_better': True}
    assert '<div class="bar"><i style="width:25.0%"></i><b style="left:calc(100.0%' in render(
        Report('t', scores={'e': {'m': entry}})
    )
    page = render(Report('t', scores={'e': {'m': entry | {'score': 4.0, 'chance': 2.0}}}))
    assert '<div class="bar below"><i style="width:100.0%"></i><b style="left:calc(50.0%' in page


def test_calibration_is_drawn_where_the_numbers_are():
    found = Calibration('transfer: <x>', 1.875, [(0.9, 0.5, 16)], [(0.6, 0.5, 4)], [(0.5, 1.0), (1.0, 0.75)])
    page = render(Report('t', calibration=[found]))
    assert 'Does it know when it is right?' in outline(page).text and 'transfer: <x>' in outline(page).text
    assert '1.88' in page
    assert 'cx="90.00" cy="50.00" r="4.00" fill="var(--muted)"' in page
    assert 'cx="60.00" cy="50.00" r="2.50" fill="var(--accent)"' in page
    assert 'd="M50.00 0.00L100.00 25.00"' in page


def test_what_is_missing_leaves_its_section_out():
    page = render(Report('only a title'))
    assert outline(page).text.count('only a title') == 2  # The window's title and the headline.
    assert '<h2>' not in page and '<section' not in page and '<img' not in page


def test_attention_must_fit_its_tokens():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match='2 tokens'):
        render(Report('t', attention=[Attention(image, 'p', ['a', 'b'], np.ones((3, 2, 2)))]))


def test_data_uri_keeps_small_pictures_and_shrinks_large_ones():
    rng = np.random.default_rng(4)
    small = rng.integers(0, 256, (48, 40, 4), np.uint8)
    (back,) = decoded(f'"{pictures.data_uri(small)}"')
    np.testing.assert_array_equal(np.asarray(back), small)
    large = pictures.data_uri(np.full((900, 450, 3), 90, np.uint8))
    (back,) = decoded(f'"{large}"')
    assert large.startswith('data:image/jpeg') and back.size == (192, 384)
    np.testing.assert_allclose(np.asarray(back)[..., :3], 90, atol=2)
    with pytest.raises(ValueError, match='uint8'):
        pictures.data_uri(np.zeros((4, 4, 3)))


def test_exploded_patches_are_the_image_with_gaps():
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (9, 9, 3), np.uint8)
    out = pictures.exploded(image, (2, 2), 4)
    opaque = out[..., 3] == 255
    rows, columns = opaque.any(1), opaque.any(0)
    whole = out[rows][:, columns]
    zoom = whole.shape[0] // 8
    np.testing.assert_array_equal(whole[::zoom, ::zoom, :3], image[:8, :8])
    assert not rows.all() and not columns.all() and (whole[..., 3] == 255).all()


def test_heat_is_brightest_where_the_weight_is_largest():
    picture = pictures.heat(np.array([[0.0, 0.1], [0.2, 0.05]]))
    light = picture[..., :3].astype(int).sum(-1)
    assert picture.shape == (2, 2, 4) and (np.argsort(light.ravel()) == [0, 3, 1, 2]).all()
    np.testing.assert_array_equal(pictures.heat(np.zeros((2, 2))), pictures.heat(np.full((2, 2), 0.0)))


def drawn_points(svg):
    """The vertices of the curves, in the order they were drawn (grid lines have two)."""
    paths = re.findall(r'<path d="([^"]*)" clip-path', svg)
    return [len(re.findall('[ML]', path)) for path in paths]


def test_curves_hold_the_data_but_not_all_of_it():
    few = pictures.curves({'grad': [(0, 1.0), (10, 3.0), (20, 2.0)]}, 'a <title>')
    assert max(drawn_points(few)) == 3 and 'a &lt;title&gt;' in few
    many = pictures.curves({'loss': [(s, float(s % 7)) for s in range(100_000)]}, 'loss', loss=True)
    assert max(drawn_points(many)) <= 400 and len(many) < 40_000
    assert 'var(--accent)' in many and '#040404' not in many


def test_a_column_of_one_value_is_told_in_words():
    page = render(random_report(np.random.default_rng(0)))
    assert '<span>updates_skipped</span><b>0</b>' in page and 'grad_norm</span>' not in page
    drawn = re.findall(r'<svg.*?</svg>', page, flags=re.DOTALL)
    assert any('grad_norm' in svg for svg in drawn) and not any('updates_skipped' in svg for svg in drawn)


def test_thinning_takes_means():
    steps, values = pictures._thin(np.array([(s, 2.0 * s) for s in range(800)]))
    assert len(steps) == 400
    np.testing.assert_allclose(steps[:3], [0.5, 2.5, 4.5], rtol=1e-15)
    np.testing.assert_allclose(values, 2 * steps, rtol=1e-15)


def test_moving_average_skips_what_is_not_a_number():
    average = pictures._average(np.array([1.0, np.nan, 3.0, 5.0]), 1)
    np.testing.assert_allclose(average, [1.0, np.nan, 4.0, 4.0], rtol=1e-15)
