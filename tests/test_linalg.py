"""Inverses, determinants, linear systems, factorizations and products: exact and nested, without the local fallback."""

import itertools

import pytest
import torch
from torch.autograd.functional import hessian

import jetplane as jp

linalg = torch.linalg
WEIGHTS = torch.linspace(-1, 1, 16).double().sin().reshape(4, 4)
ROWS = [0, 1, 2, 0]


def weighed(*results):
    """A number that depends on every entry."""
    return sum((r * WEIGHTS[: r.shape[-2], : r.shape[-1]]).sum() for r in results)


def positive(z):
    return z @ z.mT


def symmetric(z):
    return z + z.mT


def spectral(z):
    values, v = linalg.eigh(symmetric(z))
    return values.exp().sum() * 1e-3 + weighed(v @ torch.diag_embed(values.sin()) @ v.mT) + (v * v)[..., 0].sum()


def singular(z):
    u, s, vh = linalg.svd(z[..., :3], full_matrices=False)
    return weighed(u @ torch.diag_embed(s.sin()) @ vh) + (u * u)[..., 0].sum() + (vh * vh)[..., 2, 0].sum()


def general(z):
    values, v = linalg.eig(z)
    return values.abs().sum() + weighed(((v @ torch.diag_embed(values.exp())) @ linalg.inv(v)).real) * 1e-2


def phases(z):
    sign, logabsdet = linalg.slogdet(torch.complex(z, z.sin()))
    return (sign.real * logabsdet + sign.imag).sum()


def packed(z):
    factors, pivots = linalg.lu_factor(z)
    return weighed(linalg.lu_solve(factors, pivots, z.sin()), linalg.lu_solve(factors, pivots, z.cos(), adjoint=True))


def rectangles(z):
    wide, tall = z[..., :3, :], z[..., :3]
    return weighed(*linalg.lu(wide)[1:], *linalg.lu(tall)[1:], *linalg.qr(wide), *linalg.qr(tall))


def complex_triangles(z):
    c = torch.complex(z, z.sin())
    q, r = linalg.qr(c)
    lower = linalg.cholesky(c @ c.mH)
    return weighed(q.real, r.imag, lower.real, lower.imag)


def deficient(z):
    a = z[..., :2] @ z[..., 2:, :].sin()  # of rank two everywhere
    return weighed(linalg.pinv(a))


CASES = {
    "slogdet": lambda z: linalg.slogdet(z)[1].sin().sum(),
    "slogdet, complex": phases,
    "logdet": lambda z: torch.logdet(z @ z.mT).sum(),
    "det": lambda z: linalg.det(z).sum(),
    "inv": lambda z: linalg.inv(z).sin().sum(),
    "inverse of an inverse": lambda z: (linalg.inv(linalg.inv(z) + z) * z).sum(),
    "matrix_power": lambda z: linalg.matrix_power(z, -2).sum(),
    "solve": lambda z: weighed(linalg.solve(z, z.sin()), linalg.solve(z, z.cos(), left=False)),
    "solve, constant matrix": lambda z: weighed(linalg.solve(3 * torch.eye(4).double() + WEIGHTS, z.sin())),
    "solve, vector": lambda z: linalg.solve(z, z[..., 0].sin()).sum(),
    "solve_triangular": lambda z: (
        weighed(linalg.solve_triangular(z, z.sin(), upper=True))
        + weighed(linalg.solve_triangular(z, z.sin(), upper=False, left=False, unitriangular=True))
    ),
    "cholesky": lambda z: weighed(linalg.cholesky(positive(z)), linalg.cholesky(positive(z), upper=True)),
    "cholesky_solve": lambda z: (
        weighed(torch.cholesky_solve(z.sin(), z.tril())) + weighed(torch.cholesky_inverse(z.triu(), upper=True))
    ),
    "lu": lambda z: weighed(*linalg.lu(z)[1:]),
    "lu_solve": packed,
    "qr": lambda z: weighed(*linalg.qr(z)),
    "rectangular lu and qr": rectangles,
    "complex qr and cholesky": complex_triangles,
    "eigh": spectral,
    "eigvalsh": lambda z: linalg.eigvalsh(symmetric(z)).sin().sum(),
    "eig": general,
    "eigvals": lambda z: linalg.eigvals(z).real.square().sum(),
    "svd": singular,
    "svdvals": lambda z: linalg.svdvals(z[..., :3]).sin().sum() + linalg.svdvals(z).log().sum(),
    "pinv": lambda z: weighed(linalg.pinv(z[..., :3])),
    "pinv of a product": deficient,
    "lstsq": lambda z: weighed(linalg.lstsq(z[..., :2], z.sin(), driver="gelsd").solution),
    "matrix_exp": lambda z: weighed(linalg.matrix_exp(z)) * 1e-3,
    "householder_product": lambda z: weighed(linalg.householder_product(z, z[..., 0].sin())),
    "prod": lambda z: z.prod(-1).sum() + (z * (z.detach() > 0)).prod(0).sum() + z.prod(),
    "cumprod": lambda z: weighed((z * (z.detach() > -0.5)).cumprod(-1)),
}
# Distances are held against norms of differences: torch has no second derivative of its own.
for p in (0.5, 1.0, 1.5, 2.0, 3.0, float("inf")):
    CASES[f"cdist, p = {p}"] = lambda z, p=p: weighed(distances(z, z.sin() + 2 * WEIGHTS, p))


def distances(a, b, p):
    if isinstance(a, jp.jets.Jet):
        return torch.cdist(a, b, p)
    return linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)


def matrices(*batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(batch))
    noise = torch.randn(*batch, 4, 4, generator=generator, dtype=torch.float64)
    return noise + 3 * torch.diag(torch.tensor([1.0, 1.5, 2.0, 2.5])).double()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_hessians(name, batch):
    f, z = CASES[name], matrices(*batch)
    with jp.strict():
        found, laplacian = jp.hessian(f, z), jp.laplacian(f, z)
        product = jp.hvp(f, z, z.cos(), mode="forward")
    expected = hessian(f, z).reshape(z.numel(), -1)
    scale = expected.abs().max()
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-9, atol=1e-11 * scale)
    torch.testing.assert_close(laplacian, expected.trace(), rtol=1e-9, atol=1e-11 * scale)
    along = (expected @ z.cos().flatten()).reshape(z.shape)
    torch.testing.assert_close(product, along, rtol=1e-9, atol=1e-10 * scale)


@pytest.mark.parametrize("count", [2, 64])  # copies of a factor, or one coefficient at a time
@pytest.mark.parametrize("name", ["slogdet", "constant on the left", "constant on the right", "transposed"])
def test_batches_of_products(name, count):
    generator = torch.Generator().manual_seed(count)
    w = torch.randn(3, count * 64, generator=generator, dtype=torch.float64) / 3
    known = torch.randn(count, 8, 8, generator=generator, dtype=torch.float64) + 3 * torch.eye(8)
    functions = {
        "slogdet": lambda a: linalg.slogdet(a + known)[1].square(),
        "constant on the left": lambda a: (known @ a).sin(),
        "constant on the right": lambda a: (a @ known).sin(),
        "transposed": lambda a: (known.mT @ a.mT).sin() + (a.mT @ known.mT).cos(),
    }

    def f(x):
        return functions[name]((x @ w).sin().view(count, 8, 8)).sum()

    x = torch.tensor([0.3, -0.4, 0.5]).double()
    expected = hessian(f, x)
    torch.testing.assert_close(jp.hessian(f, x), expected, rtol=1e-11, atol=1e-12 * expected.abs().max())
    torch.testing.assert_close(jp.laplacian(f, x), expected.trace(), rtol=1e-11, atol=1e-12 * expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_laplacians_inside_a_loss(name):
    """As for a wave function: along parameters, of second derivatives along coordinates, and by reverse mode."""
    torch.manual_seed(0)
    w, x = torch.randn(3, 3).double().requires_grad_(), torch.randn(3, 3).double()
    fixed = matrices()

    def f(z):
        return CASES[name](fixed + torch.nn.functional.pad((z @ w).tanh(), (0, 1, 0, 1)))

    truth = hessian(f, x, create_graph=True).reshape(9, 9).trace().square()
    (gradient,) = torch.autograd.grad(truth, w)
    with jp.strict():
        plane = jp.evaluate(lambda: jp.laplacian(f, x).square(), [w], [torch.eye(9).double().reshape(9, 3, 3)], "none")
        (recorded,) = torch.autograd.grad(jp.laplacian(f, x).square(), w)
    scale = gradient.abs().max()
    torch.testing.assert_close(plane.value, truth.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(plane.slope, gradient.flatten(), rtol=1e-8, atol=1e-10 * scale)
    torch.testing.assert_close(recorded, gradient, rtol=1e-8, atol=1e-10 * scale)


@pytest.mark.parametrize("rank", [3, 2, 1])
def test_determinants_of_singular_matrices(rank):
    """Reverse mode's second derivative of these is not finite; that of the sum over permutations is."""
    u, s, vh = linalg.svd(matrices())
    z = (u[:, :rank] * s[:rank]) @ vh[:rank]

    def by_permutations(z):
        total = 0
        for p in itertools.permutations(range(4)):
            sign = linalg.det(torch.eye(4).double()[list(p)])
            total = total + sign * z[0, p[0]] * z[1, p[1]] * z[2, p[2]] * z[3, p[3]]
        return total

    with jp.strict():
        found = jp.jet(linalg.det, z, torch.eye(16).double().reshape(16, 4, 4))
    expected = by_permutations(z), torch.func.grad(by_permutations)(z).flatten(), hessian(by_permutations, z)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-10, atol=1e-10)


REFUSED = {
    "full SVD": (lambda z: linalg.svd(z[..., :3])[0].sum(), "full_matrices=False"),
    "complete QR": (lambda z: linalg.qr(z[..., :3], "complete")[0].sum(), "mode='reduced'"),
    "equal eigenvalues": (lambda z: linalg.eigvalsh(z - z.detach() + torch.eye(4)).sum(), "equal up to rounding"),
    "equal singular values": (lambda z: linalg.svdvals(z - z.detach() + torch.eye(4)).sum(), "equal up to rounding"),
    "rank that changes": (lambda z: linalg.pinv(z - z.detach() + z.detach()[:, :1]).sum(), "rank changes"),
    "values that are cut off": (lambda z: linalg.pinv(z, rtol=0.5).sum(), "cut off"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_derivative_is_refused(name):
    f, told = REFUSED[name]
    with pytest.raises(jp.DerivativeError, match=told):
        jp.hessian(f, matrices())


def test_first_derivatives_of_equal_eigenvalues_are_there():
    def trace(z):
        return linalg.eigvalsh(z + z.mT).sum()

    torch.testing.assert_close(jp.jacobian(trace, torch.eye(3)), 2 * torch.eye(3))


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_is_a_layer_and_a_loss(curvature, reduction):
    """In chunks too, of which torch has no second derivative."""
    torch.manual_seed(0)
    x, y = torch.randn(10, 5).double(), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, -100, 1])
    w, v, b = torch.randn(4, 5).double(), torch.randn(5, 5).double(), torch.randn(4).double()
    params = [p.requires_grad_() for p in (w, v, b)]
    directions = [torch.randn(3, *p.shape).double() for p in params]

    def found(options=None):
        def loss():
            how = {"linear_bias": b, "reduction": reduction, "options": options}
            return torch.nn.functional.linear_cross_entropy((x @ v).tanh(), w, y, **how).sum()

        with jp.strict():
            return jp.evaluate(loss, params, directions, curvature=curvature)

    def apart():
        return torch.nn.functional.cross_entropy((x @ v).tanh() @ w.mT + b, y, reduction=reduction).sum()

    expected = jp.evaluate(apart, params, directions, curvature=curvature)
    for options in (None, torch.nn.LinearCrossEntropyOptions()):
        got = found(options)
        torch.testing.assert_close((got.slope, got.curvature), (expected.slope, expected.curvature))


def minors(x):
    """The determinant by its definition."""
    if x.shape[-1] == 1:
        return x[..., 0, 0]
    others = [torch.cat([x[..., 1:, :j], x[..., 1:, j + 1 :]], -1) for j in range(x.shape[-1])]
    return sum((-1) ** j * x[..., 0, j] * minors(rest) for j, rest in enumerate(others))


@pytest.mark.parametrize(
    "spectrum", [(1.0, 0.7, 0.4), (1.0, 0.7, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1.0, 1e-5, 1e-9)]
)
@pytest.mark.filterwarnings("error::jetplane.FallbackWarning")
def test_derivatives_of_determinants_of_any_rank(spectrum):
    """Also the third ones by a graph, and the fourth by nesting, unlike torch at singular matrices."""
    torch.manual_seed(0)
    u, v = (linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0] for _ in range(2))
    x = torch.stack([u @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ v, v])
    weights = [torch.randn(shape, dtype=torch.float64) for shape in [(2,), (2, 3, 3), (2, 3, 3, 3, 3), (3, 3)]]
    found = []
    for determinant in (minors, linalg.det):
        z = x.clone().requires_grad_()
        start = x.clone()

        def f(z, determinant=determinant, start=start):
            return determinant(z + 0.1 * (z - start) ** 2 * weights[3])

        second, hessian = jp.value_and_laplacian(f, z, batch_dim=0), jp.hessian(f, z, batch_dim=0)
        parts = zip((second.laplacian, second.gradient, hessian), weights, strict=False)
        (slope,) = torch.autograd.grad(sum((part * w).sum() for part, w in parts), z)
        with torch.no_grad():
            fourth = jp.bilaplacian(f, x, batch_dim=0)
        found.append([*second, hessian, slope, fourth])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-13)
