"""Adaptation at test time on corrupted Fashion-MNIST, by seven ways: `python -m benchmarks.adapt`.

Trains a small vision transformer and a CNN (two minutes of one core each), makes them 8-bit, and gives each method the
same batches of 64 test images under fifteen corruptions at severity 5, for three seeds of images, corruptions and
draws. Prints tables; `--json` keeps all figures, `--figure` draws, `--models` keeps the trained models.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from jetplane.experiments.adaptation import experiment

from .measuring import machine

NAMES = experiment.TITLES


def tables(found: dict[str, Any]) -> str:
    """Means, and accuracies under each corruption."""
    lines = [found["machine"], "", experiment.table(found["models"])]
    for name, runs in found["models"].items():
        float_accuracy, small_accuracy = found["clean"][name]
        clean = f"{name}: without corruption {float_accuracy:.1f} % in floating point, {small_accuracy:.1f} % in 8 bits"
        lines += ["", clean, "", experiment.by_corruption(runs)]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder of Fashion-MNIST's four files")
    add("--examples", type=int, default=192, help="test images under each corruption")
    add("--seeds", type=int, default=3)
    add("--models", type=Path, help="folder in which trained models are kept")
    add("--json", type=Path, help="all figures")
    add("--figure", type=Path)
    add("--from", type=Path, dest="earlier", help="figures of an earlier run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.earlier:
        found = json.loads(args.earlier.read_text())
    else:
        images = experiment.Images.fashion_mnist(args.data_dir)
        found = {
            "command": f"python -m benchmarks.adapt --examples {args.examples} --seeds {args.seeds}",
            "machine": machine(1), "clean": {}, "models": {name: [] for name in NAMES.values()},
        }  # fmt: skip
        trained = {name: experiment.trained(name, images, args.models) for name in NAMES}
        for key, name in NAMES.items():
            found["clean"][name] = experiment.clean_accuracy(trained[key], images)
        settings = {name: experiment.prepared(images, model) for name, model in trained.items()}
        for seed in range(args.seeds):
            for key, name in NAMES.items():
                found["models"][name].append(experiment.run(images, settings[key], seed, args.examples))
                print(f"seed {seed}, {name}", file=sys.stderr)
                if args.json:
                    args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.figure:
        experiment.draw(found["models"], args.figure)
    print(tables(found))


if __name__ == "__main__":
    main()
