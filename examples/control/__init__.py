"""Optimal control: problems with known optima. ``python -m examples.control goddard`` solves and draws one."""

from .case import Case
from .classics import (
    brachistochrone,
    bryson_denham,
    cart_pole,
    goddard,
    goddard_smooth,
    hyper_sensitive,
    moon_lander,
)
from .flight import low_thrust, powered_descent, quadrotor, shuttle
from .learned import known, learned

CASES = {
    f.__name__: f
    for f in (
        brachistochrone,
        bryson_denham,
        goddard,
        goddard_smooth,
        hyper_sensitive,
        moon_lander,
        cart_pole,
        shuttle,
        quadrotor,
        powered_descent,
        low_thrust,
        learned,
        known,
    )
}

__all__ = ["CASES", "Case"]
