"""What fewer bits cost: weights in int8 and NF4, keys and values in int8, on a trained model.

    python benchmarks/quantization.py --model=runs/quickstart/model --data_dir=runs/quickstart/data

For each way: bytes of the language model's layers, bytes of a cached token, the error of the logits at the tokens of
true answers (root mean square, as a share of the logits' standard deviation), how often the likeliest token is another
one, and exact match of generated answers.
"""

import argparse

import jax
import numpy as np

from phantom_jax.data.sources import open_records
from phantom_jax.evaluation.exact_match import answer_all, questions_of, score, spread
from phantom_jax.models.cache import empty_cache
from phantom_jax.ops.image import normalize_pixels
from phantom_jax.pretrained import load

WAYS = {
    "as stored": {},
    "int8 weights": {"quantize": "int8"},
    "NF4 weights": {"quantize": "nf4"},
    "int8 cache": {"int8_cache": True},
    "int8 weights, int8 cache": {"quantize": "int8", "int8_cache": True},
    "NF4 weights, int8 cache": {"quantize": "nf4", "int8_cache": True},
}


def answer_logits(vlm, questions, records) -> np.ndarray:
    """[tokens, V] float32, what predicts each token of the true answers; keys and values go through the cache."""
    model, processor, out = vlm.model, vlm.processor, []

    @jax.jit
    def logits(params, batch):
        config = model.config.language_model
        cache = empty_cache(config, *batch["token_ids"].shape, model.dtype, int8=vlm.int8_cache)
        batch = batch | {"pixels": normalize_pixels(batch["pixels"], processor.mean, processor.std)}
        variables = {"params": params}
        output = model.apply(variables, batch, rope_length=1, cache=cache, method="hidden_states")
        return model.apply(variables, output.hidden, method="logits")

    for question in questions:
        tiles = processor.encode_image(records[question.record].image)
        encoded = processor.encode_conversation([(question.question, question.truth)], [len(tiles)])
        length = len(encoded.token_ids)
        batch = {
            name: np.zeros((1, processor.max_length), np.int32) for name in ("token_ids", "positions", "segment_ids")
        }
        batch["image_slots"] = np.full((1, processor.max_length), -1, np.int32)
        batch["token_ids"][0, :length], batch["positions"][0, :length] = encoded.token_ids, np.arange(length)
        batch["segment_ids"][0, :length], batch["image_slots"][0, :length] = 1, encoded.image_slots
        pixels = np.zeros((1, processor.max_tiles + 1, *tiles.shape[1:]), np.uint8)
        pixels[0, : len(tiles)] = tiles
        predicted = logits(vlm.params, batch | {"pixels": pixels})
        out.append(np.asarray(predicted)[0, encoded.answer_start - 1 : length - 1])
    return np.concatenate(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--source", default="handwritten_numbers")
    parser.add_argument("--limit", type=int, default=None, help="questions to answer; all when not given")
    parser.add_argument("--logits", type=int, default=100, help="questions whose logits are compared")
    arguments = parser.parse_args()
    records = open_records(arguments.source, "test", arguments.data_dir)
    questions = spread(questions_of(records), arguments.limit)
    some = spread(questions, arguments.logits)
    exact = None
    print("| | layers, bytes | a cached token, bytes | logit error | other likeliest token | exact match |")
    print("|---|---|---|---|---|---|")
    for name, options in WAYS.items():
        vlm = load(arguments.model, **options)
        layers = [tree for key, tree in vlm.params["language_model"].items() if key.startswith("layers_")]
        cache = jax.eval_shape(
            lambda vlm=vlm: empty_cache(vlm.model.config.language_model, 1, 1, vlm.model.dtype, int8=vlm.int8_cache)
        )
        token = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
        logits = answer_logits(vlm, some, records)
        exact = logits if exact is None else exact
        error = np.sqrt(np.mean(np.square(logits - exact))) / exact.std()
        other = np.mean(np.argmax(logits, -1) != np.argmax(exact, -1))
        answers = answer_all(vlm, questions, records, batch_size=64, max_new_tokens=16)
        right, count = score(questions, answers)["all"]["all"]
        cells = [name, f"{sum(leaf.nbytes for leaf in jax.tree.leaves(layers)):,}", f"{token:,}"]
        cells += [f"{100 * error:.2f} %", f"{100 * other:.1f} %", f"{100 * right / count:.1f} %"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
