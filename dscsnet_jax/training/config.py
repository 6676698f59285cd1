"""Config: the fields of a training run, their defaults and checks.

ConfigDicts stop here: the rest of the library takes plain arguments.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from dscsnet_jax.physics.scene import Preset, get_preset
from dscsnet_jax.unfolding.registry import (
    Network,
    default_fields,
    is_frame_bound,
    make_network,
    suggestion,
)


def default_config(method: str = "dscsnet") -> ml_collections.ConfigDict:
    """All fields of a training run with their defaults.

    Fields:
      method: the network trained, a name of `unfolding.registry`.
      seed: of the parameters and of the data (`train` split).
      scene.preset, scene.frame_size, scene.division: the frames trained on.
      scene.sigma, scene.read_noise, scene.pedestal, scene.intensity_low,
        scene.intensity_high: optics, sensor and targets; None: those of the preset.
      network.*: hyper-parameters of the method (for DSCSNet, see `NetworkConfig`); the
        division and the size of the frames are the scene's.
      optimiser.*: see `training.step.make_optimiser`; `num_steps` is `train.num_steps`.
      train.batch_size, train.num_steps: frames a step, steps in all.
      train.truth_width, train.symmetry_weight, train.remat: see `training.step.make_step`.
      train.init_weights: released weights to start from; empty: new parameters.
      train.log_every, train.eval_every, train.checkpoint_every: steps between.
      eval.num_frames, eval.frame_size: frames of the `val` split that are scored.

    Args:
      method: the network to be trained.

    Returns:
      A locked ConfigDict.

    Raises:
      ValueError: for an unknown method; names the known ones.

    Example:
      >>> default_config().scene.preset
      'csist'
    """
    config = {
        "seed": 0,
        "method": method,
        "scene": {
            "preset": "csist",
            "frame_size": 11,
            "division": 3,
            **{name.removeprefix("scene."): config_dict.placeholder(float) for name in _OPTIONAL},
        },
        "network": _network_fields(method),
        "optimiser": {
            "learning_rate": 2e-3,
            "warmup_steps": 500,
            "weight_decay": 1e-4,
            "clip_norm": 1.0,
            "final_fraction": 0.01,
        },
        "train": {
            "batch_size": 128,
            "num_steps": 5000,
            "truth_width": 0.3,
            "symmetry_weight": 0.0,
            "remat": False,
            "init_weights": "",
            "log_every": 50,
            "eval_every": 1000,
            "checkpoint_every": 1000,
        },
        "eval": {"num_frames": 2000, "frame_size": 11},
    }
    return ml_collections.ConfigDict(config).lock()


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> ml_collections.ConfigDict:
    """Load a config file (`get_config()` in Python) and apply `a.b=value` overrides.

    With another method, in the file or as an override, its hyper-parameters have their
    defaults, but for those that it has, too, and that the file changes.

    Args:
      path: the file.
      overrides: as on the command line, `train.num_steps=100`.

    Returns:
      A locked ConfigDict with the fields of `default_config`.

    Raises:
      ValueError: for a file without `get_config`, an unknown field (with a suggestion),
        a value of the wrong type or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist")
    fields = dict(flat(_run_file(path)))
    changes = dict(_override(text) for text in overrides)
    method = str(changes.pop("method", fields.get("method", "dscsnet")))
    config = default_config(method)
    fields = _of_method(fields, method)
    for name, value in {**fields, "method": method, **changes}.items():
        set_field(config, name, value)
    check_config(config)
    return config


def set_field(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
    """Set one dotted field, of the type it has.

    Raises:
      ValueError: if the field is unknown (with a suggestion) or of another type.

    Example:
      >>> config = default_config()
      >>> set_field(config, "train.num_stpes", 3)
      Traceback (most recent call last):
      ValueError: unknown config field 'train.num_stpes'; did you mean 'train.num_steps'?
    """
    known = dict(flat(config.to_dict()))
    if name not in known:
        raise ValueError(f"unknown config field {name!r}{suggestion(name, known)}")
    optional = name in _OPTIONAL
    expected = float if optional else type(known[name])
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected and not (optional and value is None):
        kind = f"{expected.__name__}{' or None' if optional else ''}"
        raise ValueError(f"config field {name!r} is a {kind}, got {value!r}")
    config.update_from_flattened_dict({name: value})


def check_config(config: ml_collections.ConfigDict) -> None:
    """Check all values before anything is compiled.

    Raises:
      ValueError: naming the field, what was expected and what was given.
    """
    make_preset(config)
    make_preset(config, config.eval.frame_size)
    network = make_method(config)
    sizes = config.scene.frame_size, config.eval.frame_size
    if is_frame_bound(network) and sizes[0] != sizes[1]:
        raise ValueError(
            f"{config.method} is bound to one size of frames, but scene.frame_size is "
            f"{sizes[0]} and eval.frame_size {sizes[1]}"
        )
    for name, value in flat(config.to_dict()):
        least = 0 if name in _MAY_BE_ZERO else 1
        if type(value) is int and value < least:
            raise ValueError(f"config field {name!r} must be at least {least}, got {value}")
        if type(value) is float and not (0 < value < float("inf") or value == least == 0):
            bound = "> 0" if least else ">= 0"
            raise ValueError(f"config field {name!r} must be finite and {bound}, got {value}")
    if config.optimiser.warmup_steps >= config.train.num_steps:
        raise ValueError(
            f"optimiser.warmup_steps {config.optimiser.warmup_steps} must be below "
            f"train.num_steps {config.train.num_steps}"
        )


def make_preset(config: ml_collections.ConfigDict, frame_size: int | None = None) -> Preset:
    """The scene's preset with the changes that are set, optionally at another frame size.

    Raises:
      ValueError: if the preset is unknown, or does not allow a change.
    """
    scene = config.scene
    size = scene.frame_size if frame_size is None else frame_size
    own = get_preset(scene.preset)
    changes = {
        name: scene[name] for name in ("sigma", "read_noise", "pedestal") if scene[name] is not None
    }
    ends = scene.intensity_low, scene.intensity_high
    if ends != (None, None):
        changes["intensity"] = tuple(
            default if end is None else end
            for end, default in zip(ends, own.cluster.intensity, strict=True)
        )
    if own.variation is not None and scene.intensity_low is not None:
        raise ValueError(
            f"scene.intensity_low cannot be set: preset {scene.preset!r} draws the lower end of "
            "the intensities for every frame"
        )
    return get_preset(scene.preset, frame_size=size, division=scene.division, **changes)


def make_method(config: ml_collections.ConfigDict) -> Network:
    """The network to be trained, at the scene's division and size of frames.

    Raises:
      ValueError: for an unknown method or a value that it refuses.
    """
    own = default_fields(config.method)
    scene = {name: config.scene[name] for name in _OF_THE_SCENE if name in own}
    return make_network(config.method, **scene, **config.network.to_dict())


def flat(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted names and values of a nested dict.

    Example:
      >>> list(flat({"a": {"b": 1}}))
      [('a.b', 1)]
    """
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _of_method(fields: dict[str, Any], method: str) -> dict[str, Any]:
    """A file's fields without the hyper-parameters that another method's defaults brought."""
    given = {name for name in fields if name.startswith("network.")}
    defaults = {
        name: {f"network.{k}": v for k, v in _network_fields(name).items()}
        for name in (fields.get("method", "dscsnet"), "dscsnet", method)
    }
    made_for = next((name for name, known in defaults.items() if given == known.keys()), method)
    if made_for == method:
        return fields
    kept = {k for k in given & defaults[method].keys() if fields[k] != defaults[made_for][k]}
    return {k: v for k, v in fields.items() if k not in given or k in kept}


def _network_fields(method: str) -> dict[str, Any]:
    return {k: v for k, v in default_fields(method).items() if k not in _OF_THE_SCENE}


def _override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"an override reads a.b=value, got {text!r}")
    return name.strip(), _parse(value)


_OF_THE_SCENE = ("division", "frame_size")
# Numbers that the preset has an answer to; None in a config leaves it to the preset.
_OPTIONAL = (
    "scene.sigma",
    "scene.read_noise",
    "scene.pedestal",
    "scene.intensity_low",
    "scene.intensity_high",
)
_MAY_BE_ZERO = frozenset(
    {
        "seed",
        "scene.read_noise",
        "scene.pedestal",
        "network.attention_radius",
        "optimiser.warmup_steps",
        "optimiser.weight_decay",
        "optimiser.final_fraction",
        "train.symmetry_weight",
        "train.truth_width",
    }
)


def _run_file(path: Path) -> dict[str, Any]:
    """What `get_config()` of a Python file returns; whatever it raises names the file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or path.suffix != ".py":
        raise ValueError(f"config file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError("it has no function get_config()")
        config = module.get_config()
        if not isinstance(config, ml_collections.ConfigDict):
            raise ValueError(f"get_config() must return a ConfigDict, got {config!r}")
    except Exception as error:  # a locked ConfigDict answers a typo with AttributeError
        raise ValueError(f"config file {path}: {error}") from error
    return config.to_dict()


def _parse(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text
