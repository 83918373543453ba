"""Tiny language models of transformers, with random weights."""

import torch
import transformers

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 24,
}


def llama_config(**settings):
    return transformers.LlamaConfig(**_SIZES | settings)


def language_model(kind):
    """A model by kind: `llama`, `llama-linear`, `qwen2`, `qwen2-tied` or `phi3`."""
    if kind == "llama":
        return transformers.LlamaForCausalLM(llama_config())
    if kind == "llama-linear":
        rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
        return transformers.LlamaForCausalLM(llama_config(rope_parameters=rope))
    if kind.startswith("qwen2"):
        config = transformers.Qwen2Config(**_SIZES, tie_word_embeddings=kind == "qwen2-tied")
        return transformers.Qwen2ForCausalLM(config)
    config = transformers.Phi3Config(
        **_SIZES, original_max_position_embeddings=24, rope_parameters=LONGROPE, eos_token_id=2
    )
    return transformers.Phi3ForCausalLM(config)


def stir(model):
    """Biases and norms start constant, which would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
