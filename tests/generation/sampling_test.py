"""Rules on logits against a plain implementation, and sampling against its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax.generation import sampling
from phantom_jax.generation.controls import controls
from phantom_jax.generation.settings import Settings

VOCABULARY = 40


def adjusted(scores, step=0, end_ids=(), seen=None, **settings):
    settings = {"temperature": 1.0} | settings
    rows = scores.shape[0]
    asked = controls(
        Settings(**settings),
        max_new_tokens=np.full(rows, 9),
        end_ids=end_ids,
        pad_id=0,
        seeds=np.arange(rows),
        prompt_tokens=np.zeros((rows, VOCABULARY), bool),
    )
    return np.asarray(jax.jit(sampling.adjust)(jnp.asarray(scores), seen, jnp.int32(step), asked))


@pytest.fixture
def scores():
    return np.random.default_rng(0).normal(size=(3, 2, VOCABULARY)).astype(np.float32) * 3


@pytest.mark.parametrize("k", [1, 2, 17, VOCABULARY, 1000])
def test_top_k_keeps_the_k_largest(scores, k):
    kept = np.isfinite(adjusted(scores, top_k=k))
    expected = np.argsort(np.argsort(-scores, axis=-1), axis=-1) < k
    np.testing.assert_array_equal(kept, expected)


def test_top_k_keeps_ties(scores):
    scores[..., :5] = 100.0
    assert (np.isfinite(adjusted(scores, top_k=2)).sum(-1) == 5).all()


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_of_that_mass(scores, p):
    kept = np.isfinite(adjusted(scores, top_p=p, temperature=0.7))
    probabilities = np.asarray(jax.nn.softmax(scores / 0.7, axis=-1), np.float64)
    order = np.argsort(-probabilities, axis=-1)
    above = np.cumsum(np.take_along_axis(probabilities, order, -1), -1) - np.take_along_axis(probabilities, order, -1)
    expected = np.zeros_like(kept)
    np.put_along_axis(expected, order, above < p - 1e-7, -1)
    np.testing.assert_array_equal(kept, expected)
    assert kept.any(-1).all()


def test_a_top_p_of_one_is_none(scores):
    np.testing.assert_allclose(adjusted(scores, top_p=1.0), scores)


def test_top_k_comes_before_top_p(scores):
    both = np.isfinite(adjusted(scores, top_k=3, top_p=0.8))
    largest = np.where(np.argsort(np.argsort(-scores, axis=-1), axis=-1) < 3, scores, -np.inf)
    np.testing.assert_array_equal(both, np.isfinite(adjusted(largest.astype(np.float32), top_p=0.8)))


def test_repetition_penalty(scores):
    seen = np.random.default_rng(1).random(scores.shape) < 0.3
    ours = adjusted(scores, seen=jnp.asarray(seen), repetition_penalty=1.5)
    expected = np.where(seen, np.where(scores > 0, scores / 1.5, scores * 1.5), scores)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_end_tokens_are_ruled_out_at_first_and_only_they(scores):
    early, late = (adjusted(scores, step=step, end_ids=(3, 7), min_new_tokens=2) for step in (1, 2))
    assert np.isneginf(early[..., [3, 7]]).all() and np.isfinite(np.delete(early, [3, 7], -1)).all()
    np.testing.assert_allclose(late, scores, rtol=1e-6)


def test_samples_follow_the_distribution():
    scores = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    rows = 4096
    asked = controls(
        Settings(temperature=1.0), max_new_tokens=np.ones(rows), end_ids=(), pad_id=0, seeds=np.arange(rows)
    )
    for step in range(2):
        tokens = np.asarray(sampling.choose(jnp.tile(scores, (rows, 2, 1)), jnp.int32(step), asked))
        for branch in range(2):
            shares = np.bincount(tokens[:, branch], minlength=4) / rows
            # Four standard errors of a share of one half.
            np.testing.assert_allclose(shares, np.exp(scores), atol=4 * 0.5 / rows**0.5)
        assert abs(np.mean(tokens[:, 0] == tokens[:, 1]) - 0.345) < 0.04, "branches draw independently"


def test_a_seed_decides_and_another_one_differs():
    scores = jnp.zeros((1, 1, 1000))

    def token(seed, step=0):
        asked = controls(
            Settings(temperature=1.0), max_new_tokens=np.ones(1), end_ids=(), pad_id=0, seeds=np.array([seed])
        )
        return int(sampling.choose(scores, jnp.int32(step), asked)[0, 0])

    assert token(5) == token(5)
    assert len({token(seed) for seed in range(8)} | {token(5, step) for step in range(1, 8)}) > 12
