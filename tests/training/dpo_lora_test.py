"""DPO with an adapter: the model without it, and what was stored before the first step, are the same reference."""

import numpy as np

from phantom_jax.training.loop import train
from tests.training.task_test import config_for, data_dir, records_of  # noqa: F401 - a fixture


def test_both_references_give_the_same_losses(data_dir, tmp_path):  # noqa: F811
    losses = {}
    for reference in ("adapter_off", "stored"):
        config = config_for(data_dir)
        config.phases = config.phases[:1]
        config.validation.every = 0
        phase = config.phases[0]
        phase.objective = {"name": "dpo", "beta": 0.1, "reference": reference}
        phase.trainable = ()
        phase.lora.update(rank=2, alpha=8.0)
        phase.data.update(questions_per_image=1, max_digits=1)
        train(config, tmp_path / reference, say=lambda line: None)
        losses[reference] = [record["train/loss"] for record in records_of(tmp_path / reference)]
    np.testing.assert_allclose(losses["stored"], losses["adapter_off"], rtol=1e-5)
    # The adapter changes nothing yet, so both answers are as likely as under the reference.
    assert abs(losses["stored"][0] - np.log(2)) < 1e-5 and losses["stored"][-1] < losses["stored"][0] - 0.01
