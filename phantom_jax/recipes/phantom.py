"""Phantom's two steps (arXiv 2409.14713, section on training).

"The paper" marks what it states, "the public code" what its release shows, "ours" what neither says.
"""

import dataclasses
from typing import Any

from phantom_jax.config import LINEARS, default_config, default_phase, parse_arg
from phantom_jax.errors import InputError
from phantom_jax.recipes.variants import check_choice, make_smoke, steps_of

TRIPLES = 2_040_186
"""The paper and its data set: questions with a right and a wrong answer."""

OBJECTIVES = {"po": "phantom_optimization", "sft": "sft", "simpo": "simpo", "orpo": "orpo"}
METHODS = ("full", "lora", "qlora")
BASES = ("int8", "nf4")

PROJECTOR_AND_PHANTOM = ("projector/**", "language_model/**/phantom/**")
"""The paper: step 1 trains the projector, the cross attentions and the gate's linear maps."""

LINEARS_OF_BOTH = ("vision_tower/layers/**", *LINEARS)
"""The paper: adapters on all linear maps of vision encoder and language model. Neither embeddings nor head are meant:
ours, as it is the custom of such adapters."""


@dataclasses.dataclass(frozen=True)
class Size:
    """What differs between the sizes.

    Attributes:
      template: of the conversations.
      tiny: what makes the tiny model's decoder of the same kind.
    """

    template: str
    tiny: dict[str, Any]


SIZES = {
    "0.5b": Size("qwen2", {}),
    "1.8b": Size("internlm2", {"qkv_bias": False}),
    "3.8b": Size("phi3", {"qkv_bias": False, "num_kv_heads": 4}),
    "7b": Size("internlm2", {"qkv_bias": False}),
}


def recipe(size: str, arg: str | None) -> Any:
    """A run: step 1 aligns, step 2 instructs.

    Args:
      size: a key of `SIZES`.
      arg: variants, as the config files list them.

    Raises:
      InputError: a variant does not exist.
    """
    variant = parse_arg(arg, method="full", base="", objective="po", smoke=False)
    check_choice("method", variant.method, METHODS)
    check_choice("objective", variant.objective, OBJECTIVES)
    if variant.base:
        check_choice("base", variant.base, BASES)
    if variant.base and variant.method != "qlora":
        raise InputError(
            f"Variant base={variant.base} is of method=qlora, and the method is {variant.method}; leave base out, or"
            " take method=qlora."
        )

    config = default_config()
    # `weights` is what `convert --vision=InternViT-300M-448px --llm=...` writes: the parents, and what is new beside.
    # bfloat16 and gradient checkpointing: the paper. The attention backend: ours.
    config.model.update(
        name=f"phantom-{size}",
        weights=f"weights/phantom-{size}",
        dtype="bfloat16",
        attention_backend="chunked",
        remat="full",
    )
    # Tiles: the public code. The context: ours; an image takes up to 1,792 tokens of it.
    config.processor.update(template=SIZES[size].template, tile_size=448, max_tiles=6, max_length=4096)
    # The public code has a configuration of DeepSpeed's ZeRO-3.
    config.mesh.update(strategy="zero3", fsdp=-1)
    config.data.name = "phantom_triples"

    both = {
        # Data, one pass, batch and accumulation: the paper. It leaves open whether step 2 has the 2.0 M questions of
        # the triples or all 2.8 M gathered ones; ours: those of the triples, with their right answers.
        "data": {"sources": {"phantom_triples": 1.0}},
        "batch_size": 128,
        "accumulation": 4,
        "steps": steps_of(TRIPLES, 128),
        "optimizer": {
            # AdamW, cosine, 1e-5 to 1e-6: the paper, for both steps.
            "learning_rate": 1e-5,
            "end_learning_rate": 1e-6,
            "schedule": "cosine",
            # Ours, and so are the defaults of betas and clipping: the paper says nothing of any of them.
            "warmup_fraction": 0.0,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            # Ours: gradients of the phantom branch carry its eta of 1e-4, and 1e-8 would swallow them.
            "eps": 1e-12,
        },
    }
    if variant.method == "qlora":
        # A frozen language model of 8 bits in every step: the paper. NF4: ours.
        both["quantize"] = {"kind": variant.base or "int8", "patterns": LINEARS}
    adapted = {}
    if variant.method != "full":
        # Rank and alpha: the paper. No dropout: ours. It says both that all parameters are unfrozen and that adapters
        # train; ours: adapters, and in full what step 1 trains. Without a quantised base (lora): ours.
        adapted = {
            "trainable": PROJECTOR_AND_PHANTOM,
            "lora": {"rank": 256, "alpha": 256.0, "dropout": 0.0, "patterns": LINEARS_OF_BOTH},
        }
    config.phases = (
        # The paper: Phantom optimisation in this step alone. The tower stays frozen: it is not named as trained.
        default_phase(
            "step_1",
            trainable=PROJECTOR_AND_PHANTOM,
            objective={"name": OBJECTIVES[variant.objective]},
            **both,
        ),
        # The paper: everything trains, on right answers.
        default_phase("step_2", **{"trainable": ("**",), "objective": {"name": "sft"}, **both, **adapted}),
    )
    config.log_every = 10
    if variant.smoke:
        make_smoke(config, {"name": "phantom-quickstart", **SIZES[size].tiny}, max_length=128)
    return config
