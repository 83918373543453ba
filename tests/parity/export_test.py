"""What an export says beside its weights, as transformers reads it."""

import json
import subprocess
import sys

import pytest
import transformers
from transformers import GenerationConfig

from phantom_jax.checkpoints.generation_config import generation_config
from phantom_jax.checkpoints.hf_config import TokenIds
from phantom_jax.checkpoints.load_lines import load_lines
from tests.tiny_tokenizers import llama

TOKENS = TokenIds(image=208, eos=(2, 3), pad=0)
SOURCES = {
    "none": None,
    "vicuna": {
        "bos_token_id": 1,
        "temperature": 0.9,
        "top_p": 0.6,
        "max_length": 4096,
        "pad_token_id": 0,
        "_from_model_config": True,
    },
    "llama-2-chat": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096},
    "beams": {"num_beams": 4, "length_penalty": 0.0, "early_stopping": True},
    "one beam": {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True, "top_k": 5, "min_p": 0.1},
    "outputs": {"output_scores": True, "return_dict_in_generate": False, "num_return_sequences": 3, "use_cache": False},
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_generation_config_is_valid_there(source, tmp_path):
    written = generation_config(TOKENS, source=source)
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    read = GenerationConfig.from_pretrained(tmp_path)
    read.validate(strict=True)
    for name, value in written.items():
        assert getattr(read, name) == value
    read.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert {name: again[name] for name in written} == written


def test_vicunas_own_file_is_not():
    """What the sanitised file is for."""
    with pytest.raises(ValueError, match="temperature"):
        GenerationConfig(**SOURCES["vicuna"] | {"_from_model_config": None}).validate(strict=True)


def test_model_with_the_file_can_be_saved(golden, tmp_path):
    model = transformers.LlavaForConditionalGeneration.from_pretrained(golden / "llava-hf")
    (tmp_path / "generation_config.json").write_text(json.dumps(generation_config(TOKENS, source=SOURCES["vicuna"])))
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_lines_load_in_transformers(golden, tmp_path):
    """In a process of their own, as a user types them; the logits are those of the reference."""
    folder = tmp_path / "my model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((golden / "llava-hf" / name).read_bytes())
    # The reference has none: any that its reader takes will do.
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=llama("first"), bos_token="<s>", eos_token="</s>")  # noqa: S106
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    transformers.LlavaProcessor(images, tokenizer, patch_size=14, image_token="<image>").save_pretrained(folder)  # noqa: S106
    code = [
        *load_lines("llava-hf", folder),
        "import sys, numpy, torch",
        "golden = numpy.load(sys.argv[1])",
        "names = ('input_ids', 'attention_mask', 'pixel_values')",
        "inputs = {name: torch.as_tensor(golden['image_' + name]) for name in names}",
        "with torch.no_grad(): logits = model.eval()(**inputs).logits",
        "real = inputs['attention_mask'].bool().numpy()",
        "numpy.testing.assert_allclose(logits.numpy()[real], golden['image_logits'][real], atol=1e-5)",
        "assert type(processor).__name__ == 'LlavaProcessor', processor",
    ]
    command = [sys.executable, "-c", "\n".join(code), str(golden / "llava-hf" / "golden.npz")]
    subprocess.run(command, check=True)
