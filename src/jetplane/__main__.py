"""``python -m jetplane``: the command line, or an error that names the package it lacks."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("torch", "jetplane"):
            raise
        sys.exit(f"the command line needs {error.name}: pip install 'jetplane[cli]'")
    run()


if __name__ == "__main__":
    main()
