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
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import jetplane as jp
from jetplane.distributed import Layout, fingerprint

from .measuring import ROOT, environment, machine, wait_for_quiet
from .problems import Problem, make

SIZES = (8, 1 << 10, 1 << 14, 1 << 17, 1 << 21)  # bytes of all-reduces, for the constants of the network


# --- one rank ------------------------------------------------------------------------------------


def ways(problem: Problem) -> dict[str, Callable[[], Any]]:
    """A step of each way, on this rank's shard. Rates are zero, so that all of them stay at one point."""
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
    }


def gauss_newton(problem: Problem, k: int) -> Callable[[], Any]:
    """Evaluation together of a Gauss-Newton plane, whose tangents are drawn anew."""
    assert dist.group.WORLD is not None
    ranks, params = jp.distributed.Ranks(dist.group.WORLD), list(problem.params.values())

    def evaluate() -> None:
        tangents = jp.Directions(k).tangents(params)
        ranks.evaluate(
            problem.loss, lambda part: jp.evaluate(problem.loss, params, part, "ggn"), tangents,
            Layout(k, "ggn", "all"), params, {}, dict, float(len(problem.y)),
        )  # fmt: skip

    return evaluate


def sent(interface: str) -> int:
    """Bytes that a network interface of this namespace has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise ValueError(f"there is no interface {interface}")


def timed(run: Callable[[], Any], interface: str, seconds: float) -> dict[str, float]:
    """Median seconds of a run that all ranks make together, and bytes that the interface sends for one."""
    run()
    start, before, times = time.perf_counter(), sent(interface), []
    more = torch.ones(1)
    while more:
        at = time.perf_counter()
        run()
        times.append(time.perf_counter() - at)
        if len(times) == 3:  # enough to agree on how many to make
            more[:] = max(0.0, seconds - (time.perf_counter() - start)) / statistics.median(times)
            dist.broadcast(more, 0)
            more.clamp_(max=200)
        elif len(times) > 3:
            more -= 1
        more.round_()
    return {"seconds": statistics.median(times), "bytes": (sent(interface) - before) / len(times)}


def rank(spec: dict[str, Any]) -> None:
    """Measure, and print as one line what the first rank saw."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    size, here = dist.get_world_size(), dist.get_rank()
    problem = make("cnn", 1, spec["batch"])
    problem.x, problem.y = (t.tensor_split(size)[here].contiguous() for t in (problem.x, problem.y))
    links = 1 if spec["interface"] != "lo" else size  # whose bytes the interface counts
    result: dict[str, Any] = {
        "ways": {},
        "reductions": {},
        "parameters": sum(p.numel() for p in problem.params.values()),
    }
    with torch.inference_mode():
        result["forward"] = timed(problem.loss, spec["interface"], spec["seconds"])["seconds"]
        params = list(problem.params.values())
        result["fingerprint"] = timed(lambda: fingerprint(params), spec["interface"], spec["seconds"])["seconds"]
    for name, step in ways(problem).items():
        result["ways"][name] = timed(step, spec["interface"], spec["seconds"])
    for count in SIZES if size > 1 else ():
        message = torch.zeros(count, dtype=torch.uint8)
        reduced = timed(lambda message=message: dist.all_reduce(message), spec["interface"], spec["seconds"])
        result["reductions"][count] = reduced["seconds"]
    for found in result["ways"].values():
        found["bytes"] /= links
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
    """The steps of all settings as a table."""
    lines = ["| setting | way | ms a step | bytes a step and rank | DDP / this |", "|---|---|--:|--:|--:|"]
    for setting, found in settings.items():
        backprop = found["ways"]["DDP"]["seconds"]
        for way, w in found["ways"].items():
            ratio = backprop / w["seconds"]
            lines.append(f"| {setting} | {way} | {1e3 * w['seconds']:.1f} | {w['bytes']:,.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def constants(setting: str, found: dict[str, Any]) -> str:
    """What a message costs: seconds of an all-reduce, by size."""
    times = ", ".join(f"{int(size):,} B {1e3 * s:.2f} ms" for size, s in found["reductions"].items())
    return (
        f"{setting}: forward {1e3 * found['forward']:.1f} ms, fingerprint "
        f"{1e9 * found['fingerprint'] / found['parameters']:.2f} ns a parameter; all-reduce of {times or 'nothing'}"
    )


def main() -> None:
    """Measure all settings and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="examples of a step, all ranks together")
    parser.add_argument("--rates", type=float, nargs="*", default=[10.0], help="Mbit/s between two namespaces")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each way of a setting")
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
    count = settings["1 rank"]["parameters"]
    print(f"CNN of {count:,} parameters, batch {args.batch}; {machine(1)} a rank; waited {waited:.0f} s for quiet\n")
    print(table(settings) + "\n")
    for name, found in settings.items():
        print(constants(name, found))


if __name__ == "__main__":
    main()
