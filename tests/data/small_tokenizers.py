"""Small tokenizers of the two kinds that language models have."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, trainers

from phantom_jax.data.tokenizer import train_tokenizer

TEXTS = [
    "The quick brown fox: it jumps over 13 lazy dogs, doesn't it?\n\n  Yes.",
    "né à l'été, 北京 and 東京, e\u0301 with a combining mark, 🙂👩‍🚀 and 🇫🇷",
]


def byte_level() -> tokenizers.Tokenizer:
    """As Qwen2's: 256 bytes in GPT-2's alphabet and merges."""
    return train_tokenizer(TEXTS * 3, vocab_size=400)


def llama_like() -> tokenizers.Tokenizer:
    """As LLaMA's: ▁ for a space, one before every text, and a token of its own for each byte of what is unknown."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizer
    # Emoji are left to the byte tokens.
    words = [text.split("🙂")[0] for text in TEXTS]
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: token_id for token_id, token in enumerate([*first, *model["vocab"]])}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # noqa: S106
    tokenizer.normalizer = normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer
