"""Maps: how close a sub-pixel map is to the grid truth (PSNR, SSIM).

Both are the image scores the field reports. They compare maps cell by cell, so a
target one cell away counts as wrong as one that is missing: judge targets by
`metrics`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import correlate1d

DATA_RANGE = 255.0
"""Default range of the map's values, counts: that of the 8-bit benchmark."""

SSIM_SIGMA = 1.5
"""Standard deviation of the SSIM window, cells."""

SSIM_RADIUS = 5
"""Half width of the SSIM window, cells: 11 cells wide."""

SSIM_K = (0.01, 0.03)
"""Constants `k1, k2` that keep SSIM's ratios defined, relative to the data range."""

_CHUNK = 256  # frames worked on at once: bounds the memory, not the result


def psnr(x: ArrayLike, reference: ArrayLike, data_range: float = DATA_RANGE) -> np.ndarray:
    """Peak signal-to-noise ratio `10 log10(L^2 / mean((x - reference)^2))` per frame.

    Args:
      x: (B, H, W) maps, or one (H, W), counts.
      reference: true maps, same shape.
      data_range: `L`, counts.

    Returns:
      (B,) decibels; inf where the maps are equal. Its mean is `psnr(...).mean()`.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> psnr(np.full((1, 4, 4), 25.5), np.zeros((1, 4, 4))).tolist()
      [20.0]
    """
    maps, true_maps = _map_pair(x, reference)
    error = ((maps - true_maps) ** 2).mean((-2, -1))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(data_range**2 / error)


def ssim(x: ArrayLike, reference: ArrayLike, data_range: float = DATA_RANGE) -> np.ndarray:
    """Structural similarity per frame.

    With means `m`, variances `v` and covariance `v_xy` under a Gaussian window and
    `C1 = (k1 L)^2, C2 = (k2 L)^2`, the mean over all windows that lie inside the map of

        (2 m_x m_y + C1)(2 v_xy + C2) / ((m_x^2 + m_y^2 + C1)(v_x + v_y + C2))

    Args:
      x: (B, H, W) maps, or one (H, W), counts.
      reference: true maps, same shape.
      data_range: `L`, counts.

    Returns:
      (B,) values up to 1; NaN for maps of less than 11 cells on a side, where no window
      fits. Its mean is `ssim(...).mean()`.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> ramp = np.arange(144.0).reshape(1, 12, 12)
      >>> ssim(ramp, ramp).tolist()
      [1.0]

    References:
      Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility
      to structural similarity", IEEE Trans. Image Processing 13(4), 2004.
    """
    maps, true_maps = _map_pair(x, reference)
    scores = np.full(len(maps), np.nan)
    if min(maps.shape[1:]) < 2 * SSIM_RADIUS + 1:
        return scores
    for start in range(0, len(maps), _CHUNK):
        part = slice(start, start + _CHUNK)
        scores[part] = _ssim(maps[part], true_maps[part], data_range)
    return scores


def _ssim(x: np.ndarray, y: np.ndarray, data_range: float) -> np.ndarray:
    c1, c2 = ((k * data_range) ** 2 for k in SSIM_K)
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = _window_mean(x * x) - mean_x**2
    var_y = _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean((-2, -1))


def _window_mean(values: np.ndarray) -> np.ndarray:
    """Gaussian mean of every window inside the map: (B, H, W) -> (B, H-10, W-10)."""
    taps = np.exp(-0.5 * (np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1) / SSIM_SIGMA) ** 2)
    taps /= taps.sum()
    inside = slice(SSIM_RADIUS, -SSIM_RADIUS)
    rows = correlate1d(values, taps, axis=-2)[:, inside, :]
    return correlate1d(rows, taps, axis=-1)[..., inside]


def _map_pair(x: ArrayLike, reference: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both maps as (B, H, W) float64."""
    maps, true_maps = np.asarray(x, float), np.asarray(reference, float)
    if maps.shape != true_maps.shape or maps.ndim not in (2, 3):
        raise ValueError(
            "x and reference must have the same shape (B, H, W) or (H, W), "
            f"got {maps.shape} and {true_maps.shape}"
        )
    return (maps[None], true_maps[None]) if maps.ndim == 2 else (maps, true_maps)
