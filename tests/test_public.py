"""The public surface: what `dir(dj)` lists, and that asking for it costs nothing before."""

import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dscsnet_jax as dj

NAMES = [name for name in dir(dj) if not name.startswith("_")]


def test_importing_touches_nothing() -> None:
    code = (
        "import sys, dscsnet_jax as dj; dir(dj); print(sorted({'jax', 'numpy'} & {*sys.modules}))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert time.perf_counter() - start < 5  # an interpreter's start; JAX alone takes longer on CI


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_there_and_has_an_example(name: str) -> None:
    thing = getattr(dj, name)
    assert thing is getattr(dj, name)
    assert ">>> " in thing.__doc__


def test_other_names_are_none_of_it() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'unmixx'"):
        dj.unmixx  # noqa: B018
    assert {"unmix", "Known", "Sensor", "UnmixResult", "log_evidence"} <= set(NAMES)


@pytest.mark.slow
def test_a_number_will_do_for_a_gaussian_psf() -> None:
    truth = dj.from_lists([[(3.1, 2.6, 60.0)]])
    seen = dj.observe(dj.render(truth, frame_size=7, psf=0.5), dj.Sensor(1.0, background=0.0))
    one, other = (dj.fit(seen, truth, dj.Known(psf)) for psf in (0.5, dj.Gaussian(0.5)))
    np.testing.assert_array_equal(one.targets.position, other.targets.position)
    with pytest.raises(ValueError, match="needs a PSF"):
        dj.fit(seen, truth, dj.Known())


@pytest.mark.slow
def test_log_evidence_has_a_derivative_by_every_number_of_what_is_known(x64: None) -> None:
    """By differences, leaf by leaf: optics, sensor (maps too) and scene."""
    rng = np.random.default_rng(0)
    truth = dj.from_lists([[(3.1, 2.6, 60.0), (3.0, 3.6, 80.0)]])
    truth = jax.tree.map(lambda a: a.astype(float) if a.dtype.kind == "f" else a, truth)
    ramp = np.linspace(0, 2, 49).reshape(7, 7)
    known = dj.Known(
        dj.rotated_gaussian((0.5, 0.6), 20.0),
        dj.Sensor(
            read_noise=1.5 + ramp,
            pedestal=3 * ramp,
            background=2.0,
            gain=1.3,
            excess_noise=1.4,
            saturation=30.0,
        ),
        dj.scene_prior(intensity=(20.0, 150.0), separation=1.02, cluster_size=1.6),
    )
    known = jax.tree.map(lambda a: jnp.asarray(a, float), known)
    y = dj.render(truth, frame_size=7, psf=known.psf) + 3 * ramp[None] + 2
    y = y + rng.normal(0, 2, (1, 7, 7))
    y = jnp.where(y >= 30, 31, y)  # saturated whatever the step below

    @jax.jit
    def evidence(known: dj.Known) -> jax.Array:
        return dj.log_evidence(y, truth, known, num_iterations=60)[0]

    with jax.numpy_rank_promotion("allow"):  # the way back is traced where nothing else is set
        gradient = jax.jit(jax.grad(evidence))(known)
    leaves, structure = jax.tree.flatten(known)
    named = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(known)]
    slopes = jax.tree.leaves(gradient)
    for i, (name, leaf, slope) in enumerate(zip(named, leaves, slopes, strict=True)):
        direction = jnp.asarray(rng.uniform(0.5, 1, leaf.shape))
        step = 1e-4 * max(1.0, float(jnp.abs(leaf).max()))
        ends = (
            evidence(structure.unflatten([*leaves[:i], leaf + s * direction, *leaves[i + 1 :]]))
            for s in (step, -step)
        )
        up, down = ends
        expected = float(up - down) / (2 * step)
        got = float((slope * direction).sum())
        assert got == pytest.approx(expected, rel=5e-4, abs=1e-9), name
        assert expected != 0, name
