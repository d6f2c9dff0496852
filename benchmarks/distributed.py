"""Seconds and bytes of a step on one and two ranks, beside DistributedDataParallel, and over a thin wire.

    python -m benchmarks.distributed                      # on this machine, and over a link of 10 Mbit/s
    python -m benchmarks.distributed --rates 10 100 --batch 256

Each setting is a fresh pair of processes of one thread each, in which all ways take turns on the same model and
batch: stochastic gradient descent with DistributedDataParallel (on one rank: plain backpropagation), and ours.
Bytes are what the network interface counts. The thin wire joins two network namespaces whose ends are
throttled by tc; that needs root and iproute2, and is left out with a word where it cannot be had.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import jetplane as jp
from jetplane.evaluation.specification import PlaneSpec
from jetplane.parallel.ranks import fingerprint

from .measuring import ROOT, environment, machine, wait_for_quiet
from .problems import Problem, make

FORWARD, FINGERPRINT = "forward pass", "fingerprint"
TURNS = 4
SIZES = (8, 1 << 10, 1 << 14, 1 << 17, 1 << 21)  # bytes of all-reduces, for the constants of the network


# --- one rank ------------------------------------------------------------------------------------


def ways(problem: Problem) -> dict[str, Callable[[], Any]]:
    """A step of each way, on this rank's shard. Rates are zero, so that they stay at one point; searches have none."""
    model = problem.model
    trained = DistributedDataParallel(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)

    def backprop() -> None:
        sgd.zero_grad()
        F.cross_entropy(trained(problem.x), problem.y).backward()
        sgd.step()

    def ours(opt: Any) -> Callable[[], Any]:
        return lambda: opt.step(problem.loss, weight=len(problem.y))

    params = list(model.parameters())
    shared: dict[str, Any] = {"lr": 0.0, "process_group": dist.group.WORLD}
    return {
        "DDP": backprop,
        "FGD, 1": ours(jp.optim.FGD(params, k=1, **shared)),
        "FoMoH, 1": ours(jp.optim.FoMoH(params, k=1, **shared)),
        "FoMoH-3D": ours(jp.optim.FoMoHKD(params, k=3, descent="saddle-free", **shared)),
        "GGN, 64": gauss_newton(problem, 64),
        "PlaneSearch, 64 drawn": search(problem, k=64),
        "PlaneSearch, by the model": search(problem),
    }


def gauss_newton(problem: Problem, k: int) -> Callable[[], Any]:
    """Evaluation together of a Gauss-Newton plane, whose tangents are drawn anew."""
    assert dist.group.WORLD is not None
    ranks, params = jp.distributed.Ranks(dist.group.WORLD), list(problem.params.values())

    def evaluate() -> None:
        directions = jp.Directions(k)
        directions.prepare(params)
        ranks.evaluate(
            problem.loss, lambda part: jp.evaluate(problem.loss, params, part, "ggn"), directions,
            PlaneSpec(k, "ggn"), params, {}, dict, float(len(problem.y)),
        )  # fmt: skip

    return evaluate


def search(problem: Problem, k: int | None = None) -> Callable[[], Any]:
    """A step of PlaneSearch on a model of its own; of drawn directions, or of estimates by noise on its layers."""
    model = copy.deepcopy(problem.model)
    sources = [jp.sources.Drawn(k), jp.sources.Averages(), jp.sources.PreviousStep()] if k else None
    opt = jp.optim.PlaneSearch(
        model.parameters(), None if k else model, subspace=sources, process_group=dist.group.WORLD
    )
    return lambda: opt.step(lambda: F.cross_entropy(model(problem.x), problem.y), weight=len(problem.y))


def sent(interface: str) -> int:
    """Bytes that a network interface of this namespace has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise ValueError(f"there is no interface {interface}")


@dataclass
class Timed:
    """What all ranks do together, measured in turns with others. Disturbances only add, so the fastest counts."""

    run: Callable[[], Any]
    interface: str
    seconds: float = math.inf  # of the fastest
    cpu: float = math.inf  # processor time of this rank in the one that took least
    bytes: float = 0.0  # that the interface sends for one, on average
    times: int = 0

    def turn(self, seconds: float) -> None:
        """Run for about so long."""
        start = time.perf_counter()
        self.run()
        count = torch.tensor([seconds / (time.perf_counter() - start)])
        dist.broadcast(count, 0)  # as often on all ranks
        before, count = sent(self.interface), int(count.clamp(1, 50))
        for _ in range(count):
            at, busy = time.perf_counter(), time.process_time()
            self.run()
            self.cpu = min(self.cpu, time.process_time() - busy)
            self.seconds = min(self.seconds, time.perf_counter() - at)
        self.bytes = (self.bytes * self.times + sent(self.interface) - before) / (self.times + count)
        self.times += count


def rank(spec: dict[str, Any]) -> None:
    """Measure, and print as one line what the first rank saw."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    size, here = dist.get_world_size(), dist.get_rank()
    problem = make("cnn", 1, spec["batch"])
    problem.x, problem.y = (t.tensor_split(size)[here].contiguous() for t in (problem.x, problem.y))
    params = list(problem.params.values())
    measured = {name: Timed(run, spec["interface"]) for name, run in ways(problem).items()}
    measured |= {FORWARD: Timed(torch.no_grad()(problem.loss), spec["interface"])}
    measured |= {FINGERPRINT: Timed(lambda: fingerprint(params), spec["interface"])}
    for count in SIZES if size > 1 else ():
        message = torch.zeros(count, dtype=torch.uint8)
        measured[f"{count:,} B"] = Timed(lambda message=message: dist.all_reduce(message), spec["interface"])
    for _ in range(TURNS):
        for way in measured.values():
            way.turn(spec["seconds"] / TURNS)
    links = size if spec["interface"] == "lo" else 1  # whose bytes the interface counts
    result = {
        name: {"seconds": way.seconds, "cpu": way.cpu, "bytes": way.bytes / links} for name, way in measured.items()
    }
    if here == 0:
        print(json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()


# --- the ranks of a setting ------------------------------------------------------------------------


def measure(ranks: int, spec: dict[str, Any], prefixes: list[list[str]], address: str) -> dict[str, Any]:
    """Start the ranks of one setting, each behind its prefix of a command, and read what the first found."""
    port = str(20_000 + os.getpid() % 10_000)
    processes = []
    for here in range(ranks):
        extra = {
            "RANK": str(here), "WORLD_SIZE": str(ranks), "MASTER_ADDR": address, "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": spec["interface"] if spec["interface"] == "lo" else f"{spec['interface']}{here}",
        }  # fmt: skip
        own = spec | {"interface": extra["GLOO_SOCKET_IFNAME"]}
        command = [*prefixes[here], sys.executable, "-m", "benchmarks.distributed", "--rank", json.dumps(own)]
        env = environment(1, **extra) | {"OMP_PROC_BIND": "false"}
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env))
    try:
        said = [process.communicate(timeout=1200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise SystemExit(f"ranks ended with {[process.returncode for process in processes]}")
    return json.loads(said[0].splitlines()[-1])


def ip(*words: str) -> None:
    """Run iproute2's `ip`, or `tc` if that is the first word."""
    command = list(words) if words[0] == "tc" else ["ip", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.contextmanager
def thin_wire(megabits: float) -> Iterator[tuple[list[list[str]], str]]:
    """Two network namespaces joined by a link of so many megabits a second in each direction.

    Raises:
        OSError: this machine does not allow it.
    """
    if shutil.which("ip") is None or shutil.which("tc") is None:
        raise OSError("it needs the commands ip and tc (iproute2)")
    names = [f"jetplane{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "jp0", "netns", names[0], "type", "veth", "peer", "name", "jp1", "netns", names[1])
        for n, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{n + 1}/24", "dev", f"jp{n}")
            for interface in ("lo", f"jp{n}"):
                ip("-n", name, "link", "set", interface, "up")
            limit = ("tbf", "rate", f"{megabits}mbit", "burst", "16kb", "latency", "500ms")
            ip("tc", "-n", name, "qdisc", "add", "dev", f"jp{n}", "root", *limit)
        yield [["ip", "netns", "exec", name] for name in names], "10.77.0.1"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def table(settings: dict[str, dict[str, Any]]) -> str:
    """The steps of all settings, and the constants of network and processor."""
    lines = [
        "| setting | way | ms a step | of them CPU | bytes a step and rank | DDP / this |",
        "|---|---|--:|--:|--:|--:|",
    ]
    rest = []
    for setting, found in settings.items():
        for way, w in found.items():
            line = f"| {setting} | {way} | {1e3 * w['seconds']:.2f} | {1e3 * w['cpu']:.2f} |"
            if way in (FORWARD, FINGERPRINT) or way.endswith(" B"):
                rest.append(line)
            else:
                lines.append(f"{line} {w['bytes']:,.0f} | {found['DDP']['seconds'] / w['seconds']:.2f} |")
    return "\n".join([*lines, "", "| setting | all-reduce of, or | ms | of them CPU |", "|---|---|--:|--:|", *rest])


def main() -> None:
    """Measure all settings and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="examples of a step, all ranks together")
    parser.add_argument("--rates", type=float, nargs="*", default=[10.0], help="Mbit/s between two namespaces")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each way of a setting")
    parser.add_argument("--quiet", type=float, default=60.0, help="seconds to wait at most until the machine rests")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank(json.loads(args.rank))
        return
    spec: dict[str, Any] = {"batch": args.batch, "seconds": args.seconds, "interface": "lo"}
    settings: dict[str, dict[str, Any]] = {}
    waited = 0.0
    for ranks in (1, 2):
        waited += wait_for_quiet(args.quiet)
        settings[f"{ranks} rank{'s' if ranks > 1 else ''}"] = measure(ranks, spec, [[], []], "127.0.0.1")
    for rate in args.rates:
        name = f"2 ranks, {rate:g} Mbit/s"
        try:
            with thin_wire(rate) as (prefixes, address):
                waited += wait_for_quiet(args.quiet)
                settings[name] = measure(2, spec | {"interface": "jp"}, prefixes, address)
        except OSError as error:
            print(f"left out: {name}: {error}")
    print(f"the CNN, batch {args.batch}; {machine(1)} a rank; load {os.getloadavg()[0]:.1f}, waited {waited:.0f} s\n")
    print(table(settings))


if __name__ == "__main__":
    main()
