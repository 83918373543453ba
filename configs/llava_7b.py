"""LLaVA-7B: CLIP ViT-L/14 and Vicuna-7B, in two stages.

Variants:
  recipe=scaling|lightning|v1_5 the paper's, or one of the public scripts'.
  method=full|lora|qlora        what stage 2 trains beside the projector; v1_5 has no qlora.
  rank=64                       of the adapters; the recipe's own when not given.
  image=336|224                 pixels; the recipe's own when not given.
  mix=true|false                ShareGPT beside the instructions, with recipe=scaling. Default: false.
  smoke                         two steps of each on a tiny model and handwritten numbers.
"""

from phantom_jax.recipes import llava


def get_config(arg=None):
    """One run; `arg` picks variants."""
    return llava.recipe("7b", arg)
