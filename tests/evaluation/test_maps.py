"""PSNR and SSIM against values computed independently."""

import numpy as np
import pytest

from dscsnet_jax.evaluation.maps import psnr, ssim
from dscsnet_jax.evaluation.report import evaluate
from dscsnet_jax.physics.targets import from_lists


def ssim_by_windows(x, y, data_range):
    """One 11 x 11 window at a time, with an explicit two-dimensional kernel."""
    axis = np.arange(11) - 5
    kernel = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (kernel * a).sum(), (kernel * b).sum()
            var_a = (kernel * (a - mean_a) ** 2).sum()
            var_b = (kernel * (b - mean_b) ** 2).sum()
            both = (kernel * (a - mean_a) * (b - mean_b)).sum()
            top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
            values.append(top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return np.mean(values)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 255, (3, 15, 18))
    return truth + rng.normal(0, 30, truth.shape), truth


def test_psnr_by_hand():
    truth = np.zeros((2, 4, 4))
    x = truth.copy()
    x[0, 0, 0], x[1] = 8.0, 25.5  # mean squared errors 4 and 25.5^2
    np.testing.assert_allclose(psnr(x, truth), [10 * np.log10(255**2 / 4), 20.0], rtol=1e-12)
    np.testing.assert_allclose(psnr(x, truth, 25.5)[1], 0.0, atol=1e-12)


def test_psnr_of_equal_maps_is_infinite_without_a_warning():
    assert psnr(np.ones((1, 4, 4)), np.ones((1, 4, 4))).tolist() == [np.inf]


@pytest.mark.parametrize("data_range", [255.0, 40.0])
def test_ssim_equals_window_by_window_computation(pair, data_range):
    expected = [ssim_by_windows(x, y, data_range) for x, y in zip(*pair, strict=True)]
    np.testing.assert_allclose(ssim(*pair, data_range), expected, rtol=1e-10)


def test_ssim_is_symmetric_and_one_for_equal_maps(pair):
    x, truth = pair
    np.testing.assert_allclose(ssim(x, truth), ssim(truth, x), rtol=1e-12)
    np.testing.assert_allclose(ssim(x, x), 1.0, rtol=1e-12)


def test_each_frame_is_scored_by_itself(pair):
    x, truth = (np.tile(maps, (120, 1, 1)) for maps in pair)  # more frames than one chunk
    for score in (psnr, ssim):
        whole = score(x, truth)
        assert whole.shape == (360,)
        np.testing.assert_allclose(whole[:3], np.r_[[score(x[i], truth[i])[0] for i in range(3)]])
        np.testing.assert_array_equal(whole.reshape(120, 3), np.tile(whole[:3], (120, 1)))


def test_row05_wrong_shapes_name_both():
    with pytest.raises(ValueError, match=r"\(1, 12, 12\) and \(1, 12, 13\)"):
        psnr(np.zeros((1, 12, 12)), np.zeros((1, 12, 13)))
    with pytest.raises(ValueError, match=r"\(1, 9, 9\) and \(1, 9, 10\)"):
        ssim(np.zeros((1, 9, 9)), np.zeros((1, 9, 10)))


@pytest.mark.parametrize("shape", [(9, 9), (12, 10), (10, 12)])
def test_maps_smaller_than_the_window_have_no_ssim(shape):
    """A frame of 3 x 3 pixels has 9 x 9 cells: its other scores are there all the same."""
    maps = np.random.default_rng(0).uniform(0, 255, (2, *shape))
    np.testing.assert_array_equal(ssim(maps, maps + 1), [np.nan, np.nan])
    truth = from_lists([[(1.0, 1.0, 240.0)], []])
    scores = evaluate(truth, truth, maps=maps, truth_maps=maps + 1).as_dict()
    assert (scores["ssim"], scores["mAP"]) == (None, 100.0)
    assert scores["psnr"] == pytest.approx(20 * np.log10(255))


def test_the_smallest_map_with_an_ssim_holds_one_window():
    x, truth = np.random.default_rng(0).uniform(0, 255, (2, 1, 11, 11))
    np.testing.assert_allclose(ssim(x, truth), ssim_by_windows(x[0], truth[0], 255.0), rtol=1e-10)
