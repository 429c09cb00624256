"""The README is checked like code: its tree, its commands, its links and its Python are held against the checkout.

So are the commands of the other pages, and of the tools' own help.
"""

import argparse
import ast
import importlib.util
import inspect
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from big_vlm import config
from big_vlm.bundle import Bundle
from big_vlm.data import images, sources, transforms

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / 'big_vlm/config/schema.py'
README = (ROOT / 'README.md').read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```$', README, flags=re.DOTALL | re.MULTILINE)


def section(heading: str) -> str:
    """The text below a '## heading', up to the next one."""
    return README.split(f'\n## {heading}\n', 1)[1].split('\n## ', 1)[0]


def commands() -> list[str]:
    """Every shell line, comments and continuations resolved."""
    text = '\n'.join(blocks('bash')).replace('\\\n', ' ')
    return [line.split('  #')[0].strip() for line in text.splitlines() if line.strip() and line[0] != '#']


def printed() -> list[tuple[Path, str]]:
    """(file, command) of all `python -m …` that are ours, on lines of their own or between backticks."""
    found = []
    for page in [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), *(ROOT / 'tools').rglob('*.py')]:
        text = re.sub(r'\\+\n', ' ', page.read_text())
        lines = re.findall(r'^ *(?:srun )?(python -m .*)$', text, flags=re.MULTILINE)
        lines += re.findall(r'`(python -m [^`]*)`', text)
        ours = [line for line in lines if re.match(r'python -m (tools|big_vlm)\.\w', line)]
        found += [(page, line.partition(' && ')[0]) for line in ours]
    return found


def tracked() -> list[str]:
    """The checkout's own files; what git ignores is not part of it."""
    listed = ['git', 'ls-files', '--cached', '--others', '--exclude-standard']
    found = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip('not a git checkout')  # a source archive cannot tell its own files from a run's
    return [name for name in found.stdout.splitlines() if (ROOT / name).exists()]


def listed_paths() -> dict[str, str]:
    """Path → its line's words, from the tree; two more spaces of indentation are one level deeper."""
    paths, folders = {}, []
    for line in section('The house').split('```')[1].splitlines()[1:]:
        indent, name, words = re.match(r'( *)(\S+)\s*(.*)', line).groups()
        folders = folders[: len(indent) // 2] + [name.rstrip('/')]
        path = '/'.join(folders)
        assert name.endswith('/') == (ROOT / path).is_dir(), f'{path}: is it a folder?'
        paths[path] = words
    return paths


def test_the_tree_is_the_checkout():
    listed, files = listed_paths(), tracked()
    assert [path for path in listed if not (ROOT / path).exists()] == [], 'listed but not there'
    assert [path for path, words in listed.items() if not words] == [], 'listed without a word about it'
    top = {name.split('/')[0] for name in files} - {'.gitignore'}
    assert top - set(listed) == set(), 'top level, not listed'
    package = {name for name in files if name.startswith('big_vlm/') and not name.endswith('__init__.py')}
    assert package - set(listed) == set(), 'in big_vlm/, not listed'


def test_links_lead_somewhere():
    targets = re.findall(r'\]\(([^)#]+)[^)]*\)', README)
    local = [target for target in targets if '://' not in target]
    assert local and [target for target in local if not (ROOT / target).exists()] == []


def test_the_two_commands_come_first():
    """CI reads these two lines to know what to run."""
    assert re.search(r'^python tools/start\.py job$', section('Run it'), flags=re.MULTILINE)
    assert re.search(r'^python tools/start\.py tests$', section('Test it'), flags=re.MULTILINE)


def starter():
    spec = importlib.util.spec_from_file_location('start', ROOT / 'tools' / 'start.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_starter_commands_are_understood():
    lines = [line for line in commands() if 'tools/start.py' in line]
    assert len(lines) >= 2
    for line in lines:
        words = line.split()
        words = words[words.index('tools/start.py') + 1 :]
        assert starter().parse(words) is not None or '--help' in words, line


def test_commands_are_understood(monkeypatch, capsys):
    """As they are printed, by the programs themselves, which are stopped when they have parsed them."""

    class Understood(Exception):
        pass

    def stop(*args, **kwargs):
        raise Understood

    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', lambda self, words, *_: stop(parse(self, words)))
    monkeypatch.setattr(config, 'load_config', stop)  # the first that big_vlm.main does then
    seen = set()
    for page, line in printed():
        _, _, name, *words = shlex.split(line, comments=True)
        program = importlib.import_module(name + '.__main__' * (ROOT / name.replace('.', '/')).is_dir())
        with pytest.raises(Understood):
            program.main(words)
            pytest.fail(f'{page}: {line}: {capsys.readouterr().err}')
        seen.add(name)
    assert seen >= {f'tools.{name}' for name in ('doctor', 'export', 'convert', 'preflight', 'generate', 'sweep')}


def test_configs_and_overrides_validate():
    lines = [line for line in commands() if '--config=' in line or '--config.' in line]
    assert lines
    for line in lines:
        words, overrides = config.take_overrides(line.replace("'", '').split())
        files = [word.removeprefix('--config=') for word in words if word.startswith('--config=')]
        spec = files[0] if files else 'configs/quickstart.py'
        if '…' in spec or spec.startswith('my/'):
            continue
        path, colon, argument = spec.partition(':')
        assert config.validate(config.load_config(f'{ROOT / path}{colon}{argument}', overrides)), line


@pytest.mark.parametrize('code', blocks('python'))
def test_python_parses(code):
    ast.parse(code)


def test_the_example_dataset_feeds_the_example_config(tmp_path, monkeypatch):
    """Both are run as they are printed, but for the place of the data."""
    [builder] = [code for code in blocks('python') if 'GeneratorBasedBuilder' in code]
    [example] = [code for code in blocks('python') if 'def get_config' in code]
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'photos').mkdir()
    for color in ('red', 'green', 'blue'):
        Image.new('RGB', (64, 48), color).save(tmp_path / 'photos' / f'{color}.png')
    lines = ''.join(f'{color}.png,a {color} wall\n' for color in ('red', 'green', 'blue'))
    (tmp_path / 'photos' / 'captions.csv').write_text(lines)
    builder = builder.replace('~/.cache/big_vlm', str(tmp_path / 'data'))
    exec(compile(builder, 'README.md', 'exec'), {})
    (tmp_path / 'example.py').write_text(example)

    stages = config.validate(config.load_config(str(tmp_path / 'example.py')))
    [source] = [source for stage in stages.values() for source in stage.data.sources.values()]
    data_dir = str(tmp_path / 'data')
    sources.check(source.dataset, source.split, data_dir)
    pipeline = transforms.parse(source.pipeline, where='README.md')
    records = sources.load(source.dataset, source.split, data_dir)
    texts = [text for i in range(len(records)) for text in pipeline.texts(records[i])]
    assert sorted(texts) == ['a blue wall', 'a green wall', 'a red wall']


def test_the_example_lines_feed_the_example_config(tmp_path, monkeypatch):
    [lines] = blocks('json')
    [example] = [code for code in blocks('python') if 'def get_config' in code]
    (tmp_path / 'photos' / 'harbour').mkdir(parents=True)
    (tmp_path / 'photos' / 'captions.jsonl').write_text(lines)
    Image.new('RGB', (64, 48), 'red').save(tmp_path / 'photos' / 'harbour' / '001.png')
    (tmp_path / 'example.py').write_text(example.replace('my_captions', 'photos/captions.jsonl'))
    monkeypatch.chdir(tmp_path)
    [stage] = config.validate(config.load_config('example.py')).values()
    [source] = stage.data.sources.values()
    sources.check(source.dataset, source.split)
    records = sources.load(source.dataset, source.split)
    pipeline = transforms.parse(source.pipeline, where='README.md')
    texts = [text for i in range(len(records)) for text in pipeline.texts(records[i])]
    assert texts == ['two boats at a quay', 'a lighthouse in the fog']
    assert images.decode(records[0]['image']).shape == (48, 64, 3)


def test_python_uses_what_exists():
    """Every method that the examples call on a bundle is there, with the keywords they give it."""
    called = set()
    for code in blocks('python'):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if isinstance(node.func.value, ast.Name) and node.func.value.id in ('model', 'towers'):
                    called.add(node.func.attr)
                    parameters = inspect.signature(getattr(Bundle, node.func.attr)).parameters
                    assert {keyword.arg for keyword in node.keywords} <= set(parameters)
    assert {'generate', 'embed'} <= called


def test_where_a_new_thing_goes():
    """Every file that design.md's table names is there, and every name in it."""
    table = (ROOT / 'docs/design.md').read_text().partition('## Where a new thing goes')[2].partition('\n## ')[0]
    rows = [row for row in table.splitlines() if row.startswith('| ') and '`' in row]
    assert len(rows) > 10
    for row in rows:
        words = re.findall(r'`([\w./]+)`', row)
        rooms = [ROOT / 'big_vlm' / word for word in words if '/' in word]
        assert all(room.exists() for room in rooms), row
        said = ''.join(file.read_text() for room in [*rooms, SCHEMA] for file in ([room] if room.is_file() else []))
        for name in (word.rpartition('.')[2] for word in words if '/' not in word):
            assert re.search(rf'\b{name}\b', said), (row, name)
