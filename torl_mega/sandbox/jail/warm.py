"""What each kind of zygote imports before its first fork, and the calls that fill sympy's caches.

A cache that the zygote has filled is filled in every child for nothing; unwarmed, the same snippet costs three times
the CPU. The calls are ordinary school and olympiad algebra, not any benchmark's problems.
"""

from __future__ import annotations

PRELOAD: dict[str, tuple[str, ...]] = {
    "math": ("numpy", "sympy"),
    "data": (
        "numpy", "sympy", "scipy", "scipy.optimize", "scipy.integrate", "scipy.special", "scipy.linalg", "scipy.stats",
        "pandas", "matplotlib", "matplotlib.pyplot",
    ),
}  # fmt: skip

_MATH = """
import encodings.utf_8_sig, ast, bisect, cmath, collections, copy, dataclasses, datetime, decimal, enum, fractions
import functools, inspect, itertools, math, operator, re, statistics, string, textwrap, typing, warnings, tempfile
import numpy as np, sympy as s
x, y, n = s.symbols('x y n')
s.solve(x**2 - 7*x + 10, x); s.solve(x**3 - 6*x**2 + 11*x - 6, x); s.solve([x + y - 3, x - y - 1], [x, y])
s.solve(s.Eq(2*x + 1, 7), x); s.solveset(x**2 - 4, x, domain=s.S.Reals); s.nsolve(x**2 - 2, 1); s.roots(x**2 - 3*x + 2)
s.simplify((x**2 - 1)/(x - 1)); s.simplify(s.sin(x)**2 + s.cos(x)**2); s.expand((x + y)**3); s.factor(x**2 - 9)
s.integrate(x**2*s.exp(x), x); s.integrate(s.sin(x), (x, 0, s.pi)); s.diff(s.sin(x)*x, x); s.limit(s.sin(x)/x, x, 0)
s.series(s.cos(x), x, 0, 4); s.summation(n, (n, 1, 10)); s.factorint(360); s.isprime(97); s.gcd(12, 18); s.divisors(28)
s.Matrix([[1, 2], [3, 4]]).inv(); s.Matrix([[1, 2], [3, 4]]).det(); s.Rational(1, 3) + s.sqrt(2); s.N(s.pi, 20)
s.latex(x**2/2); s.pretty(x**2); str(s.sqrt(8)); s.binomial(5, 2); s.factorial(5); (x**2 + 1).subs(x, 2).evalf()
s.lambdify(x, x**2)(3); s.Poly(x**2 + 1, x).all_coeffs(); s.trigsimp(s.sin(2*x)/s.cos(x)); s.apart(1/(x**2 - 1))
s.solve(x**2 - 2 > 0, x); abs(s.Integer(-3)); s.Abs(x).diff(x); s.log(8, 2); s.ceiling(s.Rational(7, 2))
np.linalg.inv(np.eye(3)); np.linalg.solve(np.eye(2), np.ones(2)); np.roots([1, -3, 2]); np.random.rand(2)
np.random.seed(1); str(np.arange(3))
exec('from sympy import *; from math import *; from fractions import Fraction; from itertools import *', {})
"""
_DATA = """
import io, pandas as pd, matplotlib.pyplot as plt
from scipy.optimize import minimize, fsolve
fsolve(lambda v: v**2 - 2, 1.0); minimize(lambda v: (v[0] - 1)**2, [0.0])
str(pd.DataFrame({'a': [1, 2]}).describe())
plt.plot([1, 2]); plt.savefig(io.BytesIO()); plt.close('all')
"""
WARM = {"math": _MATH, "data": _MATH + _DATA}
