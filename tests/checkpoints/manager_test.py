import contextlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from phantom_jax.checkpoints import manager as checkpoints
from phantom_jax.errors import InputError
from phantom_jax.training.state import start_phase

META = {"step": 3, "config": {"phases": [{"name": "a"}]}}
DATA = {"next_index": 12, "parents": [{"position": 3}]}


def make_state(seed=0, size=4):
    params = {
        "a": {"kernel": jax.random.normal(jax.random.key(seed), (3, size)), "scale": jnp.ones(3)},
        "b": {"kernel": jax.random.normal(jax.random.key(seed + 1), (size, 2))},
    }
    init = optax.chain(optax.scale_by_adam(), optax.identity()).init
    return start_phase(
        params, patterns=["a/**"], init_optimizer=lambda tree: {"base": init(tree)}, compute_dtype=jnp.bfloat16
    )


def abstract(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


@contextlib.contextmanager
def opened(directory, keep=2):
    with contextlib.closing(checkpoints.open_manager(directory, keep=keep)) as manager:
        yield manager


def test_round_trip_is_bit_equal(tmp_path):
    state = make_state()
    with opened(tmp_path) as manager:
        checkpoints.save(manager, 3, state=state, data=DATA, meta=META)
    with opened(tmp_path) as manager:
        assert manager.latest_step() == 3
        assert checkpoints.restore_meta(manager, 3) == (DATA, META)
        restored = checkpoints.restore_state(manager, 3, abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(new, old)


def test_the_last_k_are_kept(tmp_path):
    with opened(tmp_path, keep=2) as manager:
        for step in (1, 2, 3, 4):
            checkpoints.save(manager, step, state=make_state(step), data=DATA, meta=META)
    with opened(tmp_path) as manager:
        assert sorted(manager.all_steps()) == [3, 4]


def test_saving_a_step_again_keeps_the_first(tmp_path):
    with opened(tmp_path) as manager:
        checkpoints.save(manager, 1, state=make_state(1), data=DATA, meta=META)
        checkpoints.save(manager, 1, state=make_state(2), data=DATA, meta=META)
        manager.wait_until_finished()
        restored = checkpoints.restore_state(manager, 1, abstract(make_state(1)))
    np.testing.assert_array_equal(restored.frozen["b"]["kernel"], make_state(1).frozen["b"]["kernel"])


def test_buffers_may_be_donated_while_a_save_is_under_way(tmp_path):
    scramble = jax.jit(lambda state: jax.tree.map(lambda x: (x * 0 - 1).astype(x.dtype), state), donate_argnums=0)
    with opened(tmp_path) as manager:
        for step in range(1, 4):
            state = make_state(step, size=200_000)
            expected = jax.device_get(jax.tree.map(jnp.copy, state))
            checkpoints.save(manager, step, state=state, data=DATA, meta=META)
            for _ in range(3):
                state = scramble(state)
            jax.block_until_ready(state)
            manager.wait_until_finished()
            restored = checkpoints.restore_state(manager, step, abstract(state))
            jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_an_unfinished_checkpoint_is_not_seen_and_is_cleaned(tmp_path):
    with opened(tmp_path) as manager:
        checkpoints.save(manager, 1, state=make_state(), data=DATA, meta=META)
    leftover = tmp_path / "2.orbax-checkpoint-tmp"
    os.makedirs(leftover / "state")
    with opened(tmp_path) as manager:
        assert manager.latest_step() == 1
        checkpoints.save(manager, 2, state=make_state(), data=DATA, meta=META)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert not leftover.exists()


def test_every_wrong_array_is_listed(tmp_path):
    state = make_state()
    with opened(tmp_path) as manager:
        checkpoints.save(manager, 1, state=state, data=DATA, meta=META)
        manager.wait_until_finished()
        other = abstract(state)
        device = other.step.sharding
        other = other.replace(
            frozen={"b": {"kernel": jax.ShapeDtypeStruct((4, 5), jnp.bfloat16, sharding=device)}, "c": other.step},
            trainable={"a": {"kernel": other.trainable["a"]["kernel"]}},
        )
        with pytest.raises(InputError) as error:
            checkpoints.restore_state(manager, 1, other)
    message = str(error.value)
    assert "1 missing: frozen/c int32[]" in message
    assert "1 not part of this state: trainable/a/scale float32[3]" in message
    assert "frozen/b/kernel is bfloat16[4,2], wanted bfloat16[4,5]" in message


def test_data_and_meta_are_plain_json(tmp_path):
    with opened(tmp_path) as manager:
        checkpoints.save(manager, 1, state=make_state(), data=DATA, meta=META)
    [path] = (tmp_path / "1" / "meta").glob("metadata*")
    assert json.loads(path.read_text()) == META
