"""Small tokenizers of the kinds that published models have."""

import json

import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers

from phantom_jax.data.tokenizer import train_tokenizer

TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: What is in the picture? ASSISTANT: "
    "It is a cat, and the number 482 stands on it. USER: How many animals are there? ASSISTANT: There are two of them.",
    "You are a helpful language and vision assistant. [INST] <<SYS>> <</SYS>> What is it? [/INST] It is a dog.",
    "user\n assistant\n café 猫 is here",
]
LLAMA_KINDS = ("prepend", "first", "always")
"""How they put a space first: a normaliser before every run, or Metaspace before the text or before every run."""


def llama(kind: str, *, special=("<image>",)) -> tokenizers.Tokenizer:
    """A BPE with byte fallback and "▁" for the space; its post-processor puts `<s>` first."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))  # noqa: S106
    # Trained by words, while the published ones merge over a whole run of text.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    single_bytes = [f"<0x{value:02X}>" for value in range(256)]
    first = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*first, *single_bytes, *special],
        limit_alphabet=70,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [added for added in content["added_tokens"] if added["content"] not in single_bytes]
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": kind, "split": False}
    if kind == "prepend":
        content["pre_tokenizer"] = None
        prepend, replace = {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "content": "▁"}
        content["normalizer"] = {
            "type": "Sequence",
            "normalizers": [prepend, {**replace, "pattern": {"String": " "}}],
        }
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def byte_level(*, special=(), stripping=()) -> tokenizers.Tokenizer:
    """A byte-level BPE; `stripping` are special tokens that take the white space after them."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=450)
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special])
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, rstrip=True) for token in stripping])
    return tokenizer


def language_model() -> tokenizers.Tokenizer:
    """A byte-level BPE without the tokens of images."""
    content = json.loads(byte_level().to_str())
    for token in ("<img>", "</img>", "<IMG_CONTEXT>"):
        new = "<|" + token.strip("</>").lower() + str(token.count("/")) + "|>"
        content["model"]["vocab"][new] = content["model"]["vocab"].pop(token)
        for added in content["added_tokens"]:
            if added["content"] == token:
                added["content"] = new
    return tokenizers.Tokenizer.from_str(json.dumps(content))
