"""What one plane evaluation costs at least, in products: the limit that measurements stand beside.

A product of the model (matrix product, convolution) costs 1 in the plain forward. What its jet costs
depends on which coefficients its two sides have: data has none, a parameter has first ones alone, and
what a layer makes keeps its order through piecewise linear functions and rises to second through others.
"""

from __future__ import annotations

from dataclasses import dataclass

from .problems import CLASSES, EMBEDDING, HIDDEN, INPUTS, LAYERS, SEQUENCE, VOCABULARY, WIDTH

NONE, FIRST, SECOND = 0, 1, 2


@dataclass(frozen=True)
class Product:
    """One product of the forward pass: multiply-adds for one example, orders of its two sides."""

    cost: int
    left: int
    right: int = FIRST


def products(name: str) -> list[Product]:
    """The products of a benchmark model, from input to output."""
    if name == "logreg":
        return [Product(INPUTS * CLASSES, NONE)]
    if name == "mlp":
        # The first layer is linear in the parameters and ReLU keeps it so; from the second on, second
        # coefficients exist.
        widths = [INPUTS] + [WIDTH] * HIDDEN + [CLASSES]
        orders = [NONE, FIRST] + [SECOND] * (len(widths) - 3)
        return [Product(a * b, o) for a, b, o in zip(widths, widths[1:], orders, strict=False)]
    if name == "cnn":
        return [
            Product(20 * 25 * 24 * 24, NONE),
            Product(50 * 20 * 25 * 8 * 8, FIRST),
            Product(800 * 500, SECOND),
            Product(500 * CLASSES, SECOND),
        ]
    if name == "gpt":  # the first norm makes second coefficients of the embeddings' first ones
        t, d = SEQUENCE, EMBEDDING
        block = [
            Product(t * d * 3 * d, SECOND),
            Product(t * t * d, SECOND, SECOND),
            Product(t * t * d, SECOND, SECOND),
            Product(t * d * d, SECOND),
            Product(t * d * 4 * d, SECOND),
            Product(t * 4 * d * d, SECOND),
        ]
        return LAYERS * block + [Product(t * d * VOCABULARY, SECOND)]
    raise ValueError(f"no products known for {name!r}")


def units(product: Product, k: int, interpolated: bool = False) -> int:
    """Products that the jet of one product takes, exact curvature, all pairs.

    The primal; first coefficients of each side with the other's primal, and second ones likewise; one
    cross term for each pair, by polarisation. Interpolated, products of sums give the primal, first
    and cross terms together, and the first coefficients take K instead of 2K.
    """
    pairs = k * (k + 1) // 2
    sides = (product.left, product.right)
    first = k * sum(s >= FIRST for s in sides)
    second = pairs * sum(s == SECOND for s in sides)
    if all(s >= FIRST for s in sides):
        second += pairs
        first = k if interpolated else first
    return 1 + first + second


def limit(name: str, k: int, interpolated: bool = False) -> float:
    """Products of one evaluation over those of one plain forward."""
    model = products(name)
    return sum(p.cost * units(p, k, interpolated) for p in model) / sum(p.cost for p in model)
