"""A small byte-level BPE tokenizer, trained on a data set's text and kept in Hugging Face format; tokens as bytes."""

import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from phantom_jax.errors import InputError
from phantom_jax.json_files import write_json

PAD = "<|endoftext|>"
SPECIAL_TOKENS = (PAD, "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")

_PADS = (PAD, "<pad>")

TOKENIZER = "tokenizer.json"

WORDS = r"\d| ?[^\s\d]+\n?|\s+"
"""What merges never cross: each digit alone; a word, its punctuation, the space before and a line's end after it."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 512) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE.

    Args:
      texts: the text between special tokens; special tokens themselves may occur and are left out.
      vocab_size: at most so many tokens, the special ones and the 256 bytes included. Fewer where every word is one.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    pieces = (piece for text in texts for piece in special.split(text) if piece)
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def pad_token(tokenizer: tokenizers.Tokenizer) -> str | None:
    """The tokenizer's own token for padding, if it has one."""
    return next((token for token in _PADS if tokenizer.token_to_id(token) is not None), None)


def begin_token(tokenizer: tokenizers.Tokenizer) -> str | None:
    """The special token that the tokenizer puts before every text, if there is one."""
    encoded = tokenizer.encode("a")
    return encoded.tokens[0] if encoded.special_tokens_mask[:1] == [1] else None


def save_tokenizer(
    tokenizer: tokenizers.Tokenizer, directory: str | os.PathLike, *, end_of_answer: str, begin_of_text: str = ""
) -> None:
    """Writes what `transformers.AutoTokenizer` loads: tokenizer.json and the two files beside it.

    Args:
      tokenizer: to write.
      directory: the folder; it is made where it does not exist.
      end_of_answer: the special token that ends an answer.
      begin_of_text: the special token that texts begin with; by default the one that the tokenizer puts there.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / TOKENIZER))
    names = {"eos_token": end_of_answer, "pad_token": pad_token(tokenizer) or end_of_answer}
    special = [added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special]
    # A name makes a special token of what it names, and texts that hold it would be encoded otherwise.
    found = {
        "bos_token": begin_of_text or begin_token(tokenizer),
        "unk_token": getattr(tokenizer.model, "unk_token", None),
    }
    names |= {name: token for name, token in found.items() if token in special}
    extra = [token for token in special if token not in names.values()]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "additional_special_tokens": extra,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", config)
    names = {**names, "additional_special_tokens": extra}
    write_json(directory / "special_tokens_map.json", names)


def load_tokenizer(directory: str | os.PathLike) -> tokenizers.Tokenizer:
    """Loads a folder's tokenizer.json.

    Raises:
      InputError: the file is missing or is not a tokenizer.
    """
    path = pathlib.Path(directory) / TOKENIZER
    if not path.is_file():
        raise InputError(f"There is no tokenizer at {path}. Give a folder that a model was saved to.")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    # The library raises bare `Exception`.
    except Exception as error:
        raise InputError(f"{path} is not a tokenizer: {error}. Save the model again.") from error


def token_bytes(tokenizer: tokenizers.Tokenizer) -> tuple[bytes, ...]:
    """The bytes that each token adds to a text, by token id.

    Joined, they are the UTF-8 of what `tokenizer.decode` gives, but for the one leading space that decoders of the
    SentencePiece kind take off. Special tokens and ids that the vocabulary leaves out add nothing. An added token of a
    byte-level tokenizer adds its content, also where that is not spelled in the alphabet of bytes.

    Raises:
      InputError: the tokenizer's decoder is neither byte-level nor of the SentencePiece kind.
    """
    to_bytes = _decoder(json.loads(tokenizer.to_str())["decoder"])
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    added = tokenizer.get_added_tokens_decoder()
    table = [b""] * (1 + max([*vocab.values(), *added], default=-1))
    for token, token_id in vocab.items():
        table[token_id] = to_bytes(token)
    added_to_bytes = str.encode if to_bytes is _from_byte_alphabet else to_bytes
    for token_id, token in added.items():
        table[token_id] = b"" if token.special else added_to_bytes(token.content)
    return tuple(table)


def _decoder(config: dict | None) -> Callable[[str], bytes]:
    """How a token becomes bytes, from the decoder's JSON."""
    steps = [] if config is None else config["decoders"] if config["type"] == "Sequence" else [config]
    names = " ".join(step["type"] for step in steps)
    if names == "ByteLevel":
        return _from_byte_alphabet
    if names == "Metaspace":
        return functools.partial(_from_pieces, replacements=((steps[0]["replacement"], " "),), byte_fallback=False)
    # A Strip of spaces after Fuse acts on the ends of the whole text; before it, on every token.
    replaced = [step for step in steps if step["type"] == "Replace"]
    stripped = [step for step in steps if step["type"] == "Strip"]
    if (
        re.fullmatch("(Replace )+(ByteFallback )?Fuse( Strip)*", names)
        and all("String" in step["pattern"] for step in replaced)
        and all(step["content"].isspace() for step in stripped)
    ):
        replacements = tuple((step["pattern"]["String"], step["content"]) for step in replaced)
        return functools.partial(_from_pieces, replacements=replacements, byte_fallback="ByteFallback" in names)
    raise InputError(
        f"The tokenizer's decoder is {json.dumps(config, ensure_ascii=False)}. Supported are ByteLevel, Metaspace and "
        "a Sequence of Replace (of a fixed string), ByteFallback, Fuse and Strip (of spaces), in that order: use "
        "such a tokenizer."
    )


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, read backwards: printable Latin-1 stands for itself, the others follow
    from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _from_byte_alphabet(token: str) -> bytes:
    alphabet = _byte_alphabet()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:
        return token.encode()


_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _from_pieces(token: str, *, replacements: tuple[tuple[str, str], ...], byte_fallback: bool) -> bytes:
    for old, new in replacements:
        token = token.replace(old, new)
    byte = _BYTE_TOKEN.fullmatch(token) if byte_fallback else None
    return bytes.fromhex(byte[1]) if byte else token.encode()
