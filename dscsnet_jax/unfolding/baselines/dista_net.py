"""DISTA-Net: unfolded ISTA whose transform and threshold depend on the frame.

Iteration k, with `F` and `G` of two 3 x 3 convolutions as in ISTA-Net, a 3 x 3 kernel
`w(x)` made from the whole map by two linear layers, and a spatial attention `A`:

    r = x - step_k Phi^T (Phi x - y)
    f = a F_k(r) + (1 - a) sigmoid(w_k(x) * r)       two branches, weight `a`
    x = G_k(soft(f, f A_k(f)))                       dynamic threshold

Kept of the published network (toolkit GrokCSO): 6 iterations, 64 features, the layers'
biases, no nonlinearity between the two linear layers, a step free in sign, and a threshold
`f A(f)` that may be negative, where it enlarges what it should shrink. The linear layers
see the map's cells as one vector, so weights fit frames of one size.

Not kept: the publication convolves each frame with the kernels of all frames of its batch
and takes the batch for the features, so its answers depend on the other frames, and it runs
at a batch of 1 or `channels` only. Here each frame has its own kernel, which is the same at
a batch of 1. It also cuts the gradient of the kernels, so that its linear layers keep their
random start; here they learn (`compat` cuts it, too). Its start is another, see
`ConvConfig.start`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dscsnet_jax.unfolding.admm import soft_threshold
from dscsnet_jax.unfolding.baselines.conv import (
    STEP,
    ConvBaseline,
    ConvConfig,
    transform_sizes,
)
from dscsnet_jax.unfolding.baselines.convolution import (
    convolve,
    draw,
    draw_kernels,
    neighbours,
    pair,
)
from dscsnet_jax.unfolding.baselines.published import Layout
from dscsnet_jax.unfolding.registry import register

_LAYERS = {
    "hidden": "w1",
    "kernel": "w2",
    "attention/depthwise": "att.convl",
    "attention/near": "att.conv0_s",
    "attention/far": "att.conv1_s",
    "attention/squeeze": "att.conv_squeeze",
    "attention/mix": "att.conv_m",
}
_ENDS = {"kernel": "weight", "bias": "bias"}
LAYOUT = Layout(
    method="dista_net",
    blocks={
        "step": "lambda_step",
        "forward1": "conv1_forward",
        "forward2": "conv2_forward",
        "backward1": "conv1_backward",
        "backward2": "conv2_backward",
        **{f"{o}/{e}": f"{t}.{_ENDS[e]}" for o, t in _LAYERS.items() for e in _ENDS},
    },
    sizes={"channels": "conv1_forward", "hidden": "w1.weight"},
    cells="w1.weight",
)


@dataclasses.dataclass(frozen=True)
class DistaNetConfig(ConvConfig):
    """Hyper-parameters of DISTA-Net: those of `ConvConfig`, and its own.

    Attributes:
      frame_size: detector pixels per side of the frames it is for.
      hidden: features between the two linear layers.
      branch_weight: weight `a` of the static branch, in 0..1. It is not stored in the
        published checkpoints; their configurations have 0.7 and, one of them, 0.5.
      compat: cut the gradient of the dynamic kernels, as published.

    Raises:
      ValueError: if a value is out of its range.
    """

    iterations: int = 6
    channels: int = 64
    frame_size: int = 11
    hidden: int = 256
    branch_weight: float = 0.7
    compat: bool = False

    _LEAST: ClassVar[Mapping[str, int]] = {
        **ConvConfig._LEAST,
        "channels": 2,
        "frame_size": 1,
        "hidden": 1,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.branch_weight <= 1:
            raise ValueError(f"branch_weight must be in 0..1, got {self.branch_weight}")


def block(
    p: dict[str, Any],
    x: jax.Array,
    r: jax.Array,
    *,
    branch_weight: float,
    compat: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`x = G(soft(f, f A(f)))`, the learned part of an iteration.

    Args:
      p: its parameters: the kernels `forward1`, `forward2` of `F` and `backward1`,
        `backward2` of `G`; the layers `hidden` and `kernel` of `w`; `attention`.
      x: (B, cN, cM) map before the gradient step, which makes the dynamic kernel.
      r: (B, cN, cM) gradient step.
      branch_weight: weight of the static branch, `a`.
      compat: cut the gradient of the dynamic kernel.

    Returns:
      `x` (B, cN, cM) and the error of the left inverse `G(f) - r` (B, cN, cM).
    """
    static = pair(r[..., None], (p["forward1"],), (p["forward2"],))
    kernels = dynamic_kernels(p, x)
    kernels = jax.lax.stop_gradient(kernels) if compat else kernels
    dynamic = nn.sigmoid(filtered(r, kernels))
    f = branch_weight * static + (1 - branch_weight) * dynamic[..., None]

    def inverse(f: jax.Array) -> jax.Array:
        return pair(f, (p["backward1"],), (p["backward2"],))[..., 0]

    theta = f * attention(p["attention"], f)
    return inverse(soft_threshold(f, theta)), inverse(f) - r


def dynamic_kernels(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """`w(x)`: one 3 x 3 kernel for each map, (B, cN, cM) -> (B, 3, 3)."""
    hidden = _dense(x.reshape(x.shape[0], -1), p["hidden"])
    return _dense(hidden, p["kernel"]).reshape(-1, 3, 3)


def filtered(r: jax.Array, kernels: jax.Array) -> jax.Array:
    """`w * r`: each map (B, cN, cM) by its own kernel (B, 3, 3), zero beyond the border.

    Example:
      >>> kernels = jnp.stack([jnp.ones((3, 3)), jnp.zeros((3, 3)).at[1, 0].set(2.0)])
      >>> filtered(jnp.ones((2, 3, 3)), kernels)[:, 1].tolist()
      [[6.0, 9.0, 6.0], [0.0, 2.0, 2.0]]
    """
    weights = kernels.reshape(r.shape[0], -1, 1, 1)
    views = neighbours(r[..., None], (3, 3))
    terms = (weights[:, n] * view[..., 0] for n, view in enumerate(views))
    return sum(terms, start=jnp.zeros_like(r))


def attention(p: dict[str, Any], f: jax.Array) -> jax.Array:
    """Spatial attention `A(f)` over two reaches, (B, cN, cM, C) -> the same shape.

    Features of every cell and of its 3 x 3 neighbourhood are weighed against each other by
    a gate, which a convolution makes from their mean and maximum.
    """
    near = _layer(f, p["near"])
    far = _layer(_depthwise(f, p["depthwise"]), p["far"])
    both = jnp.concatenate([near, far], -1)
    summary = jnp.stack([both.mean(-1), both.max(-1)], -1)
    gate = nn.sigmoid(_layer(summary, p["squeeze"]))
    return _layer(near * gate[..., :1] + far * gate[..., 1:], p["mix"])


def _dense(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    return x @ p["kernel"] + p["bias"][None]


def _layer(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    return convolve(x, p["kernel"], p["bias"])


def _depthwise(f: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    """3 x 3 convolution of each feature alone; kernel (3, 3, 1, C)."""
    # Products and sums fuse into one loop; a grouped convolution is slow on CPU.
    kernels = p["kernel"].reshape(9, 1, 1, 1, -1)
    views = neighbours(f, (3, 3))
    terms = (kernels[n] * view for n, view in enumerate(views))
    return sum(terms, start=p["bias"][None, None, None])


@register("dista_net")
@dataclasses.dataclass(frozen=True)
class DistaNet(ConvBaseline):
    """DISTA-Net as an init/apply pair, for frames of one size.

    Attributes:
      config: hyper-parameters.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> op = sensing_operator(5, division=3, psf=0.5)
      >>> net = DistaNet(DistaNetConfig(frame_size=5, iterations=2, channels=4, hidden=4))
      >>> params = net.init(jax.random.key(0), op)
      >>> net.apply(params, jnp.zeros((4, 5, 5)), op).x.shape
      (4, 15, 15)

    References:
      Han et al., DISTA-Net: Dynamic Closely-Spaced Infrared Small Target Unmixing, ICCV
      2025, arXiv 2505.19148.
    """

    config: DistaNetConfig = DistaNetConfig()
    layout: ClassVar[Layout] = LAYOUT

    def _draw(self, key: jax.Array) -> dict[str, Any]:
        cfg = self.config
        n, half = cfg.channels, cfg.channels // 2
        layers = {
            "hidden": ((cfg.frame_size * cfg.division) ** 2, cfg.hidden),
            "kernel": (cfg.hidden, 9),
        }
        gates = {
            "depthwise": (3, 3, 1, n),
            "near": (1, 1, n, half),
            "far": (1, 1, n, half),
            "squeeze": (3, 3, 2, 2),
            "mix": (1, 1, half, n),
        }
        keys = jax.random.split(key, 3)
        return {
            "step": jnp.asarray(STEP),
            **draw_kernels(keys[0], transform_sizes(n)),
            **_draw_layers(keys[1], layers),
            "attention": _draw_layers(keys[2], gates),
        }

    def _block(self, p: Any, x: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        cfg = self.config
        return block(p, x, r, branch_weight=cfg.branch_weight, compat=cfg.compat)


def _draw_layers(key: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Layers with bias, as published: uniform within 1 / sqrt(inputs of a feature)."""
    uniform = partial(jax.random.uniform, minval=-1.0, maxval=1.0)
    kernels, biases = jax.random.split(key)
    kernel = draw(uniform, kernels, shapes)
    bias = draw(uniform, biases, {name: shape[-1:] for name, shape in shapes.items()})
    bound = {name: math.prod(shape[:-1]) ** -0.5 for name, shape in shapes.items()}
    return {n: {"kernel": bound[n] * kernel[n], "bias": bound[n] * bias[n]} for n in shapes}
