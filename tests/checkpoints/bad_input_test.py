"""Sources that are damaged, lie, or want to reach beyond their folder, through the command line."""

import json
import os
import shutil
import struct
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phantom_jax import cli, conversion
from tests.checkpoints.refusals import refused

BIAS = "vision_proj.0.bias"
FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


@pytest.fixture
def source(golden, tmp_path):
    """A published Phantom to be damaged, in the folder `source`."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in (CONFIG, FILE):
        shutil.copy(golden / "phantom-0.5b" / name, folder / name)
    return folder


@pytest.fixture
def shards(source):
    """The same in two shards: their names by tensor."""
    tensors = load_file(source / FILE)
    (source / FILE).unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for shard, held in halves.items():
        save_file({name: tensors[name] for name in held}, source / shard)
    weight_map = {name: shard for shard, held in halves.items() for name in held}
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def convert(source, *more, to="ours"):
    return ["convert", f"--source={source}", f"--target={source.parent / 'target'}", f"--to={to}", *more]


# ---- one file of tensors


def parts(path):
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def put(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


FILES = {
    "empty": lambda whole: b"",
    "length is cut": lambda whole: whole[:5],
    "header is cut": lambda whole: whole[:100],
    "data are cut": lambda whole: whole[:-1000],
    "data go on": lambda whole: whole + b"more",
    "length lies": lambda whole: struct.pack("<Q", 1 << 62) + whole[8:],
    "a web page": lambda whole: b"<!DOCTYPE html><html>Sign in</html>",
    "a list": lambda whole: struct.pack("<Q", 2) + b"[]",
    "deep": lambda whole: struct.pack("<Q", 200_000) + b"[" * 200_000,
}


@pytest.mark.parametrize("damage", FILES.values(), ids=FILES.keys())
def test_a_damaged_file_of_tensors(damage, source, capsys, tmp_path):
    (source / FILE).write_bytes(damage((source / FILE).read_bytes()))
    refused(capsys, tmp_path, convert(source), source / FILE, "no readable safetensors file", "fetch it again")


HEADERS = {
    "overlapping": (lambda entry: {"data_offsets": [place - 4 for place in entry["data_offsets"]]}, BIAS),
    "backwards": (lambda entry: {"data_offsets": entry["data_offsets"][::-1]}, BIAS),
    "another shape": (lambda entry: {"shape": [127]}, f"{BIAS!r} is F32 [127], 508 bytes, and has 512"),
    "another dtype": (lambda entry: {"dtype": "F16"}, f"{BIAS!r} is F16 [128], 256 bytes, and has 512"),
    "negative shape": (lambda entry: {"shape": [-128]}, BIAS),
    "more than there can be": (lambda entry: {"shape": [2**63, 2**63]}, BIAS),
    "unknown dtype": (lambda entry: {"dtype": "F128"}, "F128"),
}


@pytest.mark.parametrize(("change", "text"), HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_lies(change, text, source, capsys, tmp_path):
    header, data = parts(source / FILE)
    header[BIAS] |= change(header[BIAS])
    put(source / FILE, header, data)
    refused(capsys, tmp_path, convert(source), source / FILE, text, "fetch it again")


def test_a_hole_in_the_data(source, capsys, tmp_path):
    header, data = parts(source / FILE)
    del header[BIAS]
    put(source / FILE, header, data)
    refused(capsys, tmp_path, convert(source), source / FILE, "invalid offset for tensor")


def test_a_name_twice_in_a_header(source, capsys, tmp_path):
    header, data = parts(source / FILE)
    text = json.dumps(header)[:-1] + f', "{BIAS}": {json.dumps(header[BIAS])}}}'
    put(source / FILE, text.encode(), data)
    refused(capsys, tmp_path, convert(source), source / FILE, f"holds {BIAS!r} twice")


@pytest.mark.parametrize("dtype", ["I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"])
def test_dtypes_that_are_no_weights(dtype, source, capsys, tmp_path):
    header, data = parts(source / FILE)
    header[BIAS] |= {"dtype": dtype, "shape": [512]}
    put(source / FILE, header, data)
    refused(capsys, tmp_path, convert(source), source, f"1 not floating point:\n    {BIAS} is {dtype}")


def test_keys_that_do_not_fit(source, capsys, tmp_path):
    tensors = load_file(source / FILE)
    tensors["vision_proj.9.bias"] = tensors.pop(BIAS)
    tensors["vision_proj.1.bias"] = np.zeros(3, np.float32)
    tensors["\x1b[2J"] = np.zeros(3, np.float32)
    save_file(tensors, source / FILE)
    said = refused(
        capsys,
        tmp_path,
        convert(source),
        source,
        f"1 missing:\n    {BIAS}",
        "vision_proj.9.bias",
        "vision_proj.1.bias is (3,)",
        "Take config and weights from one checkpoint",
    )
    # A name can not write over the terminal.
    assert "\x1b" not in said and r"'\x1b[2J'" in said


def test_thousands_of_keys_are_counted_and_not_listed(source, capsys, tmp_path):
    save_file({"x": np.zeros(3, np.float32)}, source / FILE)
    said = refused(capsys, tmp_path, convert(source), "125 missing", "and 105 more", "1 not expected:\n    x")
    assert said.count("\n") < 40


def test_numbers_that_are_none_are_kept(source, tmp_path):
    """A conversion keeps bytes, whatever they mean."""
    tensors = load_file(source / FILE)
    tensors[BIAS][:3] = np.nan, np.inf, -np.inf
    save_file(tensors, source / FILE)
    assert cli.main(convert(source, to="phantom")) == 0
    assert load_file(tmp_path / "target" / FILE)[BIAS].tobytes() == tensors[BIAS].tobytes()


# ---- shards


def index(source, weight_map):
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name", ["../../x", "../source/a.safetensors", "/etc/passwd", ".", "..", "", "a/b", "a\0b", "x" * 999]
)
def test_an_index_leads_nowhere_else(name, source, shards, capsys, tmp_path):
    index(source, {**shards, BIAS: name})
    refused(capsys, tmp_path, convert(source), source / INDEX, f"names the shard {name!r}")


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": null}', '{"weight_map": ["a"]}', '{"weight_map": {"x": 3}}', "[]", "{", ""]
)
def test_an_index_that_is_none(content, source, shards, capsys, tmp_path):
    (source / INDEX).write_text(content)
    refused(capsys, tmp_path, convert(source), source / INDEX)


def test_shards_that_are_not_what_the_index_says(source, shards, capsys, tmp_path):
    index(source, {**shards, BIAS: "a.safetensors"})
    refused(capsys, tmp_path, convert(source), source / INDEX, "their shards do not hold", BIAS)
    index(source, {**shards, "stray": "a.safetensors"})
    refused(capsys, tmp_path, convert(source), source / INDEX, "their shards do not hold", "stray")
    index(source, shards)
    tensors = load_file(source / "a.safetensors")
    save_file({**tensors, BIAS: np.zeros(128, np.float32)}, source / "a.safetensors")
    refused(capsys, tmp_path, convert(source), "a.safetensors", "b.safetensors", f"both hold the tensor {BIAS!r}")
    save_file(tensors, source / "a.safetensors")
    (source / "b.safetensors").write_bytes((source / "b.safetensors").read_bytes()[:-1])
    refused(capsys, tmp_path, convert(source), source / "b.safetensors", "no readable safetensors file")
    (source / "b.safetensors").unlink()
    refused(capsys, tmp_path, convert(source), source / INDEX, "'b.safetensors', which is missing: fetch it again")


def test_links_are_followed(source, shards, tmp_path):
    """Hugging Face's cache: a folder of links into another one. What an index names is a file of the folder still."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.join("..", "blobs", str(number)))
    assert cli.main(convert(source, to="phantom")) == 0
    assert len(load_file(tmp_path / "target" / FILE)) == len(shards)


# ---- config.json

SIZES = (10**9, 10**12, 0, -1, float("nan"), float("inf"), 2.5, "3", True, [1])
LLM = ("num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads", "intermediate_size")
TOWER = ("num_hidden_layers", "hidden_size", "num_attention_heads", "image_size", "patch_size", "intermediate_size")
KEYS = [
    *(("phantom-0.5b", "llm_config", key) for key in LLM),
    *(("phantom-0.5b", "vision_config", key) for key in TOWER),
    *(("llava-hf", "text_config", key) for key in LLM),
    *(("llava-hf", "vision_config", key) for key in TOWER),
    *(("llava-original", None, key) for key in LLM),
]


@pytest.mark.parametrize(("model", "part", "key"), KEYS, ids=[".".join(filter(None, names)) for names in KEYS])
def test_sizes_that_no_model_has(model, part, key, golden, capsys, tmp_path):
    """Named at once: nothing is allocated or traced first."""
    folder = tmp_path / "source"
    shutil.copytree(golden / model, folder, ignore=shutil.ignore_patterns("g*"))
    content = json.loads((folder / CONFIG).read_text())
    place = content if part is None else content[part]
    begin = time.monotonic()
    for value in SIZES:
        place[key] = value
        (folder / CONFIG).write_text(json.dumps(content))
        refused(capsys, tmp_path, convert(folder), folder, f"has {key}={value!r}")
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("llm_config", "rms_norm_eps", float("nan")),
        ("llm_config", "rope_theta", -1.0),
        ("llm_config", "max_position_embeddings", 1e9),
        ("vision_config", "layer_norm_eps", "x"),
        (None, "image_token_index", -7),
        (None, "eos_token_id", []),
        (None, "downsample_ratio", 0),
        (None, "model_type", "bert"),
        (None, "vision_config", 3),
        (None, "llm_config", []),
    ],
)
def test_other_values_that_no_model_has(part, key, value, source, capsys, tmp_path):
    content = json.loads((source / CONFIG).read_text())
    (content if part is None else content[part])[key] = value
    (source / CONFIG).write_text(json.dumps(content))
    refused(capsys, tmp_path, convert(source), source)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"a":' * 100_000, '{"model_type": "phantom", "a": ' + "[" * 300 + "]" * 300 + "}", "\x00"],
    ids=["empty", "cut", "list", "number", "cut and deep", "deep", "zero"],
)
def test_a_config_that_is_no_object(content, source, capsys, tmp_path):
    (source / CONFIG).write_text(content)
    refused(capsys, tmp_path, convert(source), source / CONFIG)


def test_more_layers_than_there_are_tensors(source, capsys, tmp_path):
    content = json.loads((source / CONFIG).read_text())
    content["llm_config"]["num_hidden_layers"] = 999
    (source / CONFIG).write_text(json.dumps(content))
    refused(capsys, tmp_path, convert(source), source, "missing:\n    language_model.model.layers.", "more")


# ---- folders of ours


@pytest.fixture(scope="module")
def saved(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "ours"
    conversion.convert(str(golden / "phantom-0.5b"), str(folder), layout="ours")
    return folder


@pytest.fixture
def ours(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "ours")


DECODER = ("model", "language_model")
METAS = {
    "newer": (("schema_version",), 3, "use the version of phantom_jax that wrote it"),
    "no number": (("schema_version",), [1], "schema_version=[1]"),
    "field": (("more",), 1, "unknown fields 'more'"),
    "decoder's field": ((*DECODER, "more"), 1, "'more'"),
    "part": (("model", "more"), {}, "unknown parts more"),
    "no model": (("model",), "x", "does not describe a model"),
    "origin": (("origin",), {"base": [1]}, "origin={'base': [1]}"),
    "origin's field": (("origin", "more"), [], "must list names under base and data"),
    "quantization": (("quantization",), "int7", "quantization='int7'"),
    "no end": (("tokens", "eos"), [], "the eos token is ()"),
    "image": (("tokens", "image"), "x", "the image token is ('x',)"),
    "format": (("published", "format"), "x", "published.format='x'"),
    "config": (("published", "config"), {"llm_config": 3}, "published.config.llm_config"),
    "list": ((*DECODER, "qkv_bias"), [], "does not describe a model"),
    "rope": ((*DECODER, "rope"), 3, "does not describe a model"),
    "factors": ((*DECODER, "rope"), {"kind": "su", "original_max_length": 5}, "0 short and 0 long factors"),
    "phantom": ((*DECODER, "phantom"), {"eta": "x"}, "does not describe a model"),
    "layers": ((*DECODER, "num_layers"), 10**9, "num_layers=1000000000"),
    "other layers": ((*DECODER, "num_layers"), 4, "misshapen: params/language_model/layers/attention/key/bias is (3,"),
    "more than there is": (("model", "vision_tower", "qk_norm"), True, "missing: params/vision_tower/layers/key_norm"),
    "less than there is": ((*DECODER, "qkv_bias"), False, "not expected: params/language_model/layers/attention/key"),
}


@pytest.mark.parametrize(("path", "value", "text"), METAS.values(), ids=METAS.keys())
def test_our_description_does_not_fit(path, value, text, ours, capsys, tmp_path):
    content = json.loads((ours / "phantom_jax.json").read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (ours / "phantom_jax.json").write_text(json.dumps(content))
    refused(capsys, tmp_path, convert(ours, to="phantom"), ours, text)


def test_quantised_arrays_of_another_kind(golden, capsys, tmp_path):
    folder = tmp_path / "int8"
    conversion.convert(str(golden / "phantom-0.5b"), str(folder), layout="ours", quantize="int8")
    meta = folder / "phantom_jax.json"
    meta.write_text(meta.read_text().replace('"quantization": "int8"', '"quantization": "nf4"'))
    refused(capsys, tmp_path, convert(folder), folder, "attention/key/kernel/codes", "not how nf4 kernels")


@pytest.mark.parametrize("how", ["cut", "empty", "gone"])
def test_our_arrays_are_damaged(how, ours, capsys, tmp_path):
    """Each file that is read, one after the other: the list of chunks, its first page, the chunks."""
    files = [path for path in (ours / "params").iterdir() if path.name == "manifest.ocdbt"]
    files += (ours / "params" / "d").iterdir()
    files.append(max((ours / "params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()))
    assert len(files) >= 3
    for path in files:
        whole = path.read_bytes()
        path.unlink()
        if how != "gone":
            path.write_bytes(whole[: len(whole) // 2] if how == "cut" else b"")
        refused(
            capsys, tmp_path, convert(ours, to="phantom"), ours / "params", "cannot be read", "save the model again"
        )
        path.write_bytes(whole)


def test_our_arrays_are_not_there(ours, capsys, tmp_path):
    shutil.rmtree(ours / "params")
    refused(capsys, tmp_path, convert(ours, to="phantom"), ours, "no params/ beside phantom_jax.json")
    (ours / "params").mkdir()
    refused(capsys, tmp_path, convert(ours, to="phantom"), ours / "params", "it holds no arrays")


# ---- code

CODE = "import pathlib; pathlib.Path({canary!r}).touch()"


def test_pickles_need_to_be_allowed(source, capsys, tmp_path):
    (source / FILE).rename(source / "pytorch_model.bin")
    refused(capsys, tmp_path, convert(source), source, "--allow_pickle")


def test_code_of_a_folder_never_runs(source, tmp_path, monkeypatch):
    """`auto_map` names modules of the folder, as remote code does; transformers would ask, and run them."""
    canary = tmp_path / "canary"
    names = ("configuration_phantom", "modeling_phantom", "tokenization_phantom", "sitecustomize", "torch")
    for name in names:
        (source / f"{name}.py").write_text(CODE.format(canary=str(canary)))
    content = json.loads((source / CONFIG).read_text())
    classes = {"AutoConfig": "configuration_phantom.Config", "AutoModelForCausalLM": "modeling_phantom.Model"}
    content["auto_map"] = classes
    content["llm_config"]["auto_map"] = classes
    (source / CONFIG).write_text(json.dumps(content))
    settings = {
        "auto_map": {"AutoTokenizer": ["tokenization_phantom.Tokenizer", None]},
        "tokenizer_class": "Tokenizer",
        "trust_remote_code": True,
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "vocab.json").write_text('{"a": 0}')
    (source / "merges.txt").write_text("")
    monkeypatch.chdir(source)
    assert cli.main(convert(source, "--verify")) == 2
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    cli.main(convert(source, "--verify"))
    for name in ("vocab.json", "merges.txt"):
        (source / name).unlink()
    for layout in ("ours", "phantom"):
        shutil.rmtree(tmp_path / "target", ignore_errors=True)
        assert cli.main(convert(source, "--verify", "--allow_pickle", to=layout)) == 0
    assert not canary.exists()
    exec(CODE.format(canary=str(canary)))  # noqa: S102 - it sings where it is let
    assert canary.exists()
