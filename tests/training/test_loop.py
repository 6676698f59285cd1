"""Loop: what a run leaves behind, and how it stops, resumes and fails."""

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from dscsnet_jax.evaluation.report import Scores, evaluate
from dscsnet_jax.io.weights import Geometry, load_weights
from dscsnet_jax.maps.readout import threshold_cells
from dscsnet_jax.physics import scene as scenes
from dscsnet_jax.physics.optics import sensing_operator
from dscsnet_jax.physics.targets import Targets
from dscsnet_jax.training import config as configs
from dscsnet_jax.training import loop
from dscsnet_jax.training.checkpoint import Checkpoints
from dscsnet_jax.training.step import Step, TrainState, init_state, make_optimiser
from dscsnet_jax.unfolding.admm import Unfolded
from dscsnet_jax.unfolding.network import DSCSNet, num_parameters
from dscsnet_jax.unfolding.registry import Network

FIELDS = {
    "seed": 7,
    "scene.frame_size": 5,
    "network.iterations": 1,
    "network.channels": 4,
    "network.threshold": "scalar",
    "optimiser.warmup_steps": 1,
    "optimiser.learning_rate": 1e-2,
    "train.batch_size": 8,
    "train.num_steps": 6,
    "train.log_every": 2,
    "train.eval_every": 3,
    "train.checkpoint_every": 4,
    "eval.num_frames": 12,
    "eval.frame_size": 6,
}
LOGGED = [2, 4, 6]
Hook = Callable[[int, TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


pytestmark = pytest.mark.usefixtures("quick_compilation")


def make_config(**changes: Any) -> ml_collections.ConfigDict:
    config = configs.default_config()
    for name, value in {**FIELDS, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
        configs.set_field(config, name, value)
    return config


def light_preset(name: str, **changes: Any) -> scenes.Preset:
    """At most two targets a frame: the simulation compiles faster."""
    return scenes.get_preset(name, max_targets=2, **changes)


class Trainer:
    """`loop.train` with the one compiled step of this file, and a hook around each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, compiled: dict[str, Any]) -> None:
        self.steps: list[int] = []
        self.hook: Hook | None = None
        self.before: Callable[[int, TrainState], None] | None = None
        build = loop.data_parallel

        def data_parallel(make_step: Any, devices: Any) -> tuple[Step, int]:
            if not compiled:
                compiled["step"], compiled["share"] = build(make_step, devices)
            return self._step(compiled["step"]), compiled["share"]

        monkeypatch.setattr(loop, "data_parallel", data_parallel)
        monkeypatch.setattr(configs, "get_preset", light_preset)

    def _step(self, step: Step) -> Step:
        def hooked(state: TrainState, keys: jax.Array) -> Any:
            number = int(state.step) + 1
            self.steps.append(number)
            expected = scenes.frame_keys(7, "train", 8 * (number - 1) + jnp.arange(8))
            assert (keys == expected).all()
            if self.before is not None:
                self.before(number, state)
            state, metrics = step(state, keys)
            return (state, metrics) if self.hook is None else self.hook(number, state, metrics)

        return hooked

    def __call__(self, workdir: Path, **changes: Any) -> loop.TrainResult:
        self.steps.clear()
        return loop.train(make_config(**changes), workdir)


@pytest.fixture
def plain_interrupt() -> Iterator[None]:
    """Python's own answer to SIGINT, which a process in the background may lack."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    return {}


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, compiled: dict[str, Any]) -> Trainer:
    return Trainer(monkeypatch, compiled)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, compiled: dict[str, Any]
) -> tuple[Path, loop.TrainResult]:
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "new" / "run"
    with pytest.MonkeyPatch.context() as patch:
        return workdir, Trainer(patch, compiled)(workdir)


def lines(workdir: Path) -> list[dict[str, Any]]:
    text = (workdir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def untimed(workdir: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    clock = ("seconds", "frames_per_second")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines(workdir)]


def network() -> Network:
    return configs.make_method(make_config())


def restored(workdir: Path) -> TrainState:
    """State of the newest checkpoint."""
    config = make_config()
    operator = sensing_operator(5, division=3, psf=0.5)
    optimiser = make_optimiser(num_steps=6, **config.optimiser.to_dict())
    checkpoints = Checkpoints(workdir)
    state = checkpoints.restore(init_state(network(), operator, optimiser, 0))
    checkpoints.close()
    return state


def assert_same_leaves(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def saved_steps(workdir: Path) -> list[str]:
    return sorted(os.listdir(workdir / "checkpoints"))


def assert_same_run(workdir: Path, other: Path) -> None:
    """Same parameters, optimiser, step, metrics and released weights, bit for bit."""
    assert_same_leaves(restored(workdir), restored(other))
    assert untimed(workdir) == untimed(other)
    tensors = "weights.safetensors"
    assert (workdir / tensors).read_bytes() == (other / tensors).read_bytes()


def test_run_writes_its_config_metrics_checkpoints_and_weights(
    finished: tuple[Path, loop.TrainResult],
) -> None:
    workdir, result = finished
    files = ["checkpoints", "config.json", "metrics.jsonl", "weights.json", "weights.safetensors"]
    assert sorted(os.listdir(workdir)) == files
    assert (result.step, result.finished) == (6, True)
    assert result.weights == workdir / "weights.safetensors"
    assert json.loads((workdir / "config.json").read_text()) == make_config().to_dict()
    assert saved_steps(workdir) == ["4", "6"]


def test_metrics_hold_the_steps_asked_for(finished: tuple[Path, loop.TrainResult]) -> None:
    workdir, result = finished
    logged = [line for line in lines(workdir) if "loss" in line]
    scored = [line for line in lines(workdir) if "loss" not in line]
    assert [line["step"] for line in logged] == LOGGED
    assert set(logged[0]) == {"step", "loss", "gradient_norm", "frames_per_second", "seconds"}
    seconds = [line["seconds"] for line in logged]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert [line["step"] for line in scored] == [3, 6]
    names = ["mAP", "AP05", "AP10", "AP15", "AP20", "AP25"]
    assert set(scored[0]) == {"step", *(f"val_{name}" for name in names)}
    assert {f"val_{name}": value for name, value in result.scores.items()} == {
        name: value for name, value in scored[-1].items() if name != "step"
    }


def test_weights_are_the_final_parameters_with_where_they_come_from(
    finished: tuple[Path, loop.TrainResult],
) -> None:
    workdir, result = finished
    weights = load_weights(workdir / "weights.safetensors")
    final = restored(workdir)
    assert int(final.step) == 6
    assert_same_leaves(weights.params, final.params)
    about = weights.metadata
    assert about.method == "dscsnet"
    assert about.config == dataclasses.asdict(network().config)
    assert about.geometry == Geometry((5, 5), 3, (0.5, 0.5))
    assert about.score == {"split": "val", "frames": 12, **result.scores}
    seconds = about.training.pop("seconds")
    assert seconds == round(lines(workdir)[-2]["seconds"])
    assert about.training == {
        "preset": "csist",
        "truth_width": make_config().train.truth_width,
        "intensity": [220.0, 250.0],
        "sigma": [0.5, 0.5],
        "read_noise": [0.0, 0.0],
        "pedestal": [0.0, 0.0],
        "background": "subtracted",
        "separation": 0.5,
        "frames": 48,
        "seed": 7,
        "device": jax.devices()[0].device_kind,
        "parameters": num_parameters(final.params),
    }


@jax.jit
def by_hand(params: Any, keys: jax.Array) -> tuple[Targets, Targets]:
    """Found and true targets of 6 x 6 frames, all in one batch."""
    scene = scenes.simulate(light_preset("csist", frame_size=6), keys)
    x = network().apply(params, scene.frames, sensing_operator(6, division=3, psf=0.5)).x
    return threshold_cells(x, division=3).targets, scene.targets


def scores_by_hand(workdir: Path, split: str) -> Scores:
    params = load_weights(workdir / "weights.safetensors").params
    return evaluate(*by_hand(params, scenes.frame_keys(7, split, jnp.arange(12))))


def test_scores_are_those_of_the_val_split_at_the_evaluation_size(
    finished: tuple[Path, loop.TrainResult],
) -> None:
    workdir, result = finished
    expected, other = (scores_by_hand(workdir, split).as_dict() for split in ("val", "train"))
    assert result.scores == pytest.approx({name: expected[name] for name in result.scores})
    assert result.scores != pytest.approx({name: other[name] for name in result.scores})


def test_finished_run_returns_at_once_with_its_scores(
    train: Trainer, finished: tuple[Path, loop.TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, result = finished
    before = (workdir / "metrics.jsonl").read_bytes(), (workdir / "weights.json").read_bytes()
    monkeypatch.setattr(loop, "map_scores", lambda *_a, **_k: pytest.fail("evaluated again"))
    assert train(workdir) == result
    assert train.steps == []
    after = (workdir / "metrics.jsonl").read_bytes(), (workdir / "weights.json").read_bytes()
    assert after == before


def test_row32_same_seed_twice_is_bit_identical(
    train: Trainer, finished: tuple[Path, loop.TrainResult], tmp_path: Path
) -> None:
    result = train(tmp_path)
    assert train.steps == [1, 2, 3, 4, 5, 6]
    assert result.scores == finished[1].scores
    assert_same_run(tmp_path, finished[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_row23_signal_finishes_the_step_and_saves_and_row28_resume_is_bit_exact(
    train: Trainer,
    finished: tuple[Path, loop.TrainResult],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def stop_in_step_3(done: int, state: TrainState) -> None:
        if done == 3:
            signal.raise_signal(number)

    train.before = stop_in_step_3
    result = train(tmp_path)
    assert train.steps == [1, 2, 3]
    assert (result.step, result.finished, result.weights) == (3, False, None)
    assert saved_steps(tmp_path) == ["3"]
    assert not (tmp_path / "weights.safetensors").exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    train.before = None
    result = train(tmp_path)
    assert train.steps == [4, 5, 6]
    assert (result.step, result.finished) == (6, True)
    assert result.scores == finished[1].scores
    assert_same_run(tmp_path, finished[0])


@pytest.mark.usefixtures("plain_interrupt")
def test_row23_second_signal_stops_at_once(train: Trainer, tmp_path: Path) -> None:
    def interrupt_twice(done: int, state: TrainState) -> None:
        if done == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    train.before = interrupt_twice
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert saved_steps(tmp_path) == ["4"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("plain_interrupt")
def test_signals_are_left_alone_outside_the_main_thread() -> None:
    seen: list[Any] = []

    def inside() -> None:
        with loop.StopSignal() as stop:
            seen.extend([stop.number, signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [None, signal.default_int_handler]


def test_row22_metrics_after_the_last_checkpoint_and_half_a_line_are_dropped(
    train: Trainer, finished: tuple[Path, loop.TrainResult], tmp_path: Path
) -> None:
    """A run killed in step 6: its checkpoint is of step 4, its metrics go further."""

    class Killed(BaseException):
        pass

    def kill(done: int, state: TrainState) -> None:
        if done == 6:
            raise Killed

    train.before = kill
    with pytest.raises(Killed):
        train(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 0.0}\n{"step": 6, "lo')
    train.before = None
    assert train(tmp_path).finished
    assert train.steps == [5, 6]
    assert_same_run(tmp_path, finished[0])


def spoil(metrics: dict[str, jax.Array], **wrong: float) -> dict[str, jax.Array]:
    return {**metrics, **{name: jnp.asarray(value) for name, value in wrong.items()}}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": np.nan}, r"the loss is nan at step 6 \(seed 7\); checkpoint 4 is untouched"),
        (
            {"gradient_norm": np.inf},
            r"the gradient norm is inf and the loss is nan at step 6 \(seed 7\)",
        ),
    ],
)
def test_row31_loss_that_is_not_finite_names_step_and_seed_and_keeps_the_checkpoint(
    train: Trainer, tmp_path: Path, wrong: dict[str, float], message: str
) -> None:
    """The loss goes wrong in step 5 and is looked at in step 6."""
    kept: list[Any] = []

    def fail_from_step_5(done: int, state: TrainState, metrics: dict[str, jax.Array]) -> Any:
        if done == 4:
            kept.append(jax.device_get(state.params))
        if done < 5:
            return state, metrics
        broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), state.params)
        return state._replace(params=broken), spoil(metrics, **wrong)

    train.hook = fail_from_step_5
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path)
    assert saved_steps(tmp_path) == ["4"]
    assert_same_leaves(restored(tmp_path).params, kept[0])
    assert [line["step"] for line in lines(tmp_path)] == [2, 3, 4]
    assert not (tmp_path / "weights.safetensors").exists()


def test_row31_stopped_run_does_not_save_a_state_that_is_not_finite(
    train: Trainer, tmp_path: Path
) -> None:
    def fail_and_stop(done: int, state: TrainState, metrics: dict[str, jax.Array]) -> Any:
        signal.raise_signal(signal.SIGINT)
        return state, spoil(metrics, loss=np.nan)

    train.hook = fail_and_stop
    with pytest.raises(FloatingPointError, match=r"nan at step 1 \(seed 7\); no checkpoint yet"):
        train(tmp_path)
    assert saved_steps(tmp_path) == []


def test_other_config_in_the_same_folder_is_refused_by_field(
    train: Trainer, finished: tuple[Path, loop.TrainResult]
) -> None:
    workdir, _ = finished
    before = {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    message = (
        r"run with another config; differing: seed = 7 there, 8 here, "
        r"train.batch_size = 8 there, 16 here$"
    )
    with pytest.raises(ValueError, match=message):
        train(workdir, seed=8, train__batch_size=16)
    assert before == {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    assert saved_steps(workdir) == ["4", "6"]


def test_run_starts_from_initial_weights(
    train: Trainer, finished: tuple[Path, loop.TrainResult], tmp_path: Path
) -> None:
    first: list[TrainState] = []

    def keep_and_stop(done: int, state: TrainState) -> None:
        first.append(jax.device_get(state))
        signal.raise_signal(signal.SIGINT)

    train.before = keep_and_stop
    weights = finished[0] / "weights.safetensors"
    train(tmp_path, train__init_weights=str(weights))
    assert train.steps == [1]
    assert_same_leaves(first[0].params, load_weights(weights).params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(first[0].optimiser))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network__channels": 8}, r"weights\.safetensors are of another network: .*'channels': 4"),
        ({"network__history": False}, "are of another network"),
        ({"scene__division": 5}, r"trained for division 3.*operator has division 5"),
    ],
)
def test_row21_initial_weights_of_another_network_are_refused_and_nothing_is_written(
    train: Trainer,
    finished: tuple[Path, loop.TrainResult],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    weights = str(finished[0] / "weights.safetensors")
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", train__init_weights=weights, **changes)
    assert not (tmp_path / "run").exists()


def test_batch_that_does_not_divide_by_the_devices_is_refused(tmp_path: Path) -> None:
    config = make_config(train__batch_size=9)
    with pytest.raises(ValueError, match=r"train\.batch_size 9 does not divide by 2 devices"):
        loop.train(config, tmp_path / "run", devices=jax.devices()[:1] * 2)
    assert not (tmp_path / "run").exists()


def test_row33_every_frame_is_scored_once_when_the_last_batch_is_ragged(
    finished: tuple[Path, loop.TrainResult],
) -> None:
    """Three batches of 5 for 12 frames, against the 12 frames in one go."""
    params = load_weights(finished[0] / "weights.safetensors").params
    preset = light_preset("csist", frame_size=6)
    options = {"seed": 7, "split": "val", "num_frames": 12}
    ragged = loop.map_scores(network(), params, preset, batch_size=5, **options)
    whole = scores_by_hand(finished[0], "val")
    assert ragged.frames == 12
    assert (ragged.targets, ragged.detections) == (whole.targets, whole.detections)
    assert whole.detections > 0
    np.testing.assert_array_equal(ragged.count_confusion, whole.count_confusion)
    assert ragged.cso.as_dict() == pytest.approx(whole.cso.as_dict())
    assert ragged.matches._asdict() == pytest.approx(whole.matches._asdict(), nan_ok=True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {
                "scene__preset": "csist_noise",
                "scene__sigma": 0.7,
                "scene__read_noise": 3.0,
                "scene__pedestal": 12.0,
                "scene__intensity_low": 100.0,
                "scene__intensity_high": 900.0,
            },
            {
                "intensity": (100, 900),
                "sigma": (0.7, 0.7),
                "read_noise": (3, 3),
                "pedestal": (12, 12),
            },
        ),
        (
            {"scene__preset": "csist_varied", "scene__intensity_high": 300.0},
            {
                "intensity": (50, 300),
                "sigma": (0.4, 1.0),
                "read_noise": (0, 10),
                "pedestal": (0, 20),
            },
        ),
    ],
    ids=["set", "varied"],
)
def test_weights_record_the_conditions_really_trained_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    expected: dict[str, tuple[float, float]],
) -> None:
    """The steps are left out: what is released here are the first parameters."""

    def nothing(make_step: Any, devices: Any) -> tuple[Step, int]:
        zeros = {"loss": jnp.zeros(()), "gradient_norm": jnp.zeros(())}
        return lambda state, keys: (state._replace(step=state.step + 1), zeros), 1

    scored: list[scenes.Preset] = []

    def no_scores(_network: Any, _params: Any, preset: scenes.Preset, **_: Any) -> Scores:
        scored.append(preset)
        one = Targets(np.zeros((1, 1, 2)), np.zeros((1, 1)), np.ones((1, 1), bool))
        return evaluate(one, one)

    monkeypatch.setattr(loop, "data_parallel", nothing)
    monkeypatch.setattr(loop, "map_scores", no_scores)
    loop.train(make_config(network__normalise="frame", **changes), tmp_path)
    about = load_weights(tmp_path / "weights.safetensors").metadata
    assert {name: tuple(about.training[name]) for name in expected} == expected
    assert about.training["background"] == "subtracted"
    varies = changes["scene__preset"] == "csist_varied"
    assert about.training.get("optics") == ("told" if varies else None)
    assert about.training["preset"] == changes["scene__preset"]
    sigma = changes.get("scene__sigma", 0.5)
    assert about.geometry == Geometry((5, 5), 3, (sigma, sigma))
    assert {preset.sigma for preset in scored} == {sigma}


def test_scores_count_every_cell_above_the_threshold_on_large_frames() -> None:
    """On 64 x 64 pixels, with maps of more such cells than any fixed number of slots."""
    x = np.full((3, 192, 192), 49.9, np.float32)
    bright = np.random.default_rng(0).permutation(192**2)
    for frame, count in enumerate((5, 70, 4001)):
        x[frame].flat[bright[:count]] = np.linspace(50, 250, count)
    found = loop._all_cells(jnp.asarray(x), 3)
    assert np.asarray(found.count).tolist() == [5, 70, 4001]
    cells = np.asarray(found.position[2][found.mask[2]], np.float64) * 3 + 1
    flat = (np.round(cells) @ [192, 1]).astype(int)
    assert sorted(flat) == sorted(bright[:4001])
    few = loop._all_cells(jnp.asarray(x[:1]), 3)
    assert few.mask.shape == (1, 32)
    everything = loop._all_cells(jnp.full((1, 12, 12), 60.0), 3)
    assert np.asarray(everything.count).tolist() == [144]


def test_map_scores_lose_no_detection_of_a_young_network() -> None:
    """A network that answers with the same value in every cell."""

    class Everywhere(DSCSNet):
        def apply(self, params: Any, y: jax.Array, operator: Any, **_: Any) -> Unfolded:
            return Unfolded(jnp.full((len(y), *operator.map_shape), params))

    preset = light_preset("csist", frame_size=6)
    options = {"seed": 0, "split": "val", "num_frames": 4, "batch_size": 3}
    scores = loop.map_scores(Everywhere(), jnp.asarray(60.0), preset, **options)
    assert (scores.frames, scores.detections) == (4, 4 * 18**2)
    assert loop.map_scores(Everywhere(), jnp.asarray(49.0), preset, **options).detections == 0


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "weights.json", "metrics.jsonl", "checkpoints"]
)
def test_row35_results_without_their_config_are_not_replaced(
    train: Trainer, tmp_path: Path, name: str
) -> None:
    mine = tmp_path / name
    if name == "checkpoints":
        mine.mkdir()
    else:
        mine.write_text("mine")
    message = rf"{tmp_path} holds {name} of a run but no config\.json"
    with pytest.raises(FileExistsError, match=message):
        train(tmp_path)
    assert train.steps == []
    assert os.listdir(tmp_path) == [name]
    assert mine.is_dir() or mine.read_text() == "mine"


def test_other_files_in_the_folder_are_no_reason_to_refuse_it(
    train: Trainer, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert train(tmp_path).finished
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", [b"", b'{"seed": 7', b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_row24_broken_config_of_the_run_is_named(
    train: Trainer, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'config.json'}: not the config of a run"):
        train(tmp_path)
    assert train.steps == []
    assert (tmp_path / "config.json").read_bytes() == content


@pytest.mark.parametrize("line", [b"{", b"", b"[2]", b'{"loss": 1}', b'{"step": "2"}', b"\xff"])
def test_row24_broken_line_of_the_metrics_is_named(
    train: Trainer,
    finished: tuple[Path, loop.TrainResult],
    tmp_path: Path,
    line: bytes,
) -> None:
    (tmp_path / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
    content = b'{"step": 2, "loss": 1.0}\n' + line + b'\n{"step": 4}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    message = rf"{tmp_path / 'metrics.jsonl'}, line 2: not a record of metrics"
    with pytest.raises(ValueError, match=message):
        train(tmp_path)
    assert train.steps == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_run_from_before_a_field_was_added_goes_on(
    train: Trainer, finished: tuple[Path, loop.TrainResult], tmp_path: Path
) -> None:
    """Fields that are not set do not make another config of it."""
    stored = json.loads((finished[0] / "config.json").read_text())
    for name in ("sigma", "read_noise", "pedestal", "intensity_low", "intensity_high"):
        assert stored["scene"].pop(name) is None
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert train(tmp_path).finished
