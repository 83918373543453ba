"""Token bytes against the tokenizers that transformers makes for the language models' families."""

import json
import unicodedata

import pytest
import transformers

from phantom_jax.data.text import answer_text
from phantom_jax.data.tokenizer import token_bytes
from tests.data import small_tokenizers

LLAMA = small_tokenizers.llama_like
BYTE_LEVEL = small_tokenizers.byte_level
FAMILIES = {
    "llama": (transformers.LlamaTokenizer, LLAMA),
    "gemma": (transformers.GemmaTokenizer, LLAMA),
    "qwen2": (transformers.Qwen2Tokenizer, BYTE_LEVEL),
    "gpt2": (transformers.GPT2Tokenizer, BYTE_LEVEL),
}
TEXTS = [*small_tokenizers.TEXTS, "🙂👩‍🚀 北京", "  a  b", "no\n\n\nend"]


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES.keys())
def tokenizer(request):
    family, make = request.param
    model = json.loads(make().to_str())["model"]
    return family(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_is_what_transformers_decodes(tokenizer, text):
    table = token_bytes(tokenizer.backend_tokenizer)
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    theirs = tokenizer.decode([*token_ids, tokenizer.eos_token_id], skip_special_tokens=True)
    assert answer_text(token_ids, table, end_ids=(tokenizer.eos_token_id,)) == theirs.strip()
    # Qwen2's normalizer composes characters.
    assert theirs.strip() in (text.strip(), unicodedata.normalize("NFC", text.strip()))
    assert table[tokenizer.eos_token_id] == b""
