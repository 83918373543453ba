"""A whole model whose attention is the TPU kernel, in Pallas' interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.ops import attention, splash
from tests.models import small


def test_a_model_with_splash_is_the_model(monkeypatch):
    monkeypatch.setattr(attention, "check_backend", lambda *_: None)
    monkeypatch.setattr(splash, "attend", functools.partial(splash.attend, interpret=True))
    model, params = small.init(small.with_decoder(num_layers=2))
    ids = small.random_ids(2, 40)
    ids[:, [0, 17]] = 3  # both conversations of a row begin with the same token
    position = np.concatenate([np.arange(17), np.arange(23)])[None].repeat(2, axis=0)
    batch = small.text_batch(ids) | {
        "positions": jnp.asarray(position),
        "segment_ids": jnp.asarray(np.where(np.arange(40) < 17, 1, 2)[None].repeat(2, axis=0)).at[1, 33:].set(0),
        "pixels": jax.random.normal(jax.random.key(1), (2, 2, 16, 16, 3)),
        "image_slots": jnp.full((2, 40), -1, jnp.int32).at[:, 2:6].set(jnp.arange(4)),
        "targets": jnp.asarray(ids, jnp.int32),
    }

    @functools.partial(jax.jit, static_argnums=0)
    def log_probs(model):
        scores = model.apply({"params": params}, batch, rope_length=40, method="score")
        return scores.log_probs * (batch["segment_ids"] > 0)

    expected = log_probs(model)
    assert jnp.abs(expected).max() > 1
    np.testing.assert_allclose(log_probs(model.clone(attention_backend="splash")), expected, rtol=1e-4, atol=1e-4)
