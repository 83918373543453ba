"""A phase with low-rank factors against PEFT on the same model: loss, gradients, and what is written after it."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from phantom_jax import objectives
from phantom_jax.batch import IGNORE
from phantom_jax.checkpoints import adapter_folder, hf
from phantom_jax.config import OPTIMIZER
from phantom_jax.conversion import convert
from phantom_jax.lora import Lora
from phantom_jax.models.linears import match_linears
from phantom_jax.models.vlm import VisionLanguageModel
from phantom_jax.training.adapters import adapter_of
from phantom_jax.training.optimizer import make_optimizer
from phantom_jax.training.state import merge, split, start_phase
from phantom_jax.training.step import make_train_step
from phantom_jax.trees import flatten
from tests.parity.peft_test import batch_of, llava

ANSWER = 6


def supervised(theirs, ours):
    """Both batches with the last tokens of the row as the answer."""
    ids = np.asarray(ours["token_ids"])
    labels = np.where(np.arange(ids.shape[1]) >= ids.shape[1] - ANSWER, ids, IGNORE)
    targets = np.full_like(ids, IGNORE)
    targets[:, :-1] = labels[:, 1:]
    slots = (targets != IGNORE).astype(np.int32)
    ours = ours | {
        "targets": jnp.asarray(targets),
        "sft_mask": jnp.asarray(slots == 1),
        "answer_slots": jnp.asarray(slots),
        "row_ids": jnp.zeros(1, jnp.int32),
    }
    return theirs | {"labels": torch.tensor(np.where(labels == IGNORE, -100, labels), dtype=torch.long)}, ours


@pytest.fixture(scope="module")
def trained(golden, tmp_path_factory):
    """Two steps of ours, the adapter written, and PEFT's own reading of it."""
    base = hf.load(golden / "llava-hf")
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), base.params)
    kernels = match_linears(("language_model/**",), flatten(params), what="patterns")
    lora = Lora(tuple(sorted(kernels)), rank=4, alpha=8.0)
    theirs, ours = supervised(*batch_of(base.config, base.tokens.image))
    model = VisionLanguageModel(base.config)

    def score(params, batch):
        return model.apply({"params": params}, batch, rope_length=batch["token_ids"].shape[1], method="score")

    settings = OPTIMIZER | {"learning_rate": 3e-2, "schedule": "constant"}
    optimizer = make_optimizer(
        settings, merge(split(params, ("projector/**",))[0], lora.init(params, jax.random.key(0))), steps=2
    )
    state = start_phase(
        params,
        patterns=("projector/**",),
        init_optimizer=optimizer.init,
        compute_dtype=jnp.float32,
        lora=lora,
        key=jax.random.key(0),
    )
    step = jax.jit(make_train_step(score, objectives.sft(), optimizer, lora=lora))
    losses = []
    for _ in range(2):
        state, metrics = step(state, ours)
        losses.append(float(metrics["loss"]))

    def loss(trainable):
        scores = score(lora.attach(merge(trainable, state.frozen)), ours)
        return -jnp.sum(scores.log_probs) / ANSWER

    value, gradients = jax.jit(jax.value_and_grad(loss))(state.trainable)
    folder = tmp_path_factory.mktemp("adapter")
    for name, tree in (("ours", state.trainable), ("gradients", gradients)):
        (folder / name).mkdir()
        written = adapter_of(
            tree, lora, model=base.description, base=str(golden / "llava-hf"), numbers={}, template="vicuna_v1"
        )
        adapter_folder.write(written, folder / name, format="ours")
        convert(str(folder / name), str(folder / f"{name}_peft"), layout="peft")
    adapted = peft.PeftModel.from_pretrained(llava(golden), folder / "ours_peft", is_trainable=True).eval()
    output = adapted(**theirs)
    output.loss.backward()
    logits = model.apply(
        {"params": lora.merge(merge(state.trainable, state.frozen))}, ours, rope_length=ours["token_ids"].shape[1]
    )
    return {
        "losses": losses,
        "loss": (float(value), output.loss.item()),
        "logits": (np.asarray(logits), output.logits.detach().numpy()),
        "plain": llava(golden)(**theirs).loss.item(),
        "gradients": load_file(folder / "gradients_peft" / "adapter_model.safetensors"),
        "adapted": adapted,
    }


def test_the_first_loss_is_that_of_the_plain_model_and_the_last_that_of_peft(trained):
    np.testing.assert_allclose(trained["losses"][0], trained["plain"], rtol=1e-5)
    np.testing.assert_allclose(*trained["loss"], rtol=1e-5)
    assert trained["loss"][0] < trained["losses"][1] < trained["losses"][0]


def test_peft_reads_what_was_trained(trained):
    ours, theirs = trained["logits"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_gradients_are_those_of_peft(trained):
    theirs = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in trained["adapted"].named_parameters()
        if parameter.requires_grad
    }
    ours = {name.replace("modules_to_save.", ""): tensor for name, tensor in trained["gradients"].items()}
    theirs = {name.replace("modules_to_save.", ""): tensor for name, tensor in theirs.items()}
    assert sum("lora_" in name for name in theirs) == 2 * 7 * 3 and set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert tensor.abs().max() > 0, name
        np.testing.assert_allclose(
            ours[name].numpy(), tensor.numpy(), rtol=2e-3, atol=1e-5 * float(tensor.abs().max()) + 1e-8, err_msg=name
        )


def test_factors_begin_as_peft_begins_them(golden):
    adapted = peft.get_peft_model(llava(golden), peft.LoraConfig(r=64, target_modules=r".*language_model.*down_proj"))
    theirs = torch.cat([p.flatten() for name, p in adapted.named_parameters() if "lora_A" in name]).detach().numpy()
    kernel = {"language_model": {"layers": {"down": {"kernel": jnp.zeros((3, adapted_inputs(adapted), 32))}}}}
    lora = Lora(("language_model/layers/down/kernel",), rank=64)
    factors = lora.init(kernel, jax.random.key(0))["language_model"]["layers"]["down"]
    ours = np.asarray(factors["lora_a"]).ravel()
    assert ours.size == theirs.size
    quantiles = np.linspace(0, 1, 21)
    np.testing.assert_allclose(
        np.quantile(ours, quantiles), np.quantile(theirs, quantiles), rtol=0, atol=0.03 * theirs.max()
    )
    assert not np.asarray(factors["lora_b"]).any()


def adapted_inputs(adapted):
    return next(parameter.shape[1] for name, parameter in adapted.named_parameters() if "lora_A" in name)
