"""Training on several processes that send each other a few numbers a step, not gradients.

    python examples/many_processes.py --ranks 2

Each rank holds a share of the batch and draws the same plane from the seed. They add up loss, slope and curvature, a
few hundred bytes, and each makes the same update to its own copy of the parameters, bit for bit.
DistributedDataParallel would send 4 bytes a parameter.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.spawn import spawn

import jetplane as jp

STEPS, EXAMPLES = 40, 512


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Points in 16 dimensions and the nearest of 4 random directions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, 16, generator=generator)
    return x, (x @ torch.randn(16, 4, generator=generator)).argmax(1)


def train(rank: int, ranks: int, port: int, out: str) -> None:
    """The program of one rank."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # models start alike on all ranks
    model = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 4))
    x, y = (tensor.tensor_split(ranks)[rank] for tensor in data())
    opt = jp.optim.FoMoHKD(model.parameters(), k=10, clip=1.0, descent="saddle-free", process_group=dist.group.WORLD)
    losses = [float(opt.step(lambda: F.cross_entropy(model(x), y), weight=len(x))) for _ in range(STEPS)]
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert opt.ranks is not None
    torch.save({"losses": losses, "weights": weights, "sent": opt.ranks.sent}, Path(out) / f"{rank}.pt")
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, and compare the ranks; returns the first and last loss and the bytes of a step."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args(arguments)
    with socket.socket() as free, tempfile.TemporaryDirectory() as out:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        spawn(train, (args.ranks, port, out), nprocs=args.ranks)
        results = [torch.load(Path(out) / f"{rank}.pt") for rank in range(args.ranks)]
    first = results[0]
    assert all(torch.equal(first["weights"], other["weights"]) for other in results), "ranks hold other weights"
    found = {"first": first["losses"][0], "last": first["losses"][-1], "bytes": first["sent"] / STEPS}
    size = 4 * len(first["weights"])
    print(f"{args.ranks} ranks, the same weights bit for bit: loss {found['first']:.3f} to {found['last']:.3f}")
    print(f"each sent {found['bytes']:,.0f} bytes a step; gradients would take {size:,}")
    return found


if __name__ == "__main__":
    main()
