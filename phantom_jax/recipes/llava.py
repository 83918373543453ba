"""LLaVA's two stages: those of the scaling study (arXiv 2309.09958) and of the public scripts.

"The paper" marks what the study states, "the public scripts" what the LLaVA repository has, "ours" what neither says.
"""

import dataclasses
from typing import Any

from phantom_jax.config import LINEARS, default_config, default_phase, parse_arg
from phantom_jax.errors import InputError
from phantom_jax.recipes.variants import check_choice, make_smoke, steps_of

# Of `rank`, whose default is the recipe's: a number that nobody gives.
_NOT_GIVEN = -(2**31)

SIZES = ("7b", "13b", "33b", "65b", "70b")

ROWS = {"llava_pretrain_558k": 558_128, "llava_instruct_80k": 80_000, "sharegpt": 40_000, "llava_v1_5_mix665k": 665_298}
"""Rows of the published files. How much of ShareGPT the paper mixed in is not published: ours, as much as v1.5 has."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Where the recipes differ.

    Attributes:
      sizes, methods, images: what exists; the first image size is the default.
      projector: its kind.
      image_mode: of stage 2; stage 1 crops.
      stage_1_batch, stage_1_rate: rows of a step and learning rate of stage 1.
      data: data set of stage 2.
      full_batch, full_rate: of stage 2 where all of the language model trains.
      lora_batch, lora_rate: of stage 2 with adapters.
      rank: of an adapter, by default.
      alpha: of an adapter; None is twice the rank.
      projector_rate: learning rate of the projector beside adapters; None is theirs.
    """

    sizes: tuple[str, ...]
    methods: tuple[str, ...]
    images: tuple[int, ...]
    projector: str
    image_mode: str
    stage_1_batch: int
    stage_1_rate: float
    data: str
    full_batch: int
    full_rate: float
    lora_batch: int
    lora_rate: float
    rank: int
    alpha: float | None
    projector_rate: float | None


RECIPES = {
    # Batches of stage 2, its learning rates, 336 pixels (table 4), rank 64 and alpha of twice the rank: the paper. The
    # batch of stage 1 and the learning rate for 7B and 13B: the public scripts; see `_stage_1` for the larger ones.
    # Images are cropped: that was the public default then, and the paper does not say.
    "scaling": Recipe(
        sizes=SIZES,
        methods=("full", "lora", "qlora"),
        images=(336, 224),
        projector="linear",
        image_mode="crop",
        stage_1_batch=128,
        stage_1_rate=2e-3,
        data="llava_instruct_80k",
        full_batch=512,
        full_rate=2e-5,
        lora_batch=64,
        lora_rate=1e-4,
        rank=64,
        alpha=None,
        projector_rate=None,
    ),
    # All of it: the public scripts of May to October 2023. Their adapters are the weak ones that the paper warns of.
    "lightning": Recipe(
        sizes=("7b", "13b"),
        methods=("full", "lora", "qlora"),
        images=(224, 336),
        projector="linear",
        image_mode="crop",
        stage_1_batch=128,
        stage_1_rate=2e-3,
        data="llava_instruct_80k",
        full_batch=128,
        full_rate=2e-5,
        lora_batch=128,
        lora_rate=2e-5,
        rank=64,
        alpha=16.0,
        projector_rate=None,
    ),
    # All of it: the public scripts of LLaVA v1.5.
    "v1_5": Recipe(
        sizes=("7b", "13b"),
        methods=("full", "lora"),
        images=(336,),
        projector="mlp2x_gelu",
        image_mode="pad",
        stage_1_batch=256,
        stage_1_rate=1e-3,
        data="llava_v1_5_mix665k",
        full_batch=128,
        full_rate=2e-5,
        lora_batch=128,
        lora_rate=2e-4,
        rank=128,
        alpha=256.0,
        projector_rate=2e-5,
    ),
}

OPTIMIZER = {
    # AdamW's betas and epsilon: the public scripts, which take the defaults of their library.
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    # The paper in stage 1, the public scripts in both: no weight decay, and a warm-up over 3 % of the steps.
    "weight_decay": 0.0,
    "warmup_fraction": 0.03,
    "end_learning_rate": 0.0,
    # The public scripts' DeepSpeed files do not clip.
    "clip_norm": 0.0,
}


def recipe(size: str, arg: str | None) -> Any:
    """A run: stage 1 aligns the projector, stage 2 instructs.

    Args:
      size: one of `SIZES`.
      arg: variants, as the config files list them.

    Raises:
      InputError: a variant does not exist.
    """
    # The paper has 70B with mixed data alone.
    variant = parse_arg(arg, method="full", rank=_NOT_GIVEN, image=0, mix=size == "70b", recipe="scaling", smoke=False)
    check_choice("recipe", variant.recipe, RECIPES)
    chosen = RECIPES[variant.recipe]
    _check(size, variant, chosen)
    image = variant.image or chosen.images[0]

    config = default_config()
    # `weights` is what `convert --vision=... --llm=...` writes: tower, language model and a new projector.
    # bfloat16 and gradient checkpointing: the public scripts. The attention backend: ours.
    config.model.update(
        name=f"llava-{size}",
        weights=f"weights/llava-v1.5-{size}" if variant.recipe == "v1_5" else f"weights/llava-{size}-{image}",
        dtype="bfloat16",
        attention_backend="chunked",
        remat="full",
    )
    config.model.image_size, config.model.projector = image, chosen.projector
    if variant.recipe == "v1_5":
        # Vicuna v1.5 is made of LLaMA-2.
        config.model.update(norm_epsilon=1e-5, rope={"max_length": 4096})
    # The context of 2,048 tokens: the paper. Templates: those of the public code for these language models.
    template = "llava_llama_2" if size == "70b" else "vicuna_v1"
    config.processor.update(template=template, tile_size=image, max_tiles=1, max_length=2048)
    # The paper: ZeRO-3, and ZeRO-2 for QLoRA. The public scripts take ZeRO-2 for lightning's adapters too, and for
    # stage 1 of v1.5; a run has one mesh, and what it computes is the same.
    replicated = variant.method == "qlora" or (variant.recipe == "lightning" and variant.method == "lora")
    config.mesh.update(strategy="zero2" if replicated else "zero3", fsdp=-1)
    config.data.name = "llava_pretrain_558k"
    config.phases = (_stage_1(size, variant, chosen), _stage_2(variant, chosen))
    # Stage 2 of the paper is 157 steps long.
    config.checkpoint.every = 100
    if variant.smoke:
        tiny = {"name": "llava-tiny", "projector": chosen.projector, "num_kv_heads": 1 if size == "70b" else 4}
        make_smoke(config, tiny, max_length=384)
    return config


def _check(size: str, variant: Any, chosen: Recipe) -> None:
    check_choice("method", variant.method, ("full", "lora", "qlora"))
    if variant.image:
        check_choice("image", variant.image, (224, 336))
    if size not in chosen.sizes:
        raise InputError(
            f"Variant recipe={variant.recipe} does not exist for {size}: it was published for"
            f" {' and '.join(chosen.sizes)}. Take recipe=scaling, the paper's."
        )
    if variant.method not in chosen.methods:
        raise InputError(
            f"Variant recipe={variant.recipe},method={variant.method} does not exist. The nearest is"
            f" recipe={variant.recipe},method=lora; there are: {', '.join(chosen.methods)}."
        )
    if variant.image and variant.image not in chosen.images:
        raise InputError(
            f"Variant recipe={variant.recipe},image={variant.image} does not exist: take image={chosen.images[0]}."
        )
    if variant.mix and variant.recipe != "scaling":
        raise InputError(
            f"Variant recipe={variant.recipe},mix=true does not exist: mixing is of recipe=scaling. Leave mix out."
        )
    if variant.rank != _NOT_GIVEN and variant.method == "full":
        raise InputError(
            f"Variant rank={variant.rank} is of an adapter, and the method is full; leave rank out, or take method=lora"
            " or method=qlora."
        )
    if variant.rank < 1 and variant.rank != _NOT_GIVEN:
        raise InputError(f"Variant rank={variant.rank} does not exist: it must be 1 or larger.")


def _stage_1(size: str, variant: Any, chosen: Recipe) -> Any:
    """Trains the projector on captions; one pass."""
    rate, schedule = chosen.stage_1_rate, "cosine"
    if variant.recipe == "scaling" and size not in ("7b", "13b"):
        # The paper, for 33B and 65B; for 70B: ours.
        rate, schedule = 1e-4, "linear"
    return default_phase(
        "stage_1",
        trainable=("projector/**",),
        data={"sources": {"llava_pretrain_558k": 1.0}, "template": "plain", "image_mode": "crop"},
        batch_size=chosen.stage_1_batch,
        steps=steps_of(ROWS["llava_pretrain_558k"], chosen.stage_1_batch),
        optimizer={**OPTIMIZER, "learning_rate": rate, "schedule": schedule},
        quantize=_base(variant),
    )


def _stage_2(variant: Any, chosen: Recipe) -> Any:
    """Trains language model, or adapters of it, and projector on instructions; one pass."""
    names = [chosen.data, *(["sharegpt"] if variant.mix else [])]
    rows = sum(ROWS[name] for name in names)
    data = {"sources": {name: ROWS[name] / rows for name in names}, "image_mode": chosen.image_mode}
    # The paper does not give this stage's schedule: that of the public scripts.
    optimizer = {**OPTIMIZER, "schedule": "cosine"}
    if variant.method == "full":
        return default_phase(
            "stage_2",
            trainable=("projector/**", "language_model/**"),
            data=data,
            batch_size=chosen.full_batch,
            steps=steps_of(rows, chosen.full_batch),
            optimizer={**optimizer, "learning_rate": chosen.full_rate},
        )
    rank = chosen.rank if variant.rank == _NOT_GIVEN else variant.rank
    alpha = chosen.alpha or 2.0 * rank
    groups = ()
    if chosen.projector_rate is not None:
        groups = ({"patterns": ("projector/**",), "learning_rate": chosen.projector_rate},)
    return default_phase(
        "stage_2",
        trainable=("projector/**",),
        data=data,
        batch_size=chosen.lora_batch,
        steps=steps_of(rows, chosen.lora_batch),
        optimizer={**optimizer, "learning_rate": chosen.lora_rate},
        groups=groups,
        # All seven linear maps of each layer: follows from the paper's counts of trainable parameters. Dropout: the
        # public scripts.
        lora={"rank": rank, "alpha": alpha, "dropout": 0.05, "patterns": LINEARS},
        quantize=_base(variant),
    )


def _base(variant: Any) -> dict[str, Any]:
    # NF4 with double quantisation: the public scripts. That stage 1 has this base too is ours: where parameters are
    # replicated, the float ones of 65B do not fit a device.
    return {"kind": "nf4" if variant.method == "qlora" else "none", "patterns": LINEARS}
