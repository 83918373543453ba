"""Axis letters and logical axis names, defined once.

Hot code suffixes arrays with axis letters, `q_BLNH` for instance:
B batch, L length, S key length, I tiles per row, P patches or image tokens of a tile, D embed, N query heads,
K key-value heads, G query heads per key-value head, H head dim, F mlp, V vocab, R LoRA rank.

The logical names below stand on every parameter; a rules table maps them to mesh axes.
"""

LAYERS = "layers"
EMBED = "embed"
HEADS = "heads"
KV_HEADS = "kv_heads"
HEAD_DIM = "head_dim"
# The phantom linears map head_dim to head_dim: the second axis needs a name of its own.
HEAD_DIM_OUT = "head_dim_out"
MLP = "mlp"
VOCAB = "vocab"
NORM = "norm"
# The patch kernel has two sides of equal length; a name stands once in a parameter.
PATCH_ROW = "patch_row"
PATCH_COLUMN = "patch_column"
POSITION = "position"
CHANNELS = "channels"
VISION_EMBED = "vision_embed"
VISION_HEADS = "vision_heads"
VISION_MLP = "vision_mlp"
PROJECTOR_IN = "projector_in"
LORA_RANK = "lora_rank"

# Activations at block boundaries.
ACTIVATION_BATCH = "activation_batch"
ACTIVATION_LENGTH = "activation_length"
ACTIVATION_EMBED = "activation_embed"
# Tiles of all rows together, as the vision tower sees them.
ACTIVATION_TILES = "activation_tiles"
