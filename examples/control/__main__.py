"""Solve problems by name (all without names), check them by simulation and draw them into the current folder."""

import sys

from . import CASES

for name in sys.argv[1:] or CASES:
    case = CASES[name]()
    solution = case.problem.solve(**case.options, progress=sys.stderr.isatty())
    print(f"{name}: {solution}")
    if case.optimum is not None:
        print(f"  known optimum {case.optimum:.9g} ({case.source}), difference {solution.objective - case.optimum:.1e}")
    print(f"  {solution.simulate()}")
    print("  seconds: " + ", ".join(f"{key} {value:.3f}" for key, value in solution.seconds.items()))
    solution.plot(f"{name}.png")
