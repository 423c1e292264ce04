"""The phi functions of exponential integrators, on host floats."""

from __future__ import annotations

import math

_TAYLOR_TERMS = 20  # the last one is below 1e-18 of the sum for |z| < 1


def phi(order: int, z: float) -> float:
    """phi_j(z) = (e^z - sum_{k<j} z^k / k!) / z^j for j >= 1, and 1 / j! at 0.

    Hochbruck and Ostermann, Exponential integrators, 2010. Accurate to 1e-14 for orders 1 and 2 and |z| up to 50: the
    quotient cancels near 0, where the series takes over.
    """
    if abs(z) < 1:
        total = 0.0
        for k in reversed(range(_TAYLOR_TERMS)):
            total = total * z + 1 / math.factorial(k + order)
        return total
    return (math.expm1(z) - sum(z**k / math.factorial(k) for k in range(1, order))) / z**order
