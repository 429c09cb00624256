"""The order of the house, read from every file with `ast`: who may import whom, and what nobody may do.

`violations(root)` is the whole checker; the first test runs it on this checkout, the others plant one mistake each in
a small tree and see it caught.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room imports only from lines above its own; rooms that share a line are siblings and do not know each other.
ORDER = (
    ('config',),
    ('sharding',),
    ('ops',),
    ('data',),
    ('metrics',),
    ('reports',),
    ('models',),
    ('checkpoints',),
    ('decoding',),
    ('interop',),
    ('tasks',),
    ('bundle', 'evaluators'),
    ('training',),
    ('checks',),
    ('main',),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

# Library → the only rooms, or modules, that may import it.
ONLY_IN = {
    'orbax': {'checkpoints'},
    'tensorstore': {'checkpoints'},
    'flax': {'models'},
    'flax.struct': {'models', 'ops.kv_cache', 'training.state'},
    'optax': {'training'},
    'grain': {'data'},
    'fsspec': {'data'},
    'tensorflow_datasets': {'data'},
    'sentencepiece': {'data'},
    'safetensors': {'interop'},
    'gguf': {'interop'},
    'matplotlib': {'reports', 'checks'},
    'torch': {'checks'},
    'wandb': {'reports'},
    'transformers': {'checks'},
    'argparse': {'main'},
    'absl.flags': {'main', 'data.loader'},  # Grain insists that flags are parsed; the loader marks them so.
    'absl.app': {'main'},
}
# Rooms of numpy alone: neither they nor anything they import reaches these.
NUMPY_ROOMS, ACCELERATED = ('data', 'metrics'), {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'chex'}
FORBIDDEN_MODULES = {'tensorflow', 'tf_keras', 'keras', 'pickle', 'cPickle', 'dill', 'cloudpickle', 'shelve', 'marshal'}
VAGUE_NAMES = {'utils', 'util', 'helpers', 'common', 'misc'}

# Distribution → the module it provides, where the names differ; None: needed at run time, imported by others.
MODULE_OF = {
    'absl-py': 'absl',
    'flatbuffers': None,
    'importlib_resources': None,
    'opencv-python-headless': 'cv2',
    'orbax-checkpoint': 'orbax',
    'pillow': 'PIL',
    'scikit-learn': 'sklearn',
    'tensorflow-datasets': 'tensorflow_datasets',
}


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything a file imports; `from a import b` yields a.b, which may be a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            prefix = '.'.join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f'{prefix}.{alias.name}', node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'big_vlm':
            yield f'big_vlm.{node.attr}', node.lineno
        elif isinstance(node, ast.Attribute) and node.attr == '_src':
            yield f'{ast.unparse(node.value)}._src', node.lineno


def top_level(tree: ast.Module) -> ast.Module:
    """The file without the bodies of functions and methods: what happens when it is imported."""
    inside = [part for node in tree.body for part in (node.body if isinstance(node, ast.ClassDef) else [node])]
    kept = [node for node in inside if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return ast.Module(body=kept, type_ignores=[])


def room_of(name: str) -> str | None:
    """'big_vlm.data.contract.Contract' → 'data'; None for what is outside the package or its root."""
    parts = name.split('.')
    if parts[0] != 'big_vlm' or len(parts) == 1:
        return None
    return 'bundle' if parts[1] == 'load' else parts[1] if parts[1] in LEVEL else None


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + '.')


def placed_wrong(name: str, module: str) -> str | None:
    """The rule of ONLY_IN that an import breaks; the longest matching library decides ('flax.struct' over 'flax')."""
    matching = [library for library in ONLY_IN if within(name, library)]
    if not matching:
        return None
    library = max(matching, key=len)
    inside = module.removeprefix('big_vlm.')
    if any(within(inside, allowed) for allowed in ONLY_IN[library]):
        return None
    return f'{library} belongs in {" and ".join(sorted(ONLY_IN[library]))} alone'


def dangerous(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Code that runs what a file or a person wrote: eval, exec, unpickling."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in ('eval', 'exec', '__import__'):
            yield f'calls {node.func.id}', node.lineno
        for keyword in node.keywords:
            if keyword.arg == 'allow_pickle' and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                yield 'allow_pickle must be False', node.lineno


def violations(root: Path) -> list[str]:
    """Every broken rule below `root` as 'file:line: what', sorted; empty when the house is in order."""
    found = []
    graph: dict[str, set[str]] = {}
    libraries: dict[str, set[str]] = {}
    files = [path for top in ('big_vlm', 'configs', 'tests', 'tools') for path in sorted((root / top).rglob('*.py'))]
    modules = {'.'.join(path.relative_to(root).with_suffix('').parts).removesuffix('.__init__') for path in files}

    for path in files:
        relative = path.relative_to(root)
        parts = list(relative.with_suffix('').parts)
        package = parts[:-1]
        module = '.'.join(parts).removesuffix('.__init__')
        tree = ast.parse(path.read_text(), filename=str(relative))
        top = parts[0]

        def report(line: int, what: str, relative: Path = relative) -> None:
            found.append(f'{relative}:{line}: {what}')

        if path.stem in VAGUE_NAMES:
            report(1, f'{path.stem} names no idea')
        if tree.body and not ast.get_docstring(tree):
            report(1, 'does not open by saying what it does')
        if not relative.is_relative_to('tests'):
            for what, line in dangerous(tree):
                report(line, what)

        room = room_of(module)
        if top == 'big_vlm' and module != 'big_vlm' and room is None:
            report(1, f'{module} is no room of the ordered list')
        immediate = set(imports(top_level(tree), package))
        for name, line in imports(tree, package):
            if any(within(name, forbidden) for forbidden in FORBIDDEN_MODULES) and top != 'tests':
                report(line, f'imports {name}: never')
            if name.split('.')[0] in ('tensorflow', 'tf_keras') and top == 'tests':
                report(line, f'imports {name}: never')
            if '_src' in name.split('.'):
                report(line, f'imports {name}: private to its library')
            if top == 'big_vlm':
                target = room_of(name)
                if room and target and target != room and LEVEL[target] >= LEVEL[room]:
                    report(line, f'{room} imports {target}, which stands below it')
                if module == 'big_vlm' and target and (name, line) in immediate:
                    report(line, f'imports {target} before anyone asks for it')
                wrong = placed_wrong(name, module)
                if wrong:
                    report(line, f'imports {name}: {wrong}')
                if within(name, 'torch') or within(name, 'transformers'):
                    if (name, line) in immediate:
                        report(line, f'imports {name} outside a function')
                inner = name if name in modules else name.rpartition('.')[0]
                if inner in modules:
                    graph.setdefault(module, set()).add(inner)
                else:
                    libraries.setdefault(module, set()).add(name.split('.')[0])
            if top == 'configs':
                first = name.split('.')[0]
                if first not in ('ml_collections', 'configs') and first not in sys.stdlib_module_names:
                    report(line, f'imports {name}: configs know ml_collections and their neighbours only')
            if top == 'tools' and (name, line) in immediate:
                first = name.split('.')[0]
                if first not in ('absl', 'tools') and first not in sys.stdlib_module_names:
                    report(line, f'imports {name} before --help can answer: import it inside a function')

    for module in sorted(set(graph) | set(libraries)):
        if room_of(module) in NUMPY_ROOMS:
            for reached in sorted(reachable(module, graph)):
                for library in sorted(libraries.get(reached, set()) & ACCELERATED):
                    via = '' if reached == module else f' through {reached}'
                    found.append(f'{module.replace(".", "/")}: imports {library}{via}: this room is numpy alone')
    return sorted(found)


def reachable(module: str, graph: dict[str, set[str]]) -> set[str]:
    """The module and all it imports, directly or not, within the package. Its parent package's file runs too."""
    seen, queue = set(), [module]
    while queue:
        current = queue.pop()
        if current in seen or current == 'big_vlm':
            continue
        seen.add(current)
        queue.extend([*graph.get(current, ()), current.rpartition('.')[0]])
    return seen - {''}


def test_the_house_is_in_order():
    assert violations(ROOT) == []


def test_tests_mirror_the_rooms():
    rooms = {path.stem for path in (ROOT / 'big_vlm').iterdir() if path.stem in LEVEL and holds_code(path)}
    folders = {path.name for path in (ROOT / 'tests').iterdir() if path.is_dir() and any(path.rglob('test_*.py'))}
    files = {path.stem.removeprefix('test_') for path in (ROOT / 'tests').glob('test_*.py')}
    assert rooms - folders - files == set(), 'rooms without tests'
    assert folders - rooms - {'tools', 'configs'} == set(), 'tests of no room'
    names = [path.name for path in (ROOT / 'tests').rglob('*.py') if path.name != 'conftest.py']
    assert sorted(set(names)) == sorted(names), 'two test files share a name'


def holds_code(path: Path) -> bool:
    files = [path] if path.is_file() else list(path.rglob('*.py'))
    return any(file.stat().st_size for file in files)


def requirements(root: Path) -> dict[str, str]:
    """Distribution → its reason, from requirements.txt."""
    lines = [line.strip() for line in (root / 'requirements.txt').read_text().splitlines()]
    pairs = [line.partition('#') for line in lines if line and not line.startswith('#')]
    return {re.match(r'[\w.-]+', line).group(): reason.strip() for line, _, reason in pairs}


def test_every_requirement_is_used_and_every_import_required():
    needed = requirements(ROOT)
    assert all(needed.values()), 'a requirement without its reason'
    provided = {MODULE_OF.get(name, name.replace('-', '_')) for name in needed} - {None}
    imported = set()
    for top in ('big_vlm', 'configs', 'tools'):
        for path in (ROOT / top).rglob('*.py'):
            tree = ast.parse(path.read_text())
            imported |= {name.split('.')[0] for name, _ in imports(tree, list(path.relative_to(ROOT).parts[:-1]))}
    imported -= set(sys.stdlib_module_names) | {'big_vlm', 'configs', 'tools'}
    imported -= {'torch', 'transformers', 'wandb', 'big_vision'}  # where they are there
    assert imported - provided == set(), 'imported but not in requirements.txt'
    assert provided - imported == set(), 'in requirements.txt but never imported'


ORDERLY = {
    'big_vlm/__init__.py': '"""D."""\ndef __getattr__(name):\n    from big_vlm.bundle import load\n    return load\n',
    'big_vlm/config.py': '"""D."""\nimport ml_collections\n',
    'big_vlm/ops/__init__.py': '',
    'big_vlm/ops/masks.py': '"""D."""\nimport jax\nfrom big_vlm import config\n',
    'big_vlm/data/__init__.py': '',
    'big_vlm/data/contract.py': '"""D."""\nimport numpy\nimport grain\nfrom ..config import UserError\n',
    'big_vlm/models/__init__.py': '',
    'big_vlm/models/vit.py': '"""D."""\nfrom flax import linen\nfrom big_vlm.ops.masks import mask\n',
    'big_vlm/bundle.py': '"""D."""\nfrom big_vlm.models import vit\nimport numpy\nnumpy.load(0, allow_pickle=False)\n',
    'big_vlm/evaluators/__init__.py': '"""D."""\n',
    'big_vlm/training/__init__.py': '',
    'big_vlm/training/state.py': '"""D."""\nimport flax.struct\nimport optax\n',
    'big_vlm/main.py': '"""D."""\nfrom absl import app, flags\nimport big_vlm\nfrom big_vlm.training import state\n',
    'configs/quickstart.py': '"""D."""\nimport math\nfrom configs.arguments import parse\nimport ml_collections\n',
    'tools/start.py': '"""D."""\nimport argparse\n\ndef main():\n    import big_vlm\n',
    'tests/test_a.py': '"""D."""\nimport pickle\n',
}

# Faults as text, for the checker to find; none of them runs.
# file → (the line added to it, or its whole text; what the checker says)
PLANTED = [
    ('big_vlm/ops/masks.py', 'from big_vlm.models import vit', 'ops imports models, which stands below it'),
    ('big_vlm/ops/masks.py', 'import big_vlm.models.vit', 'ops imports models'),
    ('big_vlm/ops/masks.py', 'from ..models.vit import ViT', 'ops imports models'),
    ('big_vlm/ops/masks.py', 'from .. import models', 'ops imports models'),
    ('big_vlm/ops/masks.py', 'def f():\n    from big_vlm.training import state', 'ops imports training'),
    ('big_vlm/ops/masks.py', 'from big_vlm import load', 'ops imports bundle'),
    ('big_vlm/ops/masks.py', 'import big_vlm\nbig_vlm.load(1)', 'ops imports bundle'),
    ('big_vlm/bundle.py', 'from big_vlm import evaluators', 'bundle imports evaluators'),
    ('big_vlm/evaluators/__init__.py', 'import big_vlm.bundle', 'evaluators imports bundle'),
    ('big_vlm/__init__.py', 'from big_vlm.bundle import load', 'imports bundle before anyone asks'),
    ('big_vlm/attic.py', '"""D."""', 'big_vlm.attic is no room'),
    ('big_vlm/data/contract.py', 'import jax.numpy as jnp', 'data/contract: imports jax: this room is numpy'),
    ('big_vlm/data/contract.py', 'from big_vlm.ops import masks', 'imports jax through big_vlm.ops.masks'),
    ('big_vlm/data/contract.py', 'def f():\n    import chex', 'imports chex: this room'),
    ('big_vlm/config.py', 'import jax', 'imports jax through big_vlm.config'),
    ('big_vlm/training/state.py', 'import orbax.checkpoint as ocp', 'orbax belongs in checkpoints alone'),
    ('big_vlm/training/state.py', 'from flax import linen as nn', 'flax belongs in models alone'),
    ('big_vlm/ops/masks.py', 'from flax import struct', 'flax.struct belongs in'),
    ('big_vlm/models/vit.py', 'import optax', 'optax belongs in training alone'),
    ('big_vlm/models/vit.py', 'from absl import flags', 'absl.flags belongs in data.loader and main alone'),
    ('big_vlm/models/vit.py', 'import argparse', 'argparse belongs in main alone'),
    ('big_vlm/models/vit.py', 'import tensorflow as tf', 'imports tensorflow: never'),
    ('tests/test_a.py', 'from tensorflow import io', 'imports tensorflow.io: never'),
    ('big_vlm/models/vit.py', 'from jax._src import core', 'imports jax._src.core: private'),
    ('big_vlm/models/vit.py', 'import jax\njax._src.core', 'imports jax._src: private'),
    ('big_vlm/checks/__init__.py', '"""D."""\nimport torch', 'imports torch outside a function'),
    ('big_vlm/models/vit.py', 'eval("1")', 'calls eval'),
    ('big_vlm/models/vit.py', 'import pickle', 'imports pickle: never'),
    ('big_vlm/models/vit.py', 'linen.load(0, allow_pickle=True)', 'allow_pickle must be False'),
    ('big_vlm/models/vit.py', 'linen.load(0, allow_pickle=linen.yes)', 'allow_pickle must be False'),
    ('big_vlm/models/utils.py', '"""D."""', 'utils names no idea'),
    ('big_vlm/models/gemma.py', 'x = 1', 'does not open by saying'),
    ('configs/quickstart.py', 'import numpy', 'configs know ml_collections'),
    ('configs/quickstart.py', 'from big_vlm.config import Stage', 'configs know ml_collections'),
    ('tools/start.py', 'import jax', 'before --help can answer'),
]


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_an_orderly_tree_passes(tmp_path):
    assert violations(plant(tmp_path, ORDERLY)) == []


@pytest.mark.parametrize(('file', 'text', 'message'), PLANTED)
def test_a_planted_mistake_is_caught(tmp_path, file, text, message):
    found = violations(plant(tmp_path, {**ORDERLY, file: ORDERLY.get(file, '') + text + '\n'}))
    assert any(message in line for line in found), found
