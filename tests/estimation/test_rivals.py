"""Rivals: errors and confidence over the counts that remain plausible."""

import dataclasses
from functools import partial

import numpy as np
import pytest

import dscsnet_jax as dj
from dscsnet_jax.estimation.rivals import Rivals, averaged, between, confidence, rivals_of, within
from dscsnet_jax.estimation.windows import Windows
from dscsnet_jax.evaluation.metrics import THRESHOLDS
from dscsnet_jax.inference.search import Selected
from dscsnet_jax.inference.summary import RADII
from dscsnet_jax.physics.targets import Targets, from_lists

NONE = Rivals(np.zeros((1, 2)), np.full((1, 2, 3), np.inf))


def rivals(*chances: tuple[float, tuple[float, float, float]]) -> Rivals:
    """Of one target."""
    return Rivals(np.array([[p for p, _ in chances]]), np.array([[off for _, off in chances]]))


# --- what rivals are -------------------------------------------------------------------


def test_the_nearest_target_of_each_other_count_is_where_it_may_be() -> None:
    """Two targets that may be one, or three; none of all is excluded."""
    best = from_lists([[(3.0, 2.6, 110.0), (3.0, 3.4, 90.0)]], 3)
    three = [(3.0, 3.5, 80.0), (3.0, 2.5, 1.0), (9.0, 9.0, 1.0)]
    others = [[], [(3.0, 2.9, 200.0)], [(1.0, 1.0, 1.0)] * 2, three]
    of_counts = from_lists(others, 3)
    of_counts = Targets(*(np.asarray(a)[None] for a in dataclasses.astuple(of_counts)))
    with np.errstate(divide="ignore"):
        table = np.log([[0.0, 0.3, 0.6, 0.1]])
    none = np.zeros(1, bool)
    window = Windows(none, None, best, np.zeros((1, 3), bool), none, np.zeros((1, 3), int))  # type: ignore[arg-type]
    fit = type("Fit", (), {"targets": best})
    got = rivals_of(window, Selected(fit, table, of_counts))  # type: ignore[arg-type]
    np.testing.assert_allclose(got.probability[0, :2], [[0.3, 0.1]] * 2)

    expected = [[(0, 0.3, 90), (0, -0.1, -109)], [(0, -0.5, 110), (0, 0.1, -10)]]
    np.testing.assert_allclose(got.offset[0, :2], expected, atol=1e-5)


# --- what they mean --------------------------------------------------------------------


def test_errors_are_those_of_all_explanations() -> None:
    std, interval = np.array([[0.03, 0.04, 5.0]]), np.zeros((1, 3, 4))
    interval[0] = np.array([-2.0, -1.0, 1.0, 2.0]) * std[0][:, None] + 7
    two = rivals((0.2, (0.0, 0.3, 10.0)), (0.1, (0.1, 0.0, 0.0)))
    wider, stretched = averaged(std, interval, two, width=0.5)
    expected = [0.03**2 + 0.1 * 0.1**2, 0.04**2 + 0.2 * 0.3**2, 5.0**2 + 0.2 * 10.0**2]
    np.testing.assert_allclose(wider[0] ** 2, expected)
    np.testing.assert_allclose(stretched[0, :, 3] - 7, 2 * wider[0])
    np.testing.assert_allclose(stretched[0, :, 0] - 7, -2 * std[0])  # no rival is on this side


def test_no_light_is_below_none() -> None:
    interval = np.tile([2.0, 6.0, 14.0, 18.0], (1, 3, 1))
    fainter = rivals((0.4, (0.0, 0.0, -9.0)))
    _, stretched = averaged(np.array([[1.0, 1.0, 4.0]]), interval, fainter, width=0.5)
    assert stretched[0, 2, 0] == 0
    assert 0 < stretched[0, 2, 1] < 6
    np.testing.assert_allclose(stretched[0, 2, 2:], [14, 18])


def test_an_improbable_rival_makes_no_tail() -> None:
    std = np.array([[0.03, 0.04, 5.0]])
    interval = np.zeros((1, 3, 4))
    wider, _ = averaged(std, interval, rivals((0.03, (0.3, 0.3, 100.0))), width=0.5)
    np.testing.assert_allclose(wider, std)


@pytest.mark.parametrize(
    "other", [NONE, rivals((0.4, (np.inf,) * 3)), rivals((0.4, (0.0, 2.0, 5.0)))]
)
def test_other_light_is_no_error(other: Rivals) -> None:
    """A target that is not there, or another one far away, does not make this one's place worse."""
    std, interval = np.array([[0.03, 0.04, 5.0]]), np.arange(12.0).reshape(1, 3, 4)
    wider, stretched = averaged(std, interval, other, width=0.5)
    np.testing.assert_allclose(wider, std)
    np.testing.assert_allclose(stretched, interval)


@pytest.mark.parametrize("std", [(0.08, 0.08), (0.02, 0.3), (0.2, 0.05)])
def test_confidence_is_the_expectation_over_all_explanations(std: tuple[float, float]) -> None:
    """Against draws, of errors that are not round either."""
    rng = np.random.default_rng(0)
    errors = np.array([[*std, 1.0]])
    other = rivals((0.3, (0.1, -0.05, 1.0)), (0.2, (np.inf,) * 3))
    got = confidence(within(errors, np.zeros((1, 3))), errors, other)
    kind = rng.choice(3, size=200_000, p=[0.5, 0.3, 0.2])
    centre = np.array([[0.0, 0.0], [0.1, -0.05], [9.0, 9.0]])[kind]
    distance = np.linalg.norm(centre + np.array(std) * rng.normal(size=centre.shape), axis=1)
    share = np.mean([distance <= r for r in RADII], 0)
    assert abs(got[0] - share.mean()) < 4 * share.std() / share.size**0.5 + 1e-3


def test_a_third_rival_is_no_confidence_in_the_best() -> None:
    """Of shares 0.35, 0.25, 0.2 and 0.2, three are looked at."""
    best = from_lists([[(3.0, 3.0, 100.0)]], 3)
    others = from_lists([[(9.0, 9.0, 1.0)] * n for n in range(4)], 3)
    others = Targets(*(np.asarray(a)[None] for a in dataclasses.astuple(others)))
    got = between(best, np.array([[0.2, 0.35, 0.25, 0.2]]), others)
    left = 1 - got.probability[0, 0].sum()
    assert left == pytest.approx(0.35 / 0.8)


def test_a_certain_target_is_within_all_radii() -> None:
    assert within(np.array([1e-4, 1e-4, 1.0]), np.zeros(3)) == pytest.approx(1)
    assert within(np.array([1e3, 1e3, 1.0]), np.zeros(3)) < 1e-6


# --- in the answer ---------------------------------------------------------------------


@pytest.mark.slow
def test_counts_in_doubt_make_errors_larger_and_confidence_smaller() -> None:
    """Pairs that are hardly told apart, and bright targets far from each other."""
    rng = np.random.default_rng(3)
    close = [[(5.0, 5 - a, 100.0), (5.0, 5 + a, 100.0)] for a in rng.uniform(0.15, 0.5, 60)]
    table = [*close, *[[(3.0, 3.0, 3000.0), (7.5, 7.0, 3000.0)]] * 60]
    y = np.asarray(dj.render(from_lists(table), frame_size=11, psf=0.5))
    y = y + 10 * rng.normal(size=y.shape)
    known = dj.Known(0.5, dj.Sensor(read_noise=10.0, background=0.0))
    found = dj.unmix(y, known, estimate="map")
    mask, count = np.asarray(found.targets.mask), np.asarray(found.targets.count)
    chance = found.count_probability[np.arange(120), count]
    assert (chance[60:] > 0.9).all()
    assert (chance[:60] < 0.95).mean() > 0.5
    assert (found.confidence[~mask] == 0).all()
    assert ((found.confidence[mask] > 0) & (found.confidence[mask] <= 1)).all()
    certain, doubted = (found.confidence[part][mask[part]] for part in (np.s_[60:], np.s_[:60]))
    assert certain.min() > doubted.max()
    alone = dj.fit(dj.observe(y, known.sensor), found.targets, known.with_weak_prior())
    wider = (found.std[..., :2] > 1.01 * np.asarray(alone.std)[..., :2]).all(-1)
    assert wider[:60][mask[:60]].mean() > 0.5
    assert wider[60:][mask[60:]].mean() < 0.1
    frames = found.frame_table()
    assert frames.count.tolist() == count.tolist()
    assert (frames.runner_up != count).all()
    assert ((frames.runner_up == -1) == ~(frames.runner_up_probability > 0)).all()
    np.testing.assert_allclose(frames.probability, chance)
    assert not (frames.runner_up_probability > chance).any()


@pytest.mark.slow
def test_rivals_stay_with_their_targets_where_the_mean_is_asked_for() -> None:
    """Frames of one sort are answered together: what is certain stays so beside what is not."""
    rng = np.random.default_rng(5)
    table: list[list[tuple[float, float, float]]] = [[(5.0, 5.0, 3000.0)]] * 24
    table[::3] = [[(5.0, 5 - a, 100.0), (5.0, 5 + a, 100.0)] for a in rng.uniform(0.15, 0.4, 8)]
    y = np.asarray(dj.render(from_lists(table), frame_size=11, psf=0.5))
    y = y + 10 * rng.normal(size=y.shape)
    known = dj.Known(0.5, dj.Sensor(read_noise=10.0, background=0.0))
    found = dj.unmix(y, known)
    mask = np.asarray(found.targets.mask)
    bright = np.asarray(found.targets.intensity) > 1000
    assert bright.sum() == 16
    assert found.confidence[bright].min() > 0.9
    assert found.confidence[mask & ~bright].max() < 0.9
    again = dj.unmix(y[::-1], known)
    np.testing.assert_allclose(again.confidence[::-1], found.confidence, atol=1e-6)


def test_radii_are_those_of_the_metric() -> None:
    assert RADII == THRESHOLDS


def test_ranking_by_confidence_is_a_number_of_its_own() -> None:
    """The brighter detection is wrong, and not trusted."""
    truth = from_lists([[(5.0, 5.0, 100.0)]])
    found = from_lists([[(7.0, 7.0, 200.0), (5.0, 5.0, 100.0)]])
    score = partial(dj.evaluate, found, truth)
    trusted = score(confidence=[[0.1, 0.9]])
    assert (trusted.as_dict()["mAP"], trusted.as_dict()["mAP_ranked"]) == (50.0, 100.0)
    assert "mAP_ranked" not in score().as_dict()
    with pytest.raises(ValueError, match=r"confidence: expected shape \(1, 2\), got \(2,\)"):
        score(confidence=[0.1, 0.9])
