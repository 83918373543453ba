"""The same function as the reference implementations, on every folder of golden numbers."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from phantom_jax.batch import IGNORE
from phantom_jax.checkpoints import hf
from phantom_jax.generation.settings import Settings
from phantom_jax.models.vlm import VisionLanguageModel
from phantom_jax.trees import flatten
from tests.generation.run import run, unrolled

ROOT = pathlib.Path(os.environ.get("PHANTOM_JAX_GOLDEN") or pathlib.Path(__file__).parent / "golden")
FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/golden.npz"))
TOLERANCE = 2e-4


class Golden:
    """One folder: its numbers, and its weights through the loader."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.numbers = dict(np.load(folder / "golden.npz"))
        self.checkpoint = hf.load(folder)
        self.model = VisionLanguageModel(self.checkpoint.config, keep_layer_inputs=True)
        self.params = jax.tree.map(jnp.asarray, self.checkpoint.params)
        self.image_token = self.checkpoint.tokens.image

    def batch(self, kind: str) -> dict[str, jax.Array]:
        """The inputs of `text`, `image` or `train` as a batch."""
        ids, mask = self.numbers[f"{kind}_input_ids"], self.numbers[f"{kind}_attention_mask"].astype(bool)
        batch = {
            "token_ids": np.where(mask, ids, 0),
            "positions": np.maximum(np.cumsum(mask, axis=1) - 1, 0),
            "segment_ids": mask,
        }
        pixels = self.numbers.get(f"{kind}_pixel_values")
        if pixels is not None:
            tiles = self.numbers.get(f"{kind}_tiles", self.numbers.get(f"{kind}_has_image"))
            tiles = np.ones(len(ids), int) if tiles is None else tiles.astype(int)
            stacked = np.zeros((len(ids), max(tiles.max(), 1), *pixels.shape[2:], pixels.shape[1]), np.float32)
            first = 0
            for row, count in enumerate(tiles):
                stacked[row, :count] = pixels[first : first + count].transpose(0, 2, 3, 1)
                first += count
            assert first == len(pixels)
            is_image = (ids == self.image_token) & mask & (tiles > 0)[:, None]
            batch["image_slots"] = np.where(is_image, np.cumsum(is_image, axis=1) - 1, -1)
            batch["pixels"] = stacked
        return {
            name: jnp.asarray(value, jnp.float32 if name == "pixels" else jnp.int32) for name, value in batch.items()
        }

    def rope_length(self, kind: str, new_tokens: int = 0) -> int:
        return int(self.numbers[f"{kind}_attention_mask"].sum(axis=1).max()) + new_tokens

    def apply(self, batch, kind, method):
        return self.model.apply({"params": self.params}, batch, rope_length=self.rope_length(kind), method=method)

    def compare_answers(self, kind, expected, settings):
        """Answers token for token, up to their end; what follows an end in the reference is padding."""
        tokens, lengths = run(
            *unrolled(self.model, self.params),
            self.batch(kind),
            settings,
            eos=self.checkpoint.tokens.eos,
            rope_length=self.rope_length(kind, settings.max_new_tokens),
        )
        for mine, length, theirs in zip(tokens[:, 0], lengths[:, 0], expected.tolist(), strict=True):
            ends = [i + 1 for i, token in enumerate(theirs) if token in self.checkpoint.tokens.eos]
            stop = ends[0] if ends else len(theirs)
            assert mine[:length].tolist() == theirs[:stop]

    def train_batch(self) -> dict[str, jax.Array]:
        labels = self.numbers["train_labels"]
        targets = np.full_like(labels, IGNORE)
        targets[:, :-1] = labels[:, 1:]
        return self.batch("train") | {"targets": jnp.asarray(targets, jnp.int32)}


@pytest.fixture(scope="module", params=FOLDERS)
def golden(request):
    return Golden(ROOT / request.param)


def close_where_real(ours, theirs, mask):
    mask = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(ours)[mask], theirs[mask], rtol=0, atol=TOLERANCE)


def test_there_are_golden_folders():
    assert FOLDERS, f"no golden folders in {ROOT}"


def test_text_logits(golden):
    logits = golden.apply(golden.batch("text"), "text", None)
    close_where_real(logits, golden.numbers["text_logits"], golden.numbers["text_attention_mask"])


def test_hidden_states(golden):
    expected = [golden.numbers[f"text_hidden_{i}"] for i in range(100) if f"text_hidden_{i}" in golden.numbers]
    output = golden.apply(golden.batch("text"), "text", "hidden_states")
    ours = [*output.layer_inputs, output.hidden]
    assert not expected or len(ours) == len(expected)
    for mine, theirs in zip(ours, expected, strict=False):
        close_where_real(mine, theirs, golden.numbers["text_attention_mask"])


def test_vision_and_projector(golden):
    pixels = jnp.asarray(golden.numbers["image_pixel_values"].transpose(0, 2, 3, 1))
    features = golden.model.apply({"params": golden.params}, pixels[:, None], method="image_features")
    np.testing.assert_allclose(features, golden.numbers["image_features"], rtol=0, atol=TOLERANCE)
    if "image_vision_last_hidden" in golden.numbers:
        hidden = golden.model.apply(
            {"params": golden.params}, pixels, method=lambda model, images: model.vision_tower(images)
        )
        np.testing.assert_allclose(hidden, golden.numbers["image_vision_last_hidden"], rtol=0, atol=TOLERANCE)


def test_image_logits(golden):
    logits = golden.apply(golden.batch("image"), "image", None)
    close_where_real(logits, golden.numbers["image_logits"], golden.numbers["image_attention_mask"])


@pytest.mark.parametrize("kind", ["text", "image"])
def test_greedy_generation(golden, kind):
    expected = golden.numbers[f"{kind}_generate"]
    golden.compare_answers(kind, expected, Settings(max_new_tokens=16))


def test_beam_search(golden):
    golden.compare_answers("text", golden.numbers["text_beam5"], Settings(max_new_tokens=10, num_beams=5))


def test_train_loss_and_sequence_log_probabilities(golden):
    batch = golden.train_batch()
    scores = golden.apply(batch, "train", "score")
    lengths = np.asarray((batch["targets"] != IGNORE).sum(axis=1))
    np.testing.assert_array_equal(lengths, golden.numbers["train_sequence_length"])
    sums = np.asarray(scores.log_probs.sum(axis=1))
    np.testing.assert_allclose(sums, golden.numbers["train_sequence_logprob"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(-sums.sum() / lengths.sum(), golden.numbers["train_loss"], rtol=0, atol=1e-5)


def test_every_gradient(golden):
    batch = golden.train_batch()
    count = float((batch["targets"] != IGNORE).sum())

    def loss(params):
        scores = golden.model.apply({"params": params}, batch, rope_length=golden.rope_length("train"), method="score")
        return -scores.log_probs.sum() / count

    gradients = jax.jit(jax.grad(loss))(golden.params)
    flat = {path: np.asarray(leaf) for path, leaf in flatten({"params": gradients}).items()}
    expected, compared, wrong = load_file(golden.folder / "grads.safetensors"), set(), []
    for row in hf.table(golden.checkpoint.config, golden.checkpoint.published):
        if row.paths[0].startswith("unused/"):
            continue
        for tensor in hf.row_tensors(row, [flat[path] for path in row.paths]):
            name = tensor.name
            assert name in expected, f"the reference has no gradient for {name}"
            ours = np.concatenate([block() for block in tensor.blocks()]).reshape(tensor.shape)
            theirs = expected[name]
            compared.add(name)
            norm = np.linalg.norm(theirs)
            error = np.linalg.norm(ours - theirs)
            good = np.linalg.norm(ours) < 1e-6 if norm < 1e-7 else error <= 1e-3 * norm
            if not good:
                wrong.append((name, float(error), float(norm)))
    assert compared == set(expected)
    assert not wrong
