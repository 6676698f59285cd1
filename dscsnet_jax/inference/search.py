"""Search: fits of windows with their counts selected, by changes that compete by evidence.

Most windows are done after a few iterations. Those that need more are gathered into pieces of
fixed size, round by round, so that few slow ones do not cost all others their time; what
is gathered never changes what is computed for a window.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dscsnet_jax.inference.changes import NEAR_CHANGES, NUM_CHANGES, changes
from dscsnet_jax.inference.doubt import DOUBTED, NEAR, doubt
from dscsnet_jax.inference.evidence import laplace
from dscsnet_jax.inference.fit import NUM_ITERATIONS, Fit, fit
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import zeros_of
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.physics.targets import Targets

MAX_ROUNDS = 6
_PIECE = 64  # windows that are gathered
_EXCLUDED = 1e7  # nats that a count costs for each target by which it is off those that can be


class Selected(NamedTuple):
    """Fits of B windows with their counts selected.

    Attributes:
      fit: of the best count.
      log_evidence: (B, K+1) of each count that was tried and can be; -inf of the others.
      of_counts: `Targets` (B, K+1, K, ...), the best that were found of each count.
    """

    fit: Fit
    log_evidence: jax.Array
    of_counts: Targets


def select(
    windows: Observation,
    start: Targets,
    known: Known,
    *,
    only_add: bool = False,
    compare: bool | jax.Array = True,
) -> Selected:
    """Fit, then remove or add targets where the evidence says so.

    Windows whose fit the noise does not explain, whose targets are in doubt, or whose count the
    prior excludes are compared with their `changes`: all run a first heat, the best of each
    window a second, the winner is fitted in full. The way may lead through excluded counts.

    Args:
      windows: `Observation` of (B, N, M).
      start: `Targets` (B, K, ...).
      known: PSF, sensor's gain and scene prior.
      only_add: add one target at a time at the residual's peak as long as the evidence
        grows, from any start, and try nothing else: what one would write by hand.
      compare: with other counts; else the start's is kept. May be traced: one program does both.

    Returns:
      `Selected`.
    """
    phases = jnp.where(compare, _DONE, _HEAT_ONE)
    state = _search(windows, start, known, phases, only_add=only_add)
    possible = jnp.isfinite(known.prior.log_count(jnp.arange(state.table.shape[1]), float))
    # A heat that its fit in full did not reach counts for no more than what was kept.
    kept = state.best.targets.mask.sum(1, keepdims=True)
    most = jnp.where(possible[kept], jnp.take_along_axis(state.table, kept, 1), jnp.inf)
    table = jnp.where(possible[None], jnp.minimum(state.table, most), -jnp.inf)
    return Selected(state.best, table, state.of_counts)


# Phases of the search; in each some starts are fitted, for so many iterations.
_FIRST, _SLOW, _HEAT_ONE, _HEAT_TWO, _WINNER, _DONE = range(6)
_ITERATIONS = (10, NUM_ITERATIONS, 8, 12, NUM_ITERATIONS)
_HEAT_WINNERS = 3


class _Search(NamedTuple):
    """Where the search for counts stands: one fit program serves all its phases.

    Attributes:
      phase: what is being fitted.
      rounds: counts of all windows compared so far.
      starts: `Targets` (B, changes, K, ...) that compete; fits replace them.
      reached: (B, changes) their evidence.
      wanted: (B, changes) bool, still to be fitted in this phase.
      entered: (B, changes) bool, those of this phase.
      trial: the last fits (B,).
      best: fits (B,) of the best counts so far.
      evidence: (B,) of them.
      table: (B, K+1) evidence of each count.
      of_counts: `Targets` (B, K+1, K, ...) that have it.
      doubt: (B,) degree of doubt.
      todo: (B,) bool, windows to be compared in this round.
    """

    phase: jax.Array
    rounds: jax.Array
    starts: Targets
    reached: jax.Array
    wanted: jax.Array
    entered: jax.Array
    trial: Fit
    best: Fit
    evidence: jax.Array
    table: jax.Array
    of_counts: Targets
    doubt: jax.Array
    todo: jax.Array


def _search(
    windows: Observation, start: Targets, known: Known, phases: jax.Array, *, only_add: bool
) -> _Search:
    """Run the phases up to the given one."""
    start = jax.tree.map(jnp.asarray, start)
    empty = zeros_of(lambda: fit(windows, start, known, num_iterations=0, differentiable=False))
    number = 1 if only_add else NUM_CHANGES
    length, slots = start.mask.shape
    shape = (length, number)
    unknown = jnp.full(shape, -jnp.inf, empty.level.dtype)
    starts = jax.tree.map(lambda a, b: a.astype(b.dtype), start, empty.targets)
    own = jnp.arange(number)[None] == jnp.zeros((length, 1), jnp.int32)
    state = _Search(
        phase=jnp.zeros((), jnp.int32),
        rounds=jnp.zeros((), jnp.int32),
        starts=jax.tree.map(lambda a: jnp.repeat(a[:, None], number, 1), starts),
        reached=unknown,
        wanted=own & _tells(windows)[:, None],
        entered=own,
        trial=empty,
        best=empty,
        evidence=unknown[:, 0],
        table=jnp.full((length, slots + 1), -jnp.inf, unknown.dtype),
        of_counts=jax.tree.map(lambda a: jnp.zeros_like(a, shape=_counts_of(a)), starts),
        doubt=jnp.zeros(length, jnp.int32),
        todo=jnp.ones(length, bool),
    )
    iterations = jnp.asarray(_ITERATIONS, jnp.int32)
    size = min(_PIECE, length)
    any_count = known.of_any_count()
    log_count = _log_count(known, slots, unknown.dtype)

    def work(state: _Search) -> _Search:
        """Fit a piece of what is wanted."""
        flat = partial(jax.tree.map, lambda a: a.reshape(-1, *a.shape[2:]))
        back = partial(jax.tree.map, lambda a: a.reshape(*shape, *a.shape[1:]))
        index = jnp.nonzero(state.wanted.reshape(-1), size=size, fill_value=length * number)[0]
        row = index // number
        seen, begin = _rows(windows, row), _rows(flat(state.starts), index)
        new = fit(seen, begin, known, num_iterations=iterations[state.phase], differentiable=False)
        reached = laplace(new, seen, any_count) + log_count[new.targets.mask.sum(-1)]
        reached = jnp.where(jnp.isfinite(reached), reached, -jnp.inf)
        pool = flat((state.starts, state.reached, state.wanted))
        pool = _with_rows(pool, index, (new.targets, reached, jnp.zeros_like(index, bool)))
        starts, reached, wanted = back(pool)
        trial = _with_rows(state.trial, row, new)
        return state._replace(starts=starts, reached=reached, wanted=wanted, trial=trial)

    steps = [_first, _slow, _heat_one, _heat_two, _winner]
    advance = [partial(step, windows=windows, known=known, only_add=only_add) for step in steps]

    def turn(state: _Search) -> _Search:
        state = jax.lax.switch(jnp.minimum(state.phase, len(advance) - 1), advance, state)
        begins = (state.phase == _HEAT_ONE) & (phases > _HEAT_ONE)
        return jax.lax.cond(begins, partial(_compare, windows, known, only_add), _same, state)

    def loop(state: _Search) -> _Search:
        return jax.lax.cond(state.wanted.any(), work, turn, state)

    return jax.lax.while_loop(lambda state: state.phase < phases, loop, state)


def _same(state: _Search) -> _Search:
    return state


def _own(state: _Search, chosen: jax.Array) -> jax.Array:
    """(B, changes) bool: the first start of the chosen windows."""
    return (jnp.arange(state.wanted.shape[1]) == 0)[None] & chosen[:, None]


def _tells(windows: Observation) -> jax.Array:
    """(B,) bool: a window has pixels; batches may be filled up with some that have none."""
    return windows.valid.any((1, 2))


def _log_count(known: Known, slots: int, dtype: Any) -> jax.Array:
    """(K+1,) `log p(n)`; of excluded counts the less, the further they are from others."""
    listed = known.prior.count
    most = max(slots + 1, len(listed) if isinstance(listed, tuple) else 0)
    number = jnp.arange(most)
    told = known.prior.log_count(number, dtype)
    possible = jnp.isfinite(told)
    off = jnp.where(possible[None], jnp.abs(number[:, None] - number[None]), most).min(1)
    return jnp.where(possible, told, -_EXCLUDED * off)[: slots + 1]


def _first(state: _Search, *, windows: Observation, **_: Any) -> _Search:
    """After the first iterations: those that have not converged go on."""
    wanted = _own(state, ~state.trial.converged & _tells(windows))
    return state._replace(phase=state.phase + 1, wanted=wanted)


def _slow(state: _Search, *, windows: Observation, known: Known, only_add: bool) -> _Search:
    """All are fitted: which are in doubt?"""
    best, evidence = state.trial, state.reached[:, 0]
    degree = jnp.full_like(state.doubt, DOUBTED) if only_add else doubt(best, windows, known)
    excluded = jnp.isneginf(known.prior.log_count(best.targets.mask.sum(-1), evidence.dtype))
    degree = jnp.where(_tells(windows), jnp.where(excluded, DOUBTED, degree), 0)
    state = _noted(state, _alone(best.targets), state.reached[:, :1])
    return state._replace(
        phase=state.phase + 1,
        best=best,
        evidence=evidence,
        doubt=degree,
        todo=degree > 0,
    )


def _compare(windows: Observation, known: Known, only_add: bool, state: _Search) -> _Search:
    """Begin a round: the changes of all windows in doubt."""
    starts = changes(state.best, windows, known, only_add=only_add)
    own = jax.tree.map(lambda a: a[:, None], state.best.targets)
    other = (starts.mask != own.mask).any(-1) | (starts.position != own.position).any((-2, -1))
    wanted = other & state.todo[:, None]
    if not only_add:
        near = jnp.arange(NUM_CHANGES) >= NUM_CHANGES - NEAR_CHANGES
        wanted &= (state.doubt[:, None] != NEAR) | near[None]
    done = ~state.todo.any() | (state.rounds >= MAX_ROUNDS)
    return state._replace(
        phase=jnp.where(done, _DONE, _HEAT_ONE).astype(jnp.int32),
        rounds=state.rounds + 1,
        starts=starts,
        reached=jnp.full_like(state.reached, -jnp.inf),
        wanted=wanted & ~done,
        entered=wanted,
    )


def _heat_one(state: _Search, **_: Any) -> _Search:
    """The best of each window go on."""
    reached = jnp.where(state.entered, state.reached, -jnp.inf)
    order = jnp.argsort(jnp.argsort(-reached, axis=1, stable=True), axis=1, stable=True)
    entered = (order < _HEAT_WINNERS) & jnp.isfinite(reached)
    state = _noted(state, state.starts, reached)
    return state._replace(phase=state.phase + 1, wanted=entered, entered=entered)


def _heat_two(state: _Search, **_: Any) -> _Search:
    """The winner of each window is fitted in full if it has a larger evidence."""
    reached = jnp.where(state.entered, state.reached, -jnp.inf)
    winner = jnp.argmax(reached, axis=1)
    rows = jnp.arange(winner.shape[0])
    wanted = _own(state, reached[rows, winner] > state.evidence)
    return _noted(state, state.starts, reached)._replace(
        phase=state.phase + 1,
        starts=jax.tree.map(lambda a: a.at[:, 0].set(a[rows, winner]), state.starts),
        wanted=wanted,
        entered=wanted,
    )


def _winner(state: _Search, **_: Any) -> _Search:
    """What is better replaces the fit; where its count is another, there is a further round."""
    hopeful = state.entered[:, 0]
    reached = jnp.where(hopeful, state.reached[:, 0], -jnp.inf)
    better = hopeful & (reached > state.evidence)
    changed = state.trial.targets.mask.sum(1) != state.best.targets.mask.sum(1)
    return _noted(state, _alone(state.trial.targets), reached[:, None])._replace(
        phase=jnp.full_like(state.phase, _HEAT_ONE),
        best=_chosen(better, state.trial, state.best),
        evidence=jnp.where(better, reached, state.evidence),
        doubt=jnp.where(hopeful, DOUBTED, state.doubt),
        todo=better & changed,
    )


def _rows(tree: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda a: a.at[index].get(mode="clip"), tree)


def _with_rows(old: Any, index: jax.Array, new: Any) -> Any:
    return jax.tree.map(lambda a, b: a.at[index].set(b, mode="drop"), old, new)


def _chosen(better: jax.Array, new: Any, old: Any) -> Any:
    """Trees of values whose first axes are those of `better`."""

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(better.reshape(*better.shape, *(1,) * (a.ndim - better.ndim)), a, b)

    return jax.tree.map(choose, new, old)


def _alone(targets: Targets) -> Targets:
    """Targets (B, K, ...) as the one start of each window."""
    return jax.tree.map(lambda a: a[:, None], targets)


def _counts_of(a: jax.Array) -> tuple[int, ...]:
    """Shape of values (B, K, ...) of targets for each count."""
    return (a.shape[0], a.shape[1] + 1, *a.shape[1:])


def _noted(state: _Search, targets: Targets, evidence: jax.Array) -> _Search:
    """The table with targets (B, n, K, ...) of this evidence (B, n)."""
    count = jnp.arange(state.table.shape[1])[None, None]
    of_count = jnp.where(targets.mask.sum(-1)[..., None] == count, evidence[..., None], -jnp.inf)
    reached, index = of_count.max(1), of_count.argmax(1)
    rows = jnp.arange(len(index))[:, None]
    best = jax.tree.map(lambda a: a[rows, index], targets)
    of_counts = _chosen(reached > state.table, best, state.of_counts)
    return state._replace(table=jnp.maximum(state.table, reached), of_counts=of_counts)
