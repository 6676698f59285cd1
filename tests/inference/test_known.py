"""What is known: its file is read as it was written, and refuses what cannot be."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.struct
import jax
import numpy as np
import pytest

from dscsnet_jax.inference import known_file
from dscsnet_jax.inference.intensity import Histogram, LogNormal
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.prior import ScenePrior, scene_prior
from dscsnet_jax.physics.preset import Sensor, presets
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.psf_airy import airy
from dscsnet_jax.physics.psf_gaussians import GaussianMixture, Moffat, rotated_gaussian
from dscsnet_jax.physics.psf_tables import empirical

RNG = np.random.default_rng(0)
ARRAY = np.exp(-(np.add.outer((np.arange(21) - 10.0) ** 2, (np.arange(21) - 9.7) ** 2) / 9))
PSFS = {
    "none": None,
    "gaussian": Gaussian(0.1 + 0.4),
    "two widths": Gaussian(np.array([0.45, 0.6], np.float32)),
    "rotated_gaussian": rotated_gaussian((0.45, 0.6), 30.0),
    "moffat": Moffat(1.2, 2.7),
    "gaussian_mixture": GaussianMixture((0.8, 0.2), (0.5, 1.2)),
    "offset mixture": GaussianMixture((0.8, 0.2), (0.5, 1.2), ((0.0, 0.0), (0.2, -0.1))),
    "airy": airy(1.05, obscuration=0.3, jitter=0.1),
    "empirical": empirical(ARRAY, oversampling=4),
}
SENSORS = {
    "none": Sensor(),
    "numbers": Sensor(2.0, -3.5, 8.0, 0.7, 1.4, 4095.0, True),
    "misfit": Sensor(read_noise=2.0, misfit=0.05),
    "endless": Sensor(np.float32(0.1), saturation=np.inf, quantised=False),
    "maps": Sensor(
        read_noise=RNG.uniform(1, 2, (9, 11)).astype("f4"),
        pedestal=RNG.normal(size=(9, 11)),
        background=np.linspace(0, 1, 99).reshape(9, 11),
        bad_pixels=RNG.uniform(size=(9, 11)) < 0.1,
    ),
    "planes": Sensor(read_noise=RNG.uniform(1, 2, (4, 9, 11)), pedestal=np.arange(4.0)),
}
SCENES = {
    "none": ScenePrior(),
    "csist": presets()["csist"].known.prior,
    "log_normal": scene_prior(intensity=LogNormal(5.0, 0.3), separation=0.2),
    "histogram": scene_prior(
        intensity=Histogram(np.array([1.0, 3.0, 10.0]), np.array([1.0, 2.0])), count=(1, 2, 3)
    ),
}


def assert_same(one: Known, other: Known) -> None:
    assert type(one.psf) is type(other.psf)
    assert jax.tree.structure(one.sensor) == jax.tree.structure(other.sensor)
    parts = (("psf", one.psf, other.psf), ("sensor", one.sensor, other.sensor))
    for name, a, b in (*parts, ("prior", one.prior, other.prior)):
        for field in dataclasses.fields(a) if a is not None else ():
            got, wanted = (getattr(of, field.name) for of in (b, a))
            pairs = [(got, wanted)]
            if dataclasses.is_dataclass(wanted):
                pairs = zip(*(jax.tree.leaves(of) for of in (got, wanted)), strict=True)
            for value, expected in pairs:
                np.testing.assert_array_equal(value, expected, err_msg=f"{name}.{field.name}")


@pytest.mark.parametrize(
    "known",
    [
        *(Known(psf=psf) for psf in PSFS.values()),
        *(Known(sensor=sensor) for sensor in SENSORS.values()),
        *(Known(prior=prior) for prior in SCENES.values()),
        *(preset.known for preset in presets().values() if preset.variation is None),
    ],
)
def test_the_file_is_read_as_it_was_written(known: Known, tmp_path: Path) -> None:
    """Bit for bit, and once more: the second file is the first."""
    known.to_json(tmp_path / "a.json")
    again = Known.from_json(tmp_path / "a.json")
    assert_same(known, again)
    again.to_json(tmp_path / "b.json")
    first, second = ((tmp_path / f"{n}.json").read_text() for n in "ab")
    assert first.replace("a.npz", "b.npz") == second


def test_maps_may_mark_pixels_that_tell_nothing(tmp_path: Path) -> None:
    noise = np.ones((3, 3))
    noise[1, 1] = np.nan
    known = Known(sensor=Sensor(read_noise=noise))
    known.to_json(tmp_path / "a.json")
    assert_same(known, Known.from_json(tmp_path / "a.json"))
    with pytest.raises(ValueError, match=r"expected the suffix \.json"):
        known.to_json(tmp_path / "a.npz")


def test_fields_are_told_once(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"version": 1, "sensor": {"gain": 1, "gain": 2}}')
    with pytest.raises(ValueError, match="field gain is there twice"):
        Known.from_json(path)


def test_what_is_known_of_some_frames() -> None:
    known = Known(sensor=SENSORS["planes"]).of_frames(1, 3)
    np.testing.assert_array_equal(known.sensor.read_noise, SENSORS["planes"].read_noise[1:3])
    np.testing.assert_array_equal(known.sensor.pedestal, [1.0, 2.0])
    assert Known(sensor=SENSORS["maps"]).of_frames(1, 3).sensor is not None
    np.testing.assert_array_equal(
        Known(sensor=SENSORS["maps"]).of_frames(1, 3).sensor.pedestal, SENSORS["maps"].pedestal
    )


def test_a_psf_read_answers_as_the_one_written(tmp_path: Path) -> None:
    for psf in list(PSFS.values())[1:]:
        Known(psf=psf).to_json(tmp_path / "a.json")
        again = Known.from_json(tmp_path / "a.json").psf
        place = np.array(4.3, np.float32)
        for axis in (0, 1):
            one, other = (p.terms().responses(axis, place, 9) for p in (psf, again))
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def written(tmp_path: Path, **parts: Any) -> Path:
    path = tmp_path / "sensor.json"
    path.write_text(json.dumps({"version": 1, **parts}))
    return path


def test_a_person_writes_what_is_known_and_no_more(tmp_path: Path) -> None:
    path = written(tmp_path, sensor={"read_noise": 2, "saturation": "inf"})
    assert_same(Known.from_json(path), Known(sensor=Sensor(read_noise=2, saturation=np.inf)))
    path = written(tmp_path, psf={"kind": "airy", "resolution": 1.05, "obscuration": 0.3})
    assert_same(Known.from_json(path), Known(psf=airy(1.05, obscuration=0.3)))
    path = written(
        tmp_path, psf=None, prior={"intensity": {"kind": "uniform", "low": 1, "high": 9}}
    )
    assert_same(Known.from_json(path), Known(prior=scene_prior(intensity=(1, 9))))
    np.save(tmp_path / "psf.npy", ARRAY)
    told = {"kind": "array", "array": "psf.npy", "oversampling": 4}
    path = written(tmp_path, psf=told, units={"psf.oversampling": "1 / pixel"})
    assert_same(Known.from_json(path), Known(psf=empirical(ARRAY, oversampling=4)))
    path = written(tmp_path, psf=told | {"values": "effective", "centre": [9.0, 10.5]})
    centred = empirical(ARRAY, oversampling=4, centre=(9.0, 10.5), kind="effective")
    assert_same(Known.from_json(path), Known(psf=centred))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"version": 2}, "version must be 1, got 2"),
    ({"optics": {}}, "the file has no field 'optics'"),
    ({"sensor": {"noise": 1.0}}, "sensor has no field 'noise'; it has read_noise, pedestal"),
    ({"prior": {"intensities": 1.0}}, "prior has no field 'intensities'"),
    ({"psf": {"kind": "gaussian", "width": 1.0}}, "psf has no field 'width'; it has sigma"),
    ({"psf": {"kind": "gausian"}}, "psf.kind must be one of gaussian, .*, got 'gausian'"),
    ({"psf": {"kind": "airy"}}, "psf of kind airy lacks resolution"),
    ({"psf": {"kind": "gaussian", "sigma": -0.5}}, "psf: sigma must be one or two positive"),
    ({"psf": {"kind": "gaussian", "sigma": "0.5"}}, "psf.sigma must be a number"),
    ({"psf": {"kind": "moffat", "fwhm": 1.0, "beta": 1.0}}, "psf: beta must be finite and above"),
    ({"psf": {"kind": "airy", "resolution": 1, "obscuration": 1}}, "psf: obscuration 1 of an"),
    ({"psf": {"kind": "gaussian_mixture", "weight": [1], "sigma": [1, 2]}}, "psf: weights"),
    ({"psf": {"kind": "array", "array": "../a.npy", "oversampling": 2}}, "must be a file beside"),
    ({"psf": 0.5}, "psf must be an object"),
    ({"sensor": {"gain": 0}}, "gain must be finite electrons per count above 0, got 0"),
    ({"sensor": {"gain": [1, 2]}}, "gain must be one number"),
    ({"sensor": {"read_noise": -1}}, "read_noise must be finite counts of at least 0, got -1"),
    ({"sensor": {"read_noise": "inf"}}, "read_noise must be finite counts"),
    ({"sensor": {"saturation": 0}}, "saturation must be counts above 0"),
    ({"sensor": {"misfit": -0.1}}, "misfit must be a finite number of at least 0, got -0.1"),
    ({"sensor": {"misfit": [0.1, 0.2]}}, "misfit must be one number"),
    ({"sensor": {"excess_noise": 0.5}}, "excess_noise must be a finite factor of at least 1"),
    ({"sensor": {"bad_pixels": [[0, 1]]}}, "bad_pixels must be .* of true and false"),
    ({"sensor": {"quantised": 1}}, "quantised must be true, false or null, got 1"),
    ({"sensor": {"pedestal": True}}, "sensor.pedestal must be a number"),
    ({"version": True}, "version must be 1, got True"),
    ({"psf": {"kind": "gaussian", "sigma": True}}, "psf.sigma must be a number"),
    ({"psf": {"kind": "airy", "resolution": 1, "half": 2.5}}, "psf.half must be a positive whole"),
    ({"sensor": {"read_noise": 10**400}}, "sensor.read_noise is beyond what a number holds"),
    ({"sensor": {"excess_noise": None, "gain": [1]}}, "gain must be one number"),
    ({"prior": {"separation": -1}}, "separation must be finite and at least 0"),
    ({"prior": {"intensity": {"kind": "uniform", "low": 9, "high": 1}}}, "intensity must be a ran"),
    ({"prior": {"intensity": [220, 250]}}, "prior.intensity must be an object"),
    ({"prior": {"places": "here"}}, "unknown places 'here'"),
    ({"units": {"sensor.read_noise": "electron"}}, "unit of sensor.read_noise must be 'count'"),
    ({"units": {"sensor.noise": "count"}}, "units of unknown fields: sensor.noise"),
    ({"units": []}, "units must be an object"),
]


@pytest.mark.parametrize(("parts", "said"), WRONG, ids=[said[:30] for _, said in WRONG])
def test_row21_what_cannot_be_is_refused_in_a_line(
    parts: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = written(tmp_path, **parts)
    with pytest.raises(ValueError, match=said) as caught:
        Known.from_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.where(np.eye(21) > 0, np.nan, ARRAY), "a NaN or an infinity at"),
        (-ARRAY, "light must be positive"),
        (ARRAY[:20], "even side: tell the centre"),
    ],
)
def test_row21_arrays_that_are_no_psf_are_refused(
    array: np.ndarray, said: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "psf.npy", array)
    told = {"kind": "array", "array": "psf.npy", "oversampling": 4}
    with pytest.raises(ValueError, match=said):
        Known.from_json(written(tmp_path, psf=told))
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        Known.from_json(written(tmp_path, psf=told | {"array": "none.npy"}))


@flax.struct.dataclass
class Own(Gaussian):
    """A PSF of one's own."""


def test_a_psf_of_ones_own_is_written_once_it_has_a_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Known(psf=Own(0.6))
    with pytest.raises(ValueError, match="psf of class Own has no kind"):
        known.to_json(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())
    kind = known_file.Kind(Own, {"sigma": "pixel"}, Own)
    monkeypatch.setitem(known_file.PSF_KINDS, "own", kind)
    known.to_json(tmp_path / "a.json")
    assert_same(Known.from_json(tmp_path / "a.json"), known)


def test_programs_are_told_the_gain_and_nothing_that_windows_hold() -> None:
    known = Known((0.4, 0.5), SENSORS["numbers"], SCENES["csist"])
    told = known.for_windows()
    assert told.sensor == Sensor(gain=np.float32(0.5))  # 0.7 by an excess of 1.4
    misfit = Known(0.5, SENSORS["misfit"]).for_windows().sensor
    assert misfit == Sensor(misfit=np.float32(0.05))
    assert jax.tree.leaves(told.psf)[0].dtype == np.float32
    plain = Known(0.5, dataclasses.replace(SENSORS["maps"], gain=3.0), SCENES["csist"])
    assert jax.tree.structure(told) == jax.tree.structure(plain.for_windows())


def test_presets_tell_all_there_is_to_know() -> None:
    for name, preset in presets().items():
        if preset.variation is None:
            sensor = preset.known.sensor
            assert None not in (sensor.read_noise, sensor.pedestal, sensor.background), name
            assert sensor == preset.sensor
        else:
            with pytest.raises(ValueError, match="sensor of its own"):
                _ = preset.known
