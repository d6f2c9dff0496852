"""An epidemic: infection and recovery rates of the SIR model, fitted to influenza in a boarding school.

    python examples/fit_epidemic.py

Data: the number of boys in bed, of 763, for each day from 22 January to 4 February 1978 (British Medical Journal 1,
587, 1978). Bounds keep the rates positive.
"""

import torch

import jetplane as jp

BOYS = 763
IN_BED = torch.tensor([3.0, 8, 26, 76, 225, 298, 258, 233, 189, 128, 68, 29, 14, 4], dtype=torch.float64)
STEPS = 8  # a day


def simulated(p):
    """How many are infected, day by day: s' = -infection s i, i' = infection s i - recovery i, by Heun's method."""
    h, i = 1 / STEPS, p["first"] / BOYS
    s = 1 - i

    def derivatives(s, i):
        new = p["infection"] * s * i
        return -new, new - p["recovery"] * i

    for _ in IN_BED:
        yield BOYS * i
        for _ in range(STEPS):
            ds, di = derivatives(s, i)
            es, ei = derivatives(s + h * ds, i + h * di)
            s, i = s + h / 2 * (ds + es), i + h / 2 * (di + ei)


def residuals(p):
    """Day by day."""
    for infected, in_bed in zip(simulated(p), IN_BED, strict=True):
        yield infected - in_bed


def fit():
    """The fit, from rough rates."""
    start = {"infection": 2.0, "recovery": 0.5, "first": 1.0}
    start = {name: torch.tensor(number).double() for name, number in start.items()}
    return jp.optim.least_squares(residuals, start, bounds=(0, 10))


if __name__ == "__main__":
    found = fit()
    print(f"{found.message}; {found.nfev} evaluations")
    for name in ("infection", "recovery"):
        print(f"{name}: {found.params[name]:.3f} ± {found.standard_errors[name]:.3f} a day")
    print(f"reproduction number: {found.params['infection'] / found.params['recovery']:.2f}")
