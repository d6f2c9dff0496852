# pyright: reportMissingImports=false
"""A measured process with jax: ``python -m benchmarks.jax_peer SPECIFICATION``, in a Python that has it.

The problem's arrays come from a file that the measuring process wrote. Everything is compiled before it
is timed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .protocol import serve

HEADS = 4


def pool(x: Any) -> Any:
    """Maximum over 2 x 2 windows, by slices: jet is wrong for a reduction over reshaped windows."""
    rows = jnp.maximum(x[:, :, ::2], x[:, :, 1::2])
    return jnp.maximum(rows[..., ::2], rows[..., 1::2])


def convolve(x: Any, weight: Any, bias: Any) -> Any:
    """A valid convolution of images (N, C, H, W)."""
    y = lax.conv_general_dilated(x, weight, (1, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW"))
    return y + bias[:, None, None]


def gpt(p: dict[str, Any], tokens: Any) -> Any:
    """The GPT-style stack of `problems`."""
    n, t = tokens.shape
    d = p["position"].shape[1]
    layers = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    mask = jnp.triu(jnp.full((t, t), -1e9, p["position"].dtype), 1)

    def affine(h: Any, name: str) -> Any:
        y = h @ p[name + ".weight"].T
        return y + p[name + ".bias"] if name + ".bias" in p else y

    def norm(h: Any, name: str) -> Any:
        centred = h - h.mean(-1, keepdims=True)
        scaled = centred / jnp.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
        return scaled * p[name + ".weight"] + p[name + ".bias"]

    def softmax(s: Any) -> Any:
        e = jnp.exp(s - lax.stop_gradient(s.max(-1, keepdims=True)))
        return e / e.sum(-1, keepdims=True)

    h = p["token.weight"][tokens] + p["position"]
    for i in range(layers):
        block = f"blocks.{i}."
        qkv = affine(norm(h, block + "norm1"), block + "attention.qkv").reshape(n, t, 3, HEADS, d // HEADS)
        query, key, value = (qkv[:, :, s].transpose(0, 2, 1, 3) for s in range(3))
        weights = softmax(query @ key.transpose(0, 1, 3, 2) / math.sqrt(d // HEADS) + mask)
        h = h + affine((weights @ value).transpose(0, 2, 1, 3).reshape(n, t, d), block + "attention.out")
        u = affine(norm(h, block + "norm2"), block + "up")
        u = 0.5 * u * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u * u * u)))
        h = h + affine(u, block + "down")
    return affine(norm(h, "norm"), "head").reshape(n * t, -1)


def logits(name: str, p: dict[str, Any], x: Any) -> Any:
    """The model's output."""
    if name == "gpt":
        return gpt(p, x)
    layers = sorted({int(key.split(".")[0]) for key in p})
    for layer in layers:
        weight, bias = p[f"{layer}.weight"], p[f"{layer}.bias"]
        if weight.ndim == 4:
            x = pool(jnp.maximum(convolve(x, weight, bias), 0))
        else:
            x = x.reshape(x.shape[0], -1) @ weight.T + bias
            x = x if layer == layers[-1] else jnp.maximum(x, 0)
    return x


def loss(name: str, p: dict[str, Any], x: Any, y: Any) -> Any:
    """Mean cross entropy."""
    z = logits(name, p, x)
    z = z - lax.stop_gradient(z.max(-1, keepdims=True))
    picked = (z * (jnp.arange(z.shape[-1]) == y[:, None])).sum(-1)
    return (jnp.log(jnp.exp(z).sum(-1)) - picked).mean()


def pairs(k: int) -> tuple[np.ndarray, np.ndarray]:
    """Directions i <= j of each entry of the upper triangle."""
    return np.triu_indices(k)


def from_pairs(k: int, values: Any) -> Any:
    """The symmetric matrix with this upper triangle."""
    i, j = pairs(k)
    upper = jnp.zeros((k, k), values.dtype).at[i, j].set(values)
    return upper.at[j, i].set(values)


def grid(f: Callable[..., Any], p: Any, v: Any, k: int) -> Any:
    """Nested jvp, vectorised over both directions."""
    (value, slope), curvature = jax.vmap(
        lambda a: jax.vmap(lambda b: _twice(f, p, a, b))(v),
    )(v)
    return value[0, 0], slope[:, 0], curvature


def _twice(f: Callable[..., Any], p: Any, a: Any, b: Any) -> Any:
    (value, slope), (_, mixed) = jax.jvp(lambda q: jax.jvp(f, (q,), (a,)), (p,), (b,))
    return (value, slope), mixed


def unrolled(f: Callable[..., Any], p: Any, v: Any, k: int) -> Any:
    """Nested jvp, pair by pair in one graph: the compiler may find what pairs share."""

    def one(i: int) -> Any:
        return {name: t[i] for name, t in v.items()}

    out = [_twice(f, p, one(i), one(j)) for i, j in zip(*pairs(k), strict=True)]
    slope = jnp.stack([s for ((_, s), _), i, j in zip(out, *pairs(k), strict=True) if i == j])
    return out[0][0][0], slope, from_pairs(k, jnp.stack([mixed for _, mixed in out]))


def taylor(f: Callable[..., Any], p: Any, v: Any, k: int) -> Any:
    """Jets along v_i and v_i + v_j, in one graph; mixed terms by polarisation."""
    from jax.experimental.jet import jet

    names = list(p)
    flat = lambda *q: f(dict(zip(names, q, strict=True)))  # noqa: E731
    i, j = pairs(k)
    out = []
    for a, b in zip(i, j, strict=True):
        series = [[v[n][a] + (v[n][b] if a != b else 0), jnp.zeros_like(p[n])] for n in names]
        value, (first, second) = jet(flat, [p[n] for n in names], series)
        out.append((value, first, second))
    own = {a: second for a, b, (_, _, second) in zip(i, j, out, strict=True) if a == b}
    slope = jnp.stack([first for a, b, (_, first, _) in zip(i, j, out, strict=True) if a == b])
    curvature = [
        second if a == b else (second - own[a] - own[b]) / 2 for a, b, (_, _, second) in zip(i, j, out, strict=True)
    ]
    return out[0][0], slope, from_pairs(k, jnp.stack(curvature))


WAYS = {"jax jvp": grid, "jax jvp unrolled": unrolled, "jax jet": taylor}


def main() -> None:
    """Measure what the one argument, a JSON object, asks for."""
    spec = json.loads(sys.argv[1])
    if spec["dtype"] == "float64":
        jax.config.update("jax_enable_x64", True)

    def build() -> tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]:
        arrays = np.load(spec["arrays"])
        read = lambda kind: {  # noqa: E731
            n.removeprefix(kind): jnp.asarray(arrays[n]) for n in arrays.files if n.startswith(kind)
        }
        args = read("param:"), read("tangent:"), jnp.asarray(arrays["x"]), jnp.asarray(arrays["y"])

        def evaluated(p: Any, v: Any, x: Any, y: Any) -> Any:
            return WAYS[spec["way"]](lambda q: loss(spec["model"], q, x, y), p, v, spec["k"])

        compiled = jax.jit(evaluated).lower(*args).compile()
        return lambda: jax.block_until_ready(compiled(*args)), numbers

    def numbers(result: Any) -> dict[str, Any]:
        return dict(zip(("loss", "slope", "curvature"), (np.asarray(r).tolist() for r in result), strict=True))

    serve(build, spec["cpu_time"])


if __name__ == "__main__":
    main()
