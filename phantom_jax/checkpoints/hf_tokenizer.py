"""The tokenizer of a published folder, from whichever of its files hold it. No code of the folder ever runs."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from phantom_jax.data import sentencepiece_model
from phantom_jax.data.tokenizer import load_tokenizer
from phantom_jax.errors import InputError
from phantom_jax.json_files import read_json

_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_ADDED = "added_tokens.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_tokenizer(directory: pathlib.Path) -> tokenizers.Tokenizer | None:
    """Reads tokenizer.json, else tokenizer.model (SentencePiece BPE), else vocab.json with merges.txt.

    To the latter two come the tokens of tokenizer_config.json, special_tokens_map.json and added_tokens.json.

    Returns:
      The tokenizer, or None where the folder has none of these files.

    Raises:
      InputError: a file is damaged or of another kind, or files do not go together.
    """
    if (directory / "tokenizer.json").is_file():
        return load_tokenizer(directory)
    config, special_map, ids = (_json(directory / name) for name in (_CONFIG, _SPECIAL, _ADDED))
    named = _named(special_map) | _named(config)
    added = _added_tokens(config, ids, special=named.values())
    path = directory / "tokenizer.model"
    if path.is_file():
        try:
            model = sentencepiece_model.parse(path.read_bytes())
            names = {token_id: token.content for token_id, token in added.items() if token_id < len(model.pieces)}
            model = model.renamed(names)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        tokenizer = sentencepiece_model.make_tokenizer(model, every_run=config.get("legacy") is not False)
        _add(tokenizer, added, directory)
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        tokenizer = _by_class(directory, config.get("tokenizer_class") or "Qwen2Tokenizer")
        _add(tokenizer, added, directory)
    else:
        return None
    known = tokenizer.get_vocab()
    missing = [content for content in named.values() if content not in known]
    tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in missing])
    if path.is_file():
        _surround(tokenizer, config, named)
    return tokenizer


def _json(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """A token that is written as text or as an object."""
    return token.get("content") if isinstance(token, Mapping) else token


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a file names, by what they are for."""
    found = {key: _content(value) for key, value in config.items() if key.endswith("_token")}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or []
        more = list(more.values()) if isinstance(more, Mapping) else more
        if not isinstance(more, list):
            raise InputError(f"{_CONFIG} or {_SPECIAL} has {key}={more!r}: it must be a list of tokens")
        for number, token in enumerate(more):
            found[f"{key} {number}"] = _content(token)
    return {key: content for key, content in found.items() if isinstance(content, str) and content}


def _added_tokens(
    config: Mapping[str, Any], ids: Mapping[str, Any], special: Iterable[str]
) -> dict[int, tokenizers.AddedToken]:
    """All added tokens whose id a file gives."""
    special = set(special)
    try:
        plain = {
            int(token_id): AddedToken(token, normalized=False, special=token in special)
            for token, token_id in ids.items()
        }
        flagged = {
            int(token_id): AddedToken(token["content"], **{flag: bool(token.get(flag, False)) for flag in _FLAGS})
            for token_id, token in (config.get("added_tokens_decoder") or {}).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{_ADDED} or {_CONFIG} does not list tokens and their ids ({error!r})") from error
    for token_id in plain.keys() & flagged.keys():
        if plain[token_id].content != flagged[token_id].content:
            raise InputError(
                f"id {token_id} is {plain[token_id].content!r} in {_ADDED} and {flagged[token_id].content!r} in "
                f"{_CONFIG}: take both files from one folder"
            )
    return dict(sorted({**plain, **flagged}.items()))


def _add(tokenizer: tokenizers.Tokenizer, added: Mapping[int, AddedToken], directory: pathlib.Path) -> None:
    for token_id, token in added.items():
        tokenizer.add_tokens([token])
        got = tokenizer.token_to_id(token.content)
        if got != token_id:
            raise InputError(
                f"{directory}: {_ADDED} or {_CONFIG} gives the token {token.content!r} the id {token_id}, with this "
                f"vocabulary it has {got}: take all tokenizer files from one folder"
            )


def _surround(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """What other libraries put before and after every text, as LLaMA's do where nothing else is said."""
    begin = [named.get("bos_token", "<s>")] if config.get("add_bos_token", True) else []
    end = [named.get("eos_token", "</s>")] if config.get("add_eos_token", False) else []
    special = [(token, tokenizer.token_to_id(token)) for token in (*begin, *end)]
    for token, token_id in special:
        if token_id is None:
            raise InputError(f"{_CONFIG} puts {token!r} around every text, and tokenizer.model does not have it")
    tokenizer.post_processor = TemplateProcessing(single=[*begin, "$A", *end], special_tokens=special)


def _by_class(directory: pathlib.Path, name: str) -> tokenizers.Tokenizer:
    """What a tokenizer class of transformers makes of the folder; a class that comes with the folder is not asked."""
    import transformers

    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)):
        raise InputError(f"{directory / _CONFIG} has tokenizer_class={name!r}, which transformers does not have")
    try:
        return kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False).backend_tokenizer
    # The libraries raise anything, bare `Exception` too.
    except Exception as error:
        raise InputError(f"{directory}: vocab.json and merges.txt make no {name}: {error}") from error
