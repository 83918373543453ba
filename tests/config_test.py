import copy
import importlib.util
import inspect
import json
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from phantom_jax import config as configs
from phantom_jax import layouts, objectives
from phantom_jax.data import tiles
from phantom_jax.errors import InputError
from phantom_jax.models import remat
from phantom_jax.ops import backends
from phantom_jax.sharding import rules


def a_config():
    config = configs.default_config()
    config.model.name = "phantom-quickstart"
    config.phases = (
        configs.default_phase("a", steps=10, objective={"name": "phantom_optimization", "beta": 3.0}),
        configs.default_phase(
            "b",
            steps=5,
            groups=({"patterns": ("projector/**",), "learning_rate": 1e-3},),
            data={"kind_weights": {"x": 2.0}},
        ),
    )
    return config


def test_a_good_config_has_nothing_wrong():
    assert configs.validate(a_config()) == []
    resolved = configs.resolve(a_config())
    assert json.loads(json.dumps(resolved)) == resolved
    assert resolved["phases"][0]["objective"] == {
        "name": "phantom_optimization",
        "beta": 3.0,
        "gamma": 0.5,
        "sft_weight": 1.0,
    }
    assert configs.resolve(resolved) == resolved


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(sede=1), "sede does not exist. Did you mean 'seed'?"),
        (lambda c: c.validation.update(evry=1), "validation.evry does not exist. Did you mean 'every'?"),
        (lambda c: c.phases[0].update(step=1), "phases[0].step does not exist. Did you mean 'steps'?"),
        (
            lambda c: c.phases[1].optimizer.update(learnin_rate=1.0),
            "phases[1].optimizer.learnin_rate does not exist. Did you mean 'learning_rate'?",
        ),
        (lambda c: c.phases[0].data.update(spilt="x"), "phases[0].data.spilt does not exist. Did you mean 'split'?"),
        (lambda c: c.phases[1].groups[0].update(lr=1.0), "phases[1].groups[0].lr does not exist."),
        (
            lambda c: c.phases[0].objective.update(gama=1.0),
            "phases[0].objective.gama does not exist. Did you mean 'gamma'?",
        ),
        (lambda c: c.phases[1].objective.update(beta=1.0), "phases[1].objective.beta does not exist."),
        (
            lambda c: c.phases[0].objective.update(name="phantom_optimisation"),
            "phases[0].objective.name is 'phantom_optimisation'; it must be one of sft, phantom_optimization, simpo,"
            " dpo, orpo. Did you mean 'phantom_optimization'?",
        ),
        (lambda c: c.model.update(name=""), "model.name is empty"),
        (lambda c: c.model.update(dtype="fp16"), "model.dtype is 'fp16'; it must be one of float32, bfloat16."),
        (lambda c: c.update(phases=()), "phases is empty"),
        (lambda c: c.phases[0].update(steps=0), "phases[0].steps is 0; it must be larger than 0."),
        (lambda c: c.phases[0].update(batch_size=10, accumulation=4), "set batch_size to a multiple, 12 for instance"),
        (lambda c: c.phases[0].update(name="b"), "phases[1].name is 'b', as an earlier phase's"),
        (lambda c: c.phases[0].update(name="../a"), "phases[0].name is '../a'; it must be letters"),
        (lambda c: c.phases[0].update(trainable=()), "phases[0].trainable is empty"),
        (lambda c: c.phases[1].groups[0].update(patterns=()), "phases[1].groups[0].patterns is empty"),
        (lambda c: c.phases[1].groups[0].update(learning_rate=0.0), "phases[1].groups[0].learning_rate is 0.0"),
        (lambda c: c.phases[0].optimizer.update(schedule="cos"), "schedule is 'cos'; it must be one of cosine, linear"),
        (lambda c: c.phases[0].optimizer.update(warmup_fraction=1.5), "it must be at least 0 and less than 1"),
        (lambda c: c.phases[0].optimizer.update(learning_rate=float("nan")), "learning_rate is nan; it must be finite"),
        (lambda c: c.phases[0].optimizer.update(end_learning_rate=1.0), "more than the learning_rate of 1e-05"),
        (lambda c: c.checkpoint.update(keep=0), "checkpoint.keep is 0; it must be larger than 0."),
        (
            lambda c: c.phases[0].__setitem__("objective", {"name": "dpo", "beta": 0.1, "reference": "stord"}),
            "phases[0].objective.reference is 'stord'; it must be one of adapter_off, stored. Did you mean 'stored'?",
        ),
        (
            lambda c: c.phases[0].__setitem__("objective", {"name": "dpo", "beta": 0.1, "reference": "adapter_off"}),
            "lora.rank is 0, so there is none. Set phases[0].objective to {'name': 'dpo', 'reference': 'stored'}",
        ),
        (
            lambda c: (
                c.phases[0].__setitem__("objective", {"name": "dpo", "beta": 0.1, "reference": "adapter_off"}),
                c.phases[0].lora.update(rank=8),
            ),
            "phases[0].trainable is ('**',): what trains beside the adapter would move the reference with it.",
        ),
        (lambda c: c.validation.update(every=-1), "validation.every is -1; it must be 0 or larger."),
    ],
)
def test_what_is_wrong_is_said_with_the_value_and_what_to_set(change, message):
    config = a_config()
    change(config)
    problems = configs.validate(config)
    assert len(problems) == 1 and message in problems[0], problems
    with pytest.raises(InputError):
        configs.resolve(config)


def test_wrong_types_and_missing_keys_of_a_plain_config():
    good = configs.plain(a_config())
    for path, value, message in (
        (("seed",), "1", "seed is '1'; it must be of type int"),
        (("seed",), True, "seed is True; it must be of type int"),
        (("phases",), {}, "phases is {}; it must be a tuple of sections"),
        (("phases", 0, "optimizer"), 3, "phases[0].optimizer is 3; it must be a section"),
        (("phases", 0, "trainable"), "**", "phases[0].trainable is '**'; it must be a tuple of strings"),
        (("phases", 0, "objective"), "sft", "phases[0].objective.name is None"),
    ):
        config = copy.deepcopy(good)
        section = config
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value
        assert any(message in problem for problem in configs.validate(config)), configs.validate(config)
    config = copy.deepcopy(good)
    del config["phases"][0]["optimizer"]["b1"]
    assert configs.validate(config) == ["phases[0].optimizer.b1 is missing; its default is 0.9."]


def test_everything_wrong_is_listed_at_once():
    config = a_config()
    config.phases[0].steps = 0
    config.checkpoint.keep = 0
    with pytest.raises(InputError, match=r"2 things are wrong with the config:\n.*keep.*\n.*steps"):
        configs.resolve(config)


def test_default_phase_refuses_unknown_keys():
    with pytest.raises(InputError, match="step does not exist. Did you mean 'steps'"):
        configs.default_phase("a", step=3)
    with pytest.raises(InputError, match="optimizer.lerning_rate does not exist. Did you mean 'learning_rate'"):
        configs.default_phase("a", optimizer={"lerning_rate": 3})


def test_configs_do_not_share_sections():
    first = a_config()
    first.phases[0].optimizer.learning_rate = 7.0
    first.validation.every = 7
    second = a_config()
    assert second.phases[0].optimizer.learning_rate == second.phases[1].optimizer.learning_rate == 1e-5
    assert second.validation.every == 0


def test_parse_arg():
    variant = configs.parse_arg("smoke,steps=10,name=x", smoke=False, steps=3, name="", rate=0.5)
    assert vars(variant) == {"smoke": True, "steps": 10, "name": "x", "rate": 0.5}
    assert configs.parse_arg(None, smoke=False).smoke is False
    for text in ("smoke=true", "smoke=True", "smoke=1"):
        assert configs.parse_arg(text, smoke=False).smoke is True
    assert configs.parse_arg("smoke=false", smoke=True).smoke is False
    for arg, message in (
        ("smok", "Did you mean 'smoke'"),
        ("steps", "needs a value"),
        ("steps=many", "not a value of type int"),
        ("smoke=maybe", "not a value of type bool"),
    ):
        with pytest.raises(InputError, match=message):
            configs.parse_arg(arg, smoke=False, steps=3)


def test_config_difference_names_each_value():
    first, second = a_config(), a_config()
    assert configs.config_difference(first, second) == []
    assert configs.config_difference(configs.plain(first), second) == []
    second.phases[1].optimizer.learning_rate = 0.5
    second.phases[0].trainable = ("projector/**",)
    second.model.vocab_size = 3
    second.phases = (*second.phases, configs.default_phase("c", steps=1))
    lines = configs.config_difference(first, second)
    assert lines[0] == "model.vocab_size: (none) -> 3"
    assert "phases[0].trainable: ['**'] -> ['projector/**']" in lines
    assert "phases[1].optimizer.learning_rate: 1e-05 -> 0.5" in lines
    assert "phases[2].steps: (none) -> 1" in lines


def test_flags_override_values_of_a_phase(tmp_path):
    path = tmp_path / "a_config.py"
    path.write_text(
        "from phantom_jax.config import default_config, default_phase\n"
        "def get_config(arg=None):\n"
        "    config = default_config()\n"
        "    config.phases = (default_phase('a', steps=1), default_phase('b', steps=2))\n"
        "    return config\n"
    )
    values = flags.FlagValues()
    arguments = [
        "program",
        f"--config={path}",
        "--config.phases[0].steps=10",
        "--config.phases[1].optimizer.learning_rate=1",
        "--config.phases[1].trainable=('projector/**','a/*')",
        "--config.model.name=phantom-quickstart",
        "--config.validation.every=5",
    ]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    values(arguments)
    resolved = configs.resolve(values.config)
    assert [phase["steps"] for phase in resolved["phases"]] == [10, 2]
    assert resolved["phases"][1]["optimizer"]["learning_rate"] == 1.0
    assert resolved["phases"][0]["optimizer"]["learning_rate"] == 1e-5
    assert resolved["phases"][1]["trainable"] == ["projector/**", "a/*"]
    assert resolved["validation"]["every"] == 5


def test_the_tables_say_what_the_functions_take():
    assert configs.OBJECTIVES.keys() == objectives.OBJECTIVES.keys()
    for name, function in objectives.OBJECTIVES.items():
        parameters = inspect.signature(function).parameters
        assert {key: parameter.default for key, parameter in parameters.items()} == configs.OBJECTIVES[name]
    assert configs.ATTENTION_BACKENDS == backends.BACKENDS
    assert configs.REFERENCES == objectives.REFERENCES
    assert configs.REMAT == remat.PRESETS
    assert tuple(rules.STRATEGIES) == configs.STRATEGIES
    assert set(configs.QUANTIZE) == {"none", *layouts.QUANTIZATIONS}
    assert ("model", *tiles.IMAGE_MODES) == configs.IMAGE_MODES


@pytest.mark.parametrize("arg", [None, "smoke", "smoke=True", "objective=sft", "objective=sft,smoke=True"])
def test_the_quickstart_config_is_right(repository, arg):
    spec = importlib.util.spec_from_file_location("quickstart", repository / "configs" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    resolved = configs.resolve(module.get_config(arg))
    names = [phase["objective"]["name"] for phase in resolved["phases"]]
    assert ("phantom_optimization" in names) == ("sft" not in (arg or ""))
    with pytest.raises(InputError, match="po or sft"):
        module.get_config("objective=dpo")


def test_importing_config_loads_nothing_heavy(repository):
    code = "import sys, phantom_jax.config; print([m for m in ('jax', 'flax', 'ml_collections') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository)
    assert output.stdout.strip() == "[]"


def test_another_objective_brings_its_own_arguments():
    config = configs.default_config()
    config.model.name, config.data.data_dir = "phantom-quickstart", "data"
    config.phases = (configs.default_phase("a", steps=1, objective={"name": "phantom_optimization", "gamma": 0.7}),)
    config.phases[0].objective.name = "simpo"
    assert configs.resolve(config)["phases"][0]["objective"] == {"name": "simpo", "beta": 2.0, "gamma": 0.7}
    config.phases[0].objective.name = "orpo"
    with pytest.raises(InputError, match="gamma"):
        configs.resolve(config)
    config.phases[0].objective.gamma = 0.5
    assert configs.resolve(config)["phases"][0]["objective"] == {"name": "orpo", "beta": 0.1}
