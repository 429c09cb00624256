"""The command line: what it teaches, what it refuses, and what it prints."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_bundle import GENERATIVE, make

import big_vlm
from big_vlm import bundle, interop
from big_vlm.bundle.settings import Settings
from big_vlm.checkpoints import trees
from big_vlm.config import UserError
from big_vlm.data import images, prompts
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.models import gemma
from big_vlm.ops import pixels
from tools import convert, generate

ROOT = pathlib.Path(__file__).parents[2]


def test_help_shows_examples_and_imports_nothing_heavy():
    code = (
        'import sys, tools.generate as tool\n'
        'try: tool.main(["--help"])\n'
        'except SystemExit as stop: assert stop.code == 0\n'
        'heavy = {"jax", "numpy", "PIL", "flax", "tensorflow_datasets"} & set(sys.modules)\n'
        'assert not heavy, heavy'
    )
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--image=scene.png --prompt='caption en'" in result.stdout
    assert '--json' in result.stdout and '--draw' in result.stdout


def test_pairs():
    assert generate.pairs(['a'], ['p', 'q']) == [('a', 'p'), ('a', 'q')]
    assert generate.pairs(['a', 'b'], ['p']) == [('a', 'p'), ('b', 'p')]
    assert generate.pairs(['a', 'b'], ['p', 'q']) == [('a', 'p'), ('b', 'q')]
    with pytest.raises(UserError, match='2 images and 3 prompts'):
        generate.pairs(['a', 'b'], ['p', 'q', 'r'])
    assert generate.pairs([], ['p', 'q']) == [(None, 'p'), (None, 'q')]
    assert generate.pairs([['a', 'b']], ['p']) == [(['a', 'b'], 'p')]
    with pytest.raises(UserError, match='--prompt'):
        generate.pairs(['a'], [])


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['BUNDLE', '--prompt=x', '--draw=o.png'], 'give one --image for each answer'),
        (['BUNDLE', '--prompt=x', '--image={tmp}/none.png'], 'none.png: no such file'),
        (['{tmp}/nowhere', '--prompt=x', '--image={tmp}/a.png'], 'nowhere: no such folder'),
        (['BUNDLE', '--prompt=x', '--image={tmp}/a.png', '--draw={tmp}/out.txt'], 'out.txt: must end in the name'),
        (
            ['BUNDLE', '--prompt=x', '--prompt=y', '--image={tmp}/a.png', '--draw=o.png'],
            'need a folder, such as --draw=o',
        ),
        (['BUNDLE', '--prompt=x', '--image={tmp}/a.png', '--batch_size=0'], '--slots=0'),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / 'a.png')
    assert generate.main([word.format(tmp=tmp_path) for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err and err.startswith('error: ') and err.count('\n') == 1


class Answering:
    """Stands in for a bundle: answers with a box on every image, labelled with the prompt."""

    def __init__(self):
        self.asked = []

    def generate_each(self, images, prompts, **settings):
        self.asked.append((images, prompts, settings))
        for prompt in prompts:
            text = f'<loc0256><loc0256><loc0767><loc0767> {prompt}'
            yield bundle.Answer(text, [5, 6, 1], [-0.1234567, -0.5, -1e-7])

    def stream(self, image, prompt, **settings):
        self.asked.append((image, prompt, settings))
        yield from ('a ', 'Bär, ', prompt)


@pytest.fixture
def answering(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save('a.png')
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save('b.png')
    fake = Answering()
    monkeypatch.setattr(big_vlm, 'load', lambda path, **how: fake, raising=False)
    return fake


def test_one_answer_is_plain_text(answering, capsys):
    assert generate.main(['BUNDLE', '--image=a.png', '--prompt=three', '--seed=3', '--temperature=0.5']) == 0
    out, err = capsys.readouterr()
    assert out == '<loc0256><loc0256><loc0767><loc0767> three\n' and not err
    [(images, prompts, settings)] = answering.asked
    assert (images, prompts, settings['seed'], settings['temperature']) == (['a.png'], ['three'], 3, 0.5)


def test_every_setting_reaches_the_model(answering, capsys):
    given = dict(max_new_tokens=5, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.2, beams=2)
    given |= dict(best_of=3, prompt_lookup=4, length_penalty=0.5, seed=4, grammar='boxes', batch_size=8)
    words = [f'--{name}={value}' for name, value in given.items()]
    words[-1:] = ['--slots=8', '--choices=a, b', '--stop=a', '--stop= b']
    assert generate.main(['BUNDLE', '--image=a.png', '--prompt=x', *words]) == 0
    [(_, _, settings)] = answering.asked
    assert settings == given | {'stop': ['a', ' b'], 'choices': ['a', 'b'], 'errors': 'raise'}
    assert set(settings) == {field.name for field in dataclasses.fields(Settings)} - {'progress', 'first'}


def test_one_that_fails_leaves_the_others(answering, capsys, monkeypatch):
    whole = answering.generate_each

    def failing(images, prompts, **settings):
        assert settings['errors'] == 'return'
        for i, answer in enumerate(whole(images, prompts, **settings)):
            yield bundle.Answer('', [], [], 'images[1]: no picture') if i == 1 else answer

    monkeypatch.setattr(answering, 'generate_each', failing)
    assert generate.main(['BUNDLE', '--image=a.png', '--prompt=p', '--prompt=q', '--prompt=r', '--json']) == 2
    out, err = capsys.readouterr()
    assert [json.loads(line)['prompt'] for line in out.splitlines()] == ['p', 'r']
    assert err.splitlines() == [
        'not answered: images[1]: no picture',
        'error: 1 of 3 requests could not be answered, each named above',
    ]


def test_a_stream_is_printed_as_it_comes(answering, capsys):
    assert generate.main(['BUNDLE', '--image=a.png', '--prompt=three', '--stream', '--stop=x']) == 0
    assert capsys.readouterr().out == 'a Bär, three\n'
    [(image, prompt, settings)] = answering.asked
    assert (image, prompt, settings['stop']) == ('a.png', 'three', ['x'])
    for more in ('--json', '--prompt=four', '--draw=a.png'):
        assert generate.main(['BUNDLE', '--image=a.png', '--prompt=three', '--stream', more]) == 2
        assert '--stream prints one answer' in capsys.readouterr().err


def test_a_public_checkpoint_in_bfloat16():
    model = generate.load(str(ROOT / 'tests' / 'goldens' / 'gemma3'), dtype='bfloat16')
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype('bfloat16')}
    assert model.task.dtype == jnp.bfloat16


def test_json_lines_and_progress(answering, capsys):
    words = [
        'BUNDLE',
        '--image=a.png',
        '--image=b.png',
        '--prompt=three',
        '--prompt=ein Bär',
        '--json',
        '--batch_size=1',
    ]
    assert generate.main(words) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line['image'], line['prompt']) for line in lines] == [('a.png', 'three'), ('b.png', 'ein Bär')]
    assert lines[1]['text'].endswith('ein Bär') and 'ein Bär' in out
    assert lines[0]['ids'] == [5, 6, 1] and lines[0]['log_probs'] == [-0.123457, -0.5, 0.0]
    assert err.splitlines() == ['1 of 2 answers', '2 of 2 answers']


def test_boxes_are_drawn_where_the_answer_says(answering, capsys):
    assert generate.main(['BUNDLE', '--image=a.png', '--prompt=three', '--draw=out.png']) == 0
    assert capsys.readouterr().err == 'out.png: 1 box\n'
    red = np.asarray(Image.open('out.png').convert('RGB'))[..., 0] > 200
    # A quarter of 40 pixels in from each side; nothing outside, the edges whole.
    assert red[10, 10:31].all() and red[30, 10:31].all() and red[10:31, 10].all() and red[10:31, 30].all()
    assert not red[:10].any() and not red[31:].any() and not red[:, :10].any()

    assert generate.main(['BUNDLE', '--image=a.png', '--image=b.png', '--prompt=three', '--draw=drawn']) == 0
    first, second = (np.asarray(Image.open(f'drawn/000{i}.png').convert('RGB')) for i in range(2))
    assert first.shape == (40, 40, 3) and second.shape == (40, 80, 3)
    assert (second[10, 20:61, 0] > 200).all()


def test_a_trained_bundle_answers(micro_run, tmp_path, capsys):
    """Nothing is replaced: files in, JSON out, and prompts that cannot be asked."""
    picture = tmp_path / 'a.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(picture)
    words = [str(micro_run / 'multimodal' / 'bundle'), f'--image={picture}', '--max_new_tokens=4', '--json']
    prompts = ['caption en', 'how many digits are there?', 'detect red three']
    assert generate.main([*words, *(f'--prompt={prompt}' for prompt in prompts)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line['image'], line['prompt']) for line in lines] == [(str(picture), prompt) for prompt in prompts]
    for line in lines:
        assert isinstance(line['text'], str) and 1 <= len(line['ids']) == len(line['log_probs']) <= 4
        assert all(isinstance(i, int) for i in line['ids']) and all(value <= 0 for value in line['log_probs'])

    assert generate.main([words[0], '--prompt=caption en']) == 2
    assert 'no images: this model answers about images' in capsys.readouterr().err
    for option, message in (
        ('--quantize=int3', "unknown quantisation 'int3'"),
        ('--dtype=int8', "unknown dtype 'int8'"),
    ):
        assert generate.main([*words, '--prompt=ocr', option]) == 2
        assert message in capsys.readouterr().err

    for prompt, message in (('', 'prompts[0] is empty'), ('red three ' * 40, 'contract.text_length')):
        assert generate.main([*words, f'--prompt={prompt}']) == 2
        out, err = capsys.readouterr()
        assert not out and message in err and err.startswith('error: ') and err.count('\n') == 1, err


def test_a_model_without_a_tokenizer_is_given_one(tmp_path, capsys, monkeypatch):
    golden = ROOT / 'tests' / 'goldens' / 'gemma'
    assert convert.main([str(golden), str(tmp_path / 'x.npz')]) == 0
    words = [str(tmp_path / 'x.npz'), '--prompt=a']
    capsys.readouterr()
    assert generate.main(words) == 2
    assert 'x.npz comes without a SentencePiece tokenizer: name its file, --tokenizer=FILE' in capsys.readouterr().err

    def generate_each(model, images, prompts, **settings):
        yield bundle.Answer(model.tokenizer.decode(model.tokenizer.encode(prompts[0])), [1], [0.0])

    monkeypatch.setattr(bundle.Bundle, 'generate_each', generate_each)
    assert generate.main([*words, f'--tokenizer={golden}/tokenizer.model']) == 0
    assert capsys.readouterr().out == 'a\n'


@pytest.mark.slow
@pytest.mark.parametrize('name', ['gemma2', 'gemma3'])
def test_a_decoder_alone_goes_on_with_a_text(tmp_path, capsys, name):
    """From a folder of Hugging Face and from the bundle made of it: what the whole row's logits say, token by token."""
    golden = ROOT / 'tests' / 'goldens' / name
    assert convert.main([str(golden), str(tmp_path / 'bundle')]) == 0
    texts = []
    for source in (golden, tmp_path / 'bundle'):
        capsys.readouterr()
        assert generate.main([str(source), '--prompt=a red three in', '--max_new_tokens=5', '--json']) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0] == texts[1] and texts[0]['image'] is None

    model = big_vlm.load(tmp_path / 'bundle')
    ids = [model.contract.bos_id, *model.tokenizer.encode('a red three in')]
    llm, params, whole = model.task.model.llm, model.params['llm'], len(ids) + 5

    @jax.jit
    def next_token(tokens, count):
        position = jnp.arange(whole)[None]
        mask = jnp.tril(jnp.ones((1, whole, whole), bool))
        x, _ = llm.apply({'params': params}, gemma.embed(llm, params, tokens[None]), position, mask)
        return jnp.argmax(gemma.logits(llm, params, x)[0, count - 1])

    expected = []
    while len(expected) < 5 and model.contract.eos_id not in expected:
        row = np.pad(np.array(ids + expected, np.int32), (0, whole - len(ids + expected)))
        expected.append(int(next_token(row, len(ids + expected))))
    assert texts[0]['ids'] == expected

    assert generate.main([str(golden), '--prompt=a', f'--image={__file__}']) == 2
    assert 'a decoder alone and sees no images: leave them out' in capsys.readouterr().err


@pytest.mark.slow
def test_a_gemma_3_with_an_image_tower(tmp_path, capsys):
    """The recipe of Gemma 3: patches averaged to four tokens among causal text; token by token, as the whole row."""
    golden = ROOT / 'tests' / 'goldens' / 'gemma3'
    decoder, weights = interop.read(golden).model.decoder, interop.read(golden).weights
    model = GENERATIVE['model'] | {'decoder': dataclasses.asdict(decoder), 'projector': 'pooled', 'image_tokens': 4}
    contract = {'image_size': 16, 'text_length': 12, 'lower': False, 'separator': '', 'causal_prompt': True}
    made = make(GENERATIVE | {'model': model, 'contract': contract}, Tokenizer.load(golden / 'tokenizer.model'))
    layers = {name: weights.read(name) for name in weights.shapes if name.startswith('llm/layers/')}
    made.params['llm']['layers'] = trees.nested(layers)['llm']['layers']
    bundle.save(tmp_path / 'bundle', made.params, made.stage, made.contract, made.tokenizer)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / 'a.png')
    words = [str(tmp_path / 'bundle'), f'--image={tmp_path}/a.png', '--prompt=a red', '--max_new_tokens=5', '--json']
    assert generate.main(words) == 0
    answer = json.loads(capsys.readouterr().out)

    row = prompts.generative_row(made.tokenizer.encode('a red'), None, made.contract)
    image = pixels.to_model_range(images.prepare(images.read(tmp_path / 'a.png'), made.contract), (-1.0, 1.0))
    count, whole = int(np.sum(row['segment'])), np.arange(16, dtype=np.int32)
    assert (row['text'][:4] == -1).all() and row['mask_ar'][:count].tolist() == [1, 0, 0, 0, *([1] * (count - 4))]
    forward = jax.jit(lambda params, *rows: made.task.model.apply(params, image[None, None], None, *rows)[0])
    text, ar = np.ones(16, np.int32), np.ones(16, np.int32)
    text[:count], ar[:count] = row['text'][:count], row['mask_ar'][:count]
    for token in answer['ids']:
        logits = forward(made.params, text[None], np.int32(whole < count)[None], whole[None], ar[None])
        assert token == int(jnp.argmax(logits[0, count - 1]))
        text[count] = token
        count += 1
    assert len(answer['ids']) == 5
