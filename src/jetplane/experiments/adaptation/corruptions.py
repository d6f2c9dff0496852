"""Fifteen corruptions of grey images of 28 x 28 pixels at severity 5, after ImageNet-C.

The formulas are those of Hendrycks and Dietterich, *Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations*, arXiv 1903.12261, section 3 and appendix B, with lengths scaled to 28 pixels and strengths to clothes in
grey on black, of which noise and blur of photographs' strength would leave nothing. Frost is drawn (branching
crystals), where ImageNet-C overlays photographs of it, and JPEG's coding is written out (ITU-T T.81, annex K), without
its lossless part. All take and give images (N, 28, 28) from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ArgumentError

Corruption = Callable[[Tensor, torch.Generator], Tensor]
CORRUPTIONS: dict[str, Corruption] = {}
SIDE = 28


def corruption(function: Corruption) -> Corruption:
    """Enter a corruption under its name."""
    CORRUPTIONS[function.__name__.replace("_", " ")] = function
    return function


def corrupted(images: Tensor, name: str, seed: int = 0) -> Tensor:
    """Images (N, 28, 28) from 0 to 1 with a corruption at severity 5, the same for a seed.

    Raises:
        ArgumentError: no corruption has this name, or images are of another shape.
    """
    if name not in CORRUPTIONS:
        raise ArgumentError(f"no corruption {name!r}; expected one of {', '.join(CORRUPTIONS)}")
    if images.shape[1:] != (SIDE, SIDE):
        raise ArgumentError(f"expected images of shape (N, {SIDE}, {SIDE}), got {tuple(images.shape)}")
    generator = torch.Generator().manual_seed(1_000_003 * seed + list(CORRUPTIONS).index(name))
    return CORRUPTIONS[name](images, generator).clamp(0, 1)


# --- noise ---------------------------------------------------------------------------------------------------------


@corruption
def gaussian_noise(x: Tensor, g: torch.Generator) -> Tensor:
    """``x + 0.3 n`` with normal n."""
    return x + 0.3 * torch.randn(x.shape, generator=g)


@corruption
def shot_noise(x: Tensor, g: torch.Generator) -> Tensor:
    """Photons are counted, six of a white pixel on average, over a dark current of one."""
    return torch.poisson(6 * x + 1, generator=g) / 6


@corruption
def impulse_noise(x: Tensor, g: torch.Generator) -> Tensor:
    """A quarter of the pixels are black or white."""
    u = torch.rand(x.shape, generator=g)
    return torch.where(u < 0.125, 0.0, torch.where(u < 0.25, 1.0, x))


# --- blur ----------------------------------------------------------------------------------------------------------


@corruption
def defocus_blur(x: Tensor, g: torch.Generator) -> Tensor:
    """Convolution with a disk of radius 3, smoothed at its rim."""
    y, z = _grid(4)
    return _convolved(x, _normalized((3.5 - (y**2 + z**2).sqrt()).clamp(0, 1)))


@corruption
def glass_blur(x: Tensor, g: torch.Generator) -> Tensor:
    """Pixels change places with neighbours up to two away, twice, between two Gaussian blurs."""
    x = _convolved(x, _gaussian(0.7)).clone()
    for _ in range(2):
        dy, dx = torch.randint(-2, 3, (2, *x.shape), generator=g)
        rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        place = (rows + dy).clamp(0, SIDE - 1) * SIDE + (columns + dx).clamp(0, SIDE - 1)
        x = x.flatten(1).gather(1, place.flatten(1)).view_as(x)
    return _convolved(x, _gaussian(0.7))


@corruption
def motion_blur(x: Tensor, g: torch.Generator) -> Tensor:
    """The mean along a line of eleven pixels, at an angle of each image's own."""
    angles = math.pi * torch.rand(len(x), generator=g)
    y, z = _grid(5)
    along = y * angles.sin()[:, None, None] + z * angles.cos()[:, None, None]
    across = z * angles.sin()[:, None, None] - y * angles.cos()[:, None, None]
    kernels = (1 - across.abs()).clamp_min(0) * (along.abs() <= 5)
    kernels = kernels / kernels.sum((1, 2), keepdim=True)
    padded = F.pad(x[None], (5, 5, 5, 5))
    return F.conv2d(padded, kernels[:, None], groups=len(x))[0]


@corruption
def zoom_blur(x: Tensor, g: torch.Generator) -> Tensor:
    """The mean of the image and of its enlargements by up to 60 %."""
    return torch.stack([x, *(_scaled(x, 1 + 0.06 * n) for n in range(1, 11))]).mean(0)


# --- weather -------------------------------------------------------------------------------------------------------


@corruption
def snow(x: Tensor, g: torch.Generator) -> Tensor:
    """Flakes that a wind has drawn out, over a picture that is made paler."""
    flakes = torch.randn(x.shape, generator=g) * 0.3 + 0.5
    flakes = torch.where(flakes < 0.85, 0.0, flakes)
    line = torch.zeros(7, 7)
    line[range(7), range(7)] = 1 / 4
    drifting = _convolved(flakes, line)
    paler = 0.75 * x + 0.25 * torch.maximum(x, 0.5 * x + 0.5)
    return paler + drifting + drifting.rot90(2, (1, 2))


@corruption
def frost(x: Tensor, g: torch.Generator) -> Tensor:
    """``0.65 x + 0.6`` times crystals: bright needles in random directions, thicker towards a corner."""
    n = len(x)
    y, z = _pixels()
    crystals = torch.zeros_like(x)
    for _ in range(14):
        place, angle = SIDE * torch.rand(2, n, 1, 1, generator=g), math.pi * torch.rand(n, 1, 1, generator=g)
        along = (y - place[0]) * angle.sin() + (z - place[1]) * angle.cos()
        across = (z - place[1]) * angle.sin() - (y - place[0]) * angle.cos()
        crystals = torch.maximum(crystals, torch.exp(-across.abs()) * torch.exp(-along.abs() / 7))
    corner = SIDE * torch.randint(0, 2, (2, n, 1, 1), generator=g)
    near = torch.exp(-((y - corner[0]) ** 2 + (z - corner[1]) ** 2) / (2 * 14**2))
    return 0.65 * x + 0.6 * (crystals + near * (0.5 + 0.5 * torch.rand(x.shape, generator=g))).clamp_max(1)


@corruption
def fog(x: Tensor, g: torch.Generator) -> Tensor:
    """A fractal landscape, whose heights are a power of their size, laid over the image."""
    frequencies = torch.fft.fftfreq(32)[:, None] ** 2 + torch.fft.rfftfreq(32)[None] ** 2
    frequencies[0, 0] = torch.inf
    noise = torch.fft.rfft2(torch.randn(len(x), 32, 32, generator=g)) * frequencies ** (-0.8)
    height = torch.fft.irfft2(noise)[:, :SIDE, :SIDE]
    low, high = (f(height, (1, 2), keepdim=True) for f in (torch.amin, torch.amax))
    return (x + 1.5 * (height - low) / (high - low)) / 2


@corruption
def brightness(x: Tensor, g: torch.Generator) -> Tensor:
    """Half is added."""
    return x + 0.5


# --- digital -------------------------------------------------------------------------------------------------------


@corruption
def contrast(x: Tensor, g: torch.Generator) -> Tensor:
    """``0.1 (x - mean) + mean``, with the mean of each image."""
    mean = x.mean((1, 2), keepdim=True)
    return 0.1 * (x - mean) + mean


@corruption
def elastic_transform(x: Tensor, g: torch.Generator) -> Tensor:
    """Pixels move by a smooth random field of about one and a half pixels."""
    field = _convolved(torch.rand(2 * len(x), SIDE, SIDE, generator=g) * 2 - 1, _gaussian(2.0)).view(2, -1, SIDE, SIDE)
    field = 1.5 * field / field.square().mean((0, 2, 3), keepdim=True).sqrt()
    y, z = _pixels()
    return _sampled(x, y + field[0], z + field[1])


@corruption
def pixelate(x: Tensor, g: torch.Generator) -> Tensor:
    """Means over a grid of 9 x 9."""
    return F.interpolate(F.adaptive_avg_pool2d(x[None], 9), SIDE)[0]


@corruption
def jpeg_compression(x: Tensor, g: torch.Generator) -> Tensor:
    """JPEG at quality 5: coefficients of the cosine transform of 8 x 8 pixels, rounded to multiples of a table."""
    padded = F.pad(x[None], (0, 4, 0, 4), mode="replicate")[0] * 255 - 128
    blocks = padded.unfold(1, 8, 8).unfold(2, 8, 8)
    k, n = torch.arange(8.0)[:, None], torch.arange(8.0)[None]
    cosines = torch.cos(math.pi * (2 * n + 1) * k / 16) / 2
    cosines[0] /= math.sqrt(2)
    table = (torch.tensor(LUMINANCE).float() * (5000 / 5) / 100).round().clamp(1, 255)
    coded = (cosines @ blocks @ cosines.T / table).round() * table
    decoded = cosines.T @ coded @ cosines
    image = decoded.transpose(2, 3).reshape(len(x), 32, 32)
    return (image[:, :SIDE, :SIDE] + 128) / 255


LUMINANCE = [
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
]


# --- parts ---------------------------------------------------------------------------------------------------------


def _grid(radius: int) -> tuple[Tensor, Tensor]:
    side = torch.arange(-radius, radius + 1.0)
    return side[:, None], side[None]


def _pixels() -> tuple[Tensor, Tensor]:
    side = torch.arange(float(SIDE))
    return side[:, None], side[None]


def _normalized(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum()


def _gaussian(sigma: float) -> Tensor:
    y, z = _grid(math.ceil(3 * sigma))
    return _normalized(torch.exp(-(y**2 + z**2) / (2 * sigma**2)))


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(x[:, None], kernel[None, None], padding=kernel.shape[0] // 2)[:, 0]


def _sampled(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Images at rows y and columns z, between pixels linearly."""
    where = torch.stack(torch.broadcast_tensors(z, y), -1) * (2 / (SIDE - 1)) - 1
    return F.grid_sample(x[:, None], where.expand(len(x), -1, -1, -1), align_corners=True)[:, 0]


def _scaled(x: Tensor, factor: float) -> Tensor:
    y, z = _pixels()
    middle = (SIDE - 1) / 2
    return _sampled(x, (y - middle) / factor + middle, (z - middle) / factor + middle)
