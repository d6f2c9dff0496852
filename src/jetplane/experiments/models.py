"""The models of the paper, and smaller ones for smaller images, as plain torch modules."""

from __future__ import annotations

from torch import nn

from ..errors import ArgumentError


def build(name: str, side: int, channels: int = 1) -> nn.Module:
    """A classifier of square images (N, channels, side, side) into ten classes.

    Args:
        name: "logreg", "mlp" (one hidden layer of 128 units), "cnn" or "cnn-bn" (BatchNorm and dropout). For 28 pixels
            and one channel "logreg" (7,850 parameters) and "cnn" (431,080) are the paper's; for 32 pixels and three
            channels "cnn-bn" is the model of the paper's scripts for CIFAR-10.
        side: height and width of the images in pixels.
        channels: number of channels.

    Raises:
        ArgumentError: the images are too small for the model.
    """
    if name == "logreg":
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, 10))
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, 128), nn.ReLU(), nn.Linear(128, 10))
    if name == "cnn-bn":
        return _cnn_bn(side, channels)
    if (side, channels) == (28, 1):
        return nn.Sequential(
            nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
        )  # fmt: skip
    pooled = (side // 2) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * pooled * pooled, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def _cnn_bn(side: int, channels: int) -> nn.Module:
    """Three blocks of two convolutions; BatchNorm uses the statistics of the batch in training and in testing."""
    if side < 8:
        raise ArgumentError(f"cnn-bn halves images three times: expected a side of at least 8 pixels, got {side}")
    layers: list[nn.Module] = []
    for width in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width, track_running_stats=False)]
            layers.append(nn.ReLU())
            channels = width
        layers.append(nn.MaxPool2d(2))
    flat = 128 * (side // 8) ** 2
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(flat, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, 10),
    )  # fmt: skip
