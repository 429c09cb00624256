"""Text to ids and back: a SentencePiece model, then 1024 location and 128 segmentation tokens after its last piece."""

import functools
import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import sentencepiece

from big_vlm.config import UserError, whole_file
from big_vlm.data.coordinates import NUM_LOCATIONS, NUM_SEGMENTS, TOKEN

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's numbers of the kinds of pieces
_BYTE_PAIRS = 2  # and of its model
_LOCATIONS = [*(f'<loc{i:04d}>' for i in range(NUM_LOCATIONS)), *(f'<seg{i:03d}>' for i in range(NUM_SEGMENTS))]
_SENTINEL = re.compile('▁?<extra_id_[0-9]+>')  # of T5's gaps; mT5's file ends with 100, and SigLIP has no rows for them
_REMEMBERED = 1 << 16  # texts; captions and questions repeat


class Tokenizer:
    """`encode` and `decode`, and the ids everyone needs: `pad_id`, `bos_id`, `eos_id`, `vocab_size`.

    A text is cut at its location and segmentation tokens, and each part goes through SentencePiece on its own. No space
    is added in front: 'red' and ' red' are different pieces, in a text's beginning as after a token. bos and eos are
    never added here.

    A model that itself ends with all those tokens has them once. T5's sentinels at its end are left out: no text holds
    them.
    """

    def __init__(self, model: bytes, path: str = '', locations: bool = True):
        """`model`: the bytes of a SentencePiece model file. `path`: where they came from.

        `locations`: False leaves out the location and segmentation tokens, for models that have no rows for them, such
        as SigLIP; '<loc0007>' is then spelt like any text. A model without bos (SigLIP 1's) pads with eos.
        """
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        last = self._pieces.id_to_piece(len(self._pieces) - 1)
        if last == _LOCATIONS[-1] or _SENTINEL.fullmatch(last):
            model = _own_pieces(model)
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._model = model
        self.path = path
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.base = self._pieces.vocab_size()
        self.locations = locations
        self.vocab_size = self.base + (NUM_LOCATIONS + NUM_SEGMENTS if locations else 0)
        self.pad_id, self.bos_id, self.eos_id = self._pieces.pad_id(), self._pieces.bos_id(), self._pieces.eos_id()
        self.unk_id = self._pieces.unk_id()
        if self.bos_id < 0:
            self.pad_id = self.eos_id
        # Bound to this instance, so that a tokenizer that goes takes its memory along.
        self._encode = functools.lru_cache(maxsize=_REMEMBERED)(self._encode_uncached)

    @classmethod
    def load(cls, path: str | Path) -> 'Tokenizer':
        """Reads a SentencePiece model file. Raises UserError if there is none, or if it lacks pad or eos."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f'cannot read tokenizer {path}: {error.strerror}') from error
        try:
            tokenizer = cls(model, str(path))
        except (RuntimeError, ValueError) as error:
            raise UserError(f'{path} is not a SentencePiece model') from error
        for name in ('pad_id', 'eos_id'):
            if getattr(tokenizer, name) < 0:
                raise UserError(f'tokenizer {path} has no {name}: choose a model that defines pad and eos')
        return tokenizer

    @classmethod
    def from_pieces(
        cls, pieces: Iterable[tuple[str, float, int]], ids: Mapping[str, int], path: str | Path = ''
    ) -> 'Tokenizer':
        """Gemma's kind of tokenizer, byte pairs, of its pieces in the order of their ids.

        Args:
          pieces: (piece, score, SentencePiece's number of its kind).
          ids: of 'pad', 'eos', 'bos' and 'unk'.
          path: where they came from.

        Raises:
          UserError: SentencePiece makes no model of them: a piece is there twice, a kind is none of its own.
        """
        from sentencepiece import sentencepiece_model_pb2  # protobuf, which nothing else here needs

        model = sentencepiece_model_pb2.ModelProto()
        try:
            for piece, score, kind in pieces:
                model.pieces.add(piece=piece, score=score, type=kind)
            spec, normalizer = model.trainer_spec, model.normalizer_spec
            spec.model_type, spec.vocab_size, spec.byte_fallback = _BYTE_PAIRS, len(model.pieces), True
            for name, i in ids.items():
                setattr(spec, f'{name}_id', i)
                setattr(spec, f'{name}_piece', model.pieces[i].piece)
            # What is encoded is what was written.
            normalizer.name, normalizer.add_dummy_prefix = 'identity', False
            normalizer.remove_extra_whitespaces = False
            return cls(model.SerializeToString(), str(path))
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f'{path}: its pieces make no tokenizer ({" ".join(str(error).split())[:120]})') from None

    def pieces(self) -> list[tuple[str, float, int]]:
        """What `from_pieces` takes, in the order of the ids: (piece, score, SentencePiece's number of its kind).

        Raises UserError for another kind of tokenizer: it would read texts otherwise if it were made of its pieces.
        """
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(self._model)
        spec, normalizer = model.trainer_spec, model.normalizer_spec
        changes = normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
        if spec.model_type != _BYTE_PAIRS or not spec.byte_fallback or changes:
            raise UserError(
                f"{self.path or 'the tokenizer'} is not of Gemma's kind: byte pairs, then bytes, of texts as they stand"
            )
        return [(piece.piece, piece.score, piece.type) for piece in model.pieces]

    def without_locations(self) -> 'Tokenizer':
        """The same pieces alone."""
        return Tokenizer(self._model, self.path, locations=False)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, path: str | Path) -> 'Tokenizer':
        """Trains byte-pair pieces on texts and writes the model to `path`.

        The ids are Gemma's where that matters: pad 0, eos 1, bos 2, unk 3; newline is a piece of its own, and 256 byte
        pieces spell what the texts never held. The same texts in the same order give the same file. A vocabulary that
        the texts cannot fill comes out smaller; one too small to hold the bytes and the texts' characters is a
        UserError, as are texts that are all empty.
        """
        texts = [line for text in texts for line in TOKEN.sub(' ', text).split('\n') if line.strip()]
        if not texts:
            raise UserError('no text to train a tokenizer on: the pipelines of the training data produce none')
        model = _train(texts, vocab_size)
        # Complete under its name, or not there: every restart reads it.
        with whole_file.writing(path) as part:
            part.write_bytes(model)
        return cls(model, str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos. encode('a<loc0007>') = [*encode('a'), base + 7]."""
        return list(self._encode(text))

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        if '<' not in text or not self.locations:
            return tuple(self._pieces.encode(text))
        ids, start = [], 0
        for match in TOKEN.finditer(text):
            ids += self._pieces.encode(text[start : match.start()])
            token, start = match.group(), match.end()
            ids.append(self.base + int(token[4:-1]) + (NUM_LOCATIONS if token.startswith('<seg') else 0))
        return tuple(ids + self._pieces.encode(text[start:]))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; pad, bos and eos leave no trace. An id beyond the vocabulary becomes U+FFFD."""
        text, pieces = '', []
        for i in map(int, ids):
            if 0 <= i < self.base:
                pieces.append(i)
                continue
            text += self._decode_pieces(pieces) + self.piece(i)
            pieces = []
        return text + self._decode_pieces(pieces)

    def _decode_pieces(self, pieces: list[int]) -> str:
        # A space spelt in bytes comes back as SentencePiece's own mark.
        return self._pieces.decode(pieces).replace('▁', ' ') if pieces else ''

    def piece(self, i: int) -> str:
        """The piece of an id as the model stores it: '▁red', '<0x0A>', '<loc0012>'; U+FFFD beyond the vocabulary."""
        if 0 <= i < self.base:
            return self._pieces.id_to_piece(i)
        number = i - self.base if self.locations else -1
        if 0 <= number < NUM_LOCATIONS:
            return f'<loc{number:04d}>'
        if 0 <= number - NUM_LOCATIONS < NUM_SEGMENTS:
            return f'<seg{number - NUM_LOCATIONS:03d}>'
        return '\ufffd'

    def same_pieces(self, other: 'Tokenizer') -> bool:
        """Whether an id means the same to both."""
        if self.sha256 == other.sha256:
            return True
        return self.base == other.base and all(self.piece(i) == other.piece(i) for i in range(self.base))

    def save(self, path: str | Path) -> None:
        """Writes the SentencePiece model file."""
        Path(path).write_bytes(self._model)

    def __reduce__(self) -> tuple:
        return Tokenizer, (self._model, self.path, self.locations)


def _own_pieces(model: bytes) -> bytes:
    """A model without the location and segmentation tokens, or the sentinels, that it ends with."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    while _SENTINEL.fullmatch(proto.pieces[-1].piece):
        del proto.pieces[-1]
    if [piece.piece for piece in proto.pieces[-len(_LOCATIONS) :]] == _LOCATIONS:
        del proto.pieces[-len(_LOCATIONS) :]
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


def _train(texts: list[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type='bpe',
            byte_fallback=True,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            user_defined_symbols=['\n'],
            # What is encoded is what was written: no added space, no changed characters, no folded spaces.
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name='identity',
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if most := re.search(r'value <= (\d+)', str(error)):
            return _train(texts, int(most[1]))
        if least := re.search(r'required_chars\. \d+ vs (\d+)', str(error)):
            raise UserError(f'tokenizer.vocab_size {vocab_size} cannot hold the text: use {least[1]} or more') from None
        raise UserError(f'cannot train a tokenizer of {vocab_size} pieces: {str(error).strip()}') from error
    return model.getvalue()
