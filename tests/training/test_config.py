"""Config: every wrong field is named before anything is compiled."""

import dataclasses
from pathlib import Path

import pytest

from dscsnet_jax.physics.scene import get_preset
from dscsnet_jax.training import loop
from dscsnet_jax.training.config import (
    check_config,
    default_config,
    flat,
    load_config,
    make_method,
    make_preset,
    set_field,
)
from dscsnet_jax.unfolding.baselines.ista_net import IstaNetConfig
from dscsnet_jax.unfolding.network import NetworkConfig

OWN = ("sigma", "read_noise", "pedestal", "intensity_low", "intensity_high")
CONFIGS = sorted((Path(__file__).parents[2] / "experiments" / "configs").glob("*.py"))
FILE = """
from dscsnet_jax.training.config import default_config

def get_config():
    config = default_config()
    {line}
    return config
"""


def write(tmp_path: Path, line: str = "pass", text: str | None = None) -> Path:
    path = tmp_path / "experiment.py"
    path.write_text(FILE.format(line=line) if text is None else text, encoding="utf-8")
    return path


def test_fields_reach_the_preset_and_the_network(tmp_path: Path) -> None:
    path = write(tmp_path, "config.scene.division = 5")
    config = load_config(path, ["scene.preset=csist_wide", "network.tied=True", "seed=7"])
    assert make_preset(config) == get_preset("csist_wide", division=5)
    assert make_preset(config, 9) == get_preset("csist_wide", division=5, frame_size=9)
    assert make_method(config).config == NetworkConfig(division=5, tied=True)
    assert config.seed == 7


def test_the_method_brings_its_own_hyper_parameters(tmp_path: Path) -> None:
    path = write(tmp_path, "config.network.channels = 8")
    assert make_method(load_config(path)).config.channels == 8
    with pytest.raises(ValueError, match=r"unknown method 'lsta'; the known ones are dscsnet"):
        load_config(path, ["method=lsta"])
    # The file's own method named once more changes nothing.
    assert make_method(load_config(path, ["method=dscsnet"])).config.channels == 8
    # Another method has its own, but for what the file changes and it has, too.
    changed = write(tmp_path, "config.network.channels = 8; config.network.tied = True")
    other = make_method(load_config(changed, ["method=ista_net", "network.iterations=3"])).config
    assert (other.channels, other.iterations) == (8, 3)
    plain = write(tmp_path)
    assert make_method(load_config(plain, ["method=ista_net"])).config == IstaNetConfig()
    named = write(tmp_path, "config.method = 'ista_net'")
    assert make_method(load_config(named)).config == IstaNetConfig()


def test_networks_bound_to_one_size_are_not_scored_on_another(tmp_path: Path) -> None:
    path = write(tmp_path, "config.scene.frame_size = 7")
    for other in (["method=lista"], ["method=ista_net", "network.start=matrix"]):
        with pytest.raises(ValueError, match="bound to one size of frames"):
            load_config(path, other)
    load_config(path, ["method=ista_net"])


def test_optics_and_sensor_are_the_presets_own_unless_they_are_set(tmp_path: Path) -> None:
    path = write(tmp_path, "config.scene.sigma = 0.6; config.scene.intensity_high = 300")
    overrides = ["scene.sigma=0.7", "scene.read_noise=0", "scene.pedestal=12.5"]
    assert make_preset(load_config(path)) == get_preset(
        "csist", sigma=0.6, intensity=(220.0, 300.0)
    )
    config = load_config(path, [*overrides, "scene.intensity_low=30", "scene.preset=csist_noise"])
    expected = get_preset(
        "csist_noise", sigma=0.7, read_noise=0.0, pedestal=12.5, intensity=(30.0, 300.0)
    )
    assert make_preset(config) == expected
    assert make_preset(config, 9) == dataclasses.replace(expected, frame_size=9)
    back = load_config(path, ["scene.sigma=None", "scene.intensity_high=None"])
    assert make_preset(back) == get_preset("csist")
    assert default_config().scene.to_dict() == {
        "preset": "csist",
        "frame_size": 11,
        "division": 3,
        **dict.fromkeys(OWN),
    }


@pytest.mark.parametrize("field", OWN)
def test_row20_optional_fields_keep_their_type(tmp_path: Path, field: str) -> None:
    config = load_config(write(tmp_path), ["scene.intensity_high=900", f"scene.{field}=240"])
    assert type(config.scene[field]) is float
    for text, shown in (("wide", "'wide'"), ("", "''"), ("True", "True"), ("(1, 2)", r"\(1, 2\)")):
        message = f"'scene.{field}' is a float or None, got {shown}"
        with pytest.raises(ValueError, match=message):
            load_config(write(tmp_path), [f"scene.{field}={text}"])
    with pytest.raises(ValueError, match=f"experiment.py: .*{field}"):
        load_config(write(tmp_path, f"config.scene.{field} = 'wide'"))


def test_upper_end_of_varied_intensities_may_be_set(tmp_path: Path) -> None:
    overrides = ["scene.preset=csist_varied", "scene.intensity_high=500"]
    preset = make_preset(load_config(write(tmp_path), overrides))
    assert preset == get_preset("csist_varied", intensity=(50.0, 500.0))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scene.sigma=0.5", "'csist_varied' draws .*: sigma cannot be set"),
        ("scene.read_noise=2", "read_noise cannot be set"),
        ("scene.pedestal=0", "pedestal cannot be set"),
        ("scene.intensity_low=50.0", "scene.intensity_low cannot be set: preset 'csist_varied'"),
        ("scene.intensity_high=200.0", "the upper end must lie above, got 200.0"),
    ],
)
def test_row20_what_a_varied_preset_draws_by_itself_cannot_be_set(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path), ["scene.preset=csist_varied", override])


def test_defaults_are_valid_and_those_of_the_network() -> None:
    config = default_config()
    check_config(config)
    assert make_method(config).config == NetworkConfig()


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("train.num_steps=1_000", "train.num_steps", 1000),
        ("optimiser.learning_rate=1", "optimiser.learning_rate", 1.0),
        ("optimiser.learning_rate=3e-4", "optimiser.learning_rate", 3e-4),
        (" train.remat = True", "train.remat", True),
        ("network.x_step=gradient", "network.x_step", "gradient"),
        ("network.x_step='gradient'", "network.x_step", "gradient"),
        ("train.init_weights=runs/a=b.safetensors", "train.init_weights", "runs/a=b.safetensors"),
        ("train.truth_width=0", "train.truth_width", 0.0),
        ("network.attention_radius=0", "network.attention_radius", 0),
    ],
)
def test_overrides_are_read_with_the_type_of_their_field(
    tmp_path: Path, override: str, name: str, value: object
) -> None:
    read = dict(flat(load_config(write(tmp_path), [override]).to_dict()))
    assert read[name] == value
    assert type(read[name]) is type(value)
    unchanged = {k: v for k, v in flat(default_config().to_dict()) if k != name}
    assert {k: v for k, v in read.items() if k != name} == unchanged


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_stpes=3", "unknown config field 'train.num_stpes'; did you mean 'train.num_s"),
        ("learning_rate=3", "unknown config field 'learning_rate'; did you mean 'optimiser.le"),
        ("zzz=1", "unknown config field 'zzz'; known: .*train.num_steps"),
        ("train={}", "unknown config field 'train'"),
        ("train.num_steps", r"an override reads a\.b=value, got 'train.num_steps'"),
        ("train.num_steps=many", "'train.num_steps' is a int, got 'many'"),
        ("train.num_steps=3.5", "'train.num_steps' is a int, got 3.5"),
        ("train.num_steps=True", "'train.num_steps' is a int, got True"),
        ("train.num_steps={[]: 1}", "'train.num_steps' is a int, got '{"),
        ("train.remat=1", "'train.remat' is a bool, got 1"),
        ("network.tied=yes", "'network.tied' is a bool, got 'yes'"),
        ("optimiser.clip_norm=None", "'optimiser.clip_norm' is a float, got None"),
        ("scene.preset=3", "'scene.preset' is a str, got 3"),
    ],
)
def test_row20_wrong_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=0", "'train.batch_size' must be at least 1, got 0"),
        ("seed=-1", "'seed' must be at least 0, got -1"),
        ("optimiser.learning_rate=-1e-3", "'optimiser.learning_rate' must be finite and > 0"),
        ("optimiser.learning_rate=1e999", "'optimiser.learning_rate' must be finite"),
        ("optimiser.clip_norm=0", "'optimiser.clip_norm' must be finite and > 0, got 0.0"),
        ("network.intensity_scale=0.0", "intensity_scale must be positive, got 0.0"),
        ("optimiser.weight_decay=-1", "'optimiser.weight_decay' must be finite and >= 0"),
        ("network.threshold=softest", "threshold must be one of attention, convolutional"),
        ("network.attention_heads=5", "attention_channels 24 must be a multiple of"),
        ("scene.preset=csits", "unknown preset 'csits'"),
        ("scene.frame_size=4", "frame_size 4 leaves no room"),
        ("eval.frame_size=4", "frame_size 4 leaves no room"),
        ("scene.sigma=0", "'scene.sigma' must be finite and > 0, got 0.0"),
        ("scene.sigma=1e999", "'scene.sigma' must be finite and > 0, got inf"),
        ("scene.read_noise=-1", "'scene.read_noise' must be finite and >= 0, got -1.0"),
        ("scene.pedestal=-1", "'scene.pedestal' must be finite and >= 0, got -1.0"),
        ("scene.intensity_low=0", "'scene.intensity_low' must be finite and > 0, got 0.0"),
        ("scene.intensity_low=251", r"expected 0 <= low <= high < inf, got 251\.0 \.\. 250\.0"),
        ("train.num_steps=500", "warmup_steps 500 must be below train.num_steps 500"),
        ("optimiser.warmup_steps=5000", "warmup_steps 5000 must be below train.num_steps 5000"),
    ],
)
def test_row20_value_out_of_range_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path), [override])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.train.num_stpes = 3", "num_stpes"),
        ("config.train.num_steps = 'many'", "num_steps"),
        ("config.train.num_steps = 0", "'train.num_steps' must be at least 1"),
        ("config.unlock(); config.scheduler = 'cosine'", "unknown config field 'scheduler'"),
        ("return None", "must return a ConfigDict, got None"),
        ("return missing", "name 'missing' is not defined"),
        ("x = = 3", "invalid syntax"),
    ],
)
def test_row20_wrong_file_is_refused(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, line))


def test_row20_errors_inside_a_file_name_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "config.train.num_stpes = 3")
    with pytest.raises(ValueError, match=f"config file {path}: "):
        load_config(path)


def test_row20_file_without_get_config_missing_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"experiment\.py: it has no function get_config"):
        load_config(write(tmp_path, text="seed = 3"))
    with pytest.raises(ValueError, match=r"absent\.py does not exist"):
        load_config(tmp_path / "absent.py")
    other = tmp_path / "config.json"
    other.write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is not a Python file"):
        load_config(other)


def test_row20_training_checks_the_config_before_it_writes_or_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "make_step", lambda *_a, **_k: pytest.fail("built a step"))
    config = default_config()
    set_field(config, "train.num_steps", 100)
    with pytest.raises(ValueError, match="warmup_steps 500 must be below"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_fields_cannot_be_set_on_the_config_itself() -> None:
    config = default_config()
    with pytest.raises(AttributeError, match="num_stpes"):
        config.train.num_stpes = 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_experiment_loads_and_says_how_it_is_run(path: Path) -> None:
    config = load_config(path)
    check_config(config)
    assert f"--config experiments/configs/{path.name}" in path.read_text(encoding="utf-8")


def test_there_are_experiments() -> None:
    assert "csist_c3" in [path.stem for path in CONFIGS]
