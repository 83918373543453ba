"""SentencePiece BPE model files (`tokenizer.model`) as fast tokenizers.

References:
  https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto: the fields and their numbers.
"""

import dataclasses
import enum
import itertools
import struct
from collections.abc import Iterator, Mapping

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from phantom_jax.errors import InputError

SPACE = "▁"
"""What stands for a space in a piece."""

_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


class Kind(enum.IntEnum):
    """What a piece is; values as in the file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclasses.dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; of two possible merges the one whose result has the higher score comes first."""

    text: str
    score: float
    kind: Kind


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """A BPE model.

    Attributes:
      pieces: by token id.
      byte_fallback: whether characters that are no piece become bytes instead of the unknown token.
      add_dummy_prefix: whether a space comes before every text.
      remove_extra_whitespaces: whether spaces at both ends are dropped, and runs of them become one.
      precompiled_charsmap: which characters become which others; empty for none.
    """

    pieces: tuple[Piece, ...]
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    precompiled_charsmap: bytes

    def renamed(self, names: Mapping[int, str]) -> "SentencePieceModel":
        """The model with other texts for some pieces that no text is made of.

        Raises:
          InputError: a piece is one that text is made of.
        """
        pieces = list(self.pieces)
        ids = _normal_ids(self.pieces)
        for token_id, name in names.items():
            piece = pieces[token_id]
            made = piece.kind is Kind.BYTE or (piece.text in ids and (len(piece.text) == 1 or _halves(piece.text, ids)))
            if piece.text != name and made:
                raise InputError(
                    f"token {name!r} is given id {token_id}, which is the piece {piece.text!r} of tokenizer.model: "
                    "take both files from one folder"
                )
            pieces[token_id] = dataclasses.replace(piece, text=name)
        _check_unique(pieces)
        return dataclasses.replace(self, pieces=tuple(pieces))


def parse(content: bytes) -> SentencePieceModel:
    """Reads a model file.

    Raises:
      InputError: it is damaged, no SentencePiece file, or a model that is not BPE.
    """
    try:
        fields = list(_fields(content))
        pieces = [_piece(_message(value)) for number, value in fields if number == 1]
        settings = {number: _message(value) for number, value in fields if number in (2, 3)}
        charsmap = settings.get(3, {}).get(2, b"")
        if charsmap:
            normalizers.Precompiled(charsmap)
    # The library raises bare `Exception` for a damaged table of characters.
    except Exception as error:
        raise InputError(f"it is damaged or no SentencePiece file ({error}): download it again") from error
    if not pieces or len(settings) < 2:
        raise InputError("it is not complete, or no SentencePiece file: download it again")
    trainer, normalizer = settings[2], settings[3]
    kind = _MODEL_TYPES.get(trainer.get(3, 1), "unknown")
    if kind != "bpe":
        raise InputError(f"it is a SentencePiece model of type {kind}: only bpe is supported")
    if trainer.get(24, 0) or not normalizer.get(5, 1):
        raise InputError("it writes spaces after words, or not as '▁': only '▁' before words is supported")
    if sum(piece.kind is Kind.UNKNOWN for piece in pieces) != 1:
        raise InputError("it must have exactly one piece for what is unknown: download it again")
    _check_unique(pieces)
    return SentencePieceModel(
        tuple(pieces),
        byte_fallback=bool(trainer.get(35, 0)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        precompiled_charsmap=charsmap,
    )


def _check_unique(pieces: list[Piece]) -> None:
    seen: dict[str, int] = {}
    for token_id, piece in enumerate(pieces):
        if seen.setdefault(piece.text, token_id) != token_id:
            raise InputError(f"pieces {seen[piece.text]} and {token_id} are both {piece.text!r}: each must differ")


def _piece(fields: Mapping[int, int | bytes]) -> Piece:
    text = fields[1].decode() if 1 in fields else ""
    if not text:
        raise ValueError("a piece has no text")
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(text, score, Kind(fields.get(3, 1)))


def _message(content: int | bytes) -> dict[int, int | bytes]:
    """The fields of a message by number; of a repeated one the last."""
    if isinstance(content, int):
        raise ValueError("a number stands where a message should")
    return dict(_fields(content))


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of every field: an int for a varint, else its bytes.

    References:
      https://protobuf.dev/programming-guides/encoding/
    """
    position = 0
    while position < len(content):
        tag, position = _varint(content, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _varint(content, position)
        else:
            if wire_type == 2:
                size, position = _varint(content, position)
            elif wire_type in (1, 5):
                size = 8 if wire_type == 1 else 4
            else:
                raise ValueError(f"a field has wire type {wire_type}")
            value = content[position : position + size]
            if len(value) < size:
                raise ValueError("it ends within a field")
            position += size
        yield number, value


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(content):
            raise ValueError("it ends within a number")
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number has more than ten bytes")


def make_tokenizer(model: SentencePieceModel, *, every_run: bool = True) -> tokenizers.Tokenizer:
    """The fast tokenizer that encodes as the model does.

    Args:
      model: what to make it of.
      every_run: where the space of `add_dummy_prefix` stands: before every run of text between added tokens, where each
        is encoded on its own, or before the whole text only, where it does not begin with a space (`"legacy": false` of
        Hugging Face).

    Returns:
      The tokenizer. Unknown and control pieces are special tokens, user-defined ones added tokens that are not.
    """
    pieces = model.pieces
    (unknown,) = (piece.text for piece in pieces if piece.kind is Kind.UNKNOWN)
    vocab = {piece.text: token_id for token_id, piece in enumerate(pieces)}
    bpe = models.BPE(vocab, _merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)
    tokenizer = tokenizers.Tokenizer(bpe)
    steps: list[normalizers.Normalizer] = []
    if model.precompiled_charsmap:
        steps.append(normalizers.Precompiled(model.precompiled_charsmap))
    if model.remove_extra_whitespaces:
        # Of the character that stands for a space, if a user wrote it, it takes away what is at the end.
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if every_run:
        steps += [normalizers.Prepend(SPACE)] * model.add_dummy_prefix
        steps.append(normalizers.Replace(" ", SPACE))
    else:
        scheme = "first" if model.add_dummy_prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    special = [piece.text for piece in pieces if piece.kind in (Kind.UNKNOWN, Kind.CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    defined = [piece.text for piece in pieces if piece.kind is Kind.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in defined])
    return tokenizer


def _normal_ids(pieces: tuple[Piece, ...]) -> dict[str, int]:
    return {piece.text: token_id for token_id, piece in enumerate(pieces) if piece.kind is Kind.NORMAL}


def _halves(text: str, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make the text."""
    pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
    return [(left, right) for left, right in pairs if left in ids and right in ids]


def _merges(pieces: tuple[Piece, ...]) -> list[tuple[str, str]]:
    """Any two pieces merge whose texts joined are a third one, the best one first."""
    ids = _normal_ids(pieces)
    best_first = sorted(ids, key=lambda text: (-pieces[ids[text]].score, ids[text]))
    # Of several ways to the same piece the leftmost in the text comes first; their order here hardly ever matters.
    ways = (sorted(_halves(text, ids), key=lambda pair: (ids[pair[0]], ids[pair[1]])) for text in best_first)
    return list(itertools.chain.from_iterable(ways))
