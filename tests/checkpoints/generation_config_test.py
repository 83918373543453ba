import json

import pytest

from phantom_jax.checkpoints.generation_config import generation_config
from phantom_jax.checkpoints.hf_config import TokenIds

TOKENS = TokenIds(image=32000, eos=(2,), pad=0)
VICUNA = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "temperature": 0.9,
    "top_p": 0.6,
    "max_length": 4096,
    "transformers_version": "4.31.0",
}


def test_greedy_without_a_source():
    assert generation_config(TOKENS) == {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    several = generation_config(TokenIds(image=5, eos=(7, 9), pad=-1), source={"bos_token_id": 1})
    assert several == {"do_sample": False, "bos_token_id": 1, "eos_token_id": [7, 9]}
    assert json.loads(json.dumps(several)) == several


def test_a_temperature_goes_where_nothing_is_sampled():
    expected = {"do_sample": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": 4096}
    assert generation_config(TOKENS, source=VICUNA) == expected
    assert generation_config(TOKENS, source=VICUNA | {"do_sample": False}) == expected


def test_a_source_that_samples_keeps_how():
    kept = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "max_new_tokens": 256}
    found = generation_config(TOKENS, source=kept | {"max_length": 4096, "length_penalty": 2.0})
    assert {name: found[name] for name in kept} == kept
    assert found.keys() == kept.keys() | {"eos_token_id", "pad_token_id"}


def test_beams_keep_what_concerns_them():
    kept = {"num_beams": 5, "length_penalty": 2.0, "early_stopping": True, "repetition_penalty": 1.1}
    found = generation_config(TOKENS, source=kept)
    assert {name: found[name] for name in kept} == kept
    assert "length_penalty" not in generation_config(TOKENS, source=kept | {"num_beams": 1})


def test_the_model_decides_its_end_and_padding():
    found = generation_config(TOKENS, source={"eos_token_id": 99, "pad_token_id": 98, "bos_token_id": 97})
    assert (found["eos_token_id"], found["pad_token_id"], found["bos_token_id"]) == (2, 0, 97)


@pytest.mark.parametrize("value", [None, "0.9", float("nan"), -1, 0, True, [1]])
def test_values_that_mean_nothing_are_left_behind(value):
    source = dict.fromkeys(("max_new_tokens", "num_beams", "repetition_penalty"), value)
    assert generation_config(TOKENS, source=source) == generation_config(TOKENS)
