"""Text to ids and back; pieces that do not depend on what stands around a location token."""

import pickle
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from big_vlm.config import UserError
from big_vlm.data.tokenizer import Tokenizer

GEMMA = Path(__file__).parents[3] / 'shared/assets/gemma_tokenizer.model'
TEXTS = [
    *(f'a {c} {d} in the {p}' for c in ('red', 'blue') for d in ('three', 'seven', 'nine') for p in ('center', 'top')),
    'which digit is red?',
    'how many digits are there?',
    '12',
]
TRICKY = ['', ' ', '  two  spaces ', 'tab\there', 'line\nbreak\n\n', 'ü ñ 漢字 🎲', 'A<loc0000>b', '<seg128>']


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Tokenizer:
    return Tokenizer.train(TEXTS, 320, tmp_path_factory.mktemp('tokenizer') / 'deep/tokenizer.model')


def test_special_ids(trained):
    assert (trained.pad_id, trained.eos_id, trained.bos_id) == (0, 1, 2)
    assert [trained.piece(i) for i in range(4)] == ['<pad>', '</s>', '<s>', '<unk>']
    assert trained.encode('\n') == [4] and trained.piece(4) == '\n'
    assert trained.encode('red\nblue') == [*trained.encode('red'), 4, *trained.encode('blue')]
    assert trained.base == 320 and trained.vocab_size == 320 + 1024 + 128


@pytest.mark.parametrize('text', [*TEXTS, *TRICKY])
def test_round_trip(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not {0, 1, 2, 3} & set(ids)  # nothing added, nothing unknown


def test_location_and_segmentation_tokens(trained):
    base = trained.base
    assert trained.encode('<loc0000><loc1023><seg000><seg127>') == [base, base + 1023, base + 1024, base + 1151]
    assert trained.decode([base + 7, base + 1024 + 7]) == '<loc0007><seg007>'
    assert trained.piece(base + 12) == '<loc0012>'
    # Each side of a token is encoded on its own.
    assert trained.encode('red<loc0005> blue') == [*trained.encode('red'), base + 5, *trained.encode(' blue')]
    # What is no token stays text.
    for text in ('<loc1024>', '<loc9999>', '<loc12>', '<seg128>', '<LOC0001>'):
        assert max(trained.encode(text)) < base


def test_no_space_is_added(trained):
    assert trained.encode('red') != trained.encode(' red')
    assert trained.decode(trained.encode(' red')) == ' red'


def test_special_ids_decode_to_nothing_and_foreign_ones_to_a_mark(trained):
    ids = trained.encode('red')
    assert trained.decode([2, *ids, 1, 0, 0]) == 'red'
    assert trained.decode([*ids, trained.vocab_size]) == 'red\ufffd'


def test_training_is_deterministic_and_loading_gives_the_same(trained, tmp_path):
    again = Tokenizer.train(iter(TEXTS), 320, tmp_path / 'again.model')
    loaded = Tokenizer.load(trained.path)
    assert again.sha256 == trained.sha256 == loaded.sha256 and len(loaded.sha256) == 64
    assert loaded.encode(TEXTS[0]) == trained.encode(TEXTS[0])
    copy = pickle.loads(pickle.dumps(trained))
    assert copy.sha256 == trained.sha256 and copy.encode(TEXTS[0]) == trained.encode(TEXTS[0])
    trained.save(tmp_path / 'saved.model')
    assert Tokenizer.load(tmp_path / 'saved.model').sha256 == trained.sha256


def test_a_write_that_breaks_off_leaves_no_model(tmp_path, monkeypatch):
    write = Path.write_bytes

    def broken(path, data):
        write(path, data[:100])
        raise OSError('killed')

    monkeypatch.setattr(Path, 'write_bytes', broken)
    with pytest.raises(UserError, match='killed'):
        Tokenizer.train(TEXTS, 320, tmp_path / 't.model')
    assert not (tmp_path / 't.model').exists()
    monkeypatch.undo()
    Tokenizer.train(TEXTS, 320, tmp_path / 't.model')
    assert [f.name for f in tmp_path.iterdir()] == ['t.model']


@pytest.mark.parametrize('texts', [['a'], ['a red three', 'a blue seven'], ['x' * 500], ['12 34\n56']])
def test_tiny_corpora_give_a_smaller_vocabulary(texts, tmp_path):
    tokenizer = Tokenizer.train(texts, 4096, tmp_path / 't.model')
    assert 261 < tokenizer.base < 4096
    for text in [*texts, 'something else entirely']:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_errors_name_the_fix(tmp_path):
    with pytest.raises(UserError, match=r'vocab_size 100 cannot hold the text: use 2\d\d or more'):
        Tokenizer.train(TEXTS, 100, tmp_path / 't.model')
    with pytest.raises(UserError, match='no text to train'):
        Tokenizer.train(['', ' '], 300, tmp_path / 't.model')


def ending_with(tokenizer, path, pieces):
    """The model file with more pieces, as its user's own ones."""
    tokenizer.save(path)
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    for piece in pieces:
        model.pieces.add(piece=piece, score=0.0, type=4)
    path.write_bytes(model.SerializeToString())
    return Tokenizer.load(path)


def test_tokens_that_the_file_itself_ends_with(trained, tmp_path):
    """As PaliGemma's file may. They are there once; some of them alone are pieces like others."""
    tokens = [trained.piece(i) for i in range(trained.base, trained.vocab_size)]
    whole, some = (ending_with(trained, tmp_path / 'x.model', x) for x in (tokens, tokens[-128:]))
    assert whole.same_pieces(trained) and whole.vocab_size == trained.vocab_size
    for text in ('red<loc0005> blue<seg127>', *TEXTS):
        assert whole.encode(text) == trained.encode(text)
    assert (some.base, some.encode('<seg000>')) == (trained.base + 128, [trained.base + 128 + 1024])


def test_sentinels_are_left_out(trained, tmp_path):
    ended = ending_with(trained, tmp_path / 'x.model', [f'▁<extra_id_{i}>' for i in reversed(range(100))])
    assert ended.same_pieces(trained) and ended.vocab_size == trained.vocab_size
    text = 'which <extra_id_3> is red?'
    assert ended.encode(text) == trained.encode(text) and ended.decode(ended.encode(text)) == text
    assert pickle.loads(pickle.dumps(ended)).sha256 == ended.sha256


def test_loading_errors(tmp_path):
    with pytest.raises(UserError, match='cannot read tokenizer'):
        Tokenizer.load(tmp_path / 'none.model')
    (tmp_path / 'bad.model').write_bytes(b'not a model')
    with pytest.raises(UserError, match='is not a SentencePiece model'):
        Tokenizer.load(tmp_path / 'bad.model')


@pytest.mark.skipif(not GEMMA.is_file(), reason='the Gemma tokenizer is not beside this checkout (shared/assets)')
def test_gemma():
    gemma = Tokenizer.load(GEMMA)
    assert gemma.sha256 == '61a7b147390c64585d6c3543dd6fc636906c9af3865a5548f27f31aee1d4c8e2'
    assert (gemma.base, gemma.vocab_size) == (256_000, 257_152)
    assert (gemma.pad_id, gemma.eos_id, gemma.bos_id) == (0, 1, 2)
    assert gemma.encode('\n') == [108] and gemma.encode('\n\n') == [109]
    assert gemma.encode('<loc0000><loc1023><seg000>') == [256_000, 257_023, 257_024]
    assert gemma.encode('caption en') == [21209, 659]
    assert gemma.piece(gemma.encode('red')[0]) == 'red' and gemma.piece(gemma.encode(' red')[0]) == '▁red'
    for text in [*TEXTS, *TRICKY]:
        assert gemma.decode(gemma.encode(text)) == text


def test_a_tokenizer_is_its_pieces(trained):
    """Kinds: 1 normal, 2 unknown, 3 control, 4 user-defined, 6 byte. Scores: the earlier merge first."""
    texts = [trained.piece(i) for i in range(trained.base)]
    kinds = [3, 3, 3, 2, 4, *(6 if text.startswith('<0x') else 1 for text in texts[5:])]
    pieces = [(text, -float(i), kind) for i, (text, kind) in enumerate(zip(texts, kinds, strict=True))]
    ids = {'pad': 0, 'eos': 1, 'bos': 2, 'unk': 3}
    again = Tokenizer.from_pieces(pieces, ids, 'here')
    assert (again.pad_id, again.eos_id, again.bos_id, again.base) == (0, 1, 2, trained.base)
    for text in TEXTS + TRICKY:
        assert again.encode(text) == trained.encode(text)
    with pytest.raises(UserError, match='here: its pieces make no tokenizer'):
        Tokenizer.from_pieces([*pieces, pieces[-1]], ids, 'here')
