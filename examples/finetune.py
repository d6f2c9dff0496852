"""Fine-tune a language model on labelled texts without a backward pass: the parts of `jetplane finetune` in a program.

The blocks that do not train run once for each text, and their outputs are cached on disk. PlaneSearch trains adapters
(LoRA) in the last block: no rate, no gradients, no graph.

    python examples/finetune.py --model FOLDER --data own.csv

The folder is one that transformers wrote, or a .gguf file; the table has columns ``label`` and ``text``. It needs
``pip install '.[cli,finetune]'``. Protocol: MeZO, arXiv 2305.17333.
"""

import argparse
from itertools import islice
from pathlib import Path

from jetplane.experiments.finetune.methods import method_of
from jetplane.experiments.finetune.options import Settings, Source
from jetplane.experiments.finetune.preparing import prepare
from jetplane.experiments.finetune.training import accuracy


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--cache", type=Path, default=Source.cache)
    args = parser.parse_args(arguments)

    prepared = prepare(Source(args.model, args.data, cache=args.cache))
    task = prepared.task
    model = task.prepared(Settings("lora"), seed=0)
    print(f"{len(prepared.classes)} classes, {task.sizes} texts, {sum(p.numel() for p in model.trained):,} parameters")

    step = method_of("plane-search").build(
        model, 1.0, 0, 4
    )  # a rate, of which it makes no use; a seed; texts at a time
    for n, batch in enumerate(islice(task.batches(16, seed=0), args.steps)):
        loss = step(batch)
        print(f"step {n:3d}  loss {loss:.3f}")
    reached = accuracy(model, task, task.places("test"))
    print(f"test accuracy {reached:.1%}")
    return reached


if __name__ == "__main__":
    main()
