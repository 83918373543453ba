"""The compiled loop: what it computes is what running the whole sequence again for every token gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax.generation import decode, sampling
from phantom_jax.generation.controls import controls
from phantom_jax.generation.prefix import first_token_states
from phantom_jax.generation.settings import Settings
from tests.generation.run import run, unrolled
from tests.models import small

NEW = 7
GREEDY = Settings(max_new_tokens=NEW)
SAMPLED = Settings(max_new_tokens=NEW, temperature=1.5, num_answers=3)
BEAMS = Settings(max_new_tokens=NEW, num_beams=3)
EVERY_KIND = pytest.mark.parametrize("settings", [GREEDY, SAMPLED, BEAMS], ids=["greedy", "sampled", "beams"])


@pytest.fixture(scope="module", params=["plain", "phantom"])
def scanned(request):
    return small.init(small.CONFIG if request.param == "phantom" else small.with_decoder(phantom=None), seed=3)


@pytest.fixture(scope="module")
def model_and_params(scanned):
    return unrolled(*scanned)


def by_recomputing(model, params, ids):
    """What greedy decoding means: the whole sequence through the model for every new token."""
    length = len(ids)
    row = np.zeros((1, 10 + NEW), int)
    row[0, :length] = ids
    for step in range(length, length + NEW):
        logits = small.logits(model, params, small.text_batch(row, [step]))
        row[0, step] = int(np.argmax(np.asarray(logits)[0, step - 1]))
    return row[0, length : length + NEW].tolist()


def rows_with_images(rows=2):
    rng = np.random.default_rng(0)
    return small.text_batch(small.random_ids(rows, 12, seed=6)) | {
        "image_slots": jnp.asarray(np.tile(np.r_[-1, np.arange(8), -1, -1, -1], (rows, 1)), jnp.int32),
        "pixels": jnp.asarray(rng.normal(size=(rows, 2, 16, 16, 3)), jnp.float32),
    }


def one_row(batch, row):
    return {name: value[row : row + 1] for name, value in batch.items()}


def test_a_batch_of_mixed_lengths_equals_recomputing_each_row(scanned, model_and_params):
    ids, lengths = small.random_ids(3, 10, seed=5), [10, 7, 3]
    ours, counts = run(*model_and_params, small.text_batch(ids, lengths, left=True), GREEDY)
    assert (counts == NEW).all()
    for row, length in enumerate(lengths):
        assert ours[row, 0].tolist() == by_recomputing(*scanned, ids[row, 10 - length :])


def test_rows_with_images_see_their_own(scanned, model_and_params):
    batch = rows_with_images()
    together, _ = run(*model_and_params, batch)
    for row in range(2):
        np.testing.assert_array_equal(together[row], run(*model_and_params, one_row(batch, row))[0][0])
    logits = [
        np.asarray(small.logits(*scanned, batch | {"pixels": pixels}))
        for pixels in (batch["pixels"], batch["pixels"][::-1])
    ]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3, "the images must matter for the test to mean something"


@EVERY_KIND
def test_a_row_alone_is_what_it_is_in_a_batch(model_and_params, settings):
    ids, lengths = small.random_ids(4, 10, seed=8), [10, 6, 3, 9]
    batch = small.text_batch(ids, lengths, left=True)
    together = run(*model_and_params, batch, settings, eos=(5, 9))
    for row in range(4):
        # The seed of a row goes with the row.
        alone = run(*model_and_params, one_row(batch, row), dataclasses.replace(settings, seed=row), eos=(5, 9))
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_array_equal(ours[row], theirs[0])


@EVERY_KIND
def test_step_by_step_is_what_one_call_gives(model_and_params, settings):
    batch = small.text_batch(small.random_ids(2, 8, seed=4), [8, 5], left=True)
    whole, steps = (run(*model_and_params, batch, settings, eos=(7,), step_by_step=flag) for flag in (False, True))
    for ours, theirs in zip(whole, steps, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_end_token_ends_its_row_and_padding_follows(model_and_params):
    batch = small.text_batch(small.random_ids(3, 6, seed=7))
    free, _ = run(*model_and_params, batch)
    eos = int(free[0, 0, 2])
    ours, lengths = run(*model_and_params, batch, eos=[eos])
    for row in range(3):
        ends = np.flatnonzero(free[row, 0] == eos)
        stop = ends[0] + 1 if len(ends) else NEW
        assert lengths[row, 0] == stop
        np.testing.assert_array_equal(ours[row, 0, :stop], free[row, 0, :stop])
        assert (ours[row, 0, stop:] == 0).all()


def test_no_end_before_the_least_number_of_tokens(model_and_params):
    batch = small.text_batch(small.random_ids(3, 6, seed=7))
    free, _ = run(*model_and_params, batch)
    eos = int(free[0, 0, 0])
    assert run(*model_and_params, batch, eos=[eos])[1][0, 0] == 1
    ours, lengths = run(*model_and_params, batch, Settings(max_new_tokens=NEW, min_new_tokens=3), eos=[eos])
    assert lengths.min() > 3 and not (ours[:, :, :3] == eos).any()


@EVERY_KIND
def test_stop_strings_end_answers_in_the_loop(model_and_params, settings):
    # Short beams are made the best ones, so that one that stopped comes first.
    settings = dataclasses.replace(settings, length_penalty=-3.0)
    batch = small.text_batch(small.random_ids(3, 6, seed=7))
    token_bytes = [bytes([97 + token % 26]) for token in range(61)]

    def texts(**changes):
        asked = dataclasses.replace(settings, **changes)
        tokens, lengths = run(*model_and_params, batch, asked, token_bytes=token_bytes)
        return [
            b"".join(token_bytes[token] for token in answer[:length]).decode()
            for answer, length in zip(tokens[0], lengths[0], strict=True)
        ]

    stop = texts()[0][2:4]
    stopped = texts(stop=(stop,))
    assert stopped[0].endswith(stop) and len(stopped[0]) < NEW
    assert not any(stop in text[:-1] for text in stopped)
    assert all(len(text) == NEW for text in texts(stop=(stop,), min_new_tokens=NEW - 1))


def test_samples_of_a_prompt_are_those_of_separate_rows(model_and_params):
    """Answers share the prompt's keys and values and see nothing of one another."""
    model, params = model_and_params
    batch = small.text_batch(small.random_ids(1, 8, seed=4))
    answers, _ = run(model, params, batch, SAMPLED)
    assert len({tuple(answer) for answer in answers[0].tolist()}) == 3
    prompts = np.tile(np.asarray(batch["token_ids"]), (3, 1))
    rows = small.text_batch(np.concatenate([prompts, answers[0]], axis=1))
    logits = model.apply({"params": params}, rows, rope_length=32)[:, 7:-1]
    asked = controls(SAMPLED, max_new_tokens=np.array([NEW]), end_ids=(), pad_id=0, seeds=np.zeros(1))
    for step in range(NEW):
        scores = sampling.adjust(logits[None, :, step], None, jnp.int32(step), asked)
        np.testing.assert_array_equal(sampling.choose(scores, jnp.int32(step), asked)[0], answers[0, :, step])


def test_constants_of_a_first_token_replace_its_states():
    model, params = unrolled(*small.init(small.CONFIG, seed=3))
    ids = small.random_ids(3, 8, seed=2)
    lengths = [8, 5, 3]
    for row, length in enumerate(lengths):
        ids[row, 8 - length] = 11
    batch = small.text_batch(ids, lengths, left=True)
    constants = first_token_states(model, params, np.int32(11))
    assert all(leaf.shape[:2] == (1, 1) for leaf in jax.tree.leaves(constants))
    np.testing.assert_array_equal(run(model, params, batch, phantom=constants)[0], run(model, params, batch)[0])
    other = first_token_states(model, params, np.int32(12))
    assert (run(model, params, batch, phantom=other)[0] != run(model, params, batch)[0]).any()


def test_a_cache_of_8_bits_stays_close(model_and_params):
    model, params = model_and_params
    batch = small.text_batch(small.random_ids(16, 10, seed=9))
    exact, coarse = (run(model, params, batch, int8=flag)[0] for flag in (False, True))
    first = exact[:, 0, 0] == coarse[:, 0, 0]
    assert first.mean() >= 0.9 and (exact == coarse).mean() > 0.7


def test_prompts_of_one_shape_share_one_program(model_and_params):
    def generate(prompt, **settings):
        batch = small.text_batch(small.random_ids(2, 8, seed=prompt), [8, 2 + prompt], left=True)
        run(*model_and_params, batch, Settings(max_new_tokens=NEW, **settings), eos=range(3, 4 + prompt % 2))

    warm = ({}, {"num_beams": 3}, {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1})
    for settings in warm:
        generate(1, **settings)
    compiled = decode.start._cache_size(), decode.advance._cache_size()
    for seed in range(3):
        generate(seed, min_new_tokens=seed)
        generate(seed, num_beams=3, length_penalty=0.5 * seed, early_stopping=[True, False, "never"][seed])
        generate(seed, temperature=1.0 + seed, top_k=3 + seed, top_p=0.3, repetition_penalty=1.3, seed=seed)
    assert (decode.start._cache_size(), decode.advance._cache_size()) == compiled
