"""Loop: run steps, report, evaluate, save; stop cleanly and resume bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dscsnet_jax.evaluation.report import Scores, evaluate, join_batches
from dscsnet_jax.io.outputs import replacing
from dscsnet_jax.io.weights import Metadata, check_geometry, geometry_of, load_weights, save_weights
from dscsnet_jax.maps.readout import threshold_cells
from dscsnet_jax.physics.optics import SensingOperator, sensing_operator
from dscsnet_jax.physics.scene import Preset, frame_keys, simulate
from dscsnet_jax.physics.targets import Targets
from dscsnet_jax.training import config as configs
from dscsnet_jax.training.checkpoint import Checkpoints
from dscsnet_jax.training.parallel import data_parallel
from dscsnet_jax.training.step import (
    Metrics,
    Step,
    TrainState,
    apply_to_scene,
    init_state,
    make_optimiser,
    make_step,
)
from dscsnet_jax.unfolding.network import num_parameters
from dscsnet_jax.unfolding.registry import Network

EVAL_BATCH = 250
_LEAST_SLOTS = 32
_OWN_FILES = ("metrics.jsonl", "checkpoints", "weights.safetensors", "weights.json")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
      step: steps done.
      finished: false if a signal stopped the run (a checkpoint was saved).
      scores: of the last evaluation on the `val` split, in percent; empty if none ran.
      weights: the released weights, or None if not finished.
    """

    step: int
    finished: bool
    scores: dict[str, Any]
    weights: Path | None


def train(
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> TrainResult:
    """Train a network as a config says, resuming from the workdir's newest checkpoint.

    Writes `config.json`, `metrics.jsonl`, `checkpoints/` and, at the end,
    `weights.safetensors` with `weights.json` into `workdir`. SIGINT and SIGTERM finish
    the step, save a checkpoint and return; a second signal stops at once.

    Args:
      config: see `training.config.default_config`.
      workdir: the run's folder; created if missing.
      devices: what to run on; default: all local devices.

    Returns:
      A `TrainResult`.

    Raises:
      FileExistsError: if `workdir` holds results of a run, but not the run's config.
      ValueError: if the config is wrong, differs from that of the run in `workdir`, the
        initial weights do not fit, or a file of the run there is broken.
      FloatingPointError: if the loss is not finite; names the step and the seed, and
        leaves the last checkpoint as it was.
    """
    configs.check_config(config)
    workdir = Path(workdir)
    preset = configs.make_preset(config)
    network = configs.make_method(config)
    operator = _operator(preset)
    optimiser = make_optimiser(num_steps=config.train.num_steps, **config.optimiser.to_dict())
    step, share = data_parallel(
        lambda axis: make_step(
            network,
            preset,
            operator,
            optimiser,
            truth_width=config.train.truth_width,
            symmetry_weight=config.train.symmetry_weight,
            remat=config.train.remat,
            axis_name=axis,
        ),
        jax.local_devices() if devices is None else devices,
    )
    if config.train.batch_size % share:
        raise ValueError(
            f"train.batch_size {config.train.batch_size} does not divide by {share} devices"
        )
    initial = _initial_params(config, network, operator)
    workdir.mkdir(parents=True, exist_ok=True)
    _claim_config(config, workdir)
    state = init_state(network, operator, optimiser, config.seed, initial)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(state)
        run = _Run(config, workdir, network, checkpoints)
        state, finished = run.advance(step, state)
    scores = dict(run.scores)
    weights = _release(run, state, preset, operator) if finished else None
    return TrainResult(int(state.step), finished, scores, weights)


def map_scores(
    network: Network,
    params: Any,
    preset: Preset,
    *,
    seed: int,
    split: str,
    num_frames: int,
    batch_size: int = EVAL_BATCH,
) -> Scores:
    """Scores of the map itself (reference rule) on simulated frames; no cell is left out.

    Args:
      network: the network.
      params: its parameters.
      preset: recipe of the frames.
      seed: of the data.
      split: which frames, `train`, `val` or `test`.
      num_frames: how many.
      batch_size: frames at once.

    Returns:
      `Scores`.
    """
    make = _mapper(network, preset)
    starts = range(0, num_frames, batch_size)
    pairs = []
    for start in starts:
        keys = frame_keys(seed, split, start + jnp.arange(batch_size))
        x, true_targets = make(params, keys)
        pairs.append((_all_cells(x, network.config.division), true_targets))
    found, truth = (join_batches(side, num_frames) for side in zip(*pairs, strict=True))
    return evaluate(found, truth)


@functools.lru_cache(maxsize=4)
def _mapper(
    network: Network, preset: Preset
) -> Callable[[Any, jax.Array], tuple[jax.Array, Targets]]:
    """Maps and true targets of frames by their keys; kept, so that it compiles once a run."""
    operator = _operator(preset)

    @jax.jit
    def make(params: Any, keys: jax.Array) -> tuple[jax.Array, Targets]:
        scene = simulate(preset, keys)
        return apply_to_scene(network, params, scene, preset, operator).x, scene.targets

    return make


_threshold_cells = jax.jit(threshold_cells, static_argnames=("division", "max_targets"))


def _all_cells(x: jax.Array, division: int) -> Targets:
    """All cells above the threshold, in as many slots as the fullest frame needs.

    A young network answers with many of them. The slots are doubled until they do, as
    each number of slots is a program of its own.
    """
    slots = _LEAST_SLOTS
    while (read := _threshold_cells(x, division=division, max_targets=slots)).truncated.any():
        slots *= 2
    return read.targets


class StopSignal:
    """Whether SIGINT or SIGTERM asked for a stop; a second signal acts at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # Handlers can only be set in the main thread; elsewhere the owner decides.
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


class _Run:
    """One run in progress: where it writes and what it shows."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: Path,
        network: Network,
        checkpoints: Checkpoints,
    ) -> None:
        self.config = config
        self.workdir = workdir
        self.network = network
        self.checkpoints = checkpoints
        self.scores: dict[str, Any] = {}
        self.seconds = 0.0

    def advance(
        self,
        step: Step,
        state: TrainState,
    ) -> tuple[TrainState, bool]:
        """Run steps up to the last one or a signal; returns the state and whether done."""
        cfg = self.config.train
        done = int(state.step)
        metrics: Metrics = {}
        self._resume_metrics(done)
        with StopSignal() as stop, _progress() as progress:
            task = progress.add_task("train", total=cfg.num_steps, completed=done, note="")
            since, clock = done, time.perf_counter()
            while done < cfg.num_steps and stop.number is None:
                index = done * cfg.batch_size + jnp.arange(cfg.batch_size)
                state, metrics = step(state, frame_keys(self.config.seed, "train", index))
                done += 1
                if done % cfg.log_every == 0 or done == cfg.num_steps:
                    jax.block_until_ready(metrics)
                    seconds = time.perf_counter() - clock
                    self.seconds += seconds
                    note = self._log(done, metrics, (done - since) * cfg.batch_size / seconds)
                    progress.update(task, completed=done, note=note)
                    since, clock = done, time.perf_counter()
                if done % cfg.eval_every == 0 or done == cfg.num_steps:
                    self._evaluate(done, state)
                    since, clock = done, time.perf_counter()
                if done % cfg.checkpoint_every == 0:
                    self._save(state, metrics)
                    since, clock = done, time.perf_counter()
            if self.checkpoints.latest_step() != done:
                self._save(state, metrics)
        return state, done >= cfg.num_steps

    def _log(self, done: int, metrics: Metrics, rate: float) -> str:
        values = self._finite(done, metrics)
        self._write({"step": done, **values, "frames_per_second": rate, "seconds": self.seconds})
        return f"loss {values['loss']:.4f}  {rate:.0f} frames/s"

    def _evaluate(self, done: int, state: TrainState) -> None:
        cfg = self.config
        preset = configs.make_preset(cfg, cfg.eval.frame_size)
        scores = map_scores(
            self.network,
            state.params,
            preset,
            seed=cfg.seed,
            split="val",
            num_frames=cfg.eval.num_frames,
        ).as_dict()
        self.scores = {k: v for k, v in scores.items() if k.startswith(("mAP", "AP"))}
        self._write({"step": done, **{f"val_{k}": v for k, v in self.scores.items()}})

    def _save(self, state: TrainState, metrics: Metrics) -> None:
        self._finite(int(state.step), metrics)
        self.checkpoints.save(state)

    def _finite(self, done: int, metrics: Metrics) -> dict[str, float]:
        """The metrics as numbers; an infinite gradient spoils the state before the loss."""
        values = {name: float(value) for name, value in metrics.items()}
        wrong = [
            f"the {name.replace('_', ' ')} is {value}"
            for name, value in values.items()
            if not math.isfinite(value)
        ]
        if wrong:
            last = self.checkpoints.latest_step()
            kept = "no checkpoint yet" if last is None else f"checkpoint {last} is untouched"
            raise FloatingPointError(
                f"{' and '.join(wrong)} at step {done} (seed {self.config.seed}); {kept}"
            )
        return values

    def _write(self, record: dict[str, Any]) -> None:
        with (self.workdir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _resume_metrics(self, done: int) -> None:
        """Drop what a killed run logged after its last checkpoint; pick up its totals."""
        path = self.workdir / "metrics.jsonl"
        if not path.exists():
            return
        kept = [line for line in _logged(path) if line["step"] <= done]
        with replacing(path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        self.seconds = max((line.get("seconds", 0.0) for line in kept), default=0.0)
        for line in kept:
            scored = {k[4:]: v for k, v in line.items() if k.startswith("val_")}
            self.scores = scored or self.scores


def _operator(preset: Preset) -> SensingOperator:
    # Networks train in single precision also where JAX is set to another.
    sigma = np.asarray(preset.sigma, np.float32)
    return sensing_operator(preset.frame_size, division=preset.division, psf=sigma)


def _progress() -> Progress:
    """Progress on stderr: loss, frames/s and time left; silent when not a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    # The console calls anything a terminal where FORCE_COLOR is set.
    return Progress(*columns, console=console, disable=not sys.stderr.isatty())


def _logged(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a kill may have cut the last one short."""
    *whole, _half_written = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(whole, 1):
        try:
            record = json.loads(line)
            if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
                raise ValueError("expected an object with a step")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a record of metrics ({error})") from error
        records.append(record)
    return records


def _claim_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Write the run's config, or check that the run there has the same."""
    path = workdir / "config.json"
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    if not path.exists():
        found = [name for name in _OWN_FILES if (workdir / name).exists()]
        if found:
            raise FileExistsError(
                f"{workdir} holds {', '.join(found)} of a run but no {path.name} to go on with; "
                "choose another folder"
            )
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
        return
    try:
        stored = json.loads(path.read_bytes())
        if not isinstance(stored, dict):
            raise ValueError("expected an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the config of a run ({error})") from error
    ours, theirs = (dict(configs.flat(tree)) for tree in (json.loads(text), stored))
    differ = [k for k in sorted(ours | theirs) if ours.get(k) != theirs.get(k)]
    if differ:
        raise ValueError(
            f"{workdir} holds a run with another config; differing: "
            + ", ".join(f"{k} = {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in differ)
        )


def _initial_params(
    config: ml_collections.ConfigDict, network: Network, operator: SensingOperator
) -> Any:
    """Parameters to start from, or None for new ones."""
    if not config.train.init_weights:
        return None
    weights = load_weights(config.train.init_weights)
    check_geometry(weights.metadata, operator)
    fresh = jax.eval_shape(lambda: network.init(jax.random.key(0), operator))
    shapes = [jax.tree.map(lambda a: a.shape, tree) for tree in (fresh, weights.params)]
    theirs, ours = weights.metadata, dataclasses.asdict(network.config)
    if theirs.method != config.method or shapes[0] != shapes[1]:
        raise ValueError(
            f"the weights {config.train.init_weights} are of another network: they are of "
            f"{theirs.method} {theirs.config}, the run is of {config.method} {ours}"
        )
    return jax.tree.map(jnp.asarray, weights.params)


def _conditions(preset: Preset) -> dict[str, Any]:
    """Ranges (low, high) of what was trained on, and whether the network was told the PSF."""
    low, high = preset.cluster.intensity
    sensor, varied = preset.sensor, preset.variation
    ranges: dict[str, Any]
    if varied is None:
        fixed = {
            "sigma": preset.sigma,
            "read_noise": sensor.read_noise,
            "pedestal": sensor.pedestal,
        }
        ranges = {name: [value, value] for name, value in fixed.items()}
    else:
        low = varied.least_intensity[0]
        # What is drawn below 0 is no noise.
        noise = [max(end, 0.0) for end in varied.read_noise]
        ranges = {
            "sigma": list(varied.sigma),
            "optics": "told",
            "read_noise": noise,
            "pedestal": list(varied.pedestal),
        }
    return {"intensity": [low, high], **ranges, "background": "subtracted"}


def _release(run: _Run, state: TrainState, preset: Preset, operator: SensingOperator) -> Path:
    """Write the trained parameters as released weights."""
    config = run.config
    path = run.workdir / "weights.safetensors"
    metadata = Metadata(
        method=config.method,
        config=dataclasses.asdict(run.network.config),
        geometry=geometry_of(operator),
        score={"split": "val", "frames": config.eval.num_frames, **run.scores},
        training={
            "preset": preset.name,
            "truth_width": config.train.truth_width,
            **_conditions(preset),
            "separation": preset.cluster.separation,
            "frames": int(state.step) * config.train.batch_size,
            "seed": config.seed,
            "seconds": round(run.seconds),
            "device": next(iter(state.step.devices())).device_kind,
            "parameters": num_parameters(state.params),
        },
    )
    save_weights(path, jax.device_get(state.params), metadata, force=True)
    return path
