"""`unmix` told of a sensor pixel by pixel: read noise, pedestal, bad pixels."""

import dataclasses

import jax
import numpy as np
import pytest

import dscsnet_jax as dj

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

SIDE, FRAMES = 15, 24
NOISE = np.where(np.arange(SIDE) < SIDE // 2, 8.0, 1.0) * np.ones((SIDE, 1))  # by columns
TABLES = [[(7.2, 11.0, 70.0)], [(6.8, 10.6, 200.0), (7.4, 11.5, 150.0)], []]


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    tables = [TABLES[i % len(TABLES)] for i in range(FRAMES)]
    return np.asarray(
        jax.jit(lambda t: dj.render(t, frame_size=SIDE, psf=0.5))(dj.from_lists(tables))
    )


def noisy(clean: np.ndarray, seed: int = 0) -> np.ndarray:
    return clean + NOISE * np.random.default_rng(seed).normal(size=clean.shape)


def assert_right(answer: dj.UnmixResult) -> None:
    wanted = [len(TABLES[i % len(TABLES)]) for i in range(FRAMES)]
    assert answer.targets.count.tolist() == wanted
    for i, table in enumerate(TABLES[:2]):
        some, here = answer[np.arange(i, FRAMES, len(TABLES))], slice(0, len(table))
        found = np.concatenate([some.targets.position, some.targets.intensity[..., None]], -1)
        pull = (found[:, here] - np.array(table)) / some.std[:, here]
        assert np.abs(pull).max() < 4.5
        assert np.sqrt((pull**2).mean()) < 1.6


@pytest.mark.parametrize("estimate", ["map", "mean"])
def test_the_noise_of_each_pixel_weighs_it(clean: np.ndarray, estimate: str) -> None:
    """Told pixel by pixel no frame has a target too many, and a faint one is found beside."""
    frames = noisy(clean)
    sensor = dj.Sensor(read_noise=NOISE, background=0.0)
    answer = dj.unmix(frames, dj.Known(0.5, sensor), estimate=estimate)
    assert_right(answer)
    np.testing.assert_allclose(answer.noise, np.sqrt((NOISE**2).mean()), rtol=1e-6)
    assert not answer.unexplained.any()
    np.testing.assert_allclose(answer.chi_square.mean(), 1, atol=0.15)
    # Error planes of each frame that are the same map say the same.
    planes = np.broadcast_to(NOISE, frames.shape)
    other = dj.unmix(frames, dj.Known(0.5, dj.Sensor(planes, background=0.0)), estimate=estimate)
    np.testing.assert_array_equal(answer.targets.position, other.targets.position)
    # One number for all makes targets of the noise of the others, or sees no faint one.
    one = dj.Known(0.5, dj.Sensor(1.0, background=0.0))
    wrong = dj.unmix(frames[:3], one, estimate="map")  # each with many, which takes long
    assert wrong.targets.count.sum() > 2 * answer[:3].targets.count.sum()


def test_a_sloped_pedestal_is_as_none(clean: np.ndarray) -> None:
    frames = noisy(clean, 1)
    slope = np.add.outer(np.linspace(0, 60, SIDE), np.linspace(-90, 0, SIDE))
    # Told the intensities: the level is learned beside, and counts are not left to a weak prior.
    prior = dj.scene_prior(intensity=(50.0, 250.0))
    known = dj.Known(0.5, dj.Sensor(read_noise=NOISE), prior)
    flat = dj.unmix(frames, known, estimate="map")
    told = dataclasses.replace(known, sensor=dj.Sensor(read_noise=NOISE, pedestal=slope))
    sloped = dj.unmix(frames + slope, told, estimate="map")
    assert_right(sloped)
    np.testing.assert_allclose(sloped.targets.position, flat.targets.position, atol=1e-3)
    np.testing.assert_allclose(sloped.background, flat.background, atol=1e-3)


def test_bad_pixels_make_no_targets(clean: np.ndarray) -> None:
    """Hot, dead and undefined ones; the frames are not flagged for what is known to be bad."""
    frames = clean + np.random.default_rng(2).normal(size=clean.shape)
    bad = np.zeros((SIDE, SIDE), bool)
    bad[3, 3] = bad[10, 4] = bad[12, 12] = True
    frames[:, 3, 3], frames[:, 10, 4], frames[:, 12, 12] = 700, -300, np.nan
    known = dj.Known(0.5, dj.Sensor(1.0, background=0.0, bad_pixels=bad))
    answer = dj.unmix(frames, known, estimate="map")
    assert_right(answer)
    assert not answer.invalid.any()
    assert set(answer.status()[answer.targets.mask]) == {"ok"}
    # An error plane often has a huge number there: it is no noise of the others.
    plane = np.where(bad, 1e6, 1.0)
    known = dj.Known(0.5, dj.Sensor(plane, background=0.0, bad_pixels=bad))
    for how in ({"estimate": "map"}, {"method": "grid"}):
        marked = dj.unmix(frames, known, **how)
        np.testing.assert_allclose(marked.noise, 1, rtol=1e-6)
        assert (marked.targets.count >= answer.targets.count).mean() > 0.6
    nothing = dj.Sensor(np.where(bad, np.nan, 1.0), background=0.0)
    marked = dj.unmix(np.where(bad, 0, frames), dj.Known(0.5, nothing), estimate="map")
    assert_right(marked)
    assert not marked.invalid.any()
    known = dj.Known(0.5, dj.Sensor([1.0] * FRAMES, background=0.0, bad_pixels=bad))
    frames[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        dj.unmix(frames, known, estimate="map")
    masked = dj.unmix(frames, known, estimate="map", mask_invalid=True)
    assert masked.invalid.tolist() == [True] + [False] * (FRAMES - 1)


def test_samples_are_those_of_the_means(clean: np.ndarray) -> None:
    frames = noisy(clean, 3)
    known = dj.Known(0.5, dj.Sensor(read_noise=NOISE, background=0.0))
    options = dj.Options(samples=True)
    answer = dj.unmix(frames, known, options=options)
    mask = np.asarray(answer.targets.mask)
    assert answer.samples.shape == (FRAMES, answer.samples.shape[1], *mask.shape[1:], 3)
    mean, std = answer.samples.mean(1), answer.samples.std(1)
    np.testing.assert_allclose(mean[..., :2][mask], answer.targets.position[mask], atol=1e-4)
    np.testing.assert_allclose(mean[..., 2][mask], answer.targets.intensity[mask], rtol=1e-5)
    # The errors hold that of the mean of so few samples besides, and other counts in doubt.
    ratio = std[mask] / answer.std[mask]
    assert (ratio < 1).all()
    count = np.asarray(answer.targets.count)
    sure = answer.count_probability[np.arange(FRAMES), count] > 0.95
    assert (ratio[np.broadcast_to(sure[:, None], mask.shape)[mask]] > 0.8).all()
    assert sure.mean() > 0.5
    assert not answer.samples.swapaxes(1, 2)[~mask].any()
    with pytest.raises(ValueError, match="samples are those of the estimate 'mean'"):
        dj.unmix(frames, known, estimate="map", options=options)


def test_answers_are_taken_apart(clean: np.ndarray) -> None:
    """`len`, `[i]`, tables: what is of a frame goes with it."""
    known = dj.Known(0.5, dj.Sensor(read_noise=NOISE, background=0.0))
    answer = dj.unmix(noisy(clean), known, estimate="map")
    assert len(answer) == FRAMES
    parts = list(answer)
    assert [len(part) for part in parts] == [1] * FRAMES
    for some in (answer[-1], answer[np.array([FRAMES - 1])], answer[FRAMES - 1 :]):
        np.testing.assert_array_equal(some.targets.position, answer.targets.position[-1:])
        np.testing.assert_array_equal(some.status(), answer.status()[-1:])
    with pytest.raises(IndexError, match=f"frame {FRAMES} of {FRAMES}"):
        answer[FRAMES]
    table, frame, arrow = answer.to_table(), answer.to_pandas(), answer.to_arrow()
    number = int(answer.targets.count.sum())
    assert len(table) == len(frame) == arrow.num_rows == number
    assert str(table["row_std"].unit) == "pix"
    assert frame["frame"].tolist() == [str(i) for i in np.nonzero(answer.targets.mask)[0]]
    np.testing.assert_array_equal(frame["intensity"], answer.targets.intensity[answer.targets.mask])
    text = answer._repr_html_()
    assert f"UnmixResult: {number} targets in {FRAMES} frames" in text
    assert text.count("<tr") < 30
    assert "<table" in text
