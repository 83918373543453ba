"""LLaVA-65B: CLIP ViT-L/14 and Vicuna-65B, in two stages.

Variants:
  method=full|lora|qlora  what stage 2 trains beside the projector.
  rank=64                 of the adapters.
  image=336|224           pixels.
  mix=true|false          ShareGPT beside the instructions. Default: false.
  smoke                   two steps of each on a tiny model and handwritten numbers.
"""

from phantom_jax.recipes import llava


def get_config(arg=None):
    """One run; `arg` picks variants."""
    return llava.recipe("65b", arg)
