"""Tokens per second of decoding: ours, and four others, in one run.

Random weights, one batch of random prompts, every way on the same machine in turns, so that a machine whose speed
drifts slows all of them. Ours is the compiled loop of phantom_jax/generation; the others are

  plain         the same decoder without the phantom dimension;
  recomputed    the phantom keys and values of all old tokens computed again for every new token, with the key-value
                heads repeated first, as the official code does it (same weights, and the same tokens come out);
  transformers  its Qwen2 (LLaMA for other sizes) with its own cache, PyTorch's fused attention, same dtype.

    python benchmarks/decode.py                                   # 0.5B, float32, CPU, contexts of 512 and 1,900
    python benchmarks/decode.py --size=7b --dtype=bfloat16 --batch=1 --batch=32      # on a GPU
    python benchmarks/decode.py --size=tiny --rounds=2            # does everything in seconds

transformers needs torch: launch/test.sh --parity installs it. With an accelerator of known memory bandwidth the table
also gives the share of the roofline: bytes of weights and cache that a token must read, by bandwidth and time.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from phantom_jax.generation import decode
from phantom_jax.generation.controls import controls
from phantom_jax.generation.prefix import first_token_states
from phantom_jax.generation.settings import Settings
from phantom_jax.generation.slots import left_padded
from phantom_jax.models.cache import empty_cache
from phantom_jax.models.decoder import DecoderConfig
from phantom_jax.models.phantom import PhantomConfig
from phantom_jax.models.projector import ProjectorConfig
from phantom_jax.models.vision_tower import VisionTowerConfig
from phantom_jax.models.vlm import VisionLanguageConfig, VisionLanguageModel
from phantom_jax.models.zoo import MODELS
from phantom_jax.ops import norm, rope
from phantom_jax.ops.attention import attention
from phantom_jax.ops.structure import Structure

# Bytes a second of the memory of accelerators, from their data sheets; other cards of a family have other figures.
BANDWIDTH = {"NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H200": 4.8e12, "NVIDIA A100-SXM4-80GB": 2.04e12}
FIRST_TOKEN = 5
TINY = DecoderConfig(512, 64, 2, 4, 2, 16, 128, 1e-6, qkv_bias=True)


def sizes(name: str) -> DecoderConfig:
    """The decoder of a Phantom."""
    if name == "tiny":
        return dataclasses.replace(TINY, phantom=PhantomConfig())
    return MODELS[f"phantom-{name}"].language_model


def build(config: DecoderConfig, dtype) -> tuple[VisionLanguageModel, dict]:
    """A model with random weights in `dtype`; its tower is a token one, since nothing here sees an image."""
    tower = VisionTowerConfig(embed_dim=8, num_layers=1, num_heads=1, mlp_dim=8, patch_size=2, image_size=4)
    whole = VisionLanguageConfig(tower, ProjectorConfig("linear", 8, config.embed_dim), config)
    model = VisionLanguageModel(whole, dtype, scan_layers=False)
    one = jnp.ones((1, 1), jnp.int32)
    batch = {"token_ids": one, "positions": one, "segment_ids": one}
    shapes = meta.unbox(jax.eval_shape(lambda key: model.init(key, batch, rope_length=1), jax.random.key(0)))["params"]
    leaves, structure = jax.tree.flatten(shapes)
    make = jax.jit(lambda key, shape: (0.02 * jax.random.normal(key, shape)).astype(dtype), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [make(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return model, jax.tree.unflatten(structure, made)


class Ours:
    """The compiled loop; each call goes on where the last one ended."""

    def __init__(self, model, params, prompts: np.ndarray, slots: int):
        self.model, self.params = model, params
        rows, length = prompts.shape
        config = model.config.language_model
        states = None
        if config.phantom is not None:
            states = first_token_states(model, params, np.int32(FIRST_TOKEN))
        cache = empty_cache(config, rows, length + slots, model.dtype)
        self.controls = controls(
            Settings(), max_new_tokens=np.full(rows, slots), end_ids=(), pad_id=0, prompt_tokens=None
        )
        batch = left_padded(list(prompts), [0] * rows, length=length)
        self.state = decode.start(
            model,
            params,
            cache,
            states,
            batch,
            None,
            self.controls,
            branches=1,
            beam_search=False,
            new_slots=slots,
            rope_length=1,
        )
        self.length = 1

    def __call__(self, count: int) -> None:
        self.length += count
        self.state = decode.advance(
            self.model, self.params, self.state, self.controls, np.int32(self.length), rope_length=1
        )
        jax.block_until_ready(self.state.tokens)

    def tokens(self) -> np.ndarray:
        return np.array(self.state.tokens)[:, 0, : self.length]


class Recomputed:
    """The same function with a cache of plain keys and values alone."""

    def __init__(self, model, params, prompts: np.ndarray, slots: int):
        self.config, self.dtype, self.params = model.config.language_model, model.dtype, params["language_model"]
        rows, length = prompts.shape
        shape = (rows, length + slots, self.config.num_kv_heads, self.config.head_dim)
        self.cache = [tuple(jnp.zeros(shape, self.dtype) for _ in range(2)) for _ in range(self.config.num_layers)]
        self.sos = [None] * self.config.num_layers
        token, self.cache, self.sos = self.forward(self.params, jnp.asarray(prompts), self.cache, self.sos, 0)
        self.out = [np.array(token)]
        self.token, self.length = token, length

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
    def forward(self, params, ids, cache, sos, start):
        config = self.config
        rows, length = ids.shape
        slots = cache[0][0].shape[1]
        groups = config.num_heads // config.num_kv_heads
        positions = jnp.broadcast_to(start + jnp.arange(length)[None], (rows, length))
        cosine, sine = rope.angles(positions, *rope.frequencies(config.rope, config.head_dim, 1))
        at = jnp.broadcast_to(jnp.arange(slots)[None], (rows, slots))
        keys_at = Structure(at, (at < start + length).astype(jnp.int32), jnp.zeros_like(at))
        queries_at = Structure(positions, jnp.ones_like(positions), jnp.zeros_like(positions))
        x = params["embedding"][ids]
        after, states = [], []
        for index in range(config.num_layers):
            weights = params[f"layers_{index}"]
            attend = weights["attention"]
            y = norm.rms_norm(x, weights["norm_1"]["scale"], config.norm_epsilon)

            def project(name, y=y, attend=attend):
                out = jnp.einsum("bld,dnh->blnh", y, attend[name]["kernel"])
                return out + attend[name]["bias"][None, None] if config.qkv_bias else out

            query = rope.rotate(project("query"), cosine, sine)
            new = rope.rotate(project("key"), cosine, sine), project("value")
            key, value = (
                jax.lax.dynamic_update_slice_in_dim(old, one, start, axis=1)
                for old, one in zip(cache[index], new, strict=True)
            )
            after.append((key, value))
            key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
            states.append(sos[index] or (query[:, :1], key[:, :1], value[:, :1]))
            phantom, eta = attend["phantom"], config.phantom.eta
            y_query, y_key, y_value = (
                _cross_attention(x, state, phantom[name])
                for x, state, name in zip((query, key, value), states[-1], ("query", "key", "value"), strict=True)
            )
            out = attention(
                jnp.concatenate([query, eta * y_query], axis=-1),
                jnp.concatenate([key, eta * y_key], axis=-1),
                jnp.concatenate([value, value + eta * y_value], axis=-1),
                scale=config.head_dim**-0.5,
                query_structure=queries_at,
                key_structure=keys_at,
            )
            first, second = jnp.split(out, 2, axis=-1)
            one, other = (
                jnp.einsum("blnh,h->bln", part, phantom[gate]["kernel"]) + phantom[gate]["bias"]
                for part, gate in ((first, "gate_plain"), (second, "gate_phantom"))
            )
            weight = jax.nn.sigmoid(one - other)[..., None]
            out = (weight * first + (1 - weight) * second).astype(self.dtype)
            x = x + jnp.einsum("blnh,nhd->bld", out, attend["out"]["kernel"])
            y = norm.rms_norm(x, weights["norm_2"]["scale"], config.norm_epsilon)
            hidden = jax.nn.silu(y @ weights["gate"]["kernel"]) * (y @ weights["up"]["kernel"])
            x = x + hidden @ weights["down"]["kernel"]
        x = norm.rms_norm(x[:, -1], params["final_norm"]["scale"], config.norm_epsilon)
        return jnp.argmax(x @ params["head"]["kernel"], axis=-1).astype(jnp.int32), after, states

    def __call__(self, count: int) -> None:
        for _ in range(count):
            self.token, self.cache, self.sos = self.forward(
                self.params, self.token[:, None], self.cache, self.sos, jnp.int32(self.length)
            )
            self.length += 1
            self.out.append(np.array(self.token))

    def tokens(self) -> np.ndarray:
        return np.stack(self.out, axis=1)


def _cross_attention(x, sos, weights):
    """Each head over the heads of the sos token, all four linears with their GELU."""
    gelu = functools.partial(jax.nn.gelu, approximate=False)
    a, b, c = (
        gelu(jnp.einsum("blnh,hd->blnd", y, weights[name]))
        for y, name in ((x, "linear_q"), (sos, "linear_k"), (sos, "linear_v"))
    )
    scores = jax.nn.softmax(jnp.einsum("blnd,bgd->blng", a, b[:, 0]) * x.shape[-1] ** -0.5, axis=-1)
    return gelu(jnp.einsum("blnd,de->blne", jnp.einsum("blng,bgd->blnd", scores, c[:, 0]), weights["linear_o"]))


class Transformers:
    """transformers' decoder of the same size, its own cache, one greedy token a call of the model."""

    def __init__(self, config: DecoderConfig, prompts: np.ndarray, dtype: str, device: str):
        import torch
        import transformers

        self.torch = torch
        common = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.embed_dim,
            "intermediate_size": config.mlp_dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": 32_768,
            "attn_implementation": "sdpa",
            "dtype": getattr(torch, dtype),
        }
        family = "Qwen2" if config.qkv_bias else "Llama"
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**common))
        self.model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
        with torch.no_grad():
            out = self.model(input_ids=torch.as_tensor(prompts, device=device), use_cache=True, logits_to_keep=1)
        self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def __call__(self, count: int) -> None:
        with self.torch.no_grad():
            for _ in range(count):
                out = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)
                self.token = out.logits[:, -1:].argmax(-1)
            self.token.cpu()


def bytes_per_step(model, params, rows: int, slots: int) -> int:
    """What a step must read: all weights of the decoder but the embedding, and the cache."""
    config = model.config.language_model
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params["language_model"]))
    weights -= 0 if config.tie_embeddings else params["language_model"]["embedding"].nbytes
    cache = jax.eval_shape(lambda: empty_cache(config, rows, slots, model.dtype))
    return weights + sum(leaf.size * leaf.dtype.itemsize for layer in cache.layers for leaf in jax.tree.leaves(layer))


def measure(config, dtype: str, rows: int, context: int, rounds: int, peer: bool, recompute: bool, count: int):
    """Median seconds a token of each way, and the share of the roofline where the device is known."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(10, config.vocab_size, (rows, context)).astype(np.int32)
    prompts[:, 0] = FIRST_TOKEN
    slots = count * (rounds + 1) + 1
    model, params = build(config, jnp.dtype(dtype))
    ways = {"ours": Ours(model, params, prompts, slots)}
    plain = dataclasses.replace(config, phantom=None)
    bare = {
        name: {**leaf, "attention": {k: v for k, v in leaf["attention"].items() if k != "phantom"}}
        if name.startswith("layers_")
        else leaf
        for name, leaf in params["language_model"].items()
    }
    without = model.clone(config=dataclasses.replace(model.config, language_model=plain))
    ways["plain"] = Ours(without, {**params, "language_model": bare}, prompts, slots)
    if recompute:
        ways["recomputed"] = Recomputed(model, params, prompts, slots)
    if peer:
        device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        ways["transformers"] = Transformers(plain, prompts, dtype, device)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            # The slow one decodes fewer tokens a round; its time is by token too.
            tokens = max(1, count // 8) if name == "recomputed" else count
            began = time.perf_counter()
            way(tokens)
            if round_number:  # the first one compiles
                times[name].append((time.perf_counter() - began) / tokens)
    if recompute:
        theirs = ways["recomputed"].tokens()
        same = (ways["ours"].tokens()[:, : theirs.shape[1]] == theirs).mean()
        print(f"tokens that ours and recomputed agree in: {100 * same:.1f} %", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    bandwidth = BANDWIDTH.get(jax.devices()[0].device_kind)
    share = None
    if bandwidth:
        # Half of the answers' slots are filled on average.
        share = bytes_per_step(model, params, rows, context + slots // 2) / bandwidth / medians["ours"]
    return medians, share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["tiny", "0.5b", "1.8b", "3.8b", "7b"], default="0.5b")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, action="append", help="rows; may be given several times")
    parser.add_argument("--context", type=int, action="append", help="tokens before the first new one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16, help="new tokens a round")
    parser.add_argument("--no_peer", action="store_true", help="leave transformers out")
    parser.add_argument("--no_recomputed", action="store_true", help="leave the official way out")
    arguments = parser.parse_args()
    config = sizes(arguments.size)
    print(f"{arguments.size}, {arguments.dtype}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("| context | batch | ours tokens/s | recomputed / ours | plain / ours | transformers / ours | roofline |")
    print("|---|---|---|---|---|---|---|")
    for context in arguments.context or [512, 1900]:
        for rows in arguments.batch or [1]:
            medians, share = measure(
                config,
                arguments.dtype,
                rows,
                context,
                arguments.rounds,
                not arguments.no_peer,
                not arguments.no_recomputed,
                arguments.tokens,
            )
            ours = medians["ours"]

            def ratio(name, medians=medians, ours=ours):
                return f"{medians[name] / ours:.2f}" if name in medians else "not measured"

            cells = [f"{context:,}", str(rows), f"{rows / ours:.1f}"]
            cells += [ratio(name) for name in ("recomputed", "plain", "transformers")]
            cells.append(f"{100 * share:.0f} %" if share else "not measured")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
