"""The models of the paper, and smaller ones for smaller images. Plain torch: nothing knows of jets."""

from __future__ import annotations

from torch import nn


def build(name: str, side: int) -> nn.Module:
    """A model for square images of one channel and ten classes.

    Args:
        name: "logreg", "mlp" (one hidden layer of 128 units) or "cnn". For 28 pixels the CNN is the paper's,
            431,080 parameters, and "logreg" has its 7,850.
        side: pixels of an image's side.
    """
    if name == "logreg":
        return nn.Sequential(nn.Flatten(), nn.Linear(side * side, 10))
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(side * side, 128), nn.ReLU(), nn.Linear(128, 10))
    if side == 28:
        return nn.Sequential(
            nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
        )  # fmt: skip
    pooled = (side // 2) // 2
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * pooled * pooled, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
