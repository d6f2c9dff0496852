"""An 8-bit model adapts to shifted data without labels and without a backward pass.

    python examples/adapt_at_test_time.py

Handwritten digits, whose pixels are darkened and made noisy; about ten seconds.
"""

import warnings

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import jetplane as jp


def main(arguments=()):
    """Accuracies (%) on damaged images without and with adaptation."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    train, test = slice(0, 1200), slice(1200, None)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()
    )
    model.append(nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(int(next(iter(arguments), 200))):
        optimizer.zero_grad()
        F.cross_entropy(model(x[train]), y[train]).backward()
        optimizer.step()
    with warnings.catch_warnings():  # torch means to leave this to torchao
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)

    adapter = jp.Adapter(small, x[train][:256])
    damaged = 0.4 * x[test] + 0.3 + 0.15 * torch.randn_like(x[test])
    before = small(damaged).argmax(1)
    after = torch.cat([adapter(batch).argmax(1) for batch in damaged.split(100)])
    found = {name: 100 * float((p == y[test]).float().mean()) for name, p in (("before", before), ("after", after))}
    print(f"accuracy {found['before']:.0f} % as it is, {found['after']:.0f} % adapted")
    return found


if __name__ == "__main__":
    main()
