"""Beam search and logit rules against transformers' own `generate`, on a decoder that it wrote."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from phantom_jax import pretrained
from phantom_jax.generation import sampling
from phantom_jax.generation.controls import controls
from phantom_jax.generation.settings import Settings
from tests.generation.run import run

VOCABULARY, NEW = 60, 9


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A LLaVA of transformers', and the same one read here; its answers end now and then by themselves."""
    torch.manual_seed(2)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.35,
        pad_token_id=0,
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=58, image_seq_length=4)
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("llava")
    theirs.save_pretrained(folder)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    # transformers 5 leaves out a level of names that every published checkpoint has.
    published = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): tensors[name] for name in tensors}
    save_file(published, folder / "model.safetensors")
    return theirs, pretrained.load(folder)


CASES = {
    "greedy, penalty": {"repetition_penalty": 1.3},
    "greedy, at least": {"min_new_tokens": 4},
    "3 beams": {"num_beams": 3},
    "4 beams, several answers": {"num_beams": 4, "num_answers": 3},
    "2 beams, short": {"num_beams": 2, "length_penalty": -1.0},
    "5 beams, no penalty of length": {"num_beams": 5, "length_penalty": 0.0},
    "3 beams, early": {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    "3 beams, never": {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.7},
    "3 beams, all rules": {"num_beams": 3, "repetition_penalty": 1.5, "min_new_tokens": 3, "num_answers": 2},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_answers_of_generate(models, fields):
    theirs, ours = models
    eos = [2, 17, 33, 41]
    ids = np.random.default_rng(5).integers(3, 58, (6, 8))
    settings = Settings(max_new_tokens=NEW, **fields)
    names = {"num_answers": "num_return_sequences"}
    with torch.no_grad():
        expected = [
            # Row by row: in a batch, what one row does may prolong the search of another.
            theirs.generate(
                input_ids=torch.as_tensor(row[None]),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=eos,
                pad_token_id=0,
                **{names.get(name, name): value for name, value in fields.items()},
            )[:, 8:].numpy()
            for row in ids
        ]
    batch = {
        "token_ids": jnp.asarray(ids, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(8)[None], (6, 8)),
        "segment_ids": jnp.ones((6, 8), jnp.int32),
    }
    tokens, lengths = run(ours.model, ours.params, batch, settings, eos=eos)
    ended = 0
    for row in range(6):
        for answer in range(settings.num_answers):
            mine, length = tokens[row, answer].tolist(), lengths[row, answer]
            right = expected[row][answer].tolist()
            stop = next((i + 1 for i, token in enumerate(right) if token in eos), len(right))
            assert mine[:length] == right[:stop], (row, answer)
            ended += stop < NEW
    assert ended > 0, "no answer ended by itself: the test would not see the rules for finished answers"


@pytest.mark.parametrize("fields", [{"top_k": 7}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.5, "temperature": 2.5}])
def test_what_may_be_sampled(fields):
    """The same tokens with the same scores as after transformers' warpers, in their order."""
    fields = {"temperature": 0.6} | fields
    scores = np.random.default_rng(1).normal(size=(8, VOCABULARY)).astype(np.float32) * 2
    warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(fields["temperature"])])
    if "top_k" in fields:
        warpers.append(transformers.TopKLogitsWarper(fields["top_k"]))
    if "top_p" in fields:
        warpers.append(transformers.TopPLogitsWarper(fields["top_p"]))
    expected = warpers(torch.zeros((8, 1), dtype=torch.long), torch.as_tensor(scores)).numpy()
    asked = controls(Settings(**fields), max_new_tokens=np.ones(8), end_ids=(), pad_id=0, seeds=np.zeros(8))
    ours = np.asarray(sampling.adjust(jnp.asarray(scores)[:, None], None, jnp.int32(0), asked))[:, 0]
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(expected))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
