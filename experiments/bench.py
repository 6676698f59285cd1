"""Bench: every learned method trained and scored alike, beside the classical solvers.

    python experiments/bench.py --scale cpu
    python experiments/bench.py --scale tiny --methods lista fista --out table

Each learned method gets the same frames (preset csist, c = 3, 11 x 11 pixels), steps,
schedule, clipping and truth maps (see `budget.py`). Its peak learning rate is the one of
the budget's with the lowest loss at the end of a run of a tenth of the steps; its last
parameters are scored on the `test` split:

- `mAP`, `AP05` .. `AP25`: of the map by the reference rule, every cell >= 50 counts;
- `count`: frames whose number of peaks of the map is right;
- `off mAP`, `off count`: with the fit off the grid behind it, sensor and prior known
  (`unmix(estimate="map", options=Options(weights))`).

`ista`, `fista` and `admm` solve the lasso to a relative gap of 1e-4, or as many iterations
as the budget has, with the l1 weight that scores best on `val`; `greedy` is the fit without
any map. FLOPs are those the compiler counts; MB are arguments, results and intermediate
arrays of the compiled programs: one training step, and the forward pass of 64 frames.

Interrupted, the same command goes on where it was; finished methods are not run again.
The table has all methods that are finished in the workdir.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from budget import (
    SCALES,
    Budget,
    Result,
    device,
    head,
    kept,
    parse,
    run_config,
    trained,
    write_table,
)
from ml_collections import ConfigDict

from dscsnet_jax.cli.simulate import simulated
from dscsnet_jax.estimation.unmix import Options, unmix
from dscsnet_jax.evaluation.metrics import count_accuracy
from dscsnet_jax.evaluation.report import evaluate
from dscsnet_jax.io.weights import Weights, load_weights
from dscsnet_jax.maps.readout import REFERENCE_THRESHOLD, ReadoutRule
from dscsnet_jax.physics.optics import SensingOperator, sensing_operator
from dscsnet_jax.physics.scene import Preset, frame_keys
from dscsnet_jax.physics.targets import Targets
from dscsnet_jax.training import config as configs
from dscsnet_jax.training.step import Step, TrainState, init_state, make_optimiser, make_step
from dscsnet_jax.unfolding.registry import Network, network_names
from dscsnet_jax.unfolding.solvers import LassoSolution, solve_lasso

TITLE = "Bench: preset csist, c = 3, one budget for all"
SOLVERS = ("ista", "fista", "admm")
L1_WEIGHTS = (0.3, 1.0, 3.0, 10.0, 30.0)
FORWARD_BATCH = 64
LAST_STEPS = 8  # whose losses tell rates apart
REPEATS = 3
COLUMNS = {
    **dict.fromkeys(("mAP", "AP05", "AP10", "AP15", "AP20", "AP25", "count"), ".2f"),
    "off mAP": ".2f",
    "off count": ".2f",
    "parameters": ",",
    "MFLOP/frame": ".2f",
    "frames/s forward": ",.0f",
    "frames/s training": ",.0f",
    "MB forward": ",.0f",
    "MB training": ",.0f",
    "note": "",
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all methods are measured with.

    Attributes:
      budget: of each learned method.
      seed: of parameters and frames.
      overrides: changes to all configs, `a.b=v`.
      workdir: folder of runs and results.
      preset: recipe of the scored frames.
      frames: (B, N, N) frames of the `test` split.
      truth: their targets.
    """

    budget: Budget
    seed: int
    overrides: tuple[str, ...]
    workdir: Path
    preset: Preset
    frames: np.ndarray
    truth: Targets

    @property
    def about(self) -> dict[str, Any]:
        """What a result without a config depends on."""
        return {
            "preset": self.preset.name,
            "seed": self.seed,
            "set": self.overrides,
            "budget": dataclasses.asdict(self.budget),
            "rate": f"lowest loss of the last {LAST_STEPS} steps",
        }

    def config(self, method: str, rate: float, share: int = 1) -> ConfigDict:
        """Of a run with a share of the budget's steps."""
        steps = max(self.budget.num_steps // share, 1)
        budget = dataclasses.replace(self.budget, num_steps=steps)
        return run_config(method, budget, seed=self.seed, rate=rate, overrides=self.overrides)


# --- learned methods --------------------------------------------------------------------


def learned_row(bench: Bench, method: str) -> Result:
    """Choose the rate, train, score and measure one method."""
    home = bench.workdir / method
    config = bench.config(method, chosen_rate(bench, method))

    def make() -> Result:
        run = trained(config, home / "run")
        if "loss" not in run:
            return run
        weights = load_weights(home / "run" / "weights.safetensors")
        return {
            **{f"val {k}" if k.startswith(("mAP", "AP")) else k: v for k, v in run.items()},
            "frames/s training": run["training_fps"],
            **map_scores(network_maps(bench, weights), bench.truth, bench.preset),
            **offgrid_scores(bench, weights=weights),
            **forward_cost(bench, config, weights),
            **training_cost(config),
            "note": f"rate {config.optimiser.learning_rate:g}",
        }

    return kept(home / "result.json", bench.about, make)


def chosen_rate(bench: Bench, method: str) -> float:
    """The budget's rate with the lowest loss at the end of a tenth of the steps."""
    rates = bench.budget.rates
    if len(rates) == 1:
        return rates[0]
    config = bench.config(method, rates[0], share=10)
    home = bench.workdir / method
    trials = kept(home / "rates.json", bench.about, lambda: tried(config, rates))
    return min(rates, key=lambda rate: trials[f"{rate:g}"])


def tried(config: ConfigDict, rates: Sequence[float]) -> Result:
    """Mean loss of the last steps of short runs, by peak rate; their frames are all new."""
    network, operator = network_and_operator(config)

    @jax.jit
    def advance(state: TrainState, keys: jax.Array, rate: jax.Array) -> Any:
        # AdamW's updates are linear in the rate: one program serves all rates.
        return step_of(config, scaled_optimiser(config, rate))(state, keys)

    def last_loss(rate: float) -> float:
        state = init_state(network, operator, scaled_optimiser(config, rate), config.seed)
        size, losses = config.train.batch_size, []
        for number in range(config.train.num_steps):
            keys = frame_keys(config.seed, "train", number * size + jnp.arange(size))
            state, metrics = advance(state, keys, rate)
            losses.append(metrics["loss"])
        mean = float(jnp.stack(losses[-LAST_STEPS:]).mean())
        return mean if np.isfinite(mean) else float(np.finfo(np.float32).max)

    return {f"{rate:g}": last_loss(rate) for rate in rates}


def scaled_optimiser(config: ConfigDict, rate: Any) -> optax.GradientTransformation:
    """The run's optimiser at another peak rate, which may be traced."""
    fields = config.optimiser.to_dict() | {"learning_rate": 1.0}
    unit = make_optimiser(num_steps=config.train.num_steps, **fields)
    return optax.chain(unit, optax.scale(rate))


def step_of(config: ConfigDict, optimiser: optax.GradientTransformation) -> Step:
    """The training step of a run, not compiled."""
    network, operator = network_and_operator(config)
    return make_step(
        network,
        configs.make_preset(config),
        operator,
        optimiser,
        truth_width=config.train.truth_width,
        symmetry_weight=config.train.symmetry_weight,
        remat=config.train.remat,
    )


def network_maps(bench: Bench, weights: Weights) -> np.ndarray:
    """Maps (B, cN, cN) of the test frames."""
    options = Options(weights, return_maps=True)
    answer = unmix(bench.frames, bench.preset.known, method="grid", options=options)
    return np.asarray(answer.maps)


def offgrid_scores(bench: Bench, weights: Weights | None = None, **how: Any) -> Result:
    """With the fit off the grid behind the map, everything known of scene and sensor."""
    how = how if weights is None else {**how, "options": Options(weights)}
    answer = unmix(bench.frames, bench.preset.known, estimate="map", **how)
    scores = evaluate(answer.targets, bench.truth).as_dict()
    return {f"off {key}": scores[key] for key in ("mAP", "AP05", "AP25")} | {
        "off count": scores["count_accuracy"]
    }


def forward_cost(bench: Bench, config: ConfigDict, weights: Weights) -> Result:
    """FLOPs, memory and speed of the forward pass."""
    network, operator = network_and_operator(config)

    def forward(params: Any, y: jax.Array, operator: SensingOperator) -> jax.Array:
        # Unrolled, as a loop's body is counted once.
        return network.apply(params, y, operator, unroll=True).x

    shape = (FORWARD_BATCH, *bench.frames.shape[1:])
    given = jax.device_put((weights.params, np.resize(bench.frames, shape), operator))
    program = jax.jit(forward).lower(*given).compile()
    return {
        "MFLOP/frame": program.cost_analysis()["flops"] / FORWARD_BATCH / 1e6,
        "MB forward": megabytes(program),
        "frames/s forward": FORWARD_BATCH / seconds(functools.partial(program, *given)),
    }


def training_cost(config: ConfigDict) -> Result:
    """Memory of one training step on one device."""
    network, operator = network_and_operator(config)
    optimiser = make_optimiser(num_steps=config.train.num_steps, **config.optimiser.to_dict())
    state = init_state(network, operator, optimiser, config.seed)
    given = jax.device_put((state, frame_keys(0, "train", jnp.arange(config.train.batch_size))))
    # Compiled as training does, so that the cache of programs has it.
    program = jax.jit(step_of(config, optimiser), donate_argnums=0).lower(*given).compile()
    return {"MB training": megabytes(program)}


def network_and_operator(config: ConfigDict) -> tuple[Network, SensingOperator]:
    """The network of a run and the optics of the frames it is trained on."""
    preset = configs.make_preset(config)
    size, division = preset.frame_size, preset.division
    operator = sensing_operator(size, division=division, psf=preset.sigma)
    return configs.make_method(config), operator


def megabytes(program: Any) -> float:
    """Arguments, results and intermediate arrays of a compiled program."""
    memory = program.memory_analysis()
    inside = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    return (inside + memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e6


def seconds(work: Callable[[], Any]) -> float:
    """Median wall time of `work`, after one call that warms up."""
    jax.block_until_ready(work())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


# --- maps -------------------------------------------------------------------------------


def map_scores(maps: np.ndarray, truth: Targets, preset: Preset) -> Result:
    """CSO-mAP by the reference rule, and the right counts of the peak read-out."""
    cells = evaluate(read(maps, cells_rule(maps, preset)), truth).cso.as_dict()
    return {**cells, "count": 100 * count_accuracy(read(maps, peaks_rule(preset)), truth)}


read = jax.jit(lambda x, rule: rule(x).targets, static_argnames="rule")


def cells_rule(maps: np.ndarray, preset: Preset) -> ReadoutRule:
    """The reference rule, with slots for all cells that it detects."""
    most = int((maps >= REFERENCE_THRESHOLD).sum((1, 2)).max())
    # Each number of slots is a program of its own.
    return ReadoutRule("cells", preset.division, max_targets=1 << most.bit_length())


def peaks_rule(preset: Preset) -> ReadoutRule:
    """One target a peak, with the settings of `unmix` where the preset's prior is known."""
    low, high = preset.cluster.intensity
    return ReadoutRule(
        "peaks",
        preset.division,
        threshold=0.4 * low,
        separation=0.8 * preset.cluster.separation,
        capacity=(low + high) / 2,
        max_targets=16,
    )


# --- methods that are not trained -------------------------------------------------------


def solver_row(bench: Bench, method: str) -> Result:
    """The lasso, with the l1 weight that scores best on `val`."""

    def make() -> Result:
        frames, truth = scenes(bench.preset, bench.seed, "val", len(bench.frames))

        def quality(lam: float) -> float:
            maps = solve(bench, method, frames, lam).x
            return float(map_scores(np.asarray(maps), truth, bench.preset)["mAP"])

        lam = max(L1_WEIGHTS, key=quality)
        start = time.perf_counter()
        solution = jax.block_until_ready(solve(bench, method, bench.frames, lam))
        spent = time.perf_counter() - start
        return {
            **map_scores(np.asarray(solution.x), bench.truth, bench.preset),
            "frames/s forward": len(bench.frames) / spent,
            "device": device(),
            "note": f"lam {lam:g}, {float(solution.iterations.mean()):.0f} iterations, "
            f"{float(100 * solution.converged.mean()):.0f} % converged",
        }

    return kept(bench.workdir / method / "result.json", bench.about, make)


def solve(bench: Bench, method: str, frames: np.ndarray, lam: float) -> LassoSolution:
    """The lasso's maps of frames without their pedestal."""
    preset = bench.preset
    operator = sensing_operator(preset.frame_size, division=preset.division, psf=preset.sigma)
    y = jnp.asarray(frames - preset.sensor.pedestal)
    limit = bench.budget.solver_iterations
    return solve_lasso(y, operator, lam=lam, method=method, max_iterations=limit)


def greedy_row(bench: Bench) -> Result:
    """The fit off the grid, started without a map."""

    def make() -> Result:
        return offgrid_scores(bench, method="greedy") | {"device": device(), "note": "no map"}

    return kept(bench.workdir / "greedy" / "result.json", bench.about, make)


# --- the table --------------------------------------------------------------------------


def row(bench: Bench, method: str) -> Result:
    """One line of the table."""
    if method in SOLVERS:
        return solver_row(bench, method)
    return greedy_row(bench) if method == "greedy" else learned_row(bench, method)


def make_bench(args: argparse.Namespace) -> Bench:
    """Scored frames and budget as the options say."""
    budget = SCALES[args.scale]["bench"]
    scene = [text for text in args.set if text.startswith(("scene.", "eval."))]
    config = run_config("dscsnet", budget, seed=args.seed, rate=1e-3, overrides=scene)
    preset = configs.make_preset(config, config.eval.frame_size)
    frames, truth = scenes(preset, args.seed, "test", config.eval.num_frames)
    return Bench(budget, args.seed, tuple(args.set), args.workdir, preset, frames, truth)


@functools.cache
def scenes(preset: Preset, seed: int, split: str, num: int) -> tuple[np.ndarray, Targets]:
    """Frames (B, N, N) of a split, and their targets."""
    scene = simulated(preset, seed=seed, split=split, num=num)
    return np.asarray(scene.frames), scene.targets


def main(argv: Sequence[str] | None = None) -> None:
    """Run the methods and write the table after each."""
    known = [*network_names(), *SOLVERS, "greedy"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=known, choices=known, metavar="METHOD")
    args = parse(parser, argv, "bench")
    bench = make_bench(args)
    for method in args.methods:
        row(bench, method)
        finished = [name for name in known if (bench.workdir / name / "result.json").exists()]
        rows = {name: row(bench, name) for name in finished}
        about = head(TITLE, args, bench.budget, rows)
        text = write_table(args.out, about, rows, COLUMNS)
    print(text)


if __name__ == "__main__":
    main()
