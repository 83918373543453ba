"""Phantom-7B: InternViT-300M-448px and internlm2_5-7b-chat, in the two steps of the paper.

Variants:
  method=full|lora|qlora        what step 2 trains: everything, or adapters of rank 256 on a float or a quantised base.
  base=int8|nf4                 the frozen base of qlora, in both steps.
  objective=po|sft|simpo|orpo   what step 1 trains with: Phantom optimisation, or another objective to compare with.
  smoke                         two steps of each on a tiny model and handwritten numbers.
"""

from phantom_jax.recipes import phantom


def get_config(arg=None):
    """One run; `arg` picks variants."""
    return phantom.recipe("7b", arg)
