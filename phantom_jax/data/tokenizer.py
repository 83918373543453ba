"""A small byte-level BPE tokenizer, trained on a data set's text and kept in Hugging Face format."""

import json
import os
import pathlib
import re
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from phantom_jax.errors import InputError

PAD = "<|endoftext|>"
SPECIAL_TOKENS = (PAD, "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")

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


def save_tokenizer(tokenizer: tokenizers.Tokenizer, directory: str | os.PathLike, *, end_of_answer: str) -> None:
    """Writes what `transformers.AutoTokenizer` loads: tokenizer.json and the two files beside it."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = [added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special]
    names = {"eos_token": end_of_answer, "pad_token": PAD if PAD in special else end_of_answer}
    extra = [token for token in special if token not in names.values()]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "additional_special_tokens": extra,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    names = {**names, "additional_special_tokens": extra}
    (directory / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def load_tokenizer(directory: str | os.PathLike) -> tokenizers.Tokenizer:
    """Loads a folder's tokenizer.json.

    Raises:
      InputError: the file is missing or is not a tokenizer.
    """
    path = pathlib.Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"There is no tokenizer at {path}. Give a folder that a model was saved to.")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    # The library raises bare `Exception`.
    except Exception as error:
        raise InputError(f"{path} is not a tokenizer: {error}. Save the model again.") from error
