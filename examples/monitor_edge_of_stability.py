"""Watch gradient descent come to the edge of stability: curvature along its steps rises to 2 over the rate.

    python examples/monitor_edge_of_stability.py [steps, 300 by default] [picture.png]

Data: 300 of the handwritten digits that scikit-learn includes. Rate and loss are those of full-batch gradient descent.
"""

import sys

import torch
from sklearn.datasets import load_digits

import jetplane as jp

RATE = 0.3


def run(steps):
    """The monitor after a training."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:300] / 16 - 0.3).float()
    y = torch.nn.functional.one_hot(torch.tensor(labels[:300]), 10).float()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def loss():
        return 5 * torch.nn.functional.mse_loss(model(x), y)

    with jp.CurvatureMonitor(optimizer, loss, every=10) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    return monitor


if __name__ == "__main__":
    monitor = run(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
    for reading in monitor.readings[:: max(1, len(monitor.readings) // 10)]:
        print(f"step {reading.step:4d}: loss {reading.value:.4f}, critical rate {reading.critical_rate:.3f}")
    if len(sys.argv) > 2:
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots()
        monitor.plot(axes)
        figure.savefig(sys.argv[2])
