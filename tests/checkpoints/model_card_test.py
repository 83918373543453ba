import ast
import math

import huggingface_hub
import jax
import pytest
import yaml

from phantom_jax.checkpoints.hf_config import publish
from phantom_jax.checkpoints.load_lines import adapter_lines, load_lines
from phantom_jax.checkpoints.model_card import model_card
from phantom_jax.data.conversation import TEMPLATES
from phantom_jax.errors import InputError
from phantom_jax.layouts import LAYOUTS
from phantom_jax.models import zoo
from tests.models import small

QUICKSTART = zoo.get_config("phantom-quickstart")
LLAVA = zoo.get_config("llava-7b", projector="mlp2x_gelu", image_size=336)


def card(config=QUICKSTART, layout="ours", **fields):
    return model_card(config, publish(config), layout, **{"name": "my-model", "dtype": "bfloat16", **fields})


def front(text):
    """The front matter, as a YAML reader of its own and as the Hub's library see it."""
    start, matter, _ = text.split("---\n", 2)
    assert start == ""
    fields = yaml.safe_load(matter)
    data = huggingface_hub.ModelCard(text).data.to_dict()
    assert {key: data[key] for key in fields} == fields
    return fields


def row(text, key):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {key} |")]
    return line.split("|")[2].strip()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_front_matter(layout):
    config = QUICKSTART if layout in ("ours", "phantom") else LLAVA
    base, data = ["org/base-1.5", "other/tower"], ["org/pictures"]
    text = card(config, layout, base=base, data=data, metrics={"numbers/test/accuracy": 0.98})
    assert front(text) == {
        "library_name": {"llava-hf": "transformers", "peft": "peft"}.get(layout, "phantom_jax"),
        "pipeline_tag": "image-text-to-text",
        "license": "other",
        "base_model": base,
        "datasets": data,
        "tags": ["phantom" if config is QUICKSTART else "llava", "phantom_jax", *["lora"] * (layout == "peft")],
    }
    assert "| numbers/test/accuracy | 0.98 |" in text
    block = text.split("## Loading")[1].split("```python\n")[1].split("```")[0]
    if layout == "peft":
        assert block.splitlines() == adapter_lines("llava-hf", "my-model", base=base[0])
    else:
        assert block.splitlines() == load_lines(layout, "my-model")
    assert ("vllm serve" in text) == (layout == "llava-hf")


def test_what_is_not_known_is_said():
    text = card()
    assert front(text).keys() == {"library_name", "pipeline_tag", "license", "tags"}
    for title in ("Made from", "Trained on", "Metrics"):
        assert f"## {title}\n\nnot recorded\n" in text
    assert row(text, "template") == "not recorded"


def test_folders_are_named_without_their_path(tmp_path, monkeypatch):
    """A user's paths are nobody's business, and no names on the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    text = card(base=["/home/someone/secret/vicuna", "runs/base", "org/tower"], data=[str(tmp_path / "rows")])
    assert "- `vicuna`\n- `base`\n- `org/tower`\n" in text and "- `rows`\n" in text
    assert front(text)["base_model"] == ["org/tower"] and "datasets" not in front(text)
    assert "secret" not in text and str(tmp_path) not in text and "runs" not in text


def test_licence():
    for name, parents in {
        "phantom-0.5b": ("Qwen2: Apache-2.0", "InternViT: MIT"),
        "phantom-1.8b": ("InternLM2: code Apache-2.0", "InternViT: MIT"),
        "phantom-3.8b": ("Phi-3: MIT", "InternViT: MIT"),
        "llava-7b": ("LLaMA and Vicuna", "CLIP: MIT"),
    }.items():
        licence = card(zoo.get_config(name)).split("## Licence")[1]
        assert all(f"\n- {parent}" in licence for parent in parents), name
        assert licence.count("\n- ") == 2 and "each parent's page" in licence


def test_summary_is_that_of_the_model():
    text = card(small.CONFIG, template=TEMPLATES["qwen2"])
    params = small.init(small.CONFIG)[1]
    assert row(text, "parameters") == f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)):,}"
    assert row(text, "image tokens") == "4 for each 16 x 16 pixels"
    assert row(text, "phantom dimension") == "of queries, keys, values; eta 0.5, learned gate"
    assert row(text, "template") == "qwen2 or internlm2" and row(text, "stored as") == "bfloat16"
    text = card(LLAVA, "peft", template=TEMPLATES["vicuna_v1"], rank=64)
    assert row(text, "image tokens") == "576 for each 336 x 336 pixels"
    assert row(text, "layout").startswith("peft: a LoRA adapter of rank 64")
    assert "PeftModel" in text and "phantom dimension" not in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_stands_as_it_is_read(name):
    template = TEMPLATES[name]
    text = card(LLAVA, "llava-hf", template=template)
    prompt = ast.literal_eval(text.split("repeated for every image token:\n\n```python\n")[1].split("\n```")[0])
    assert prompt.startswith(template.begin + template.system + template.user) and template.image_token in prompt
    assert prompt.endswith(template.assistant) and ("QUESTION" in prompt) == template.keep_question


def test_bad_layout():
    with pytest.raises(InputError, match="layout 'onnx' does not exist"):
        card(layout="onnx")
