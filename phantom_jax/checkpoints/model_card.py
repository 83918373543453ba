"""README.md of an exported folder: front matter that the Hugging Face Hub reads, then what a reader needs to know."""

import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence

from phantom_jax.checkpoints.hf import shapes
from phantom_jax.checkpoints.hf_config import Published
from phantom_jax.checkpoints.load_lines import adapter_lines, load_lines, serve_line
from phantom_jax.data.conversation import Template, describe_template
from phantom_jax.models.vlm import VisionLanguageConfig

_LIBRARIES = {"llava-hf": "transformers", "peft": "peft"}
_FAMILIES = {"qwen2": "Qwen2", "internlm2": "InternLM2", "phi3": "Phi-3", "llama": "LLaMA or Vicuna"}
_LICENCES = {
    "qwen2": "Qwen2: Apache-2.0 for most sizes, a licence of its own for some",
    "internlm2": "InternLM2: code Apache-2.0; weights free for research, for commercial use on application",
    "phi3": "Phi-3: MIT",
    "llama": "LLaMA and Vicuna: that of their generation (LLaMA 1 for research, later ones Meta's community licences)",
    "clip": "CLIP: MIT",
    "internvit": "InternViT: MIT",
}
_NOT_RECORDED = "not recorded"


def model_card(
    config: VisionLanguageConfig,
    published: Published,
    layout: str,
    *,
    name: str,
    dtype: str,
    template: Template | None = None,
    base: Sequence[str] = (),
    data: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    rank: int | None = None,
) -> str:
    """The text of README.md.

    Args:
      config: the model.
      published: names the family of its language model.
      layout: of the folder, one of `layouts.LAYOUTS`.
      name: of the folder, or of the model on the Hub; the lines that load it say this.
      dtype: of the weights as stored.
      template: of the conversation; None is written as not recorded.
      base: the models that this one was made from, names on the Hub or folders. Of a folder only the last part of its
        path is written. For an adapter the first is the one that it belongs on.
      data: the data sets that it was trained on, in the same way.
      metrics: values by name; the name says data set and split.
      rank: of an adapter.

    Raises:
      InputError: there is no such layout.
    """
    shown = [_public(entry) for entry in base]
    over = shown[0] if shown else None
    lines = _front_matter(config, layout, base, data)
    lines += ["", f"# {name}", ""]
    lines += ["## Made from", "", *_entries(shown), ""]
    lines += ["## Trained on", "", *_entries([_public(entry) for entry in data]), ""]
    lines += ["## Model", "", "| | |", "|---|---|"]
    lines += [
        f"| {key} | {value} |" for key, value in _summary(config, published, layout, dtype, template, rank).items()
    ]
    lines += [""]
    if template is not None:
        lines += [
            f"A prompt with one image reads so, `{template.image_token}` repeated for every image token:",
            "",
            "```python",
            _prompt(template),
            "```",
            "",
        ]
    lines += ["## Metrics", ""]
    if metrics:
        lines += ["| metric | value |", "|---|---|"]
        lines += [f"| {key.replace('|', '/')} | {value:.6g} |" for key, value in metrics.items()]
    else:
        lines.append(_NOT_RECORDED)
    adapter = layout == "peft"
    loading = adapter_lines(published.format, name, base=over) if adapter else load_lines(layout, name)
    lines += ["", "## Loading", "", "```python", *loading, "```"]
    serve = None if adapter else serve_line(layout, name)
    if serve:
        lines += ["", "```bash", serve, "```"]
    tower = "clip" if config.vision_tower.pre_norm else "internvit"
    lines += [
        "",
        "## Licence",
        "",
        "The weights stay under the licences of the models that they were made from, and data may add terms of their "
        "own. As far as known, by family; what counts is what each parent's page says:",
        "",
        f"- {_LICENCES[published.language_model]}",
        f"- {_LICENCES[tower]}",
    ]
    return "\n".join(lines) + "\n"


def _on_hub(entry: str) -> bool:
    """Whether this is a name on the Hub and no folder here: it may be published, a path may not."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", entry) is not None and not pathlib.Path(entry).exists()
    )


def _public(entry: str) -> str:
    return entry if _on_hub(entry) else pathlib.PurePath(entry).name


def _front_matter(config, layout, base, data) -> list[str]:
    kind = "llava" if config.language_model.phantom is None else "phantom"
    fields = {
        "library_name": _LIBRARIES.get(layout, "phantom_jax"),
        "pipeline_tag": "image-text-to-text",
        # The licences of the parents decide.
        "license": "other",
        "base_model": [entry for entry in base if _on_hub(entry)],
        "datasets": [entry for entry in data if _on_hub(entry)],
        "tags": [kind, "phantom_jax", *(["lora"] if layout == "peft" else [])],
    }
    lines = ["---"]
    # A JSON string is a YAML string.
    for key, value in fields.items():
        if isinstance(value, str):
            lines.append(f"{key}: {json.dumps(value)}")
        elif value:
            lines += [f"{key}:", *(f"- {json.dumps(entry)}" for entry in value)]
    return [*lines, "---"]


def _entries(values: Sequence[str]) -> list[str]:
    return [f"- `{value}`" for value in values] or [_NOT_RECORDED]


def _summary(config, published, layout, dtype, template, rank) -> dict[str, str]:
    vision, decoder = config.vision_tower, config.language_model
    parameters = (math.prod(shape) for path, shape in shapes(config).items() if path.startswith("params/"))
    out = {
        "layout": layout,
        "parameters": f"{sum(parameters):,}",
        "stored as": dtype,
        "language model": f"{_FAMILIES[published.language_model]}: {decoder.num_layers} layers, width "
        f"{decoder.embed_dim}, {decoder.num_heads} heads, {decoder.num_kv_heads} of keys and values, vocabulary "
        f"{decoder.vocab_size:,}, context {decoder.rope.max_length:,}",
        "vision tower": f"{'CLIP' if vision.pre_norm else 'InternViT'}: {vision.num_layers} layers, width "
        f"{vision.embed_dim}, patches of {vision.patch_size} pixels",
        "projector": config.projector.kind,
        "image tokens": f"{config.tokens_per_tile} for each {vision.image_size} x {vision.image_size} pixels",
        "template": _NOT_RECORDED if template is None else describe_template(template),
    }
    if layout == "peft":
        size = "" if rank is None else f" of rank {rank}"
        out["layout"] = f"peft: a LoRA adapter{size}; the rows below are of the model that it belongs on"
    if decoder.phantom is not None:
        phantom = decoder.phantom
        parts = ["queries, keys"] * phantom.query_key + ["values"] * phantom.value
        out["phantom dimension"] = f"of {', '.join(parts)}; eta {phantom.eta:g}, {phantom.gate} gate"
    return out


def _prompt(template: Template) -> str:
    image = template.image_begin + template.image_token + template.image_end + template.after_image
    question = "QUESTION" if template.keep_question else ""
    return repr(template.begin + template.system + template.user + image + question + template.assistant)
