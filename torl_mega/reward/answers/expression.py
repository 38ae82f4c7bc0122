"""Evaluates an expression tree at fixed points, exactly where it is rational.

    Node ─evaluate─► exact Fraction where possible, else 60-digit complex number

Two expressions are equal when they agree at every sample point (Schwartz-Zippel). The points fit the expression: real
numbers of all sizes and signs; whole numbers for what stands in the gold answer under a factorial, in a binomial or as
exponent of -1; and where `i` does not occur, only points at which everything stays real, as lengths and counts do (roots
and logarithms of what is negative say nothing). That is deterministic, needs no simplification and cannot hang: sizes and
exponents are bounded, and what goes over a bound or is not defined raises `Unreadable`.

Limits: powers of negative numbers are principal values, except where an odd root is real. Integer powers above 40,000
bits are not evaluated.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath
from mpmath import mp
from mpmath.libmp.libhyper import NoConvergence

from torl_mega.reward.answers.syntax import WHOLE, Node, Unreadable, symbols

_MAX_BITS = 40_000
_MAX_EXPONENT = 10**7
_DIGITS = 60
_CLOSE = mpmath.mpf(10) ** -45

Value = Fraction | mpmath.mpc

# samples of all sizes; positive ones, then of mixed sign
_SCALES = (1, 7, Fraction(1, 5), 40, 1, 9, Fraction(1, 3), 60, Fraction(1, 20), 2)
_WHOLE_SCALES = (5, 12, 9, 40, 3, 25)
NUM_POINTS = len(_SCALES)
_NUM_WHOLE_POINTS = 24  # several names must come in every order, as for d!/(d-k)!
_COUNTED_NAMES = frozenset("\\" + name for name in WHOLE) | frozenset("k l m n p N M K".split())


@dataclass(frozen=True, slots=True)
class Point:
    """Where an expression is evaluated: at sample number `index`, with whole numbers for the names in `whole`."""

    index: int
    whole: frozenset[str] = frozenset()
    real: bool = False  # whether a step that leaves the real numbers is not defined


def at_full_precision() -> contextlib.AbstractContextManager[Any]:
    """mpmath at the digits that values are computed with. Changing them costs as much as a small expression: a caller with
    many may enter this once around all."""
    return contextlib.nullcontext() if mp.dps == _DIGITS else mp.workdps(_DIGITS)


def evaluate(node: Node, point: int | Point) -> Value:
    """The value with each symbol at its number for `point` in range(NUM_POINTS). Raises Unreadable where undefined."""
    with at_full_precision():
        try:
            value = _eval(node, Point(point) if isinstance(point, int) else point)
        except (ZeroDivisionError, ValueError, OverflowError, TypeError, NoConvergence):
            raise Unreadable("not defined") from None
    if not isinstance(value, Fraction) and not (mpmath.isfinite(value.real) and mpmath.isfinite(value.imag)):
        raise Unreadable("not finite")
    return value


def same_everywhere(a: Node, b: Node) -> bool:
    """Equal at every point where both are defined, at three of them at least. Raises Unreadable when there are fewer."""
    if not (symbols(a) | symbols(b)):
        return close(evaluate(a, 0), evaluate(b, 0))
    if not (_holds(a, "const", "i") or _holds(b, "const", "i")):
        verdict = _agree(a, b, real=True)
        if verdict is not None:
            return verdict
    verdict = _agree(a, b, real=False)
    if verdict is None:
        raise Unreadable("defined at too few points")
    return verdict


def _agree(a: Node, b: Node, *, real: bool) -> bool | None:
    """Whether both have one value at all points where both are defined; None where these are too few.

    What stands for whole numbers is up to the gold answer `b`. Under `|x|` signs are what the answer is about: there a point
    at which only one is defined counts as a difference.
    """
    whole = whole_names(b)
    signs_matter = real and (_holds(a, "fn", "abs") or _holds(b, "fn", "abs"))
    points = [Point(index, whole, real) for index in range(_NUM_WHOLE_POINTS if whole else NUM_POINTS)]
    if any(_holds(node, "fn", name) for node in (a, b) for name in ("floor", "ceil")):  # they jump at whole numbers
        points += [Point(index, symbols(a) | symbols(b), real) for index in range(NUM_POINTS)]
    agreed = 0
    for point in points:
        x, y = _defined(a, point), _defined(b, point)
        if x is None or y is None:
            if signs_matter and (x is None) != (y is None):
                return False
            continue
        if not close(x, y):
            return False
        agreed += 1
    return True if agreed >= 3 else None


def _defined(node: Node, point: Point) -> Value | None:
    try:
        return evaluate(node, point)
    except Unreadable:
        return None


def close(a: Value, b: Value) -> bool:
    """Equal, to 45 digits where one of them is not exact."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    with at_full_precision():
        x, y = _float(a), _float(b)
        return abs(x - y) <= _CLOSE * max(abs(x), abs(y))


def whole_names(node: Node) -> frozenset[str]:
    """The names that stand for whole numbers: under `!`, in binomials, in a power of -1, and n, k, m under a floor."""
    if node.kind == "sym":
        return frozenset({node.name} & {"\\" + name for name in WHOLE})
    own: frozenset[str] = frozenset()
    if node.kind == "fn" and node.name in ("factorial", "binom"):
        own = symbols(node)
    elif node.kind == "fn" and node.name in ("floor", "ceil"):
        own = symbols(node) & _COUNTED_NAMES
    elif node.kind == "pow" and node.args[0].kind == "neg" and not symbols(node.args[0]):
        own = symbols(node.args[1])
    return own.union(*(whole_names(a) for a in node.args))


def _holds(node: Node, kind: str, name: str) -> bool:
    return (node.kind == kind and node.name == name) or any(_holds(a, kind, name) for a in node.args)


def _eval(node: Node, point: Point) -> Value:
    if node.kind == "num":
        assert node.value is not None
        return _bounded(node.value)
    if node.kind == "sym":
        return sample(node.name, point.index, node.name in point.whole)
    if node.kind == "const":
        return mpmath.mpc({"pi": mp.pi, "e": mp.e, "i": mpmath.mpc(0, 1)}[node.name])
    args = [_eval(a, point) for a in node.args]
    if node.kind in ("fn", "pow"):
        value = _call(node.name, args) if node.kind == "fn" else _pow(args[0], args[1])
        if point.real and isinstance(value, mpmath.mpc) and value.imag != 0:
            raise Unreadable("not a real number")
        return value
    if node.kind == "neg":
        return -args[0]
    if node.kind in ("add", "mixed"):
        return _sum(args)
    if node.kind == "mul":
        return _mul(args[0], args[1])
    assert node.kind == "div"
    if args[1] == 0:
        raise ZeroDivisionError
    return _mul(args[0], 1 / args[1])


def _sum(args: list[Value]) -> Value:
    if all(isinstance(a, Fraction) for a in args):
        return _bounded(sum(args, Fraction(0)))  # type: ignore[arg-type]
    floats = [_float(a) for a in args]
    total = sum(floats, mpmath.mpc(0))
    if abs(total) < max(abs(x) for x in floats) * mpmath.mpf(10) ** (10 - _DIGITS):
        return Fraction(0)  # cancelled to rounding noise
    return total


def _mul(a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _bounded(a * b)
    return _float(a) * _float(b)


def _pow(base: Value, exponent: Value) -> Value:
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * bits > _MAX_BITS and abs(base) not in (0, 1):
            raise Unreadable("power too large")
        if base == 0 and exponent <= 0:
            raise ZeroDivisionError
        return base ** int(exponent)
    x, y = _float(base), _float(exponent)
    if abs(y) > _MAX_EXPONENT:
        raise Unreadable("exponent too large")
    if x == 0:
        if y.real > 0:
            return Fraction(0)
        raise ZeroDivisionError
    if x.imag == 0 and x.real < 0 and isinstance(exponent, Fraction) and exponent.denominator % 2:
        return mpmath.power(-x, y) * (-1) ** (exponent.numerator % 2)  # the real value, as of odd roots
    return mpmath.power(x, y)


def _call(name: str, args: list[Value]) -> Value:
    x = args[0]
    if name == "root":
        return _root(x, args[1])
    if name == "factorial":
        return _factorial(x)
    if name == "binom":
        return _binomial(x, args[1])
    if name == "abs":
        return abs(x) if isinstance(x, Fraction) else mpmath.mpc(abs(_float(x)))
    if name in ("floor", "ceil"):
        value = _float(x)
        if value.imag != 0 or abs(value) > mpmath.mpf(10) ** 40:
            raise Unreadable("rounding of what is not a real number")
        return Fraction(int(mpmath.floor(value.real) if name == "floor" else mpmath.ceil(value.real)))
    z = _float(x)
    if name in ("log", "ln", "lg"):
        if z == 0:
            raise ZeroDivisionError
        base = args[1] if len(args) > 1 else Fraction(10) if name == "lg" else None
        return mpmath.log(z) if base is None else mpmath.log(z) / mpmath.log(_float(base))
    if abs(z) > 10**6:
        raise Unreadable("argument too large")
    result = mpmath.mpc(getattr(mpmath, name)(z))
    return Fraction(0) if abs(result) < mpmath.mpf(10) ** (10 - _DIGITS) and name != "exp" else result  # sin(pi)


def _root(x: Value, exponent: Value) -> Value:
    if not isinstance(x, Fraction) or not isinstance(exponent, Fraction):
        return _pow(x, exponent)
    if x < 0 and exponent.denominator % 2:
        return -_root(-x, exponent)  # the real odd root, as everybody writes it
    degree = exponent.denominator
    if x >= 0 and exponent.numerator == 1 and degree <= 64:
        top, bottom = (int(mpmath.nint(mpmath.root(n, degree))) for n in (x.numerator, x.denominator))
        if top**degree == x.numerator and bottom**degree == x.denominator:
            return Fraction(top, bottom)
    return _pow(x, exponent)


def _factorial(x: Value) -> Value:
    whole = isinstance(x, Fraction) and x.denominator == 1
    if (whole and not 0 <= x <= 3000) or abs(_float(x)) > 3000:
        raise Unreadable("factorial out of range")
    return Fraction(math.factorial(int(x))) if whole else mpmath.mpc(mpmath.factorial(_float(x)))


def _binomial(n: Value, k: Value) -> Value:
    if isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1:
        if not (0 <= k <= 2000 and abs(n) <= 20_000):
            raise Unreadable("binomial out of range")
        return Fraction(math.comb(int(n), int(k)) if n >= 0 else (-1) ** int(k) * math.comb(int(k - n) - 1, int(k)))
    return mpmath.mpc(mpmath.binomial(_float(n), _float(k)))


def _bounded(x: Fraction) -> Fraction:
    if x.numerator.bit_length() > _MAX_BITS or x.denominator.bit_length() > _MAX_BITS:
        raise Unreadable("number too large")
    return x


def _float(x: Value) -> Any:
    return mpmath.mpc(mpmath.mpf(x.numerator) / x.denominator) if isinstance(x, Fraction) else mpmath.mpc(x)


@lru_cache(maxsize=8192)
def sample(name: str, index: int, whole: bool = False) -> Fraction:
    """A fixed number for a symbol, of the point's size; positive at the first points, of either sign at the others."""
    digest = hashlib.blake2b(f"{name}:{index}".encode(), digest_size=8).digest()
    share = int.from_bytes(digest[:4], "big") / 2**32
    if whole:
        value = Fraction(1 + int(share * _WHOLE_SCALES[index % len(_WHOLE_SCALES)]))
        negative = name.startswith("\\whole") and index >= _NUM_WHOLE_POINTS // 2
    else:
        value = Fraction(501 + int(share * 2497), 997) * _SCALES[index % NUM_POINTS]
        negative = index % NUM_POINTS >= NUM_POINTS // 2
    return -value if negative and digest[7] % 2 else value
