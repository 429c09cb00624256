"""The command line: what it teaches, what it prints, and its exit codes."""

import pathlib
import subprocess
import sys

from big_vlm.checks import doctor
from tools import doctor as tool

ROOT = pathlib.Path(__file__).parents[2]
SIGLIP = str(ROOT / 'tests' / 'goldens' / 'siglip')


def test_help_teaches_and_imports_nothing_heavy():
    code = (
        'import sys, tools.doctor as tool\n'
        'try: tool.main(["--help"])\n'
        'except SystemExit as stop: assert stop.code == 0\n'
        'assert not {"jax", "numpy", "torch"} & set(sys.modules)'
    )
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for words in ('who is the oracle', "pip install -e '.[parity]'", 'image features scaled twice', 'norm offset'):
        assert words in result.stdout


def test_agreement_is_exit_code_zero(capsys):
    assert tool.main([SIGLIP, f'--against={SIGLIP}', '--oracle=big_vlm', '--prompt=red']) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].endswith(f"the oracle is big_vlm's own code on the weights of {SIGLIP}")
    assert lines[2].split() == ['pixels', '0.0e+00'] and lines[-2].split() == ['logits', '0.0e+00']
    assert lines[-1] == 'all agree within 2e-05'
    assert err.startswith(f'reading {SIGLIP}')


def test_a_divergence_is_exit_code_one_with_its_cause(monkeypatch, capsys):
    report = doctor.Report(
        'transformers 5.23.0',
        {'pixels': None, 'token ids': 0.0, 'decoder layer 0': 0.5, 'logits': float('nan')},
        {'llm/a/scale': 0.5, 'llm/b/scale': 1.0},
        (
            doctor.Finding('decoder layer 0', (('norm offset', "llm/a/scale: here the oracle's plus one"),)),
            doctor.Finding('logits', ()),
        ),
    )
    monkeypatch.setattr(doctor, 'examine', lambda *sides, **options: report)
    assert tool.main(['mine', '--against=theirs']) == 1
    assert capsys.readouterr().out.splitlines() == [
        'mine against theirs; the oracle is transformers 5.23.0',
        'stage                  relative error',
        'pixels                              -',
        'token ids                     0.0e+00',
        'decoder layer 0               5.0e-01   <- the first that diverges',
        'logits                            nan',
        'weights: 2 arrays differ, the most llm/b/scale: 1.0e+00',
        'decoder layer 0 diverges',
        "  cause: norm offset: llm/a/scale: here the oracle's plus one",
        'then: logits diverges',
        '  cause: none of those known',
        'DIFFERENT, beyond 2e-05',
    ]


def test_bad_input_is_one_line(tmp_path, capsys):
    assert tool.main([str(tmp_path), f'--against={SIGLIP}', '--oracle=big_vlm']) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f'error: {tmp_path} is neither an .npz')
