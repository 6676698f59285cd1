"""Settings: whatever JAX is set to, verbs and library run and answer the same.

The settings are those people turn on to find an error: float64, a stop at the first NaN,
a check for leaked tracers. Every case is compared with its answer in none of them.
"""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dscsnet_jax.cli import main, simulate
from dscsnet_jax.evaluation.report import evaluate
from dscsnet_jax.io.csist import read_csist
from dscsnet_jax.io.weights import load_weights
from dscsnet_jax.physics import grid, limits, scene
from dscsnet_jax.physics.optics import SensingOperator, render, sensing_operator
from dscsnet_jax.physics.preset import digital
from dscsnet_jax.physics.sensor import Sensor, expose, variance
from dscsnet_jax.physics.targets import Targets, from_arrays, from_lists, sort_by_intensity
from dscsnet_jax.training import config as configs
from dscsnet_jax.unfolding.admm import admm_lasso
from dscsnet_jax.unfolding.registry import Network, default_fields, make_network, network_names
from dscsnet_jax.unfolding.solvers import solve_lasso


@contextmanager
def checking_leaks() -> Iterator[None]:
    """Leaks are looked for where a program is traced, which once traced it is not again."""
    jax.clear_caches()
    with jax.checking_leaks():
        yield


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "x64": partial(jax.enable_x64, True),
    "debug_nans": partial(jax.debug_nans, True),
    "leaks": checking_leaks,
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache", "quick_compilation")]


@pytest.fixture(scope="module", autouse=True)
def few_targets() -> Iterator[None]:
    """Presets of few targets compile faster."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (simulate, configs):
            patch.setattr(module, "get_preset", light_preset)
        yield


def light_preset(name: str, **changes: Any) -> scene.Preset:
    return scene.get_preset(name, max_targets=1, **changes)


def assert_same(found: Any, expected: Any, rtol: float) -> None:
    """The same structure and values; a tolerance is relative to each array's largest value."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        finite = np.abs(b, where=np.isfinite(b), out=np.zeros_like(b, float))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * finite.max(initial=0))


# --- verbs --------------------------------------------------------------------------------

TINY = """
from dscsnet_jax.training.config import default_config

def get_config():
    config = default_config("ista_net")
    config.scene.preset, config.scene.frame_size = "csist_noise", 7
    config.train.num_steps, config.train.batch_size, config.train.log_every = 3, 4, 1
    config.optimiser.warmup_steps = 1
    config.network.iterations, config.network.channels = 1, 2
    config.eval.num_frames, config.eval.frame_size = 4, 7
    return config
"""


@pytest.fixture(scope="module")
def csist(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two frames of 11 x 11 pixels with noise, made in the usual setting."""
    folder = tmp_path_factory.mktemp("settings") / "csist"
    argv = ["simulate", "--preset", "csist_noise", "--read-noise", "1", "--num", "2"]
    assert main([*argv, "--out", str(folder)]) == 0
    return folder


def simulated(folder: Path, csist: Path) -> Any:
    argv = ["simulate", "--preset", "csist_varied", "--num", "3", "--frame-size", "7"]
    assert main([*argv, "--out", str(folder / "set")]) == 0
    split = read_csist(folder / "set")
    return split.frames, split.targets


def trained(folder: Path, csist: Path) -> Any:
    (folder / "tiny.py").write_text(TINY)
    argv = ["train", "--config", str(folder / "tiny.py"), "--workdir", str(folder / "run")]
    assert main(argv) == 0
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    weights = load_weights(folder / "run" / "weights.safetensors")
    assert {a.dtype for a in jax.tree.leaves(weights.params)} == {np.dtype(np.float32)}
    losses = [(line["loss"], line["gradient_norm"]) for line in logged if "loss" in line]
    scores = [line["val_mAP"] for line in logged if "val_mAP" in line]
    return np.array(losses), np.array(scores), weights.params


def imported(folder: Path, csist: Path) -> Any:
    checkpoint = Path(__file__).parent / "data" / "ista_net_tiny.pth"
    out = folder / "weights.safetensors"
    argv = ["import-weights", str(checkpoint), "--method", "ista_net", "--out", str(out)]
    assert main([*argv, "--sigma", "0.6", "--division", "2", "--frame-size", "5"]) == 0
    weights = load_weights(out)
    return weights.params, np.array(weights.metadata.geometry.sigma)


def scored(folder: Path, csist: Path) -> Any:
    argv = ["evaluate", "--data", str(csist), "--method", "grid"]
    assert main([*argv, "--json", str(folder / "scores.json")]) == 0
    written = json.loads((folder / "scores.json").read_text())
    names = ("mAP", "AP05", "AP25", "count_accuracy", "position_rmse", "psnr")
    rows = [written, *written["rows"].values()]
    return np.array([[row[name] or 0 for name in names] for row in rows])


def unmixed(folder: Path, csist: Path, method: str) -> Any:
    """Posterior means of the two frames; of their scenes nothing is told."""
    out = folder / f"{method}.csv"
    assert main([*unmixing(csist, method), "--out", str(out)]) == 0
    return read(out)


def unmixing(csist: Path, method: str) -> list[str]:
    argv = ["unmix", str(csist / "cso_img"), "--method", method, "--estimate", "mean"]
    return [*argv, "--noise", "1", "--pedestal", "10", "--background", "0"]


def read(out: Path) -> list[np.ndarray]:
    """Rows, cols and intensities of a catalog whose errors are those to be expected."""
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["frame"] for row in rows} == {"image_0.png", "image_1.png"}
    names = ("row", "col", "intensity")
    errors = np.array([[float(row[f"{name}_std"]) for name in names] for row in rows])
    assert (errors > 0).all()
    # Chains part at the first rounding, and their samples tell the errors to a part only.
    assert (errors < (0.1, 0.1, 10)).all()
    return [np.array([float(row[name]) for row in rows]) for name in names]


Verb = Callable[[Path, Path], Any]
VERBS: dict[str, tuple[Verb, float]] = {
    "simulate": (simulated, 1e-6),
    "train": (trained, 1e-4),
    "import-weights": (imported, 0),
    "evaluate": (scored, 1e-3),
    "unmix, greedy": (partial(unmixed, method="greedy"), 1e-2),
    "unmix, dscsnet": (partial(unmixed, method="dscsnet"), 1e-2),
}
SLOW = ("train", "unmix, greedy", "unmix, dscsnet")
_plain: dict[str, Any] = {}


@every_setting
@pytest.mark.parametrize(
    "verb", [pytest.param(v, marks=[pytest.mark.slow] if v in SLOW else []) for v in VERBS]
)
def test_a_verb_answers_the_same_in_every_setting(
    verb: str, setting: str, csist: Path, tmp_path: Path
) -> None:
    run, rtol = VERBS[verb]
    if verb not in _plain:
        (tmp_path / "plain").mkdir()
        _plain[verb] = run(tmp_path / "plain", csist)
    with SETTINGS[setting]():
        found = run(tmp_path, csist)
    assert_same(found, _plain[verb], rtol)


def test_float64_may_be_set_in_the_environment(csist: Path, tmp_path: Path) -> None:
    argv = ["evaluate", "--data", str(csist), "--method", "grid"]
    expected, found = (tmp_path / name for name in ("32.json", "64.json"))
    assert main([*argv, "--json", str(expected)]) == 0
    run = [sys.executable, "-m", "dscsnet_jax.cli", *argv, "--json", str(found)]
    settings = {"JAX_ENABLE_X64": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    subprocess.run(run, check=True, env=os.environ | settings)
    ours, theirs = (json.loads(path.read_text()) for path in (expected, found))
    assert theirs["mAP"] == pytest.approx(ours["mAP"], abs=1e-6)
    assert theirs["psnr"] == pytest.approx(ours["psnr"], rel=1e-4)


def test_posterior_means_of_float64_set_in_the_environment(csist: Path, tmp_path: Path) -> None:
    expected = unmixed(tmp_path, csist, "greedy")
    out = tmp_path / "64.csv"
    run = [sys.executable, "-m", "dscsnet_jax.cli", *unmixing(csist, "greedy"), "--out", str(out)]
    settings = {"JAX_ENABLE_X64": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    subprocess.run(run, check=True, env=os.environ | settings)
    assert_same(read(out), expected, 1e-2)


# --- library --------------------------------------------------------------------------------

SIDE = 5
SMALL = {"iterations": 2, "channels": 2, "attention_channels": 2, "hidden": 2, "frame_size": SIDE}
NOISY = scene.get_preset("csist_noise", frame_size=7)


def small(name: str, **more: Any) -> Network:
    known = default_fields(name)
    return make_network(name, **{k: v for k, v in SMALL.items() if k in known} | more)


NETWORKS = {
    **{name: small(name) for name in network_names()},
    "frame by frame": small("dscsnet", normalise="frame", x_step="gradient"),
    "matrix": small("ista_net", start="matrix"),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def single(targets: Targets) -> Targets:
    position, intensity = np.float32(targets.position), np.float32(targets.intensity)
    return from_arrays(position, intensity, targets.mask)


TRUTH = single(from_lists([[(2.1, 1.9, 230.0), (2.4, 2.4, 240.0)], [(2.5, 2.0, 221.0)], []]))
NOISE = np.ones(len(TRUTH.mask), np.float32)


@cache
def operator_of(dtype: type) -> SensingOperator:
    """In NumPy's arrays, which keep their type in every setting."""
    with jax.enable_x64(True):
        made = jax.jit(partial(sensing_operator, SIDE, division=3))(psf=dtype(0.5))
    return jax.device_get(made)


@cache
def frames() -> np.ndarray:
    return np.asarray(render(TRUTH, frame_size=SIDE, psf=0.5))


@cache
def parameters(name: str) -> Any:
    """Random ones of the network's structure."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(NETWORKS[name].init, jax.random.key(0), operator_of(np.float32))
    return jax.tree.map(lambda a: rng.normal(0, 0.1, a.shape).astype(np.float32), shapes)


def maps(name: str, params: Any, y: Any, operator: SensingOperator) -> Any:
    return NETWORKS[name].apply(params, y, operator, noise=NOISE, unroll=1, trace=True)


def slope(name: str, params: Any, y: Any, operator: SensingOperator) -> Any:
    return jax.grad(lambda p: maps(name, p, y, operator).x.sum())(params)


def kinds(tree: Any) -> set[np.dtype]:
    """Floating-point types of a tree's leaves."""
    return {leaf.dtype for leaf in jax.tree.leaves(tree) if leaf.dtype.kind == "f"}


SINGLE, DOUBLE = {np.dtype(np.float32)}, {np.dtype(np.float64)}
forward = jax.jit(maps, static_argnums=0)


@every_network
def test_networks_answer_the_same_in_every_setting(name: str) -> None:
    given = parameters(name), frames(), operator_of(np.float32)
    expected = jax.device_get(forward(name, *given))
    with jax.enable_x64(True):
        found = jax.device_get(forward(name, *given))
        assert kinds(found) == SINGLE
        assert_same(found, expected, 1e-4)
    with jax.debug_nans(True):
        assert_same(jax.device_get(forward(name, *given)), expected, 0)
    with jax.checking_leaks():  # looks at the tracing only
        traced = jax.eval_shape(partial(maps, name), *given)
        assert jax.tree.structure(traced) == jax.tree.structure(expected)


@every_network
def test_precision_is_that_of_frames_and_operator(x64: None, name: str) -> None:
    params, y = parameters(name), np.round(frames())
    double = jax.tree.map(lambda a: a.astype(float), params)
    for p, counts, width, wide in (
        (double, y, np.float32, SINGLE),
        (params, y.astype(np.uint8), np.float32, SINGLE),
        (params, y.astype(float), np.float32, DOUBLE),
        (params, y, np.float64, DOUBLE),
    ):
        given = p, counts, operator_of(width)
        assert kinds(jax.eval_shape(partial(maps, name), *given)) == wide
    assert kinds(jax.eval_shape(partial(slope, name), *given)) == SINGLE


@every_network
def test_parameters_are_single(x64: None, name: str) -> None:
    for width in (np.float32, np.float64):
        init = partial(NETWORKS[name].init, jax.random.key(0))
        assert kinds(jax.eval_shape(init, operator_of(width))) == SINGLE


def drawn(name: str) -> Any:
    """Parameters as `init` draws them."""
    return jax.jit(NETWORKS[name].init)(jax.random.key(0), operator_of(np.float32))


def solved(method: str) -> Any:
    def total(y: jax.Array, operator: SensingOperator) -> tuple[jax.Array, Any]:
        start = 0.1 * operator.adjoint(y)
        lam = np.full(3, 5.0)
        answer = solve_lasso(y, operator, lam=lam, method=method, start=start, tolerance=1e-3)
        return answer.x.sum(), (answer.x, answer.objective, answer.converged)

    both = jax.jit(jax.value_and_grad(total, has_aux=True))
    return both(frames(), operator_of(np.float32))


def unsolved() -> Any:
    """A frame whose start is the answer, so that no iteration is taken."""
    return solve_lasso(0 * frames()[:1], operator_of(np.float32), lam=1.0)._replace(iterations=None)  # type: ignore[arg-type]


@jax.jit
def _linear(operator: SensingOperator, y: jax.Array) -> Any:
    x = operator.adjoint(y)
    lasso = admm_lasso(y, operator, lam=np.float64(5), num_iterations=4, trace=True)
    exact = operator.solve(x, np.float64(0.1))
    return x, operator.data_step(y, x, 0.1), exact, operator.norm(), lasso


@jax.jit
def _limited(truth: Targets) -> Any:
    sensor = Sensor(gain=2.0)
    root = limits.information_root(truth, frame_size=SIDE, psf=0.5, sensor=sensor)
    best = limits.preset_limit(jax.random.key(0), truth, NOISY)
    return root.swapaxes(-1, -2) @ root, limits.cramer_rao(root, truth.mask), best


@jax.jit
def _on_the_grid(truth: Targets) -> list[jax.Array]:
    given = truth.position, truth.intensity, truth.mask
    make = partial(grid.grid_map, *given, frame_size=SIDE, division=3)
    return [make(), make(width=0.3), make(overwrite=True)]


@jax.jit
def _recorded(key: jax.Array, y: jax.Array) -> Any:
    sensor = digital(8, read_noise=2.0, gain=2.0)
    return expose(sensor, key, y), variance(sensor, y)


def judged() -> Any:
    nearest, shared, _ = _on_the_grid(TRUTH)
    scores = evaluate(sort_by_intensity(TRUTH), TRUTH, maps=shared, truth_maps=nearest)
    written = scores.as_dict()
    return {name: np.float32(written[name]) for name in ("mAP", "position_rmse", "psnr", "ssim")}


FUNCTIONS: dict[str, tuple[Callable[[], Any], float]] = {
    **{f"init, {name}": (partial(drawn, name), 1e-5) for name in ("dscsnet", "ista_net")},
    "solve_lasso, fista": (partial(solved, "fista"), 1e-2),
    "solve_lasso, admm": (partial(solved, "admm"), 1e-2),
    "solve_lasso, no iteration": (unsolved, 0),
    "operator": (lambda: _linear(operator_of(np.float32), frames()), 1e-4),
    "limits": (partial(_limited, TRUTH), 1e-3),
    "grid_map": (partial(_on_the_grid, TRUTH), 1e-6),
    "sensor": (lambda: _recorded(jax.random.key(0), frames()), 1e-5),
    "evaluation": (judged, 1e-5),
}


@every_setting
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_library_answers_the_same_in_every_setting(name: str, setting: str) -> None:
    call, rtol = FUNCTIONS[name]
    if name not in _plain:
        _plain[name] = jax.device_get(call())
    with SETTINGS[setting]():
        found = jax.device_get(call())
    assert kinds(found) == SINGLE
    assert_same(found, _plain[name], rtol)
