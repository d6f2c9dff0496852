"""Compiled functions: the same bits, first derivatives to 1e-12, second to 1e-10 of the same formulas in torch."""

import ctypes
import ctypes.util
import functools
import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import jetplane as jp
from jetplane.native.coefficients import Layout, padded
from jetplane.native.signature import signature

SOURCES = Path(__file__).parent / "native"
D = torch.float64

here = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="machine code of Linux on x86-64 is read"
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Machine code is kept in a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JETPLANE_CACHE", str(tmp_path_factory.mktemp("code")))
        yield


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A library of one of the sources, by its flags."""
    pytest.importorskip("pypcode", reason="needs pypcode: pip install 'jetplane[native]'")
    pytest.importorskip("llvmlite", reason="needs llvmlite: pip install 'jetplane[native]'")
    folder = tmp_path_factory.mktemp("libraries")

    def built(flags: str = "-O2", source: str = "corpus.c"):
        return build(flags, source)

    @functools.cache
    def build(flags: str, source: str):
        name = {"cpp": "g++", "f90": "gfortran"}.get(source.rpartition(".")[2], "gcc")
        if flags.startswith("clang"):
            name, flags = "clang", flags.removeprefix("clang")
        compiler = shutil.which(name)
        if compiler is None:
            pytest.skip(f"needs {name}")
        if "avx2" in flags and "avx2" not in Path("/proc/cpuinfo").read_text():
            pytest.skip("this processor has no AVX2")
        file = folder / f"{len(list(folder.iterdir()))}.so"
        subprocess.run(
            [compiler, *flags.split(), "-shared", "-fPIC", "-o", file, SOURCES / source, "-lm"],
            check=True,
            timeout=120,
            cwd=folder,  # where Fortran writes its modules
        )
        return ctypes.CDLL(str(file))

    return built


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def same_derivatives(f, reference, x, k=3, first=1e-12, second=1e-10):
    """Value, slopes and curvatures along k directions."""
    v = torch.randn(k, *x.shape, dtype=D, generator=torch.Generator().manual_seed(1))
    ours, theirs = jp.jet(f, x, v), jp.jet(reference, x, v)
    close(ours[0], theirs[0], 1e-12)
    close(ours[1], theirs[1], first)
    close(ours[2], theirs[2], second)


def same_as_differences(f, x, first=1e-9, second=1e-6):
    """Slope and curvature of f(x, n) beside differences of order six."""
    v = torch.randn(1, *x.shape, dtype=D, generator=torch.Generator().manual_seed(1))
    value, slope, bend = jp.jet(lambda x: f(x, x.numel()), x, v)

    def limit(difference, h):
        a, b, c = (difference(h / 2**k) for k in range(3))
        return (64 * c - 20 * b + a) / 45

    def at(h):
        return f(x + h * v[0], x.numel())

    assert abs(limit(lambda h: (at(h) - at(-h)) / (2 * h), 4e-3) - slope[0]) <= first * max(1, abs(slope[0]))
    assert abs(limit(lambda h: (at(h) - 2 * value + at(-h)) / h**2, 1.6e-2) - bend[0, 0]) <= second * max(
        1, abs(bend[0, 0])
    )


def random(n, seed=0):
    x = torch.rand(n, dtype=D, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.1
    return torch.where(torch.arange(n) % 3 == 0, -x, x)


# --- the same formulas in torch ----------------------------------------------------------------------------------


def loop(x):
    s = torch.where(x > 0.5, x**3, -x / (1 + x * x)).sum()
    p = (0.5 * x + 1 / (2 + x.abs())).prod()
    return (s * s + p * p).sqrt() - s


def transcendental(x):
    a, b = x[:-1], x[1:]
    s = (-a * a).exp() * b.sin() + (1 + a * a).log() + (a.abs() + 1) ** b + (a * b).tanh()
    return (s + torch.atan2(a, 2 + b.cos())).sum()


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def burgers(par, n, steps):
    m = par.numel()
    h = 1.0 / (n - 1)
    nu, dt = 0.002 + 0.01 * par[m - 1] * par[m - 1], 0.2 * h
    z = torch.arange(n, dtype=D) * h
    u = sum(par[k] * torch.sin((k + 1) * 3.14159265358979 * z) for k in range(m - 1))
    for _ in range(steps):
        c, left, right = u[1:-1], u[:-2], u[2:]
        d = torch.where(c > 0, (c - left) / h, (right - c) / h)
        u = torch.nn.functional.pad(c + dt * (nu * (right - 2 * c + left) / (h * h) - c * d), (1, 1))
    return ((u * u).sum() * h).sqrt()


def control(x):
    n = x.numel()
    a = x.abs() * 3
    i = a.detach().long()
    table = torch.arange(8, dtype=D) ** 2
    f = a - i
    s = (table[i] * (1 - f) + table[i + 1] * f).sum()
    y = total = x
    for _ in range(3):
        y = y * 0.5 + 1
        total = total * y
    s = (
        s
        + total.sum()
        + (torch.where(x >= 0.25, x, 0.25) * torch.where(x <= 0.75, x, 0.75)).sum()
        - (x.sign() * x * x).sum()
    )
    chosen = [x[0] ** 2, 3 * x[1], x[2] ** 3, 1 / (2 + x[3]), x[4] - 7, x[5] ** 2 - x[5], *(-x[6:])][:n]
    s = s + sum(c * (k + 1) for k, c in enumerate(chosen))
    whole = (x.detach() * 100).trunc()
    s = s + (torch.fmod(whole, 7) / 3).trunc().sum()
    scaled = x * 2.0 ** (torch.arange(n, dtype=D) - 2)
    return s + torch.where(x > 0, scaled, torch.zeros_like(scaled)).sum()


ARRAY = "double(const double[n] in, int n)"
FLAGS = [
    "-O0",
    "-O2",
    "-O3 -mavx2 -mfma -ffast-math",
    *(
        pytest.param(f, marks=pytest.mark.long)
        for f in ("-O1", "-O3", "-O3 -mavx2 -mfma", "clang -O0", "clang -O3 -mavx2")
    ),
]


@here
class TestCorpus:
    @pytest.mark.parametrize("flags", FLAGS)
    @pytest.mark.parametrize("name", ["loop", "transcendental", "rosenbrock", "control"])
    def test_functions(self, library, flags, name):
        f = jp.compiled(getattr(library(flags), name), ARRAY)
        n = 7 if name == "control" else 6
        tolerance = 1e-10 if "fast" in flags else 1e-12
        same_derivatives(lambda x: f(x, n), globals()[name], random(n), first=tolerance)

    @pytest.mark.parametrize("flags", ["-O2", pytest.param("-O3 -mavx2 -mfma", marks=pytest.mark.long)])
    def test_simulator(self, library, flags):
        f = jp.compiled(library(flags).burgers, "double(const double[m] in, int m, int n, int steps)")
        same_derivatives(lambda x: f(x, 5, 50, 60), lambda x: burgers(x, 50, 60), random(5).abs())

    def test_cpp(self, library):
        f = jp.compiled(library("-O2", "corpus.cpp").law, "double(const double[n] in, int n, int kind, int steps)")

        def law(x, kind, steps):
            a = [None, 0.5 + x[0] * x[0], None, None, x[1]][kind]
            u = x
            for _ in range(steps):
                g = 0.5 * u * u if a is None else u * u / (u * u + a * (1 - u) ** 2)
                flux = 0.5 * (g.roll(1) + g) - 0.3 * (u - u.roll(1))
                u = u - 0.2 * (flux.roll(-1) - flux)
            return (u * u).sum()

        for kind in (4,):
            same_derivatives(
                lambda x, kind=kind: f(x, 8, kind, 5), lambda x, kind=kind: law(x, kind, 5), random(8).abs()
            )
        assert "_Znwm" in str(f.report())
        g = jp.compiled(library("-O2", "corpus.cpp").caught, "double(const double[1] in)")
        same_derivatives(g, lambda x: x[0] * 1.0, -random(1).abs())
        with pytest.raises(jp.NativeCodeError, match="C\\+\\+ exceptions, which are not carried"):
            jp.jvp(g, random(1).abs(), torch.ones(1, dtype=D))

    def test_functions_with_a_rule(self, library):
        mpmath = pytest.importorskip("mpmath")
        f = jp.compiled(library().functions, "void(const double[2] in, double[42] out)")
        x, v = torch.tensor([0.37, 0.83], dtype=D), torch.tensor([[1.0, 0.5], [0.3, -2.0]], dtype=D)
        _, first, second = jp.jet(f, x, v)
        m = mpmath.mp
        m.dps = 40
        frac = lambda a, b: a - b * m.floor(a / b)  # noqa: E731
        functions = [
            lambda x, y: m.exp(x), lambda x, y: 2**x, lambda x, y: m.expm1(x), lambda x, y: m.log(x),
            lambda x, y: m.log(x, 2), lambda x, y: m.log10(x), lambda x, y: m.log1p(x), lambda x, y: m.sin(x),
            lambda x, y: m.cos(x), lambda x, y: m.tan(x), lambda x, y: m.asin(x), lambda x, y: m.acos(x),
            lambda x, y: m.atan(x), lambda x, y: m.sinh(x), lambda x, y: m.cosh(x), lambda x, y: m.tanh(x),
            lambda x, y: m.asinh(x), lambda x, y: m.acosh(1 + x), lambda x, y: m.atanh(x), lambda x, y: m.cbrt(x),
            lambda x, y: m.erf(x), lambda x, y: m.erfc(x), lambda x, y: m.besselj(0, x), lambda x, y: m.besselj(1, x),
            lambda x, y: m.bessely(0, x), lambda x, y: m.bessely(1, x), lambda x, y: m.gamma(x),
            lambda x, y: m.log(abs(m.gamma(x))), lambda x, y: m.log(abs(m.gamma(x - 2.5))), lambda x, y: m.sqrt(x),
            lambda x, y: x**y, lambda x, y: -(x**3), lambda x, y: m.atan2(y, x), lambda x, y: m.atan2(-y, -x),
            lambda x, y: m.sqrt(x * x + y * y), lambda x, y: frac(5 * y, x), lambda x, y: x * y + x,
            lambda x, y: x * y * 2 ** -math.frexp(0.37 * 0.83)[1], lambda x, y: y - x,
            lambda x, y: 7 * y - x * m.nint(7 * y / x), lambda x, y: m.floor(3 * x) * x,
            lambda x, y: m.log(x) * m.nint(9 * x),
        ]  # fmt: skip
        h = m.mpf(10) ** -10
        points = [(m.mpf(float(a)), m.mpf(float(b))) for a, b in (v[0], v[1])]

        def along(g, p, q):
            return g(m.mpf(0.37) + p, m.mpf(0.83) + q)

        for n, g in enumerate(functions):
            for i, (a, b) in enumerate(points):
                slope = (along(g, h * a, h * b) - along(g, -h * a, -h * b)) / (2 * h)
                assert abs(float(first[i, n]) - slope) <= 1e-12 * max(1, abs(slope)), n
            (a, b), (c, d) = points
            cross = [along(g, s * h * a + t * h * c, s * h * b + t * h * d) * s * t for s in (1, -1) for t in (1, -1)]
            bend = sum(cross) / (4 * h * h)
            assert abs(float(second[0, 1, n]) - bend) <= 1e-10 * max(1, abs(bend)), n

    def test_many_parameters(self, library):
        f = jp.compiled(
            library().many,
            "int(const double[n] a in, double b, int n, double[n] out, long k, double c, bool flag, "
            "double[m] both inout, int m, double d, double e, double f, double g, double h, double i, double j, "
            "long last)",
        )
        a, both = random(4), random(3, 1)
        rest = torch.linspace(0.5, 1.5, 9, dtype=D)

        def split(x, g, reference):
            a, both, r = x[:4], x[4:7], x[7:]
            if reference:
                out = a * r[0] + r[1] * r[2] - r[3] * r[4] + r[5] * r[6] * r[7] * r[8] + 11
                return torch.cat([out, both * both * r[0] + 1])
            count, out, new = g(a, r[0], 4, 11, r[1], True, both, 3, *r[2:], 5)
            assert int(count) == 12
            return torch.cat([out, new])

        x = torch.cat([a, both, rest])
        reference = functools.partial(split, g=None, reference=True)
        same_derivatives(functools.partial(split, g=f, reference=False), reference, x)

    def test_fortran_calls(self, library):
        number = jp.In(1, "int", name="n")
        f = jp.compiled(library().axpy_, args=[number, jp.In(1), jp.In("n"), jp.Out("n", inout=True)])
        n = torch.tensor([5])
        x = random(11)
        same_derivatives(lambda x: f(n, x[:1], x[1:6], x[6:]), lambda x: x[6:] + x[0] * x[1:6], x)

    @pytest.mark.parametrize("name", ["common", pytest.param("logistic", marks=pytest.mark.long)])
    @pytest.mark.parametrize(
        "flags", ["-O2", *(pytest.param(f, marks=pytest.mark.long) for f in ("-O0", "-O3 -mavx2"))]
    )
    def test_fortran(self, library, flags, name):
        x, c = torch.tensor([0.37, 0.83, 0.41, 0.22], dtype=D), library(flags, "corpus.f90")  # no kink is near
        f = jp.compiled(c.logistic, "void(int n, const double[n] in, double[n] out)")
        g = jp.compiled(c.common_, args=[jp.In(1, "int", name="n"), jp.In("n"), jp.Out("n")])
        at = f if name == "logistic" else lambda n, x: g(torch.tensor([n]), x)
        for k in (0, 3):
            same_as_differences(lambda x, n, k=k: at(n, x)[k], x)

    def test_memory_of_the_librarys(self, library):
        c = library()
        f = jp.compiled(c.kept, "double(const double[1] in)")
        same_derivatives(f, lambda x: 3 * x[0] ** 2, random(1))
        c.prepare()
        g = jp.compiled(c.stored, "double(const double[1] in)")
        same_derivatives(g, lambda x: x[0] ** 2, random(1))

        h = jp.compiled(c.arrays, ARRAY)
        i = torch.arange(3000)
        reference = lambda x: 1e-3 * (x[i % 4] * x[(i + 1) % 4] * i * 1e-3).square().sum()  # noqa: E731
        same_derivatives(lambda x: h(x, 4), reference, random(4))

    def test_calls_of_libc_and_complex_numbers(self, library):
        x, c = random(4), library()
        i = torch.arange(200)
        ordered = lambda x: (torch.sort(x[i % 4] * (i * 37 % 200)).values.square() * i).sum() * 5e-5  # noqa: E731
        same_derivatives(lambda x: jp.compiled(c.sorted, ARRAY)(x, 4), ordered, x)

        x = x.abs()
        same_as_differences(jp.compiled(c.in_the_plane, ARRAY), x)
        same_as_differences(jp.compiled(c.with_integers, ARRAY), x)

    def test_bits(self, library):
        x = torch.tensor([2.7], dtype=D)
        f = jp.compiled(library().mantissa, "double(const double[1] in)")
        same_derivatives(f, lambda x: (x[0] / 4) ** 2 + 2 + (3 * x[0] - 8) * x[0], x)
        f = jp.compiled(library().low_bits, "double(const double[1] in)")
        v = torch.ones(1, 1, dtype=D)
        _, slope, bend = jp.jet(f, x, v)  # (h + l)² without l²
        assert abs(float(slope) - 5.4) < 1e-6 and abs(float(bend) - 2) < 1e-12


INSTRUCTIONS = """
addpd mulpd subpd divpd maxpd minpd unpcklpd unpckhpd haddpd hsubpd addsubpd movsd movhlps movlhps addsd subsd mulsd
divsd maxsd minsd sqrtsd sqrtpd movapd movddup punpcklqdq punpckhqdq shufpd,0 shufpd,1 shufpd,2 shufpd,3 blendpd,1
blendpd,2 palignr,8 pshufd,0x4e pshufd,0xee roundpd,1 roundsd,2 cmpltpd cmpnlepd cmplesd shufps,0x4e shufps,0xee movupd
""".split()  # fmt: skip
AVX = """
vaddpd vmulpd vsubpd vdivpd vmaxpd vminpd vunpcklpd vunpckhpd vhaddpd vhsubpd vaddsubpd vshufpd,5 vshufpd,10 vblendpd,5
vperm2f128,1 vperm2f128,0x31 vperm2f128,0x28 vfmadd132pd vfmadd213pd vfmadd231pd vfmsub231pd vfnmadd213pd vfnmsub132pd
vfmaddsub213pd vfmsubadd231pd vfmadd231sd:x vfnmadd213sd:x vaddsd:x vsqrtsd:x vmovsd:x vmaxsd:x vpermpd,0x1b:1
vpermilpd,6:1 vsqrtpd:1 vmovapd:1 vmovddup:1 vroundpd,9:1 vcmplt_oqpd vcmpnge_uqpd
""".split()  # fmt: skip


@here
class TestInstructions:
    """Each instruction alone, by the machine and lifted: the first call compares bits, and a slope with differences."""

    def run(self, tmp_path, body, count):
        if shutil.which("gcc") is None:
            pytest.skip("needs gcc")
        source = tmp_path / "instructions.s"
        source.write_text(".intel_syntax noprefix\n.globl f\nf:\n" + body + "  ret\n.section .note.GNU-stack\n")
        subprocess.run(["gcc", "-shared", "-o", tmp_path / "f.so", source], check=True, timeout=60)
        f = jp.compiled(ctypes.CDLL(str(tmp_path / "f.so")).f, f"void(const double[12] in, double[{count}] out)")
        x, v = random(12, 3) + 1.2, torch.randn(1, 12, dtype=D, generator=torch.Generator().manual_seed(0))
        value, slope, bend = jp.jet(f, x, v)
        h, g = 1e-6 * v[0], 1e-4 * v[0]
        wrong = (f(x + h) - f(x - h)) / 2e-6 - slope[0]
        bent = (f(x + g) - 2 * value + f(x - g)) / 1e-8 - bend[0, 0]
        return wrong.abs().nan_to_num(), bent.abs().nan_to_num()

    def test_sse(self, library, tmp_path):
        library()
        body, at = "", 0
        for text in INSTRUCTIONS:
            name, _, immediate = text.partition(",")
            last = f", {immediate}" if immediate else ""
            body += (
                f"  movupd xmm0, [rdi]\n  movupd xmm1, [rdi+16]\n  {name} xmm0, xmm1{last}\n  movupd [rsi+{at}], xmm0\n"
            )
            at += 16
        wrong, cross = self.run(tmp_path, body, at // 8)
        for n, text in enumerate(INSTRUCTIONS):
            assert wrong[2 * n : 2 * n + 2].max() < 1e-7 and cross[2 * n : 2 * n + 2].max() < 1e-4, text

    def test_avx(self, library, tmp_path):
        library("-O3 -mavx2 -mfma")
        body, at = "", 0
        for text in AVX:
            text, _, form = text.partition(":")
            name, _, immediate = text.partition(",")
            last = f", {immediate}" if immediate else ""
            r = "xmm" if form == "x" else "ymm"
            sources = f"{r}1" if form == "1" else f"{r}1, {r}2"
            body += (
                "  vmovupd ymm0, [rdi+64]\n  vmovupd ymm1, [rdi]\n  vmovupd ymm2, [rdi+32]\n"
                f"  {name} {r}0, {sources}{last}\n"
                f"  vmovupd [rsi+{at}], ymm0\n"
            )
            at += 32
        body += f"  vbroadcastsd ymm3, [rdi+8]\n  vmovupd [rsi+{at}], ymm3\n  vextractf128 [rsi+{at + 32}], ymm1, 1\n"
        body += f"  vinsertf128 ymm4, ymm1, xmm2, 1\n  vmovupd [rsi+{at + 48}], ymm4\n  vzeroupper\n"
        wrong, cross = self.run(tmp_path, body, at // 8 + 10)
        for n, text in enumerate([*AVX, "vbroadcastsd", "vextractf128"]):
            assert wrong[4 * n : 4 * n + 4].max() < 1e-7 and cross[4 * n : 4 * n + 4].max() < 1e-4, text


@here
class TestRefusals:
    """What would lose a derivative raises, and says where."""

    CASES = {
        "inverse_root": "bits of a value that carries derivatives",
        "in_single": "rounded to single precision",
        "extended": "no rule for the instruction fld",
        "halves": "written a part of the bytes",
        "unknown": "significand.* of libm.* has no rule.*constant=.*rules=",
        "impure": "another what it returns in each call",
        "upper_half": "reads a part of a value that carries derivatives",
    }

    @pytest.mark.parametrize("name", CASES)
    def test_refused(self, library, name):
        f = jp.compiled(getattr(library("-O2 -g"), name), "double(const double[1] in)")
        with pytest.raises(jp.NativeCodeError, match=self.CASES[name]) as caught:
            jp.jvp(f, torch.tensor([1.3], dtype=D), torch.ones(1, dtype=D))
        assert "register_native" in str(caught.value) or name == "impure"
        if name == "inverse_root" and shutil.which("addr2line"):
            assert "corpus.c:" in str(caught.value) and "inverse_root+0x" in caught.value.where
        assert f(torch.tensor([1.3])).dtype == torch.float32  # without derivatives it is just called

    def test_a_branch_on_a_special_value(self, library):
        f = jp.compiled(library().special, "double(const double[1] in)")
        with pytest.raises(jp.NativeCodeError, match="slope of special differs from differences by"):
            jp.jvp(f, torch.tensor([2.0], dtype=D), torch.ones(1, dtype=D))

    @pytest.mark.parametrize("name", ["made_bits", "remembered"])
    def test_the_check_is_of_all_inputs(self, library, name):
        x = torch.tensor([0.3, 0.7], dtype=D)
        for at in (
            lambda f: jp.jacobian(f, x),
            lambda f: jp.hessian(f, x),
            lambda f: jp.jvp(f, x, x),
            lambda f: jp.hvp(f, x, x),
            lambda f: jp.laplacian(f, x),
            lambda f: f(x.clone().requires_grad_()).backward(),
        ):
            f = jp.compiled(getattr(library(), name), "double(const double[2] in)")
            with pytest.raises(jp.NativeCodeError, match=f"slope of {name} differs from differences"):
                at(f)

    def test_the_check_is_of_all_directions(self, library):
        """The part that is wrong lies in the third chunk of directions."""
        f = jp.compiled(library().made_bits, "double(const double[2] in)")
        pick = torch.zeros(40, 2, dtype=D)
        pick[0, 0] = pick[39, 1] = 1.0
        with pytest.raises(jp.NativeCodeError, match="slope of made_bits differs"):
            jp.jacobian(lambda x: f(x @ pick), torch.linspace(0.2, 0.7, 40, dtype=D))

    def test_the_check_is_of_all_outputs(self, library):
        f = jp.compiled(library().small_output, "void(const double[2] in, double[2] out)")
        with pytest.raises(jp.NativeCodeError, match=r"slope of small_output differs.*the parameter 'number 2'\[1\]"):
            jp.jacobian(f, torch.tensor([0.3, 0.7], dtype=D))

    def test_kinks_and_zeros_are_not_taken_for_errors(self, library):
        f = jp.compiled(library().loop, ARRAY)
        jp.jacobian(lambda x: f(x, 4), torch.tensor([0.0, 0.5, 0.0, -0.5], dtype=D))
        assert "slope" in str(f.report())

    def test_torch_transforms(self, library):
        f = jp.compiled(library().loop, ARRAY)
        g, x = lambda x: f(x, 3), random(3)
        for at in (
            lambda: torch.func.jvp(g, (x,), (x,)),
            lambda: torch.func.grad(g)(x),
            lambda: torch.func.hessian(g)(x),
            lambda: torch.vmap(g)(x[None]),
        ):
            with pytest.raises(jp.DerivativeError, match=r"no torch code.*jetplane\.jvp"):
                at()
        with torch.autograd.forward_ad.dual_level(), pytest.raises(jp.DerivativeError, match="no torch code"):
            g(torch.autograd.forward_ad.make_dual(x, x))

    def test_no_graph_of_derivatives(self, library):
        """A slope that is trained by backward would lack this function's part of it."""
        f, x = jp.compiled(library().loop, ARRAY), random(3).requires_grad_()
        slope = jp.jvp(lambda x: f(x, 3) + x.square().sum(), x, torch.ones(3, dtype=D))[1]
        with pytest.raises(jp.DerivativeError, match=r"backward\(\) through loop"):
            slope.backward()

    def test_a_function_of_python(self):
        f = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)(lambda x: x * x)
        with pytest.raises(jp.ArgumentError, match="a function of Python behind ctypes.CFUNCTYPE"):
            jp.compiled(f, "double(double)")

    @pytest.mark.parametrize(
        ("x", "n", "message"),
        [
            (None, 3, "consist of numbers, got None"),
            ("abc", 3, "consist of numbers, got 'abc'"),
            (torch.ones(3, dtype=torch.complex128), 3, "takes real numbers"),
            (torch.ones(3, device="meta"), 3, "got one without data"),
            (torch.ones(3).to_sparse(), 3, "of layout torch.sparse_coo"),
            (torch.ones(3), 1 << 40, "is of type int, which has no 1099511627776"),
            (torch.ones(3), 3.0, "must be an integer, got 3.0"),
        ],
    )
    def test_arguments(self, library, x, n, message):
        with pytest.raises(jp.ArgumentError, match=message):
            jp.compiled(library().loop, ARRAY)(x, n)

    def test_integers_are_not_cut(self, library):
        f = jp.compiled(
            library().axpy_, args=[jp.In(1, "int", name="n"), jp.In(1), jp.In("n"), jp.Out("n", inout=True)]
        )
        with pytest.raises(jp.ArgumentError, match="consist of integers, got a tensor of torch.float64"):
            f(torch.tensor([2.0], dtype=D), random(1), random(2), random(2))

    def test_memory_runs_out(self, library):
        f = jp.compiled(library().large, "double(const double[1] in, long n)", check="never")
        with pytest.raises(jp.NativeCodeError, match="asks for 4294967296 bytes"):
            jp.jvp(lambda x: f(x, 1 << 32), torch.ones(1, dtype=D), torch.ones(1, dtype=D))

    def test_avx_512(self, library):
        if "avx512f" not in Path("/proc/cpuinfo").read_text():
            pytest.skip("this processor has no AVX-512")
        f = jp.compiled(library("-O3 -march=x86-64-v4 -mprefer-vector-width=512 -ffast-math").rosenbrock, ARRAY)
        with pytest.raises(jp.NativeCodeError, match="AVX-512, which is not carried.*x86-64-v3"):
            jp.jvp(lambda x: f(x, 40), random(40), random(40))

    def test_a_rule_of_the_users(self, library):
        x = torch.tensor([1.3], dtype=D)
        f = jp.compiled(
            library().with_rule, "double(const double[1] in)", rules={"mine": (lambda x: 2.0, lambda x: 0.0)}
        )
        same_derivatives(f, lambda x: 2 * x[0] ** 2, x)
        f = jp.compiled(library().with_rule, "double(const double[1] in)", constant=["mine"], check="never")
        assert float(jp.jvp(f, x, torch.ones(1, dtype=D))[1]) == pytest.approx(2.6)

    def test_derivatives_of_derivatives(self, library):
        f = jp.compiled(library().loop, ARRAY)
        x = random(3)
        with pytest.raises(jp.DerivativeError, match="nested derivatives"):
            jp.hessian(lambda x: jp.hessian(lambda y: f(y, 3), x).sum(), x)


@here
class TestInTorch:
    @pytest.fixture
    def f(self, library):
        return jp.compiled(library("-O1").rosenbrock, ARRAY)

    def test_transforms(self, f):
        x = random(10)
        g = lambda x: f(x, 10)  # noqa: E731
        hessian = jp.hessian(rosenbrock, x)
        close(jp.hessian(g, x), hessian, 1e-12)  # 10 directions: in blocks
        close(jp.hessian_diagonal(g, x), hessian.diagonal(), 1e-12)
        close(jp.laplacian(g, x), hessian.trace(), 1e-12)
        close(jp.hvp(g, x, x), hessian @ x, 1e-12)
        close(jp.jacobian(g, x), jp.jacobian(rosenbrock, x), 1e-12)
        mapped = lambda h: lambda x: h(x.sin() * 2)  # noqa: E731  # second coefficients come in
        close(jp.laplacian(mapped(g), x), jp.laplacian(mapped(rosenbrock), x), 1e-12)
        close(jp.hessian(mapped(g), x), jp.hessian(mapped(rosenbrock), x), 1e-12)

    def test_training(self, f):
        torch.manual_seed(0)
        net, z = torch.nn.Linear(3, 4, dtype=D), torch.randn(3, dtype=D)
        params = list(net.parameters())
        directions = jp.Directions(k=3, seed=1)
        for curvature in ("hessian", "ggn"):
            planes = [
                jp.evaluate(lambda g=g: torch.nn.functional.mse_loss(g(net(z)), z.sum()), params, directions, curvature)
                for g in (lambda y: f(y, 4), rosenbrock)
            ]
            close(planes[0].slope, planes[1].slope, 1e-12)
            close(planes[0].curvature, planes[1].curvature, 1e-10)
        start, losses = [p.detach().clone() for p in params], []
        for g in (lambda y: f(y, 4), rosenbrock):
            torch.manual_seed(1)
            for p, q in zip(params, start, strict=True):
                p.data.copy_(q)
            optimizer = jp.optim.FoMoHKD(params, lr=0.1, k=4, descent="saddle-free")
            losses.append(torch.stack([optimizer.step(lambda g=g: g(net(z))) for _ in range(4)]))
        close(losses[0], losses[1], 1e-9)

    def test_reverse_mode(self, f):
        x = random(20).requires_grad_()
        (2 * f(x, 20)).backward()
        reference = random(20).requires_grad_()
        (2 * rosenbrock(reference)).backward()
        close(x.grad, reference.grad, 1e-12)

    def test_single_precision(self, f):
        x = random(4).float()
        value, slope = jp.jvp(lambda x: f(x, 4), x, torch.ones(4))
        assert value.dtype == slope.dtype == torch.float32
        assert float(slope) == pytest.approx(float(jp.jvp(rosenbrock, x.double(), torch.ones(4, dtype=D))[1]), rel=1e-6)

    def test_code_is_kept(self, library, tmp_path, monkeypatch):
        monkeypatch.setenv("JETPLANE_CACHE", str(tmp_path))
        x, found = random(7), []
        for _ in range(2):
            f = jp.compiled(library("-O1").control, ARRAY)
            found.append(jp.hessian(lambda x, f=f: f(x, 7), x))
            report = next(iter(f.report().layouts.values()))
        assert report.cached and report.instructions > 50 and torch.equal(*found)
        for file in tmp_path.glob("*.o"):  # a file that was damaged is not run
            file.write_bytes(file.read_bytes()[:-8])
        f = jp.compiled(library("-O1").control, ARRAY)
        assert torch.equal(jp.hessian(lambda x: f(x, 7), x), found[0])
        assert not next(iter(f.report().layouts.values())).cached

    def test_checks(self, f):
        assert "agrees with differences" in str(f.report()) or not f.report().checks
        jp.hessian(lambda x: f(x, 4), random(4))
        assert set(f.report().checks.values()) == {"slope agrees with differences, curvature agrees with differences"}


# functions of scipy.special, as mpmath has them
SCIPY = {
    "psi": lambda m, x: m.digamma(x),
    "rgamma": lambda m, x: m.rgamma(x),
    "erfcx": lambda m, x: m.exp(x * x) * m.erfc(x),
    "dawsn": lambda m, x: m.sqrt(m.pi) / 2 * m.exp(-x * x) * m.erfi(x),
    "i0": lambda m, x: m.besseli(0, x),
    "i0e": lambda m, x: m.exp(-x) * m.besseli(0, x),
    "i1": lambda m, x: m.besseli(1, x),
    "i1e": lambda m, x: m.exp(-x) * m.besseli(1, x),
    "k0": lambda m, x: m.besselk(0, x),
    "k0e": lambda m, x: m.exp(x) * m.besselk(0, x),
    "k1": lambda m, x: m.besselk(1, x),
    "k1e": lambda m, x: m.exp(x) * m.besselk(1, x),
    "j0": lambda m, x: m.besselj(0, x),
    "j1": lambda m, x: m.besselj(1, x),
    "y0": lambda m, x: m.bessely(0, x),
    "y1": lambda m, x: m.bessely(1, x),
    "ellipk": lambda m, x: m.ellipk(x),
    "ellipkm1": lambda m, x: m.ellipk(1 - x),
    "ellipe": lambda m, x: m.ellipe(x),
    "expm1": lambda m, x: m.expm1(x),
    "log1p": lambda m, x: m.log1p(x),
    "erf": lambda m, x: m.erf(x),
    "erfc": lambda m, x: m.erfc(x),
    "ndtr": lambda m, x: m.ncdf(x),
    "cbrt": lambda m, x: m.cbrt(x),
    "exp2": lambda m, x: m.mpf(2) ** x,
    "exp10": lambda m, x: m.mpf(10) ** x,
    "sindg": lambda m, x: m.sin(m.radians(x)),
    "cosdg": lambda m, x: m.cos(m.radians(x)),
    "tandg": lambda m, x: m.tan(m.radians(x)),
    "entr": lambda m, x: -x * m.log(x),
    "spence": lambda m, x: m.polylog(2, 1 - x),
    "zetac": lambda m, x: m.zeta(x) - 1,
    "gamma": lambda m, x: m.gamma(x),
    "gammaln": lambda m, x: m.loggamma(x),
    "beta": lambda m, a, x: m.beta(a, x),
    "betaln": lambda m, a, x: m.log(m.beta(a, x)),
    "gdtr": lambda m, a, b, x: m.gammainc(b, 0, a * x, regularized=True),
    "pdtr": lambda m, k, x: m.gammainc(m.floor(k) + 1, x, m.inf, regularized=True),
    "chdtr": lambda m, v, x: m.gammainc(v / 2, 0, x / 2, regularized=True),
}


@here
class TestSources:
    """Functions that others have compiled."""

    def test_an_address_and_ctypes_types(self, library):
        m = ctypes.CDLL("libm.so.6")
        m.erf.argtypes, m.erf.restype = [ctypes.c_double], ctypes.c_double
        x = torch.tensor(0.4, dtype=D)
        same_derivatives(jp.compiled(m.erf), torch.erf, x)
        address = ctypes.cast(m.erf, ctypes.c_void_p).value
        same_derivatives(jp.compiled(address, "double(double)"), torch.erf, x)

    def test_scipys_functions(self, library):
        pytest.importorskip("scipy")
        from scipy import LowLevelCallable
        from scipy.special import cython_special

        capsule = cython_special.__pyx_capi__["gammaln"]
        x = torch.tensor(1.7, dtype=D)
        # Derivatives of its own approximation, which is not torch's.
        same_derivatives(jp.compiled(capsule), torch.lgamma, x, second=1e-9)
        f = jp.compiled(LowLevelCallable.from_cython(cython_special, "i0e"))
        same_derivatives(f, torch.special.i0e, x, first=1e-11, second=1e-9)

    @pytest.mark.parametrize("name", [n if n == "j0" else pytest.param(n, marks=pytest.mark.long) for n in SCIPY])
    def test_functions_of_scipy(self, library, name):
        """Of scipy.special's own binaries, beside mpmath."""
        mpmath = pytest.importorskip("mpmath")
        api = pytest.importorskip("scipy.special.cython_special").__pyx_capi__
        key = next(k for k in api if k in (name, f"__pyx_fuse_1{name}"))
        *others, at = [0.37, 1.83, 0.59][: {"beta": 2, "betaln": 2, "gdtr": 3, "pdtr": 2, "chdtr": 2}.get(name, 1)]
        f, x = jp.compiled(api[key]), torch.tensor(at, dtype=D)
        found = jp.jet(lambda x: f(*x.new_tensor(others).unbind(), x), x, torch.ones(1, dtype=D))
        assert set(f.report().checks.values()) == {"slope agrees with differences, curvature agrees with differences"}
        m = mpmath.mp
        m.dps = 40
        for k, (ours, tolerance) in enumerate(zip(found, (1e-14, 1e-12, 1e-10), strict=True)):
            expected = float(m.diff(lambda x: m.re(SCIPY[name](m, *map(m.mpf, others), x)), m.mpf(at), k))
            assert abs(float(ours) - expected) <= tolerance * abs(expected), k

    GSL = (
        "bessel_J0 bessel_K0 dilog dawson expint_E1 lambert_W0 zeta psi clausen bessel_I1 erf gamma lngamma Si Ci "
        "log_1plusx sinc legendre_P3 erf_Q"
    ).split()

    @pytest.mark.parametrize("name", [GSL[0], *(pytest.param(n, marks=pytest.mark.long) for n in GSL[1:])])
    def test_gsl(self, library, name):
        """The GNU Scientific Library as a system has it, beside mpmath."""
        mpmath = pytest.importorskip("mpmath")
        try:
            ctypes.CDLL("libgslcblas.so.0", mode=ctypes.RTLD_GLOBAL)
            gsl = ctypes.CDLL(ctypes.util.find_library("gsl") or "libgsl.so.27")
        except OSError:
            pytest.skip("needs GSL: apt-get install libgsl-dev")
        m = mpmath.mp
        m.dps = 30
        reference = {
            "bessel_J0": lambda x: m.besselj(0, x), "bessel_K0": lambda x: m.besselk(0, x), "bessel_I1":
            lambda x: m.besseli(1, x), "dilog": lambda x: m.polylog(2, x), "erf": m.erf, "expint_E1": m.e1,
            "dawson": lambda x: m.sqrt(m.pi) / 2 * m.exp(-x * x) * m.erfi(x), "gamma": m.gamma, "lngamma": m.loggamma,
            "psi": m.digamma, "lambert_W0": lambda x: m.lambertw(x).real, "zeta": m.zeta, "Si": m.si, "Ci": m.ci,
            "clausen": lambda x: m.clsin(2, x), "log_1plusx": lambda x: m.log(1 + x), "legendre_P3":
            lambda x: m.legendre(3, x), "sinc": lambda x: m.sin(m.pi * x) / (m.pi * x),
            "erf_Q": lambda x: m.erfc(x / m.sqrt(2)) / 2,
        }[name]  # fmt: skip
        x = torch.tensor({"dilog": 0.43, "legendre_P3": 0.43, "zeta": 2.3}.get(name, 1.3), dtype=D)
        found = jp.jet(jp.compiled(getattr(gsl, f"gsl_sf_{name}"), "double(double x)"), x, torch.ones(1, dtype=D))
        for k, (ours, tolerance) in enumerate(zip(found, (1e-13, 1e-12, 1e-10), strict=True)):
            expected = float(m.diff(reference, m.mpf(float(x)), k))
            assert abs(float(ours) - expected) <= tolerance * abs(expected), k

    @pytest.mark.long
    def test_numba(self, library):
        code = """
import torch, math, numba, jetplane as jp
@numba.njit
def helper(a, b): return math.exp(-a * b) * math.sin(a + b) + math.sqrt(1 + a * a)
@numba.cfunc("float64(CPointer(float64), int32)")
def f(x, n):
    x = numba.carray(x, n)
    s = 0.0
    for i in range(1, n): s += helper(x[i], x[i - 1])
    return s * x[0]
g = jp.compiled(f, "double(const double[n] in, int n)")
x = torch.linspace(0.2, 0.8, 6, dtype=torch.float64)
r = lambda x: ((-x[1:] * x[:-1]).exp() * (x[1:] + x[:-1]).sin() + (1 + x[1:] ** 2).sqrt()).sum() * x[0]
assert (jp.hessian(lambda x: g(x, 6), x) - jp.hessian(r, x)).abs().max() < 1e-11
"""
        pytest.importorskip("numba")
        import os

        environment = {**os.environ, "NUMBA_CPU_NAME": "x86-64-v3"}
        subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=environment)

    def test_cffi(self, library):
        cffi = pytest.importorskip("cffi")
        ffi = cffi.FFI()
        ffi.cdef("double erf(double);")
        f = jp.compiled(ffi.dlopen("libm.so.6").erf, "double(double)")
        same_derivatives(f, torch.erf, torch.tensor(0.4, dtype=D))

    def test_what_is_no_function(self):
        with pytest.raises(jp.ArgumentError, match="expected a compiled function.*got str"):
            jp.compiled("sin", "double(double)")


LAPACK = """
import torch, jetplane as jp
from scipy.linalg import cython_lapack
i, one = lambda name: jp.In(1, "int", name), torch.tensor([1])
torch.manual_seed(0)
M, b, n = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64), torch.tensor([4])
E = torch.eye(4, dtype=torch.float64)
api = cython_lapack.__pyx_capi__
"""
SOLVERS = {
    "dgesv": """
f = jp.compiled(api["dgesv"], args=[i("n"), i("m"), jp.Out((4, 4), inout=True), i("a"), jp.Out(4, "int"),
                jp.Out(4, inout=True), i("b"), jp.Out(1, "int")])
both = lambda z: (M + 0.1 * z + z * z * E, b * (1 + z))
ours = lambda z: f(n, one, both(z)[0].mT.contiguous(), n, both(z)[1], n)[2]
""",
    "dposv": """
f = jp.compiled(api["dposv"], args=[jp.In(1, "char"), i("n"), i("m"), jp.Out((4, 4), inout=True), i("a"),
                jp.Out(4, inout=True), i("b"), jp.Out(1, "int")])
lower = torch.tensor([ord("L")], dtype=torch.int8)
both = lambda z: (M @ M.mT + E + 0.1 * z * E + z * z * (M + M.mT), b * (1 + z))
ours = lambda z: f(lower, n, one, both(z)[0].mT.contiguous(), n, both(z)[1], n)[1]
""",
}
COMPARED = """
theirs = lambda z: torch.linalg.solve(*both(z))
z, v = torch.tensor(0.3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
for a, b in zip(jp.jet(ours, z, v), jp.jet(theirs, z, v)):
    assert (a - b).abs().max() < 1e-10 * max(1, b.abs().max())
"""


@here
@pytest.mark.long
@pytest.mark.parametrize("name", SOLVERS)
def test_lapack(name):
    """Solvers of SciPy's OpenBLAS: 7000 instructions, memory that it holds, functions found by running."""
    import os

    pytest.importorskip("scipy")
    pytest.importorskip("pypcode")
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Haswell"}
    code = LAPACK + SOLVERS[name] + COMPARED
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=900, env=environment)


@pytest.fixture
def example():
    """An example's names, where its compiler is."""
    pytest.importorskip("pypcode", reason="needs pypcode: pip install 'jetplane[native]'")
    pytest.importorskip("llvmlite", reason="needs llvmlite: pip install 'jetplane[native]'")
    if shutil.which("gcc") is None or sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("needs gcc on Linux and x86-64")
    import runpy

    return lambda name: runpy.run_path(str(Path(__file__).parent.parent / "examples" / name))


def test_calibration(example):
    found, losses = example("calibrate_c.py")["calibrate"]()
    assert (found - torch.tensor([0.25, 2.0, 0.9], dtype=D)).abs().max() < 1e-3
    assert losses[-1] < 1.2e-6 < 1e-3 * losses[0]  # the noise of the measurements


def test_optimal_control(example):
    """The hang glider in C, beside the optimum of COPS 3, and the same formulas in torch."""
    pytest.importorskip("scipy", reason="jetplane.control needs SciPy")
    from jetplane.control import ipopt

    if ipopt.library_path() is None:
        pytest.skip("no libipopt: pip install casadi")
    solution = example("glider_c.py")["problem"]().solve(mesh="refine", accuracy=1e-6)
    assert solution.success and abs(solution.objective + 1248.03) < 0.01


class TestRegistered:
    def test_jets_in_cpp(self, library):
        from jetplane.native import include

        flags = f"-O1 -std=c++14 -I{include()}"
        c = library(flags, "jets.cpp")
        for second in (c.f_second, None):
            f = jp.register_native(c.f, ARRAY, jvp=c.f_jvp, second=second)

            def energy(x):
                a, b = x[:-1], x[1:]
                s = (-a * a).exp() * b.sin() / (1 + a * a) + (1.5 + b).log() * (2 + a).sqrt() - a.tanh() * b.cos()
                s = s + (1 + a * a) ** b + a**3 + torch.atan2(a, b + 3) + a.abs() * b.erf()
                return (1 + s.sum()) ** 2

            same_derivatives(lambda x, f=f: f(x, 5), energy, random(5), second=1e-10 if second else 1e-7)

    def test_arguments(self):
        with pytest.raises(jp.ArgumentError, match="expected jvp=, a compiled function"):
            jp.register_native(ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)(abs), "double(double)", jvp=None)


class TestSignatures:
    def test_c(self):
        s = signature("double f(const double[n][3] x in, double[n*3] out, int n, unsigned long m)", None, None)
        assert s.returns == "double"
        assert [(p.kind, p.shape, p.reads, p.writes) for p in s.parameters] == [
            ("double", ("n", 3), True, False),
            ("double", ("n*3",), False, True),
            ("int", None, True, False),
            ("size_t", None, True, False),
        ]
        assert s.parameters[1].sizes({"n": 4}) == (12,)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("double(double *x)", "pointer without a size"),
            ("double", "cannot read the signature"),
            ("float(float x)", "single precision is not carried"),
            ("double(widget x)", "is not known"),
            ("double(double x out)", "write it as an array"),
        ],
    )
    def test_errors(self, text, message):
        with pytest.raises(jp.ArgumentError, match=message):
            signature(text, None, None)

    def test_sizes_that_are_not_given(self):
        (p,) = signature("void(double[k] in)", None, None).parameters
        with pytest.raises(jp.ArgumentError, match="size 'k' is not made of integers"):
            p.sizes({"n": 3})

    @here
    def test_shapes_of_arguments(self, library):
        f = jp.compiled(library().loop, ARRAY)
        with pytest.raises(jp.ShapeError, match=r"has the shape \[4\] by signature, got a tensor of shape \[3\]"):
            f(random(3), 4)
        with pytest.raises(jp.ArgumentError, match="takes 2 arguments"):
            f(random(3))
        with pytest.raises(jp.ArgumentError, match="must be an integer, got 3.5"):
            f(random(3), 3.5)


class TestLayouts:
    @pytest.mark.parametrize("k", range(1, 18))
    def test_all_pairs_once(self, k):
        terms = [(n, i, j, 1.0) for n, (i, j) in enumerate((i, j) for i in range(k) for j in range(i, k))]
        layout = Layout.of(k, terms)
        found = set()
        for n, (g, p) in enumerate(layout.places):
            group = layout.groups[g]
            assert tuple(sorted((group.left[p], group.right[p]))) == terms[n][1:3]
            found.add((g, p))
        assert len(found) == len(terms)
        assert len(set(layout.slots[0] + layout.slots[1])) == k + len(terms) <= layout.stride

    def test_padding(self):
        assert [padded(n) for n in (1, 2, 3, 5, 8, 9, 17)] == [1, 2, 4, 8, 8, 16, 24]


def test_elsewhere_an_error_says_so(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    with pytest.raises(jp.errors.DeviceError, match="Linux on x86-64; this is .* on arm64"):
        jp.compiled(1, "double(double)")


@here
def test_without_pypcode_the_error_says_how_to_get_it(monkeypatch):
    from jetplane.native import decode

    decode._context.cache_clear()
    monkeypatch.setitem(sys.modules, "pypcode", None)
    with pytest.raises(jp.MissingPackageError, match=r"pip install 'jetplane\[native\]'"):
        decode._context()
    decode._context.cache_clear()
