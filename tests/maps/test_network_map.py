"""Network: networks bound to one size of frames see whole frames, others windows."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest

from dscsnet_jax.estimation import start
from dscsnet_jax.estimation.windows import flat, padded
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation, observe
from dscsnet_jax.io.weights import Metadata, Weights, geometry_of
from dscsnet_jax.maps.network import read_maps
from dscsnet_jax.maps.readout import Readout, peak_centroids
from dscsnet_jax.physics.optics import SensingOperator, render, sensing_operator
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.targets import Targets, from_lists, to_lists
from dscsnet_jax.unfolding.registry import make_network

# Windows are of 7 x 7 pixels: too small for what is bound to 9 x 9.
SIDE, WINDOW = 9, 7
BACKGROUND, SIGMA, THRESHOLD = 10.0, 0.5, 40.0  # counts, pixels, counts
TABLES = [[(2.1, 1.8, 240.0), (6.0, 6.7, 180.0)], [], [(4.0, 4.3, 220.0)]]
KNOWN = Known(psf=Gaussian(np.full(2, SIGMA, np.float32)))
SETTINGS: dict[str, Any] = {"threshold": THRESHOLD, "max_targets": 4}
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@cache
def seen(side: int) -> Observation:
    def look() -> Observation:
        y = BACKGROUND + render(from_lists(TABLES), frame_size=side, psf=SIGMA)
        return observe(
            y, Sensor(read_noise=1.0, pedestal=BACKGROUND / 2, background=BACKGROUND / 2)
        )

    return jax.tree.map(np.asarray, quick_jit(look)())


def operator_of(side: int) -> SensingOperator:
    return quick_jit(partial(sensing_operator, side, division=3, psf=SIGMA))()


def weights_of(name: str, **config: Any) -> Weights:
    """Of a network as it is drawn, with every number moved."""
    rng = np.random.default_rng(0)
    operator = operator_of(SIDE)
    network = make_network(name, **config)
    params = jax.tree.map(
        lambda a: np.float32(a * rng.normal(1, 0.02, a.shape)),
        quick_jit(network.init)(jax.random.key(0), operator),
    )
    return Weights(params, Metadata(name, config, geometry_of(operator)))


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what the network is shown."""
    shapes: list[tuple[int, ...]] = []
    read = start.read_maps

    def recorded(observation: Observation, *args: Any, **how: Any) -> Any:
        shapes.append(observation.counts.shape[1:])
        return read(observation, *args, **how)

    monkeypatch.setattr(start, "read_maps", recorded)
    return shapes


def read_windows(side: int, weights: Weights) -> Targets:
    found = start.read_windows(seen(side), weights, KNOWN, **SETTINGS)
    return padded(found, [], len(TABLES), SETTINGS["max_targets"])[0]


def by_hand(weights: Weights, counts: np.ndarray, max_targets: int) -> Readout:
    """The network applied to these pixels, and the rule that maps are read by."""
    network = make_network(weights.metadata.method, **weights.metadata.config)
    operator = operator_of(counts.shape[-1])

    def both(params: Any, y: np.ndarray) -> Readout:
        x = network.apply(params, y, operator).x
        return peak_centroids(
            x, division=3, threshold=THRESHOLD, separation=0.4, max_targets=max_targets
        )

    return quick_jit(both)(weights.params, counts - np.float32(BACKGROUND))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("lista", {"iterations": 2, "frame_size": SIDE}),
        ("ista_net_plus", {"iterations": 1, "channels": 2, "start": "matrix"}),
    ],
)
def test_bound_networks_see_whole_frames(
    sides: list[tuple[int, ...]], name: str, config: dict[str, Any]
) -> None:
    weights = weights_of(name, **config)
    found = read_windows(SIDE, weights)
    expected = padded(flat(by_hand(weights, seen(SIDE).counts, max_targets=4).targets), [], 3, 4)[0]
    assert sides == [(SIDE, SIDE)]
    assert expected.count[0] >= 2
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_allclose(found.position, expected.position, rtol=0, atol=1e-3)
    np.testing.assert_allclose(found.intensity, expected.intensity, rtol=1e-4)


def test_networks_for_any_frame_see_windows(sides: list[tuple[int, ...]]) -> None:
    weights = weights_of("ista_net_plus", iterations=1, channels=2)
    found = read_windows(40, weights)
    assert set(sides) == {(WINDOW, WINDOW)}
    # The last frame's target is the only one of a window that begins at pixel (1, 1).
    pixels = seen(40).counts[2:, 1 : 1 + WINDOW, 1 : 1 + WINDOW]
    (expected,) = to_lists(by_hand(weights, pixels, max_targets=2).targets)
    answers = to_lists(found)
    assert [len(table) > 0 for table in answers] == [True, False, True]
    np.testing.assert_allclose(answers[2], expected + np.array([1, 1, 0]), rtol=1e-4)


def test_a_map_shows_neither_level_nor_neighbours() -> None:
    """Of a frame with a group told as neighbours: the map without them."""
    weights = weights_of("ista_net_plus", iterations=1, channels=2)
    whole, pair = seen(SIDE), [TABLES[0][:1], [], []]
    others = quick_jit(partial(render, frame_size=SIDE, psf=SIGMA))(
        from_lists([TABLES[0][1:], [], []])
    )
    lone = quick_jit(partial(render, frame_size=SIDE, psf=SIGMA))(from_lists(pair))
    settings = {**SETTINGS, "readout": "peaks"}
    told = whole.replace(neighbours=np.asarray(others))
    maps, found, _ = read_maps(told, weights, KNOWN, **settings)
    bare = whole.replace(
        counts=np.concatenate([np.asarray(lone)[:1], whole.counts[1:] - np.float32(BACKGROUND)]),
        pedestal=np.zeros_like(whole.pedestal),
        background=np.zeros_like(whole.background),
    )
    expected, _, _ = read_maps(bare, weights, KNOWN, **settings)
    # Rounding of the differences, of which maps are made.
    np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-3)
    assert expected.max() > 10
    np.testing.assert_allclose(found.position[0, 0], TABLES[0][0][:2], atol=0.5)


@pytest.mark.parametrize("optics", [None, "told"])
def test_only_who_was_told_the_psf_in_training_is_told_it(optics: str | None) -> None:
    weights = weights_of("dscsnet", iterations=1, channels=4)
    training = {} if optics is None else {"optics": optics}
    metadata = dataclasses.replace(weights.metadata, training=training)
    told = Known(psf=Gaussian(np.full(2, 0.8, np.float32)))
    how: dict[str, Any] = {"readout": "peaks", **SETTINGS}
    maps = read_maps(seen(SIDE), Weights(weights.params, metadata), told, **how)[0]
    y = seen(SIDE).counts - BACKGROUND
    width = SIGMA if optics is None else 0.8
    operator = quick_jit(partial(sensing_operator, SIDE, division=3, psf=width))()
    network = make_network("dscsnet", iterations=1, channels=4)
    expected = network.apply(weights.params, y, operator, noise=np.ones(len(y), np.float32)).x
    np.testing.assert_allclose(maps, expected, atol=1e-3 * float(np.abs(expected).max()))
