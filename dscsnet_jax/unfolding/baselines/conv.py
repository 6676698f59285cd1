"""Conv: what the convolutional baselines share: the start, the iterations, their blocks.

They unfold proximal gradient descent on `1/2 ||Phi x - y||^2`: a gradient step with the
separable operator, `r = x - step Phi^T (Phi x - y)`, then a learned proximal map of `r`,
one `block` in each method's file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dscsnet_jax.physics.optics import SensingOperator
from dscsnet_jax.unfolding import admm
from dscsnet_jax.unfolding.baselines import published
from dscsnet_jax.unfolding.baselines.convolution import convolve, pair
from dscsnet_jax.unfolding.baselines.published import Layout
from dscsnet_jax.unfolding.baselines.shell import INTENSITY_SCALE, Baseline

STARTS = ("least_squares", "matrix")
START_PENALTY = 0.01
"""`rho` of the start; in the benchmark the eigenvalues of `Phi Phi^T` are 0.05 to 9."""

# Published starts of the learned scalars.
STEP, THRESHOLD = 0.5, 0.01


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """Hyper-parameters that the convolutional baselines share.

    Attributes:
      division: cells per pixel side, `c`.
      iterations: unfolded iterations, `K`.
      channels: features of the transform.
      start: `least_squares`, the map `Phi^T (Phi Phi^T + rho I)^-1 y` for frames of any
        size; or `matrix`, the published way: `Q y` with a dense `Q`, which fits frames of
        one size. The publications compute `Q` by least squares over a training set and
        hold it constant; here it is one more parameter, drawn as `least_squares` is.
      intensity_scale: counts that the network sees as 1.

    Raises:
      ValueError: if a value is not among its choices or too small.
    """

    division: int = 3
    iterations: int = 9
    channels: int = 32
    start: str = "least_squares"
    intensity_scale: float = INTENSITY_SCALE

    _LEAST: ClassVar[Mapping[str, int]] = {"division": 1, "iterations": 1, "channels": 1}

    def __post_init__(self) -> None:
        for field, least in self._LEAST.items():
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, got {getattr(self, field)}")
        if self.start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, got {self.start!r}")
        if not self.intensity_scale > 0:
            raise ValueError(f"intensity_scale must be positive, got {self.intensity_scale}")


@dataclasses.dataclass(frozen=True)
class ConvBaseline(Baseline):
    """Base of the convolutional baselines; a subclass has `layout`, `_draw` and `_block`."""

    config: ConvConfig = ConvConfig()
    layout: ClassVar[Layout]

    def init(self, key: jax.Array, operator: SensingOperator) -> dict[str, Any]:
        """Draw parameters; those of the iterations are stacked along a leading K axis."""
        self._check(operator)
        params = {"iterations": jax.vmap(self._draw)(jax.random.split(key, self._copies))}
        return admm.cast(params | self._start_matrix(operator), jnp.float32)

    @classmethod
    def from_torch(
        cls,
        state: Mapping[str, np.ndarray],
        operator: SensingOperator,
        *,
        initial: np.ndarray | None = None,
        **fields: Any,
    ) -> tuple[Self, dict[str, Any]]:
        """Network and parameters of a published PyTorch checkpoint.

        Iterations and widths are read off the shapes. The published networks see counts,
        so `intensity_scale` is 1.

        Args:
          state: arrays by name, see `io.torch_checkpoint.read_state`.
          operator: the sensing operator they were trained for; a network that is bound to
            one size of frames takes it from here.
          initial: (cN cM, N M) published initial matrix `Q`, which is not in the
            checkpoint; None: start by `least_squares`, which is not what the iterations
            were trained to go on from.
          **fields: other hyper-parameters, where they are not the default ones.

        Returns:
          The network, and parameters as NumPy arrays in single precision.

        Raises:
          ValueError: if names or shapes are not those of this method (names them, and the
            method whose checkpoint it is), or the operator has frames of another size.
        """
        state = published.unwrapped(state)
        sizes = published.sizes(cls.layout, state)
        published.check_frame_size(cls.layout, state, operator)
        if "frame_size" in {field.name for field in dataclasses.fields(cls().config)}:
            sizes["frame_size"] = operator.frame_shape[0]
        start = "least_squares" if initial is None else "matrix"
        own: dict[str, Any] = {
            "division": operator.division,
            "intensity_scale": 1.0,
            "start": start,
        }
        network = cls(type(cls().config)(**own | sizes | fields))
        shapes = jax.eval_shape(network.init, jax.random.key(0), operator)
        params = published.read(cls.layout, state, shapes)
        if initial is not None:
            params["start"] = {"matrix": published.matrix(initial, operator)}
        return network, params

    @property
    def _copies(self) -> int:
        """Iterations that have parameters of their own."""
        return self.config.iterations

    def _draw(self, key: jax.Array) -> dict[str, Any]:
        """Parameters of one iteration."""
        raise NotImplementedError

    def _block(self, p: Any, x: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The next map and the error of the left inverse, from `x` and its gradient step."""
        raise NotImplementedError

    def _unmix(
        self,
        params: dict[str, Any],
        y: jax.Array,
        operator: SensingOperator,
        *,
        unroll: int | bool,
        remat: bool,
        trace: bool,
    ) -> tuple[jax.Array, Any]:
        def iteration(x: jax.Array, p: Any) -> tuple[jax.Array, Any]:
            following, error = self._block(p, x, data_gradient_step(x, y, operator, p["step"]))
            return following, record(following, error)

        start, parameters = self._start(params, y, operator), params["iterations"]
        return admm.unfold(iteration, start, parameters, unroll=unroll, remat=remat, trace=trace)

    def _start(self, params: Any, y: jax.Array, operator: SensingOperator) -> jax.Array:
        """The map before the first iteration."""
        if self.config.start == "least_squares":
            return least_squares(y, operator)
        matrix = params["start"]["matrix"]
        if matrix.shape[:2] != operator.frame_shape:
            raise ValueError(
                f"the start matrix is for frames of {matrix.shape[0]} x {matrix.shape[1]} "
                f"pixels, the operator's have {operator.frame_shape[0]} x "
                f"{operator.frame_shape[1]}; start = 'least_squares' fits any"
            )
        return jnp.einsum("nij,ijab->nab", y, matrix)

    def _start_matrix(self, operator: SensingOperator) -> dict[str, Any]:
        if self.config.start == "least_squares":
            return {}
        shape = operator.frame_shape
        units = jnp.eye(shape[0] * shape[1]).reshape(-1, *shape)
        maps = least_squares(units, operator)
        return {"start": {"matrix": maps.reshape(*shape, *operator.map_shape)}}


def least_squares(y: jax.Array, operator: SensingOperator) -> jax.Array:
    """`Phi^T (Phi Phi^T + rho I)^-1 y`: (..., N, M) frames -> (..., cN, cM) maps.

    The linear map of the least mean square error for white maps under white noise of
    `rho` times their variance: what the published dense matrix is fitted for on its scenes.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> op = sensing_operator(5, division=3, psf=0.5)
      >>> y = op.apply(jnp.zeros((15, 15)).at[7, 7].set(1.0))
      >>> bool(jnp.abs(op.apply(least_squares(y, op)) - y).max() < 0.02)
      True
    """
    return operator.adjoint(operator.solve_gram(y, START_PENALTY))


def data_gradient_step(
    x: jax.Array, y: jax.Array, operator: SensingOperator, step: ArrayLike
) -> jax.Array:
    """`r = x - step Phi^T (Phi x - y)`: (..., cN, cM)."""
    return x - step * operator.adjoint(operator.apply(x) - y)


def record(x: jax.Array, error: jax.Array) -> dict[str, jax.Array]:
    """Trace of an iteration: the map, and each frame's mean square of `error` (B, ...)."""
    return {"x": x, "symmetry": (error**2).mean(tuple(range(1, error.ndim)))}


def residual_block(
    layers: Mapping[str, tuple[Any, ...]], r: jax.Array, threshold: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`r + S(G(soft(F(D(r)), theta)))`: the block of ISTA-Net+ and FISTA-Net.

    Args:
      layers: (kernel,) or (kernel, bias) of `embed` (`D`), `forward1`, `forward2` (`F`),
        `backward1`, `backward2` (`G`) and `readout` (`S`).
      r: (B, cN, cM) gradient step.
      threshold: `theta`.

    Returns:
      (B, cN, cM), and the error `G(F(D(r))) - D(r)` (B, cN, cM, channels).
    """
    d = convolve(r[..., None], *layers["embed"])
    f = pair(d, layers["forward1"], layers["forward2"])

    def inverse(f: jax.Array) -> jax.Array:
        return pair(f, layers["backward1"], layers["backward2"])

    residual = convolve(inverse(admm.soft_threshold(f, threshold)), *layers["readout"])
    return r + residual[..., 0], inverse(f) - d


def residual_sizes(channels: int) -> dict[str, tuple[int, int]]:
    """Features in and out of the kernels of a `residual_block`."""
    n = channels
    wide = dict.fromkeys(("forward1", "forward2", "backward1", "backward2"), (n, n))
    return {"embed": (1, n), **wide, "readout": (n, 1)}


def transform_sizes(channels: int) -> dict[str, tuple[int, int]]:
    """Features in and out of the kernels of a transform of maps and of its left inverse."""
    n = channels
    return {"forward1": (1, n), "forward2": (n, n), "backward1": (n, n), "backward2": (n, 1)}
