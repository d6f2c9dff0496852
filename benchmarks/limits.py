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


def units(product: Product, k: int, curvature: str = "hessian", rank_one: bool = False) -> int:
    """Products that the jet of one product takes, all pairs.

    The primal, and coefficients of each side with the other's primal: K first ones, K(K+1)/2 second ones. Where
    both sides have first ones and second ones are wanted, products of sums give the first and the cross terms
    together: K + K(K+1)/2 beside the primal. Rank-one tangents of a weight cost no product, nor do their cross terms.
    """
    second = k * (k + 1) // 2 if curvature == "hessian" else 0
    weight = product.right == FIRST
    sides = (product.left,) if weight and rank_one else (product.left, product.right)
    total = 1 + second * sum(s == SECOND for s in sides)
    if len(sides) == 2 and all(s >= FIRST for s in sides) and second:
        return total + k + second
    return total + k * sum(s >= FIRST for s in sides)


def limit(name: str, k: int, curvature: str = "hessian", rank_one: bool = False) -> float:
    """Products of one evaluation over those of one plain forward."""
    model = products(name)
    return sum(p.cost * units(p, k, curvature, rank_one) for p in model) / sum(p.cost for p in model)


# What the products of each way of ours are counted by.
LIMITS: dict[str, tuple[str, bool]] = {
    "ours": ("hessian", False), "compiled": ("hessian", False), "step": ("hessian", False), "drawn": ("hessian", False),
    "rank-one": ("hessian", True), "compiled, rank-one": ("hessian", True),
    "ggn": ("ggn", False), "batched jvps": ("ggn", False), "slope": ("ggn", False), "ggn, rank-one": ("ggn", True),
}  # fmt: skip
