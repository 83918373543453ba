"""Small SentencePiece BPE models, trained by SentencePiece itself, and texts to try them with."""

import functools
import io
import pathlib
import random

import sentencepiece

# Its own sources are text enough, and always there.
_LINES = [
    line
    for path in sorted((pathlib.Path(__file__).parent.parent / "phantom_jax").glob("*.py"))
    for line in path.read_text().splitlines()
    if line.strip()
]
_LINES += ["né à l'été, 北京市 and ひらがな, 猫はどこ?", "    indented    twice  and   thrice"] * 20
# Leading spaces so that some pieces are runs of them.
_ODD = [" ", "  ", "   ", "\n", "\t", "\r\n", "\u3000", "\u00a0", "▁", "猫", "京", "🙂", "👩‍🚀", "é", "e\u0301", "\x00"]
_ODD += ["\u200b", "ﬁ", "①", "<0x41>", "<s>", "</s>", "<unk>", "the", "ing", "482"]


@functools.cache
def train(**settings) -> bytes:
    """The content of `tokenizer.model`; by default with what LLaMA's was trained with."""
    default = {
        "vocab_size": 900,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 0.99,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "minloglevel": 2,
    }
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_LINES), model_writer=written, **{**default, **settings}
    )
    return written.getvalue()


def texts(count: int, seed: int = 0) -> list[str]:
    """Random texts: words, runs of white space, other scripts, what looks like special tokens."""
    rng = random.Random(seed)  # noqa: S311
    words = [word for line in _LINES for word in line.split(" ")]

    def text() -> str:
        kind = rng.randrange(5)
        if kind == 0:
            return "".join(rng.choice(_ODD) for _ in range(rng.randrange(20)))
        if kind == 1:
            return " ".join(rng.choice(words) for _ in range(rng.randrange(12)))
        if kind == 2:
            return "".join(rng.choice(words) + " " * rng.randrange(6) for _ in range(5))
        if kind == 3:
            return rng.choice("a =-#\n▁") * rng.randrange(1, 40)
        ranges = [(1, 0xD800), (0x10000, 0x30000), (0x20, 0x7F)]
        return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(20))

    return ["", " ", "  a  ", *(text() for _ in range(count))]
