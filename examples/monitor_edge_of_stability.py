"""Watch gradient descent reach the edge of stability: curvature along its steps rises to 2 over the rate.

    python examples/monitor_edge_of_stability.py [--steps 400] [--rate 0.3] [--picture edge.png] [--logdir runs/edge]

A plain loop on 300 of the handwritten digits that scikit-learn includes, all of them in each step. With ``--logdir``
the readings go to TensorBoard too (``tensorboard --logdir runs/edge``).
"""

import argparse

import torch
from sklearn.datasets import load_digits

import jetplane as jp


def run(steps, rate, writer=None):
    """The monitor after a training."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:300] / 16 - 0.3).float()
    y = torch.nn.functional.one_hot(torch.tensor(labels[:300]), 10).float()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)

    def loss():
        return 5 * torch.nn.functional.mse_loss(model(x), y)

    with jp.CurvatureMonitor(optimizer, loss, every=10, writer=writer) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    return monitor


def draw(monitor, picture):
    """Rate and critical rate, and the loss, over steps."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    monitor.plot(left)
    left.set_title("The critical rate comes down to the rate", loc="left", fontsize=10)
    right.plot([r.step for r in monitor.readings], [r.value for r in monitor.readings], color="C2")
    right.set(xlabel="step", ylabel="loss", yscale="log")
    right.set_title("The loss", loc="left", fontsize=10)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main(arguments=None):
    """The monitor of the run that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--picture")
    parser.add_argument("--logdir")
    args = parser.parse_args(arguments)
    writer = None
    if args.logdir:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(args.logdir)
    monitor = run(args.steps, args.rate, writer)
    if writer is not None:
        writer.close()
    for reading in monitor.readings[:: max(1, len(monitor.readings) // 10)]:
        print(f"step {reading.step:4d}: loss {reading.value:.4f}, critical rate {reading.critical_rate:.3f}")
    if args.picture:
        draw(monitor, args.picture)
    return monitor


if __name__ == "__main__":
    main()
