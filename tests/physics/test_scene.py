"""The scene protocol: facts over many frames, keys, presets and bad input."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dscsnet_jax.physics import optics, scene
from dscsnet_jax.physics.preset import digital
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.sensor import expose

NUM = 20_000
# Each program runs once or twice, so compiling fast matters more than running fast.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@cache
def program(preset: scene.Preset) -> Any:
    return quick_jit(partial(scene.simulate, preset))


def simulated(preset: scene.Preset, seed: int, split: str, index: Any) -> scene.Scene:
    keys = scene.frame_keys(seed, split, jnp.asarray(index))
    return jax.device_get(program(preset)(keys))


@pytest.fixture(scope="module")
def drawn() -> scene.Scene:
    return simulated(scene.get_preset("csist"), 7, "train", np.arange(NUM))


def brute_force(rng: np.random.Generator, slots: int, num: int) -> np.ndarray:
    """(num, slots, 2) places in the unit square by rejection, frames that jam left out."""
    place = rng.random((num, 1, 2))
    for _ in range(1, slots):
        new = np.full((len(place), 2), np.nan)
        for _ in range(3000):
            open_ = np.isnan(new[:, 0])
            if not open_.any():
                break
            draw = rng.random((open_.sum(), 2))
            near = ((place[open_] - draw[:, None]) ** 2).sum(-1) < 0.25
            new[np.flatnonzero(open_)[~near.any(1)]] = draw[~near.any(1)]
        keep = ~np.isnan(new[:, 0])
        place = np.concatenate([place[keep], new[keep, None]], 1)
    return place


def test_counts_are_clipped_normal_less_the_jammed(drawn: scene.Scene) -> None:
    share = np.bincount(np.asarray(drawn.targets.count), minlength=6)[1:] / NUM
    edges = stats.norm.cdf(np.array([1.5, 2.5, 3.5, 4.5]) - 3)
    nominal = np.diff([0, *edges, 1])
    error = 4 * np.sqrt(nominal * (1 - nominal) / NUM)
    assert (np.abs(share - nominal)[:2] < error[:2]).all()
    lost = (np.arange(1, 6) * (nominal - share)).sum()
    # Targets lost a frame: 0.030 over 400,000 frames; the counts themselves scatter by 0.96.
    assert abs(lost - 0.030) < 4 * 0.96 / NUM**0.5


def test_positions_and_intensities_keep_the_protocol(drawn: scene.Scene) -> None:
    targets = drawn.targets
    mask = np.asarray(targets.mask)
    position, intensity = np.asarray(targets.position), np.asarray(targets.intensity)
    assert position[mask].min() >= 1.6
    assert position[mask].max() <= 8.6
    assert 220 <= intensity[mask].min() < 220.1
    assert 249.9 < intensity[mask].max() <= 250
    assert (position[~mask] == 0).all()
    assert (intensity[~mask] == 0).all()
    gap = np.linalg.norm(position[:, :, None] - position[:, None], axis=-1)
    pairs = mask[:, :, None] & mask[:, None] & ~np.eye(5, dtype=bool)[None]
    assert gap[pairs].min() >= 0.5 - 1e-5
    assert gap[pairs].min() < 0.505
    pixel = np.floor(position[:, 0] + 0.4)  # the first target's cluster pixel
    counts = np.bincount(pixel[:, 0].astype(int), minlength=9)[2:9]
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("slot", [1, 2, 3])
def test_places_are_those_of_drawing_until_one_is_free(drawn: scene.Scene, slot: int) -> None:
    mask = np.asarray(drawn.targets.mask)[:, slot]
    position = np.asarray(drawn.targets.position)[mask]
    ours = (position + 0.4) % 1
    theirs = brute_force(np.random.default_rng(0), slot + 1, 6000)
    for axis in (0, 1):
        p = stats.ks_2samp(ours[:, slot, axis], theirs[:, slot, axis]).pvalue
        assert p > 1e-3
    gaps = [np.linalg.norm(a[:, slot] - a[:, 0], axis=-1) for a in (ours, theirs)]
    assert stats.ks_2samp(*gaps).pvalue > 1e-3


def test_csist_frames_are_rounded_and_saturated(drawn: scene.Scene) -> None:
    some = jax.tree.map(lambda a: a[:500], drawn.targets)
    expected = np.asarray(optics.render(some, frame_size=11, psf=0.5))
    recorded = np.clip(np.round(expected), 0, 255)
    frames = drawn.frames[:500]
    tie = np.abs(expected % 1 - 0.5) < 1e-4  # float rounding may fall either way
    np.testing.assert_array_equal(frames[~tie], recorded[~tie])
    assert (frames.max((1, 2)) == 255).mean() > 0.3


def test_presets_differ_as_documented() -> None:
    names = ("csist", "csist_float", "csist_noise", "csist_wide")
    made = {
        name: simulated(scene.get_preset(name, max_targets=3), 1, "val", np.arange(400))
        for name in names
    }
    assert float(made["csist"].frames.max()) == 255
    assert float(made["csist_float"].frames.max()) > 256
    assert (made["csist_float"].frames % 1 != 0).any()
    corner = np.asarray(made["csist_noise"].frames)[:, :1]  # no targets in the first row
    assert abs(corner.mean() - 10) < 0.5
    assert abs(corner.std() - 5) < 0.5
    wide = np.asarray(made["csist_wide"].targets.intensity)[made["csist_wide"].targets.mask]
    assert 50 <= wide.min() < 60
    assert 240 < wide.max() <= 250


def test_row32_frames_depend_on_their_key_alone() -> None:
    preset = scene.get_preset("csist_noise", max_targets=2)
    whole = simulated(preset, 3, "test", np.arange(6))
    again = simulated(preset, 3, "test", np.arange(6))
    part = simulated(preset, 3, "test", np.array([4, 2]))
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    np.testing.assert_array_equal(part.frames, whole.frames[[4, 2]])


def test_splits_and_seeds_never_share_a_key() -> None:
    index = jnp.arange(2000)
    data = [
        np.asarray(jax.random.key_data(scene.frame_keys(seed, split, index)))
        for seed in (0, 1)
        for split in scene.SPLITS
    ]
    together = np.concatenate(data)
    assert len(np.unique(together, axis=0)) == len(together)


@pytest.mark.parametrize(("division", "size"), [(5, 11), (7, 16), (4, 64)])
def test_any_division_and_size(division: int, size: int) -> None:
    preset = scene.get_preset("csist", division=division, frame_size=size, max_targets=1)
    made = simulated(preset, 0, "val", np.arange(4))
    assert made.frames.shape == (4, size, size)
    position = np.asarray(made.targets.position)[made.targets.mask]
    assert position.max() <= size - 3 + 0.6


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("csits", {}, "csist"),
        ("csist", {"colour": 1}, "colour"),
        ("csist", {"frame_size": 4}, "margin"),
        ("csist", {"intensity": (250.0, 220.0)}, r"low <= high < inf, got 250\.0 \.\. 220\.0"),
        ("csist", {"intensity": (220.0, float("nan"))}, "low <= high < inf"),
        ("csist_varied", {"sigma": 0.5}, "'csist_varied' draws .*: sigma cannot be set"),
        ("csist_varied", {"read_noise": 1.0, "pedestal": 2.0}, "pedestal, read_noise cannot"),
        ("csist_varied", {"sensor": digital(8)}, "sensor cannot be set"),
        ("csist_varied", {"variation": scene.Variation(), "read_noise": 1.0}, "read_noise cannot"),
        ("csist_varied", {"intensity": (60.0, 250.0)}, "intensity's lower end cannot be set"),
        ("csist_varied", {"intensity": (50.0, 200.0)}, r"from 50\.0 \.\. 220\.0; the upper end"),
    ],
)
def test_unknown_presets_and_changes_without_effect_are_refused(
    name: str, changes: dict, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        scene.get_preset(name, **changes)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="tset"):
        scene.frame_keys(0, "tset", jnp.arange(1))


def test_changes_beside_a_variation_are_kept() -> None:
    preset = scene.get_preset("csist_varied", frame_size=7, intensity=(50.0, 400.0))
    assert (preset.frame_size, preset.cluster.intensity) == (7, (50.0, 400.0))
    varied = scene.Variation(sigma=(0.65, 0.75))
    own = scene.get_preset("csist_varied", variation=varied, sigma=0.7)
    assert (own.sigma, own.variation) == (0.7, varied)
    without = scene.get_preset("csist_varied", variation=None, sigma=0.7, read_noise=2.0)
    assert (without.sigma, without.sensor.read_noise) == (0.7, 2.0)


@pytest.mark.parametrize("name", ["csist", "csist_float", "csist_noise", "csist_wide"])
def test_frames_without_variation_are_those_of_scene_optics_and_sensor(name: str) -> None:
    """Composed by hand, with the keys that made the frames before there was a variation."""
    preset = scene.get_preset(name, max_targets=1)

    @quick_jit
    @jax.vmap
    def by_hand(key: jax.Array) -> jax.Array:
        target_key, sensor_key = jax.random.split(key)
        targets = scene.sample_targets(preset.cluster, 11, target_key)
        expected = optics.render(targets, frame_size=11, psf=0.5)
        return expose(preset.sensor, sensor_key, expected)

    made = simulated(preset, 2, "train", np.arange(64))
    np.testing.assert_array_equal(made.frames, by_hand(scene.frame_keys(2, "train", np.arange(64))))
    offset, noise = {
        "csist": (0, 12**-0.5),
        "csist_float": (0, 0),
        "csist_noise": (10, (25 + 1 / 12) ** 0.5),
        "csist_wide": (0, 12**-0.5),
    }[name]
    np.testing.assert_array_equal(made.level, np.full(64, offset))
    np.testing.assert_allclose(made.noise, np.full(64, noise), rtol=1e-6)


# --- conditions that vary from frame to frame ----------------------------------------------

KNOWN = scene.Variation(
    sigma=(0.45, 0.55), pedestal_error=0.0, noise_error=0.0
)  # users know offset and noise
# The outer two rows and columns are 3 pixels from any target: there is background alone.
WIDE: dict[str, Any] = {"frame_size": 13, "margin": 5, "max_targets": 2}
BORDER = np.pad(np.zeros((9, 9), bool), 2, constant_values=True)


def varied(variation: scene.Variation, **changes: Any) -> scene.Scene:
    preset = scene.get_preset("csist_varied", variation=variation, **{**WIDE, **changes})
    return simulated(preset, 11, "train", np.arange(NUM))


@pytest.fixture(scope="module")
def known() -> scene.Scene:
    """Frames whose true offset and noise are told."""
    return varied(KNOWN)


@pytest.fixture(scope="module")
def is_digital(known: scene.Scene) -> np.ndarray:
    return (known.frames % 1 == 0).all((1, 2))


def assert_share(found: np.ndarray, share: float) -> None:
    assert abs(found.mean() - share) < 4 * (share * (1 - share) / found.size) ** 0.5


def test_shares_of_empty_and_of_digital_frames(known: scene.Scene, is_digital: np.ndarray) -> None:
    empty = ~known.targets.mask.any(1)
    assert_share(empty, 0.05)
    assert_share(is_digital, 0.5)
    assert_share(is_digital[empty], 0.5)
    assert not known.targets.position[empty].any()
    assert not known.targets.intensity[empty].any()
    above = known.frames[empty] - known.level[empty, None, None]  # nothing is left of a target
    assert (np.abs(above) <= 6 * known.noise[empty, None, None] + 0.5).all()
    assert known.frames[is_digital].min() == 0
    assert known.frames[~is_digital].min() < -10


def test_offset_and_noise_of_the_frames_have_the_ranges_told(
    known: scene.Scene, is_digital: np.ndarray
) -> None:
    assert stats.kstest(known.level, stats.uniform(0, 20).cdf).pvalue > 1e-3
    read = np.sqrt(np.maximum(known.noise**2 - is_digital / 12, 0))
    none = read < 1e-3
    assert_share(none, 1 / 11)
    assert stats.kstest(read[~none], stats.uniform(0, 10).cdf).pvalue > 1e-3
    assert abs(stats.spearmanr(known.level, read).statistic) < 4 / NUM**0.5


def test_frames_hold_the_offset_and_noise_told(known: scene.Scene, is_digital: np.ndarray) -> None:
    """Pixels without targets, standardised; digital ones far enough from the cut at 0."""
    offset, noise = known.level, known.noise
    noisy = (noise > 1) & (~is_digital | (offset > 5 * noise))
    assert is_digital[noisy].sum() > 300
    pixels = (known.frames[:, BORDER] - offset[:, None]) / np.where(noisy, noise, 1)[:, None]
    for kind in (noisy & is_digital, noisy & ~is_digital):
        some = pixels[kind].astype(float)
        assert abs(some.mean()) < 4 / some.size**0.5
        assert abs((some**2).mean() - 1) < 4 * (2 / some.size) ** 0.5
    still = ~is_digital & (noise == 0)
    assert still.sum() > 500
    assert np.abs(pixels[still]).max() < 1e-4


def test_offset_and_noise_that_users_know_have_the_errors_told(known: scene.Scene) -> None:
    """The same frames; only what is known of them differs."""
    told = varied(scene.Variation(sigma=KNOWN.sigma))
    np.testing.assert_array_equal(told.frames, known.frames)
    noisy = known.noise > 0.1  # where float32 resolves an error of 0.13 deviations
    offset_error = (told.level - known.level)[noisy] / (0.13 * known.noise[noisy])
    noise_error = np.log(told.noise[noisy] / known.noise[noisy]) / 0.1
    for error in (offset_error, noise_error):
        assert stats.kstest(error.astype(float), stats.norm.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(offset_error, noise_error)[0, 1]) < 4 / noisy.sum() ** 0.5
    still = known.noise == 0
    assert still.any()
    np.testing.assert_array_equal(told.level[still], known.level[still])
    assert not told.noise[still].any()


def test_intensities_lie_between_the_frames_own_lower_end_and_the_clusters_upper(
    known: scene.Scene,
) -> None:
    present = known.targets.mask[:, 0]
    first = known.targets.intensity[present, 0].astype(float)
    assert first.min() > 50
    assert first.max() < 250

    least = 50 + 170 * (np.arange(4000) + 0.5) / 4000

    def share_below(x: np.ndarray) -> np.ndarray:
        below = (np.asarray(x)[..., None] - least) / (250 - least)
        return np.clip(below, 0, 1).mean(-1)

    some = first[:4000]
    assert stats.kstest(some, share_below).pvalue > 1e-3
    # Targets of one frame share its lower end: they are alike.
    both = known.targets.mask[:, 1]
    pair = known.targets.intensity[both].astype(float)
    assert np.corrcoef(pair.T)[0, 1] > 0.1


def test_bright_targets_saturate_digital_frames_alone() -> None:
    fixed = dataclasses.replace(KNOWN, least_intensity=(200.0, 200.0), read_noise=(1.0, 2.0))
    made = varied(fixed, intensity=(50.0, 700.0), frame_size=5, margin=2, max_targets=1)
    drawn = made.targets.intensity[made.targets.mask].astype(float)
    assert stats.kstest(drawn, stats.uniform(200, 500).cdf).pvalue > 1e-3
    peak, whole = made.frames.max((1, 2)), (made.frames % 1 == 0).all((1, 2))
    assert peak[whole].max() == 255
    assert (peak[whole] == 255).mean() > 0.1
    assert (peak[~whole] > 256).mean() > 0.1


def test_psf_of_the_frames_has_the_range_told() -> None:
    """From the brightest pixel of one target: the narrower the PSF, the more it holds."""
    quiet = scene.Variation(
        read_noise=(0.0, 0.0), pedestal=(0.0, 0.0), digital=0.0, empty=0.0, sigma=(0.4, 0.6)
    )
    made = varied(quiet, frame_size=5, margin=2, max_targets=1)
    position = made.targets.position[:, 0].astype(float)
    pixel = np.round(position).astype(int)
    value = made.frames[np.arange(NUM), pixel[:, 0], pixel[:, 1]].astype(float)
    share = value / made.targets.intensity[:, 0]

    def held(sigma: np.ndarray) -> np.ndarray:
        edges = (pixel - position)[..., None] + np.array([-0.5, 0.5])
        return np.diff(special.ndtr(edges / sigma[:, None, None]))[..., 0].prod(1)

    low, high = np.full(NUM, 0.2), np.full(NUM, 1.0)
    for _ in range(40):
        middle = (low + high) / 2
        wide = held(middle) < share
        low, high = np.where(wide, low, middle), np.where(wide, middle, high)
    assert stats.kstest(low, stats.loguniform(0.4, 0.6).cdf).pvalue > 1e-3
    assert not made.noise.any()


def test_a_psf_goes_with_presets_that_draw_none() -> None:
    keys = scene.frame_keys(0, "val", np.arange(2))
    with pytest.raises(ValueError, match="csist_varied draws the PSF"):
        scene.simulate(scene.get_preset("csist_varied"), keys, psf=Gaussian(0.6))
    narrow, wide = (
        scene.simulate(scene.get_preset("csist_float"), keys, psf=psf)
        for psf in (None, Gaussian(0.8))
    )
    np.testing.assert_array_equal(narrow.targets.position, wide.targets.position)
    assert (narrow.frames.max((1, 2)) > 1.2 * wide.frames.max((1, 2))).all()
