"""The whole answer as one pure function."""

import os
import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.inference.doubt import _ambiguous, _Light
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import observe
from dscsnet_jax.inference.prior import ScenePrior, preset_prior, scene_prior
from dscsnet_jax.inference.program import estimate
from dscsnet_jax.inference.search import select
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.scene import frame_keys, get_preset, simulate
from dscsnet_jax.physics.targets import Targets, from_lists

pytestmark = pytest.mark.slow
once = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""`jax.jit` of a large program that runs a few times only."""


def empty(number: int, slots: int) -> Targets:
    return jax.tree.map(
        jnp.asarray,
        Targets(
            np.zeros((number, slots, 2), "f"),
            np.zeros((number, slots), "f"),
            np.zeros((number, slots), bool),
        ),
    )


def test_background_light_is_not_taken_for_targets():
    rng = np.random.default_rng(0)
    sky = (rng.poisson(1000, (100, 11, 11)) + rng.normal(0, 2, (100, 11, 11))).astype("f")
    run = jax.jit(lambda seen, known: select(seen, empty(100, 2), known))
    light = observe(sky, Sensor(read_noise=2.0, background=1000.0, gain=1.0))
    found = run(light, Known(psf=Gaussian(np.float32(0.5)), sensor=Sensor(gain=np.float32(1.0))))
    assert (np.asarray(found.fit.targets.count) == 0).sum() >= 98
    # The same sky told as a pedestal has no noise of its own, and is full of targets.
    pedestal = observe(sky, Sensor(read_noise=2.0, pedestal=1000.0, background=0.0))
    told_wrong = run(pedestal, Known(psf=Gaussian(np.float32(0.5))))
    assert (np.asarray(told_wrong.fit.targets.count) > 0).mean() > 0.8


@pytest.fixture(scope="module")
def clusters():
    """64 frames of one to three targets, noise 1."""
    preset = get_preset("csist_float", read_noise=1.0, max_targets=3)
    scene = simulate(preset, frame_keys(0, "val", np.arange(64)))
    known = Known(psf=Gaussian(np.float32(0.5)), prior=preset_prior(preset))
    truth = jax.tree.map(
        lambda a: jnp.pad(a, [(0, 0), (0, 1)] + [(0, 0)] * (a.ndim - 2)), scene.targets
    )
    return observe(scene.frames, Sensor(read_noise=1.0, background=0.0)), truth, known


def test_one_slot_is_enough_for_one_target():
    truth = from_lists([[(3.0, 3.2, 200.0)]], 1)
    seen = observe(render(truth, frame_size=7, psf=0.5), Sensor(read_noise=1.0, background=0.0))
    found = jax.jit(select)(seen, truth, Known(psf=Gaussian(np.float32(0.5))))
    np.testing.assert_allclose(found.fit.targets.position, [[[3.0, 3.2]]], atol=1e-3)


def test_counts_are_found_from_a_wrong_start(clusters):
    seen, truth, known = clusters
    first = jnp.arange(4)[None] == 0
    energy = truth.intensity.sum(1)
    middle = (truth.position * truth.intensity[..., None]).sum(1) / energy[:, None]
    start = Targets(
        jnp.where(first[..., None], middle[:, None], 0),
        jnp.where(first, energy[:, None], 0),
        jnp.broadcast_to(first, truth.mask.shape),
    )
    found = jax.jit(select)(seen, start, known)
    right = np.asarray(found.fit.targets.count == truth.count)
    assert right.mean() >= 0.95
    chosen = np.asarray(found.log_evidence).argmax(1)
    np.testing.assert_array_equal(chosen, found.fit.targets.count)


@pytest.mark.parametrize("given", [1, 5])
def test_counts_the_prior_excludes_are_left_whatever_explains_the_frame(given):
    """The way from one target to three, and from five, leads through excluded counts."""
    truth = from_lists([[(3.0, 3.0, 240.0)], [(2.6, 3.0, 240.0), (3.4, 3.1, 220.0)]], 5)
    seen = observe(render(truth, frame_size=7, psf=0.5), Sensor(read_noise=1.0, background=0.0))
    places = [(3.0, 3.0), (2.0, 2.0), (4.0, 2.0), (2.0, 4.0), (4.0, 4.0)]
    start = from_lists([[(*place, 200.0) for place in places[:given]]] * 2, 5)
    run = jax.jit(select)
    for certain in (3, 2):
        share = tuple(np.eye(4, dtype="f")[certain])
        found = run(seen, start, Known(Gaussian(np.float32(0.5)), prior=ScenePrior(count=share)))
        assert found.fit.targets.count.tolist() == [certain] * 2
        # Of others there is no evidence.
        assert np.isfinite(found.log_evidence).sum(1).tolist() == [1, 1]
        assert np.isfinite(found.log_evidence[:, certain]).all()


def test_excluded_counts_are_left_at_any_signal_to_noise():
    """Two targets of noise 0.1 may only be three of the prior's intensities."""
    truth = from_lists([[(2.6, 3.0, 240.0), (3.4, 3.1, 220.0)]], 3)
    seen = observe(render(truth, frame_size=7, psf=0.5), Sensor(read_noise=0.1, background=0.0))
    prior = scene_prior(intensity=(220, 250), count=(0, 0, 0, 1))
    found = jax.jit(select)(seen, truth, Known(Gaussian(np.float32(0.5)), prior=prior))
    assert found.fit.targets.count.tolist() == [3]
    # Probabilities may be an array.
    prior = prior.replace(count=np.array([0, 0, 0, 1.0], "f"))
    jax.eval_shape(select, seen, truth, Known(Gaussian(np.float32(0.5)), prior=prior))


@pytest.mark.parametrize("high", [250.0, 221.0, 220.0])
def test_counts_are_compared_where_light_and_noise_leave_them_open(high):
    """Light between that of one and two targets, at a signal-to-noise ratio of some 5."""
    light = from_lists([[(3.0, 3.0, 1.5 * 220)]], 2)
    y = render(light, frame_size=7, psf=0.5) * jnp.array([1.0, 1.2, 0.8])[:, None, None]
    prior = scene_prior(intensity=(220.0, high), count=(0, 1, 1))
    seen = observe(y, Sensor(read_noise=25.0, background=0.0))
    start = from_lists([[(3.0, 3.0, 220.0)]] * 3, 2)
    found = jax.jit(select)(seen, start, Known(Gaussian(np.float32(0.5)), prior=prior))
    assert np.isfinite(found.log_evidence[:, 1:]).all()
    # Where there is no noise to speak of, the light decides at once.
    one = from_lists([[(3.0, 3.0, (220 + high) / 2)]] * 3, 2)
    sharp = observe(render(one, frame_size=7, psf=0.5), Sensor(read_noise=1.0, background=0.0))
    found = jax.jit(select)(sharp, start, Known(Gaussian(np.float32(0.5)), prior=prior))
    assert np.isfinite(found.log_evidence).sum(1).tolist() == [1, 1, 1]


def test_fits_go_on_until_they_have_converged(clusters):
    seen, truth, known = clusters
    found = jax.jit(partial(select, compare=False))(seen, truth, known)
    assert np.asarray(found.fit.converged).mean() > 0.95
    np.testing.assert_array_equal(found.fit.targets.mask, truth.mask)
    np.testing.assert_array_equal(np.isfinite(found.log_evidence).sum(1), 1)


def test_no_window_depends_on_the_others(clusters):
    seen, truth, known = clusters
    run = jax.jit(select)
    alone, turned = run(seen, truth, known), None
    turned = run(*jax.tree.map(lambda a: a[::-1], (seen, truth)), known)
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(turned), strict=True):
        np.testing.assert_array_equal(one, other[::-1])


_MESH = """
    import jax, numpy as np
    from jax.sharding import PartitionSpec as P
    from dscsnet_jax.inference.observation import observe
    from dscsnet_jax.inference.known import Known
    from dscsnet_jax.inference.prior import scene_prior
    from dscsnet_jax.inference.program import estimate
    from dscsnet_jax.physics.optics import render
    from dscsnet_jax.physics.preset import Sensor
    from dscsnet_jax.physics.psf import Gaussian
    from dscsnet_jax.physics.targets import Targets

    rng = np.random.default_rng(0)
    place = 3 + rng.uniform(-0.4, 0.4, (32, 1, 2)) + np.array([[[-0.5, 0.0], [0.5, 0.0]]])
    energy = rng.uniform(220, 250, (32, 2)).astype("f")
    truth = Targets(place.astype("f"), energy, np.ones((32, 2), bool))
    y = render(truth, frame_size=7, psf=0.5) + jax.random.normal(jax.random.key(0), (32, 7, 7))
    seen = observe(y, Sensor(read_noise=1.0, background=0.0))
    known = Known(psf=Gaussian(np.float32(0.5)), prior=scene_prior(intensity=(220, 250)))
    key = jax.random.key(0)
    run = jax.jit(estimate)
    one = run(seen, truth, known, key)
    mesh = jax.make_mesh((8,), ("frames",), axis_types=(jax.sharding.AxisType.Auto,))
    assert len(jax.devices()) == 8
    spread = jax.shard_map(
        estimate, mesh=mesh, in_specs=(P("frames"), P("frames"), P(), P()), out_specs=P("frames"),
        check_vma=False,
    )
    parted, whole = (jax.NamedSharding(mesh, spec) for spec in (P("frames"), P()))
    told = jax.device_put((seen, truth), parted), jax.device_put((known, key), whole)
    for many in (jax.jit(spread)(seen, truth, known, key), run(*told[0], *told[1])):
        assert len(many.fit.theta.sharding.device_set) == 8
        # Pieces of another width round differently, and chains magnify that to another draw.
        off = one.posterior.targets.position - many.posterior.targets.position
        assert (abs(off) < 0.3 * one.posterior.std[..., :2]).all(), off
        np.testing.assert_array_equal(one.posterior.targets.mask, many.posterior.targets.mask)
        np.testing.assert_allclose(one.fit.theta, many.fit.theta, rtol=1e-3, atol=1e-3)
    print("same")
"""


def test_a_mesh_of_devices_gives_the_same_answers():
    # Three large programs, each of which runs once.
    more = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {more}"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MESH)],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_estimate_is_traced_once_for_any_values(clusters):
    seen, truth, known = clusters
    traced = []

    def traced_estimate(*given):
        traced.append(1)
        return estimate(*given)

    some = jax.tree.map(lambda a: a[:8], (seen, truth))
    run = once(traced_estimate)
    first = run(*some, known, jax.random.key(0))
    second = run(*some, known, jax.random.key(1))
    assert len(traced) == 1
    assert (first.posterior.targets.position != second.posterior.targets.position).any()
    np.testing.assert_array_equal(first.fit.theta, second.fit.theta)


def in_order(targets: Targets, *values):
    """Values of the targets that are there, window by window, by their rows."""
    row = np.where(targets.mask, targets.position[..., 0], np.inf)
    order, there = np.argsort(row, 1), np.sort(row, 1) < np.inf
    return [np.take_along_axis(np.asarray(v), order[..., None], 1)[there] for v in values]


def test_a_batch_of_batches_has_the_same_answers(clusters):
    seen, truth, known = clusters
    some = jax.tree.map(lambda a: jnp.asarray(a)[:8], (seen, truth))
    key = jax.random.key(0)
    one = once(estimate)(*some, known, key)
    two = jax.tree.map(lambda a: a.reshape(2, 4, *a.shape[1:]), some)
    found = once(jax.vmap(estimate, (0, 0, None, None)))(*two, known, key)
    found = jax.tree.map(lambda a: a.reshape(8, *a.shape[2:]), found)
    # Which target has which number is left to rounding.
    places, std = in_order(one.fit.targets, one.fit.targets.position, one.posterior.std)
    others, _ = in_order(found.fit.targets, found.fit.targets.position, found.posterior.std)
    np.testing.assert_allclose(places, others, atol=1e-3)
    (means,) = in_order(one.posterior.targets, one.posterior.targets.position)
    (others,) = in_order(found.posterior.targets, found.posterior.targets.position)
    assert (((means - others) / std[..., :2]) ** 2).mean() < 0.3**2


def test_start_of_lists_is_taken():
    y = np.zeros((1, 7, 7), "f")
    found = jax.jit(select)(
        observe(y, Sensor(read_noise=1.0, background=0.0)),
        from_lists([[]], 2),
        Known(psf=Gaussian(np.float32(0.5))),
    )
    assert int(found.fit.targets.count[0]) == 0


def test_a_pair_may_always_hide_a_third_that_the_light_allows():
    """The shape of much light tells one target from two; of two and more it does not."""
    light = jnp.array([200.0, 300.0, 300.0, 90.0])
    at = _Light(peak=jnp.zeros(4), light=light, error=jnp.full(4, 1.0))
    prior = scene_prior(intensity=(50.0, 250.0))
    got = _ambiguous(at, jnp.array([1, 2, 3, 2]), prior)
    assert got.tolist() == [False, True, True, True]
    narrow = scene_prior(intensity=(140.0, 160.0))  # no other number makes as much
    assert _ambiguous(at, jnp.array([1, 2, 2, 2]), narrow).tolist()[1:3] == [False, False]
