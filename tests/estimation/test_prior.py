"""Prior: values of the presets, refused arguments, shares of free places."""

import math
from functools import partial
from itertools import pairwise

import jax
import numpy as np
import pytest

from dscsnet_jax.estimation.prior import ScenePrior, log_free_share, preset_prior, scene_prior
from dscsnet_jax.physics.scene import (
    ClusterModel,
    frame_keys,
    get_preset,
    sample_targets,
    simulate,
)
from dscsnet_jax.physics.targets import Targets

DRAWS = 131_072
# Standard errors of a Monte Carlo share that a right one may be off.
DEVIATIONS = 4.0


def normal_below(x: float) -> float:
    return (1 + math.erf(x / 2**0.5)) / 2


# --- presets -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "intensity"),
    [("csist", (220.0, 250.0)), ("csist_noise", (220.0, 250.0)), ("csist_wide", (50.0, 250.0))],
)
def test_prior_of_a_preset(name: str, intensity: tuple[float, float]) -> None:
    prior = preset_prior(get_preset(name))
    assert prior.intensity == intensity
    assert prior.separation == 0.5
    assert prior.extent == pytest.approx(1.0)
    assert prior.corner == -0.4
    # round(Normal(3, 1)) clipped to 1..5: halves are the borders.
    below = [0.0, *(normal_below(k + 0.5 - 3) for k in (1, 2, 3, 4)), 1.0]
    assert prior.count is not None
    assert prior.count == pytest.approx((0.0, *(b - a for a, b in pairwise(below))))
    assert prior.log_free_share == log_free_share(0.5)


def test_prior_of_a_changed_preset() -> None:
    changed = get_preset(
        "csist", count_mean=1.0, count_std=0.5, max_targets=2, extent=(-1.0, 1.0), separation=0.3
    )
    prior = preset_prior(changed)
    assert prior.count == pytest.approx((0.0, normal_below(1.0), 1 - normal_below(1.0)))
    assert (prior.extent, prior.corner, prior.separation) == (2.0, -1.0, 0.3)
    assert prior.log_free_share == log_free_share(0.15)


@pytest.fixture(scope="module")
def truth() -> Targets:
    """Targets of 2000 scenes of the preset `csist`."""
    keys = frame_keys(3, "val", np.arange(2000))
    return jax.jit(partial(simulate, get_preset("csist")))(keys).targets


def test_prior_counts_are_those_drawn_before_any_target_is_dropped() -> None:
    cluster = ClusterModel(separation=1e-3)  # every target finds its place
    keys = frame_keys(0, "val", np.arange(2000))
    counts = jax.jit(jax.vmap(lambda key: sample_targets(cluster, 11, key).count))(keys)
    found = np.bincount(np.asarray(counts), minlength=6)
    share = np.array(preset_prior(get_preset("csist")).count)
    error = np.sqrt(2000 * share * (1 - share))
    np.testing.assert_array_less(np.abs(found - 2000 * share), DEVIATIONS * error + 1e-9)


def test_prior_ranges_are_those_of_the_scenes(truth: Targets) -> None:
    prior = preset_prior(get_preset("csist"))
    mask = np.asarray(truth.mask)
    intensity = np.asarray(truth.intensity)[mask]
    assert prior.intensity is not None
    assert intensity.min() >= prior.intensity[0]
    assert intensity.max() <= prior.intensity[1]
    mean, std = prior.intensity_moments()
    assert abs(intensity.mean() - mean) < DEVIATIONS * std / np.sqrt(len(intensity))
    assert float(std) == pytest.approx(intensity.std(), rel=0.03)
    # The square begins at a whole pixel plus the corner.
    assert prior.corner is not None
    inside = (np.asarray(truth.position)[mask] - prior.corner) % 1.0
    assert abs(inside.mean() - 0.5) < 0.01
    begin = np.floor(np.asarray(truth.position) - prior.corner + 1e-5)
    low = np.where(mask[..., None], begin, np.inf).min(1)
    high = np.where(mask[..., None], begin, -np.inf).max(1)
    np.testing.assert_array_equal(low, high)


# --- arguments ---------------------------------------------------------------------


def test_nothing_given_is_nothing_assumed() -> None:
    assert scene_prior() == ScenePrior()
    empty = ScenePrior()
    assert (empty.intensity, empty.separation, empty.extent) == (None, 0.0, None)
    assert (empty.corner, empty.count, empty.log_free_share) == (None, None, (0.0,))
    with pytest.raises(ValueError, match="no range of intensities"):
        empty.intensity_moments()


def test_given_values_arrive_and_probabilities_are_normalised() -> None:
    prior = scene_prior(
        intensity=(100, 300), separation=0.5, extent=2, corner=-0.25, count=[1, 2, 1]
    )
    assert prior.intensity == (100.0, 300.0)
    assert (prior.separation, prior.extent, prior.corner) == (0.5, 2.0, -0.25)
    assert prior.count == (0.25, 0.5, 0.25)
    assert prior.log_free_share == log_free_share(0.25)
    mean, std = prior.intensity_moments()
    assert (float(mean), float(std)) == (200.0, pytest.approx(200 / 12**0.5))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"intensity": (250, 220)}, "intensity"),
        ({"intensity": (220, 220)}, "intensity"),
        ({"intensity": (-1, 220)}, "intensity"),
        ({"intensity": (0, math.inf)}, "intensity"),
        ({"intensity": (math.nan, 220)}, "intensity"),
        ({"separation": -0.1}, "separation"),
        ({"separation": math.inf}, "separation"),
        ({"separation": math.nan}, "separation"),
        ({"extent": 0.0}, "extent"),
        ({"extent": 0.5, "separation": 0.5}, "extent"),
        ({"extent": math.inf}, "extent"),
        ({"extent": math.nan}, "extent"),
        ({"corner": 0.0}, "corner"),
        ({"corner": math.nan, "extent": 1.0}, "corner"),
        ({"corner": math.inf, "extent": 1.0}, "corner"),
        ({"count": [0, 0]}, "count"),
        ({"count": [1, -1, 3]}, "count"),
        ({"count": [1, math.inf]}, "count"),
        ({"count": [1, math.nan]}, "count"),
    ],
)
def test_impossible_priors_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message} must be"):
        scene_prior(**given)


def test_no_counts_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="count"):
        scene_prior(count=[])


# --- shares of free places ---------------------------------------------------------


@pytest.mark.parametrize("d", [0.1, 0.3, 0.5, 0.8, 1.0])
def test_free_share_of_two_equals_the_closed_form(d: float) -> None:
    """P(distance > d) of two points in a unit square, d <= 1."""
    free = 1 - (math.pi * d**2 - 8 / 3 * d**3 + d**4 / 2)
    error = math.sqrt(free * (1 - free) / DRAWS)
    assert abs(math.exp(log_free_share(d)[2]) - free) < DEVIATIONS * error


def test_free_shares_of_more_equal_plain_throws() -> None:
    """Three to five points thrown at once, by other random numbers."""
    place = np.random.default_rng(7).uniform(size=(100_000, 5, 2))
    apart = ((place[:, :, None] - place[:, None]) ** 2).sum(-1) >= 0.2**2
    for count in (3, 4, 5):
        pairs = np.triu_indices(count, 1)
        free = apart[:, pairs[0], pairs[1]].all(1).mean()
        error = math.sqrt(free * (1 - free) * (1 / 100_000 + 1 / DRAWS))
        assert abs(math.exp(log_free_share(0.2)[count]) - free) < DEVIATIONS * error


def test_free_shares_fall_to_half_a_throw() -> None:
    for d in (0.3, 0.5, 0.9):
        shares = log_free_share(d)
        assert shares[:2] == (0.0, 0.0)
        assert all(a > b for a, b in pairwise(shares[1:]))
        assert shares[-1] == pytest.approx(math.log(0.5 / DRAWS))
    # Beyond the diagonal there is no room for two.
    assert log_free_share(1.5) == (0.0, 0.0, pytest.approx(math.log(0.5 / DRAWS)))


def test_points_without_separation_are_always_free() -> None:
    assert set(log_free_share(0.0)) == {0.0}
