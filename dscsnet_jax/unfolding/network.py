"""Network: the learned transform, inverse, threshold and history, and DSCSNet itself.

DSCSNet unfolds K iterations of ADMM and learns all three steps jointly (paper,
arXiv 2603.21192). Iteration k, from the reconstruction `x` of the one before:

    z = prox_{lam_k/rho_k ||.||_1}(x + u)            strict l1
    u = u + eta_k (x - z)
    d = sum_j a_kj z^(j)                             history of all z so far
    r = argmin 1/2 ||Phi r - y||^2 + rho_k/2 ||r - z + u||^2
    f = F_k(r, d, y, y - Phi r)                      sparsifying transform
    x = r + G_k(soft(f, T_k(f, d)))                  dynamic threshold by self-attention

What the paper states is the problem, the strict l1 in the auxiliary step, the dynamic
threshold by self-attention in the reconstruction stage and the joint learning of the
three steps. The forms of F, G, T, the history and the exact data step are ours.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dscsnet_jax.physics import grid
from dscsnet_jax.physics.optics import SensingOperator
from dscsnet_jax.unfolding import admm
from dscsnet_jax.unfolding.admm import Iterate, Unfolded
from dscsnet_jax.unfolding.attention import local_attention
from dscsnet_jax.unfolding.registry import register

CHOICES = {
    "normalise": ("fixed", "frame"),
    "auxiliary": ("l1", "l2"),
    "threshold": ("attention", "convolutional", "scalar"),
    "multiplier": ("learned", "fixed", "off"),
    "x_step": ("exact", "gradient"),
    "transform_resolution": ("pixel", "subpixel"),
}
LEAST = {
    "division": 1,
    "iterations": 1,
    "channels": 1,
    "attention_channels": 1,
    "attention_heads": 1,
    "attention_radius": 0,
}
_START = {"rho": 0.1, "lam": 0.002, "eta": 1.0, "step": 0.1}
_NOISE_RANGE = (1e-3, 1.0)


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Hyper-parameters and ablation switches of DSCSNet.

    Attributes:
      division: cells per pixel side, `c`.
      iterations: unfolded iterations, `K`.
      channels: features of the sparsifying transform.
      auxiliary: penalty of the auxiliary step, `l1` (the paper) or `l2`.
      threshold: `attention` (the paper), `convolutional` or `scalar`.
      history: feed the weighted history of auxiliary variables to the transform.
      multiplier: `learned` step, `fixed` to 1, or `off` (half-quadratic splitting).
      x_step: `exact` minimiser of the data step or one `gradient` step.
      tied: share the parameters of all iterations.
      transform_resolution: convolve over detector `pixel`s with the cells as channels,
        or over `subpixel` cells (c^2 times the cost).
      nonneg: the auxiliary variable is not negative.
      attention_channels: features of queries, keys and values.
      attention_heads: number of heads, a divisor of `attention_channels`.
      attention_radius: pixels attended to on each side.
      intensity_scale: counts that the network sees as 1.
      normalise: `fixed` by `intensity_scale`, or each `frame` by its own peak, with its
        noise in units of that peak as one more input: the answer then scales with the
        frame, and one set of weights serves all noise levels.

    Raises:
      ValueError: if a value is not among its choices or too small.
    """

    division: int = 3
    iterations: int = 4
    channels: int = 48
    auxiliary: str = "l1"
    threshold: str = "attention"
    history: bool = True
    multiplier: str = "learned"
    x_step: str = "exact"
    tied: bool = False
    transform_resolution: str = "pixel"
    nonneg: bool = True
    attention_channels: int = 24
    attention_heads: int = 1
    attention_radius: int = 3
    intensity_scale: float = 250.0
    normalise: str = "fixed"

    def __post_init__(self) -> None:
        for field, choices in CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}")
        for field, least in LEAST.items():
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, got {getattr(self, field)}")
        if not self.intensity_scale > 0:
            raise ValueError(f"intensity_scale must be positive, got {self.intensity_scale}")
        if self.attention_channels % self.attention_heads:
            raise ValueError(
                f"attention_channels {self.attention_channels} must be a multiple of "
                f"attention_heads {self.attention_heads}"
            )


class AttentionThreshold(nn.Module):
    """Dynamic threshold: one non-negative value per feature, by local self-attention.

    Tokens are detector pixels. The answer is `softplus(W attention(f, d) + b)`.
    """

    features: int
    channels: int
    heads: int
    radius: int

    @nn.compact
    def __call__(self, f: jax.Array, d: jax.Array) -> jax.Array:
        """(B, N, M, features), (B, N, M, c*c) -> (B, N, M, features) thresholds."""
        tokens = jnp.concatenate([f, d], -1)
        width = self.channels // self.heads
        qkv = nn.Dense(3 * self.channels, name="qkv")(tokens)
        q, k, v = jnp.split(qkv.reshape(*qkv.shape[:-1], self.heads, 3 * width), 3, -1)
        side = 2 * self.radius + 1
        shape = (self.heads, side, side)
        bias = self.param("position", nn.initializers.zeros, shape, jnp.float32)
        mixed = local_attention(q, k, v, bias).reshape(*tokens.shape[:-1], self.channels)
        return nn.softplus(_threshold_head(self.features, nn.Dense)(mixed))


class ConvolutionalThreshold(nn.Module):
    """Ablation: the threshold from a 3 x 3 convolution instead of attention."""

    features: int

    @nn.compact
    def __call__(self, f: jax.Array, d: jax.Array) -> jax.Array:
        """Same shapes as `AttentionThreshold`."""
        tokens = jnp.concatenate([f, d], -1)
        head = _threshold_head(self.features, lambda *a, **k: _conv(*a, **k))
        return nn.softplus(head(tokens))


class ScalarThreshold(nn.Module):
    """Ablation: one learned threshold for all features and frames."""

    @nn.compact
    def __call__(self, f: jax.Array, d: jax.Array) -> jax.Array:
        """Same shapes as `AttentionThreshold`; the answer is constant."""
        raw = self.param("theta", nn.initializers.constant(-4.0), (), jnp.float32)
        return jnp.broadcast_to(nn.softplus(raw), f.shape)


class Block(nn.Module):
    """Learned part of the reconstruction step of one iteration: F, T and G."""

    config: NetworkConfig

    @nn.compact
    def __call__(
        self,
        r: jax.Array,
        d: jax.Array,
        y: jax.Array,
        residual: jax.Array,
        noise: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Correct the data step's answer.

        Args:
          r: (B, cN, cM) minimiser of the data step.
          d: (B, cN, cM) history.
          y: (B, N, M) frame.
          residual: (B, N, M) `y - Phi r`.
          noise: (B, N, M) noise level of each pixel, if frames are normalised one by one.

        Returns:
          `G(soft(F(r, d, y, y - Phi r), T))` (B, cN, cM), and the symmetry error
          `mean |H'(H(e)) - e|^2` (B,) of the transform's inner pair, where `e` is its
          first embedding (as in ISTA-Net+, where G is a left inverse in feature space).
        """
        cfg = self.config
        embedding = _conv(cfg.channels, name="embed")(
            self._inputs(r, d, [y, residual] if noise is None else [y, residual, noise])
        )
        f = _conv(cfg.channels, name="analysis")(nn.relu(embedding))
        theta = self._threshold(f, d)
        synthesis = _conv(cfg.channels, name="synthesis")
        out = 1 if cfg.transform_resolution == "subpixel" else cfg.division**2
        readout = _conv(out, kernel_init=_small_kernel(), name="readout")
        correction = readout(nn.relu(synthesis(admm.soft_threshold(f, theta))))
        symmetry = ((synthesis(f) - embedding) ** 2).mean((1, 2, 3))
        if cfg.transform_resolution == "subpixel":
            return correction[..., 0], symmetry
        return grid.unfold_channels(correction, cfg.division), symmetry

    def _inputs(self, r: jax.Array, d: jax.Array, frames: list[jax.Array]) -> jax.Array:
        """Stack what the transform sees as channels, at its resolution."""
        c = self.config.division
        if self.config.transform_resolution == "pixel":
            return jnp.concatenate([grid.fold(r, c), grid.fold(d, c), jnp.stack(frames, -1)], -1)
        fine = [jnp.repeat(jnp.repeat(a, c, -2), c, -1) for a in frames]
        return jnp.stack([r, d, *fine], -1)

    def _threshold(self, f: jax.Array, d: jax.Array) -> jax.Array:
        """Threshold per feature; sub-pixel features are folded into pixel tokens."""
        cfg = self.config
        fine = cfg.transform_resolution == "subpixel"
        tokens = _fold_features(f, cfg.division) if fine else f
        features = tokens.shape[-1]
        modules: dict[str, nn.Module] = {
            "attention": AttentionThreshold(
                features, cfg.attention_channels, cfg.attention_heads, cfg.attention_radius
            ),
            "convolutional": ConvolutionalThreshold(features),
            "scalar": ScalarThreshold(),
        }
        theta = modules[cfg.threshold](tokens, grid.fold(d, cfg.division))
        return _unfold_features(theta, cfg.division) if fine else theta


@register("dscsnet")
@dataclasses.dataclass(frozen=True)
class DSCSNet:
    """DSCSNet as an init/apply pair; weights run on frames of any size.

    Attributes:
      config: hyper-parameters and ablation switches.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> op = sensing_operator(11, division=3, psf=0.5)
      >>> net = DSCSNet(NetworkConfig(iterations=2, channels=8))
      >>> params = net.init(jax.random.key(0), op)
      >>> net.apply(params, jnp.zeros((4, 11, 11)), op).x.shape
      (4, 33, 33)

    References:
      DSCSNet: A Dynamic Sparse Compression Sensing Network for Closely-Spaced Infrared
      Small Target Unmixing, arXiv 2603.21192.
    """

    config: NetworkConfig = NetworkConfig()

    def init(self, key: jax.Array, operator: SensingOperator) -> dict[str, Any]:
        """Draw parameters; those of the iterations are stacked along a leading K axis.

        Args:
          key: PRNG key.
          operator: any sensing operator of the right division.

        Returns:
          `{"start": ..., "iterations": ...}`, a nested dict of arrays.

        Raises:
          ValueError: if the operator's division is not the network's.
        """
        cfg = self.config
        self._check(operator)
        x = jnp.zeros((1, *operator.map_shape), jnp.float32)
        y = jnp.zeros((1, *operator.frame_shape), jnp.float32)
        copies = 1 if cfg.tied else cfg.iterations
        keys = jax.random.split(key, copies)
        noise = y if cfg.normalise == "frame" else None
        blocks = jax.vmap(lambda k: Block(cfg).init(k, x, x, y, y, noise)["params"])(keys)
        names = ["rho", "lam"]
        names += ["eta"] if cfg.multiplier == "learned" else []
        names += ["step"] if cfg.x_step == "gradient" else []
        scalars = {n: jnp.full((copies,), _inverse_softplus(_START[n])) for n in names}
        iterations = {"block": blocks, "scalars": scalars}
        if cfg.history:
            iterations["history"] = jnp.zeros((copies, cfg.iterations), jnp.float32)
        return {"start": {"rho": _inverse_softplus(_START["rho"])}, "iterations": iterations}

    def apply(
        self,
        params: dict[str, Any],
        y: jax.Array,
        operator: SensingOperator,
        *,
        noise: jax.Array | None = None,
        scale: jax.Array | None = None,
        unroll: int | bool | None = None,
        remat: bool = False,
        trace: bool = False,
    ) -> Unfolded:
        """Unmix frames into sub-pixel maps.

        Args:
          params: from `init` or from released weights.
          y: (B, N, M) frames, counts.
          operator: sensing operator of the frames' optics.
          noise: (B,) standard deviation of the frames' pixels, counts; None: none. Used
            if the network normalises each frame.
          scale: (B,) counts to see as 1; None: see `scale`.
          unroll: see `admm.unfold`; default: unrolled on CPU only.
          remat: see `admm.unfold`.
          trace: record `x`, `z` (K, B, cN, cM; counts) and `symmetry` (K, B).

        Returns:
          `Unfolded` with `x` (B, cN, cM), counts.

        Raises:
          ValueError: if frames, operator and network do not fit together.
        """
        cfg = self.config
        self._check(operator)
        if y.ndim != 3:
            raise ValueError(f"frames must have shape (B, N, M), got {y.shape}")
        admm.check_frame_shape(y, operator)
        scale = self.scale(y, noise) if scale is None else scale
        # Mixed types would promote the iterate between two iterations, which a scan refuses.
        dtype = admm.precision(y, operator)
        params, y, noise, scale = admm.cast((params, y, noise, scale), dtype)
        level = self._noise_level(y, noise, scale)
        scale = scale[:, None, None]
        scaled = y / scale
        start = admm.zero_start(scaled, operator, nn.softplus(params["start"]["rho"]))
        if cfg.history:
            start = start._replace(history=jnp.zeros((cfg.iterations, *start.x.shape), dtype))
        last, seen = admm.unfold(
            lambda iterate, p: self._iteration(iterate, p, scaled, level, operator, trace),
            start,
            (jnp.arange(cfg.iterations), self._stacked(params["iterations"])),
            unroll=admm.default_unroll() if unroll is None else unroll,
            remat=remat,
            trace=trace,
        )
        if trace:
            seen = {k: v if k == "symmetry" else v * scale[None] for k, v in seen.items()}
        return Unfolded(x=last.x * scale, trace=seen)

    def scale(self, y: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Counts that the network sees as 1: fixed, or the peak of each frame.

        Args:
          y: (B, N, M) frames, counts.
          noise: (B,) standard deviation of the frames' pixels, counts; None: none. No
            frame is scaled by less than 3 of them.

        Returns:
          (B,) counts, positive.
        """
        if self.config.normalise == "fixed":
            return jnp.full(y.shape[:1], self.config.intensity_scale, jnp.result_type(y, float))
        peak = jnp.maximum(y.max((-2, -1)), 0 if noise is None else 3 * noise)
        return jnp.where(peak > 0, peak, 1)

    def _noise_level(
        self, y: jax.Array, noise: jax.Array | None, scale: jax.Array
    ) -> jax.Array | None:
        """`log(noise / scale)` of every pixel (B, N, M), brought to about -1 .. 1."""
        if self.config.normalise == "fixed":
            return None
        share = jnp.zeros_like(scale) if noise is None else noise / scale
        level = (jnp.log(jnp.clip(share, *_NOISE_RANGE)) + 4) / 3
        return jnp.broadcast_to(level[:, None, None], y.shape)

    def _iteration(
        self,
        iterate: Iterate,
        numbered: tuple[jax.Array, dict[str, Any]],
        y: jax.Array,
        level: jax.Array | None,
        operator: SensingOperator,
        trace: bool,
    ) -> tuple[Iterate, dict[str, jax.Array]]:
        """One unfolded iteration: the three steps of the module's docstring."""
        cfg = self.config
        k, p = numbered
        s = {name: nn.softplus(raw) for name, raw in p["scalars"].items()}
        z = admm.auxiliary_step(
            iterate.x,
            iterate.u,
            rho=s["rho"],
            lam=s["lam"],
            penalty=cfg.auxiliary,
            nonneg=cfg.nonneg,
        )
        eta = s["eta"] if cfg.multiplier == "learned" else float(cfg.multiplier == "fixed")
        u = admm.multiplier_step(iterate.x, z, iterate.u, eta)
        history, d = iterate.history, jnp.zeros_like(z)
        if history is not None:
            history = history.at[k].set(z)
            d = _recall(history, p["history"], k)
        if cfg.x_step == "exact":
            r, residual = admm.reconstruction_step(y, z, u, operator, s["rho"])
        else:
            before = Iterate(iterate.x, z, u)
            r, residual = admm.gradient_step(y, before, operator, s["rho"], s["step"])
        correction, symmetry = Block(cfg).apply({"params": p["block"]}, r, d, y, residual, level)
        x = r + correction
        record = {"x": x, "z": z, "symmetry": symmetry} if trace else {}
        return Iterate(x=x, z=z, u=u, history=history), record

    def _stacked(self, iterations: dict[str, Any]) -> dict[str, Any]:
        """Parameters with a leading axis of length K, also when they are tied."""
        if not self.config.tied:
            return iterations
        length = self.config.iterations
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (length, *a.shape[1:])), iterations)

    def _check(self, operator: SensingOperator) -> None:
        if operator.division != self.config.division:
            raise ValueError(
                f"the network divides pixels by {self.config.division}, "
                f"the operator by {operator.division}"
            )


def num_parameters(params: Any) -> int:
    """Number of scalars in a pytree of parameters.

    Example:
      >>> num_parameters({"a": jnp.zeros((2, 3))})
      6
    """
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _recall(history: jax.Array, logits: jax.Array, k: jax.Array) -> jax.Array:
    """`d = sum_{j<=k} softmax(a_k)_j z^(j)` over (K, B, cN, cM)."""
    seen = jnp.arange(len(logits)) <= k
    weight = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))
    return jnp.einsum("k,kbij->bij", weight, history)


def _conv(features: int, **kwargs: Any) -> nn.Conv:
    return nn.Conv(features, (3, 3), **kwargs)


def _threshold_head(features: int, layer: Any) -> Any:
    """Last layer of a threshold: starts near `softplus(-4) = 0.018` everywhere."""
    return layer(
        features,
        kernel_init=_small_kernel(),
        bias_init=nn.initializers.constant(-4.0),
        name="theta",
    )


def _inverse_softplus(value: float) -> jax.Array:
    return jnp.log(jnp.expm1(jnp.float32(value)))


def _fold_features(f: jax.Array, division: int) -> jax.Array:
    """(B, cN, cM, C) -> (B, N, M, C c^2): sub-pixel features as pixel tokens."""
    folded = grid.fold(jnp.moveaxis(f, -1, 1), division)
    return jnp.moveaxis(folded, 1, -2).reshape(*folded.shape[:1], *folded.shape[2:4], -1)


def _unfold_features(tokens: jax.Array, division: int) -> jax.Array:
    """The inverse of `_fold_features`."""
    split = tokens.reshape(*tokens.shape[:-1], -1, division**2)
    return jnp.moveaxis(grid.unfold_channels(jnp.moveaxis(split, -2, 1), division), 1, -1)


def _small_kernel() -> Any:
    return nn.initializers.variance_scaling(0.01, "fan_in", "normal")
