"""Functions of the system that are no mathematics: memory, threads, text, and what has no derivatives."""

from __future__ import annotations

from collections.abc import Callable

from .mathematics import STEPS, UNARY
from .translator import FILLS, PIECES, Lane, Translator


def _allocate(t: Translator) -> None:
    t.put("rax", Lane(t.a.op(f"call i64 @jp_allocate(i64 {t.bits(t.lane('rdi'))})")))
    t.leave_if_left()


def _calloc(t: Translator) -> None:
    n = t.a.op(f"mul i64 {t.bits(t.lane('rdi'))}, {t.bits(t.lane('rsi'))}")
    t.put("rax", Lane(t.a.op(f"call i64 @jp_zeroed(i64 {n})")))
    t.leave_if_left()


def _realloc(t: Translator) -> None:
    a, n = t.bits(t.lane("rdi")), t.bits(t.lane("rsi"))
    t.put("rax", Lane(t.a.op(f"call i64 @jp_grown(i64 {a}, i64 {n}, i64 {t.site('moves memory')})")))
    t.leave_if_left()


def _free(t: Translator) -> None:
    t.a.do(f"call void @jp_release(i64 {t.bits(t.lane('rdi'))})")


def _memcpy(t: Translator) -> None:
    d, s, n = (t.bits(t.lane(r)) for r in ("rdi", "rsi", "rdx"))
    t.a.do(f"call void @jp_copy(i64 {d}, i64 {s}, i64 {n}, i64 {t.site(PIECES)})")
    t.put("rax", Lane(d))


def _memset(t: Translator) -> None:
    d, n = t.bits(t.lane("rdi")), t.bits(t.lane("rdx"))
    value = t.a.op(f"trunc i64 {t.bits(t.lane('rsi'))} to i8")
    t.a.do(f"call void @jp_set(i64 {d}, i8 {value}, i64 {n}, i64 {t.site(FILLS)})")
    t.put("rax", Lane(d))


def _nothing(t: Translator) -> None:
    t.put("rax", Lane("0"))


def _one(t: Translator) -> None:
    t.put("rax", Lane("1"))


def _parallel(t: Translator) -> None:
    """``GOMP_parallel(f, data, …)``: one thread calls f."""
    f = t.bits(t.lane("rdi"))
    t.put("rdi", t.lane("rsi"))
    t.by_address(f, t.a.op(f"sub i64 {t.bits(t.lane('rsp'))}, 8"))


def constant(name: str, at: int | None = None) -> Callable[[Translator], None]:
    """A function that is called as it is, and whose result is constant."""

    def emit(t: Translator) -> None:
        given = [f"i64 {t.bits(t.lane(r))}" for r in ("rdi", "rsi", "rdx", "rcx", "r8", "r9")]
        given += [f"double {t.double(t.lane(f'x{n}.0'))}" for n in range(8)]
        r = t.a.op(f"call {{ i64, double }} (i64, ...) {t.module.external(name, None, at)}({', '.join(given)})")
        t.put("rax", Lane(t.a.op(f"extractvalue {{ i64, double }} {r}, 0")))
        t.put("x0.0", Lane(None, None, t.a.op(f"extractvalue {{ i64, double }} {r}, 1")))

    return emit


def _text(name: str) -> Callable[[Translator], None]:
    """A function that writes text to where its first argument points."""

    def emit(t: Translator) -> None:
        to, n = t.bits(t.lane("rdi")), t.bits(t.lane("rdx"))
        constant(name)(t)
        length = t.a.op(f"call i64 {t.module.external('strlen')}(ptr {t.a.op(f'inttoptr i64 {to} to ptr')})")
        written = n if name == "strncpy" else t.a.op(f"add i64 {length}, 1")
        t.a.do(f"call void @jp_clear(i64 {to}, i64 {written}, i64 {t.site(FILLS)})")

    return emit


PLAIN: dict[str, Callable[[Translator], None]] = {
    **dict.fromkeys(("malloc", "_Znwm", "_Znam", "_ZnwmRKSt9nothrow_t", "_ZnamRKSt9nothrow_t"), _allocate),
    **dict.fromkeys(("free", "cfree", "_ZdlPv", "_ZdaPv", "_ZdlPvm", "_ZdaPvm"), _free),
    **dict.fromkeys(("memcpy", "memmove", "__memcpy_chk", "__memmove_chk"), _memcpy),
    **dict.fromkeys(("memset", "__memset_chk"), _memset),
    "calloc": _calloc,
    "realloc": _realloc,
    "GOMP_parallel": _parallel,
    **dict.fromkeys(("GOMP_barrier", "GOMP_critical_start", "GOMP_critical_end", "GOMP_atomic_start", "GOMP_atomic_end",
                     "omp_get_thread_num", "omp_in_parallel", "pthread_mutex_lock", "pthread_mutex_unlock",
                     "pthread_mutex_trylock"), _nothing),
    **dict.fromkeys(("omp_get_num_threads", "omp_get_max_threads"), _one),
    # Text, integers and what the system is asked have no derivatives. printf and what writes text are not among them:
    # the text of an active value may be read again.
    **{n: constant(n) for n in (
        "strlen strnlen strcmp strncmp strcasecmp strncasecmp strchr strrchr strstr memcmp memchr bcmp atoi atol atof "
        "strtol strtoul strtod abs labs __tls_get_addr __errno_location __ctype_b_loc __ctype_tolower_loc "
        "__ctype_toupper_loc tolower toupper sysconf getenv rand srand random srandom drand48 srand48 clock puts "
        "putchar fputs fputc fflush omp_get_wtime").split()},
    # Single precision: nothing active reaches it.
    **{n: constant(n) for n in [f"{name}f" for name in (*UNARY, *STEPS, "pow", "sqrt", "fabs", "atan2", "hypot", "fmod",
                                                        "fmax", "fmin", "copysign") if name not in ("exp10", "logb")]},
    **{n: _text(n) for n in ("strcpy", "strncpy", "strcat", "strncat")},
}  # fmt: skip
