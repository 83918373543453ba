import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax.generation.decode import greedy
from tests.models import small

NEW = 7


@pytest.fixture(scope="module", params=["plain", "phantom"])
def model_and_params(request):
    return small.init(small.CONFIG if request.param == "phantom" else small.with_decoder(phantom=None), seed=3)


def generate(model, params, batch, eos=()):
    return np.asarray(greedy(model, params, batch, max_new_tokens=NEW, eos_ids=tuple(eos), pad_id=0, rope_length=32))


def by_recomputing(model, params, ids):
    """What greedy decoding means: the whole sequence through the model for every new token."""
    length = len(ids)
    row = np.zeros((1, 10 + NEW), int)
    row[0, :length] = ids
    for step in range(length, length + NEW):
        logits = small.logits(model, params, small.text_batch(row, [step]))
        row[0, step] = int(np.argmax(np.asarray(logits)[0, step - 1]))
    return row[0, length : length + NEW].tolist()


def test_a_batch_of_mixed_lengths_equals_recomputing_each_row(model_and_params):
    model, params = model_and_params
    ids, lengths = small.random_ids(3, 10, seed=5), [10, 7, 3]
    ours = generate(model, params, small.text_batch(ids, lengths, left=True))
    for row, length in enumerate(lengths):
        assert ours[row].tolist() == by_recomputing(model, params, ids[row, 10 - length :])


def test_rows_with_images_see_their_own(model_and_params):
    model, params = model_and_params
    rng = np.random.default_rng(0)
    batch = small.text_batch(small.random_ids(2, 12, seed=6)) | {
        "image_slots": jnp.asarray(np.tile(np.r_[-1, np.arange(8), -1, -1, -1], (2, 1)), jnp.int32),
        "pixels": jnp.asarray(rng.normal(size=(2, 2, 16, 16, 3)), jnp.float32),
    }
    together = generate(model, params, batch)
    for row in range(2):
        alone = generate(model, params, {name: value[row : row + 1] for name, value in batch.items()})
        assert together[row].tolist() == alone[0].tolist()
    logits = [
        np.asarray(small.logits(model, params, batch | {"pixels": pixels}))
        for pixels in (batch["pixels"], batch["pixels"][::-1])
    ]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3, "the images must matter for the test to mean something"


def test_an_end_token_ends_its_row_and_padding_follows(model_and_params):
    model, params = model_and_params
    batch = small.text_batch(small.random_ids(3, 6, seed=7))
    free = generate(model, params, batch)
    eos = int(free[0, 2])
    ours = generate(model, params, batch, eos=[eos])
    for row in range(3):
        ends = np.flatnonzero(free[row] == eos)
        stop = ends[0] + 1 if len(ends) else NEW
        assert ours[row, :stop].tolist() == free[row, :stop].tolist()
        assert (ours[row, stop:] == 0).all()


def test_prompts_of_one_shape_share_one_program(model_and_params):
    model, params = model_and_params
    generate(model, params, small.text_batch(small.random_ids(2, 8, seed=1)))
    compiled = greedy._cache_size()
    for seed in range(3):
        generate(model, params, small.text_batch(small.random_ids(2, 8, seed=seed), [8, 2 + seed], left=True))
    assert greedy._cache_size() == compiled
