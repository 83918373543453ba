"""Settings that cannot be meant, each refused with what to set instead."""

import pytest

from phantom_jax.errors import InputError
from phantom_jax.generation.settings import Settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0: set it to a whole number, 1 or more"),
        ({"num_beams": 2.0}, "num_beams is 2.0"),
        ({"num_answers": True}, "num_answers is True"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1: set it to a whole number, 0 or more"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 is more than max_new_tokens=8"),
        ({"temperature": -1}, "temperature is -1: set it to a number, 0 or more; 0 is greedy decoding"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 0, "temperature": 1.0}, "top_k is 0"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p is 0.0: set it above 0 and to at most 1"),
        ({"top_p": 1.5, "temperature": 1.0}, "top_p is 1.5"),
        ({"top_p": 0.9}, "set temperature above 0"),
        ({"seed": -1}, "seed is -1"),
        ({"num_beams": 257}, "num_beams is 257: set it to at most 256"),
        ({"repetition_penalty": -1}, "repetition_penalty is -1: set it above 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: set it above 0"),
        ({"length_penalty": float("inf")}, "length_penalty is inf"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon': set it to True, False or 'never'"),
        ({"num_answers": 3}, "greedy decoding would be 3 equal answers"),
        ({"temperature": 1e-9}, "temperature is 1e-09: set it to 0, greedy decoding, or to 0.001 or more"),
        ({"top_k": 2, "num_beams": 3, "temperature": 1.0}, "top_k=2 leaves fewer continuations than num_beams=3"),
        ({"seed": 2**32}, "seed is 4294967296: set it below 2147483648"),
        ({"num_answers": 3, "num_beams": 2}, "2 beams have no 3 answers"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Settings(**fields)


def test_a_misspelt_setting_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="no setting 'num_beam': did you mean 'num_beams'"):
        Settings.of({"num_beam": 3})
    with pytest.raises(InputError, match="no setting 'xyz': the settings are max_new_tokens, "):
        Settings.of({"xyz": 3})


def test_branches_are_beams_or_samples():
    assert Settings().branches == 1
    assert Settings(num_beams=5, num_answers=2).branches == 5
    assert Settings(temperature=1.0, num_answers=4).branches == 4
