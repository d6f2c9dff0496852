"""The curvature monitor as a callback of `transformers.Trainer`: a small GPT-2 with and without a warm-up of the rate.

    python examples/monitor_trainer.py [--steps 150] [--logdir runs/trainer] [--picture trainer.png]

It is trained by AdamW on characters of Python's own documentation, which its standard library includes. Readings use
one fixed batch, and go to TensorBoard where ``--logdir`` is given. Needs
``pip install 'jetplane[cli,frameworks]'``.
"""

import argparse
import math
import tempfile
from pydoc_data.topics import topics

import torch
import transformers

from jetplane.callbacks import TrainerMonitor

LENGTH, BATCH, HELD, RATE = 32, 32, 64, 3e-3


def batches(count):
    """Rows of characters, as numbers, and how many characters there are."""
    text = "".join(topics[name] for name in sorted(topics))[: count * LENGTH]
    names = sorted(set(text))
    ids = torch.tensor([names.index(c) for c in text]).view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in ids], len(names)


def run(steps, warmup, writer=None):
    """Losses by step, and the callback, of one training."""
    rows, characters = batches(HELD + 32 * BATCH)
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=characters, n_positions=LENGTH, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    held = {"input_ids": torch.stack([row["input_ids"] for row in rows[:HELD]])}
    monitor = TrainerMonitor({**held, "labels": held["input_ids"]}, every=5, writer=writer, prefix=f"warm-up {warmup}/")
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATE,
            warmup_steps=warmup, lr_scheduler_type="constant_with_warmup", logging_steps=5, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, eval_strategy="steps", eval_steps=50,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=args, train_dataset=rows[HELD:], eval_dataset=rows[:HELD], callbacks=[monitor]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    losses = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
    return losses, monitor.monitor


def draw(found, picture):
    """Rates and critical rates, and losses, with and without a warm-up."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for n, (warmup, (losses, monitor)) in enumerate(found.items()):
        name, steps = f"warm-up of {warmup} steps" if warmup else "no warm-up", [r.step for r in monitor.readings]
        there = [(r.step, r.critical_rate) for r in monitor.readings if 0 < r.critical_rate < math.inf]
        left.plot(*zip(*there, strict=True), ".", color=f"C{n}", label=f"critical rate, {name}")
        left.plot(steps, [r.rate for r in monitor.readings], "--", color=f"C{n}", label=f"rate, {name}")
        right.plot(*zip(*losses, strict=True), color=f"C{n}", label=name)
    left.set(yscale="log", xlabel="step", ylabel="rate")
    left.legend(frameon=False, fontsize=8)
    left.set_title("Adam's rate beside the critical one", loc="left", fontsize=10)
    right.set(xlabel="step", ylabel="loss")
    right.legend(frameon=False, fontsize=8)
    right.set_title("Training loss", loc="left", fontsize=10)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main(arguments=None):
    """Losses and monitors by steps of warm-up, of the runs that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--logdir")
    parser.add_argument("--picture")
    args = parser.parse_args(arguments)
    writer = None
    if args.logdir:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(args.logdir)
    found = {warmup: run(args.steps, warmup, writer) for warmup in (0, args.warmup)}
    if writer is not None:
        writer.close()
    if args.picture:
        draw(found, args.picture)
    return found


if __name__ == "__main__":
    for warmup, (losses, monitor) in main().items():
        first = monitor.readings[0]
        print(
            f"warm-up of {warmup} steps: first rate {first.rate:.1e}, critical {first.critical_rate:.1e}; "
            f"loss {losses[0][1]:.2f} at first, {losses[-1][1]:.2f} at last"
        )
