"""The compiled loop on a plain batch, as tests call it."""

import jax.numpy as jnp
import numpy as np

from phantom_jax.generation import decode
from phantom_jax.generation.controls import controls
from phantom_jax.generation.settings import Settings
from phantom_jax.generation.stops import stop_table
from phantom_jax.models.cache import empty_cache
from phantom_jax.models.decoder import unstack_layers


def unrolled(model, params):
    """The same model with layers of its own, as generation needs it."""
    return model.clone(scan_layers=False, keep_layer_inputs=False), params | {
        "language_model": unstack_layers(params["language_model"])
    }


def run(
    model,
    params,
    batch,
    settings=None,
    *,
    eos=(),
    pad_id=0,
    rope_length=32,
    phantom=None,
    int8=False,
    token_bytes=None,
    step_by_step=False,
):
    """Answers [B, K, T] and their lengths [B, K]; `model` has scan_layers=False."""
    settings = settings or Settings(max_new_tokens=7)
    rows, length = batch["token_ids"].shape
    new, branches = settings.max_new_tokens, settings.branches
    vocabulary = model.config.language_model.vocab_size
    ids, real = np.asarray(batch["token_ids"]), np.asarray(batch["segment_ids"]) > 0
    seen = np.zeros((rows, vocabulary), bool)
    for row in range(rows):
        seen[row, ids[row, real[row]]] = True
    asked = controls(
        settings,
        max_new_tokens=np.full(rows, new),
        end_ids=eos,
        pad_id=pad_id,
        seeds=np.arange(rows) + settings.seed,
        prompt_tokens=seen,
        stops=stop_table(token_bytes, settings.stop) if settings.stop else None,
    )
    slots = length + new * branches
    cache = empty_cache(model.config.language_model, rows, slots, model.dtype, int8=int8)
    state = decode.start(
        model,
        params,
        cache,
        phantom,
        batch,
        None,
        asked,
        branches=branches,
        beam_search=settings.num_beams > 1,
        new_slots=new,
        rope_length=rope_length,
    )
    for limit in range(2, new + 1) if step_by_step else [new]:
        state = decode.advance(model, params, state, asked, jnp.int32(limit), rope_length=rope_length)
    tokens, lengths = state.answers
    return np.asarray(tokens), np.asarray(lengths)
