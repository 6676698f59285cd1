"""The Bayes limit of frames: counts given, or found by the evidence."""

import jax
import numpy as np
import pytest

import dscsnet_jax as dj
from dscsnet_jax.estimation.limit import bayes_limit
from dscsnet_jax.physics.scene import Scene

pytestmark = pytest.mark.slow

FRAMES = 16


@pytest.fixture(scope="module")
def preset() -> object:
    return dj.get_preset("csist_float", read_noise=5.0, frame_size=7, margin=2, max_targets=3)


@pytest.fixture(scope="module")
def made(preset: object) -> Scene:
    keys = dj.frame_keys(3, "val", np.arange(FRAMES))
    return jax.device_get(jax.jit(dj.simulate, static_argnums=0)(preset, keys))


def test_counts_are_found_and_errors_hold_the_truth(preset: object, made: Scene) -> None:
    """On the prior's own frames: which counts come out right is as often as they say."""
    answer = bayes_limit(made.frames, preset.known)
    truth = np.asarray(made.targets.count)
    chance = answer.count_probability
    np.testing.assert_allclose(chance.sum(1), 1)
    assert not chance[:, 0].any()  # the prior knows that there is a target
    given = chance[np.arange(FRAMES), truth]
    assert given.mean() > 0.6
    assert (answer.targets.count == chance.argmax(1)).all()
    told = bayes_limit(made.frames, preset.known, count=truth)
    np.testing.assert_array_equal(told.targets.count, truth)
    np.testing.assert_array_equal(told.count_probability.argmax(1), truth)
    mask = told.targets.mask
    # Targets of a blend can be numbered in many ways: their centre cannot.
    for i in range(FRAMES):
        own = np.asarray(made.targets.mask[i])
        samples = told.samples[i][:, mask[i], :2].mean(1)
        off = samples.mean(0) - np.asarray(made.targets.position[i])[own].mean(0)
        assert (np.abs(off) < 4.5 * samples.std(0)).all()
    assert (np.diff(np.where(mask, told.targets.intensity, 0), axis=1) <= 0).all()
    np.testing.assert_allclose(
        told.samples.mean(1)[mask][:, :2], told.targets.position[mask], atol=1e-4
    )


def test_it_is_never_worse_than_unmixing(preset: object, made: Scene) -> None:
    """Mean squared errors of the centre of light, which no numbering changes, by their scatter."""
    truth = made.targets
    best = bayes_limit(made.frames, preset.known, count=np.asarray(truth.count))
    ours = dj.unmix(made.frames, preset.known)

    def squares(found: dj.Targets) -> np.ndarray:
        def centre(t: dj.Targets) -> np.ndarray:
            light = np.where(t.mask, t.intensity, 0)
            return (np.asarray(t.position) * light[..., None]).sum(1) / light.sum(1)[:, None]

        return ((centre(found) - centre(truth)) ** 2).sum(1)

    more = squares(ours.targets) - squares(best.targets)
    assert more.mean() > -3 * more.std() / FRAMES**0.5


def test_without_a_psf_there_is_no_limit() -> None:
    with pytest.raises(ValueError, match="needs a PSF"):
        bayes_limit(np.zeros((1, 7, 7)), dj.Known())
