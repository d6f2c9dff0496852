"""A step of a sharded model, and drawing a part of a tangent: ``torchrun --nproc-per-node 2 -m benchmarks.sharded``."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import jetplane as jp
from jetplane._sharding import local

REPEATS = 8


def model() -> nn.Sequential:
    torch.manual_seed(0)
    up, down = (512, 2048), (2048, 512)
    return nn.Sequential(
        nn.Linear(*up), nn.GELU(), nn.Linear(*down), nn.GELU(), nn.Linear(*up), nn.GELU(), nn.Linear(*down)
    )


def tensor_parallel(net: nn.Sequential) -> nn.Module:
    styles = {str(n): ColwiseParallel() if n % 4 == 0 else RowwiseParallel() for n in (0, 2, 4, 6)}
    return parallelize_module(net, init_device_mesh("cpu", (dist.get_world_size(),)), styles)  # type: ignore[arg-type]


def fully_sharded(net: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def fastest(action: Callable[[], object]) -> float:
    """Milliseconds."""
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    lines = ["| model on each rank | parameters of a rank | FoMoH, 1 direction, ms a step |", "|---|--:|--:|"]
    x, y = torch.randn(64, 512), torch.randint(512, (64,))
    for name, way in (("whole", lambda net: net), ("tensor parallel", tensor_parallel), ("FSDP2", fully_sharded)):
        net = way(model())
        part = slice(None) if way is tensor_parallel else slice(rank, None, size)
        opt = jp.optim.FoMoH(net.parameters(), process_group=dist.group.WORLD)
        ms = fastest(lambda net=net, opt=opt, part=part: opt.step(lambda: F.cross_entropy(net(x[part]), y[part])))
        lines.append(f"| {name} | {sum(local(p).numel() for p in net.parameters()):,} | {ms:.0f} |")
    lines += ["", "| tangents of a 2048 × 2048 weight, K = 4, ms | whole | rows | columns |", "|---|--:|--:|--:|"]
    weight, mesh = torch.empty(2048, 2048), init_device_mesh("cpu", (size,))
    for law in ("gaussian", "rademacher"):
        directions = jp.Directions(4, law)
        forms = (weight, *(distribute_tensor(weight, mesh, [Shard(dim)]) for dim in (0, 1)))
        times = [fastest(lambda p=p, d=directions: d.combine(0, p, torch.ones(4))) for p in forms]
        lines.append(f"| {law} | " + " | ".join(f"{ms:.0f}" for ms in times) + " |")
    if rank == 0:
        print("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
