"""Predators and prey: rates and first values of the Lotka-Volterra equations, fitted to pelts of lynx and hare.

    python examples/fit_lotka_volterra.py

Data: thousands of pelts that the Hudson's Bay Company traded in 1900 to 1920 (C. G. Hewitt, The Conservation of the
Wild Life of Canada, 1921). Errors are assumed to be relative, so residuals are differences of logarithms.
"""

import torch

import jetplane as jp

HARE = [30, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22, 25.4, 27.1]
HARE += [40.3, 57, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]
LYNX = [4, 6.1, 9.8, 35.2, 59.4, 41.7, 19, 13, 8.3, 9.1, 7.4, 8, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]
PELTS = torch.tensor([HARE, LYNX], dtype=torch.float64).T
STEPS = 10  # a year


def simulated(p):
    """Logarithms of hare and lynx, year by year: u' = growth + effect * exp(the other's u), by Runge and Kutta."""
    u, h = p["first"], 1 / STEPS
    signs = torch.tensor([1.0, -1.0]).double()

    def derivative(u):
        return signs * (p["growth"] - p["effect"] * u.exp().flip(0))

    for _ in PELTS:
        yield u
        for _ in range(STEPS):
            a = derivative(u)
            b = derivative(u + h / 2 * a)
            c = derivative(u + h / 2 * b)
            u = u + h / 6 * (a + 2 * (b + c) + derivative(u + h * c))


def residuals(p):
    """Yields the residuals of a year as soon as it is simulated, so no year is kept."""
    for u, pelts in zip(simulated(p), PELTS, strict=True):
        yield u - pelts.log()


def fit():
    """The fit, from rough rates."""
    start = {"growth": [0.5, 0.8], "effect": [0.02, 0.02], "first": PELTS[0].log().tolist()}
    start = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in start.items()}
    return jp.optim.least_squares(residuals, start)


if __name__ == "__main__":
    found = fit()
    print(f"{found.message}; {found.nfev} evaluations")
    for name, names in {"growth": ("of hare", "of lynx, negative"), "effect": ("of lynx", "of hare")}.items():
        for i, of in enumerate(names):
            print(f"{name} {of}: {found.params[name][i]:.4f} ± {found.standard_errors[name][i]:.4f} a year")
