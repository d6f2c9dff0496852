"""Train in an inference runtime: forward gradient descent by ONNX Runtime and NumPy, without torch.

    python examples/export_to_onnx.py                       # both of the following, with a temporary file
    python examples/export_to_onnx.py export plane.onnx     # with torch: loss and slopes of an MLP as a program
    python examples/export_to_onnx.py train plane.onnx      # without: 300 steps

Needs ``pip install 'jetplane[export]'``. The task is to tell whether a point lies inside a circle.
"""

import subprocess
import sys
import tempfile

import numpy as np

SHAPES = [(16, 2), (16,), (2, 16), (2,)]
K, BATCH, STEPS, RATE = 8, 128, 300, 0.3


def export(path):
    """Write the program: weights, tangents and a batch to the loss and its slope along each of K directions."""
    import torch

    import jetplane as jp

    def plane(weights, tangents, x, y):
        def loss():
            hidden = torch.tanh(torch.nn.functional.linear(x, weights[0], weights[1]))
            return torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, weights[2], weights[3]), y)

        found = jp.evaluate(loss, weights, tangents, curvature="none")
        return found.value, found.slope

    weights, tangents = [torch.randn(s) for s in SHAPES], [torch.randn(K, *s) for s in SHAPES]
    program = jp.export(plane, (weights, tangents, torch.randn(BATCH, 2), torch.randint(0, 2, (BATCH,))))
    torch.onnx.export(program, f=path, verbose=False)


def train(path):
    """Losses of a training by the program, and NumPy."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(path)
    names = [one.name for one in session.get_inputs()]
    generator = np.random.default_rng(0)
    weights = [(generator.standard_normal(s) / np.sqrt(s[-1])).astype(np.float32) for s in SHAPES]
    losses = []
    for _ in range(STEPS):
        x = generator.uniform(-1, 1, (BATCH, 2)).astype(np.float32)
        y = (np.square(x).sum(1) < 0.6).astype(np.int64)
        tangents = [generator.standard_normal((K, *s)).astype(np.float32) for s in SHAPES]
        fed = dict(zip(names, [*weights, *tangents, x, y], strict=True))
        value, slope = (np.asarray(one) for one in session.run(None, fed))
        # the forward gradient: the mean over K directions of slope times direction
        weights = [w - RATE * np.tensordot(slope, v, 1) / K for w, v in zip(weights, tangents, strict=True)]
        losses.append(float(value))
    return losses


if __name__ == "__main__":
    if len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as folder:
            for part in ("export", "train"):
                subprocess.run([sys.executable, __file__, part, f"{folder}/plane.onnx"], check=True)
    elif sys.argv[1] == "export":
        export(sys.argv[2])
    else:
        found = train(sys.argv[2])
        first, last = np.mean(found[:20]), np.mean(found[-20:])
        print(f"loss {first:.3f} at first, {last:.3f} at last; torch: {'torch' in sys.modules}")
