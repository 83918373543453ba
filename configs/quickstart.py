"""A Phantom of some million parameters that learns to read handwritten numbers on two CPU cores.

A fresh machine has no pretrained weights, so pre-training comes before the published two steps: first single digits,
from which the tower learns to see, then whole numbers.

Variants:
  objective=po|sft  what the first published step trains with: Phantom optimisation, or SFT alone to compare with.
  smoke             a few steps of everything, to see that all parts work; learns nothing.
"""

from phantom_jax.config import default_config, default_phase, parse_arg
from phantom_jax.errors import InputError

OBJECTIVES = {"po": "phantom_optimization", "sft": "sft"}


def get_config(arg=None):
    """One run; `arg` picks variants."""
    variant = parse_arg(arg, objective="po", smoke=False)
    if variant.objective not in OBJECTIVES:
        raise InputError(f"Variant objective={variant.objective!r} does not exist; take po or sft.")

    config = default_config()
    config.model.name = "phantom-quickstart"
    config.processor = {"template": "qwen2", "tile_size": 32, "max_tiles": 6, "max_length": 128}

    optimizer = {"warmup_fraction": 0.03, "weight_decay": 0.05, "b2": 0.98, "clip_norm": 1.0}
    # Comparisons are learned last and are rare in the records: they are drawn more often.
    kinds = {"larger_digit": 2.0, "larger_row": 8.0, "parity": 1.5, "count": 0.5}
    # Gradients of the phantom branch carry its eta of 1e-4: at Adam's usual epsilon of 1e-8 they would be lost in it.
    phantom = {**optimizer, "eps": 1e-12}
    questions = {"questions_per_image": 4, "kind_weights": kinds}
    config.phases = (
        default_phase(
            "single_digits",
            data={**questions, "max_digits": 1},
            batch_size=32,
            steps=200,
            optimizer={**optimizer, "learning_rate": 1.5e-3, "schedule": "constant"},
        ),
        default_phase(
            "pretrain",
            data=questions,
            batch_size=24,
            steps=1000,
            optimizer={**optimizer, "learning_rate": 1.5e-3, "end_learning_rate": 1e-4},
        ),
        default_phase(
            "step_1",
            trainable=("projector/**", "language_model/**/phantom/**"),
            objective={"name": OBJECTIVES[variant.objective]},
            data=questions,
            batch_size=24,
            steps=60,
            optimizer={**phantom, "learning_rate": 3e-4, "end_learning_rate": 3e-5},
        ),
        default_phase(
            "step_2",
            data=questions,
            batch_size=24,
            steps=300,
            optimizer={**phantom, "learning_rate": 4e-4, "end_learning_rate": 1e-5},
        ),
    )
    config.validation.update(every=100, batch_size=24, images=120)
    config.checkpoint.update(every=100, keep=2)
    config.log_every = 10

    if variant.smoke:
        for phase in config.phases:
            phase.batch_size, phase.steps = 2, 2
        config.validation.update(every=2, batch_size=4, images=8)
        config.log_every = 1
    return config
