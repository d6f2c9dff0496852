"""Two hosts: ranks in network namespaces of their own, and the link between them that breaks."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jetplane as jp
from benchmarks import distributed as benchmark

RANK = """
import sys, time
from datetime import timedelta
import torch, torch.distributed as dist
import jetplane as jp
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=3))
w, x = torch.nn.Parameter(torch.ones(40)), torch.eye(40)[dist.get_rank() :: 2]
opt = jp.optim.FoMoH([w], process_group=dist.group.WORLD)
while True:
    before = w.detach().clone()
    try:
        loss = opt.step(lambda: (x @ w).square().mean(), weight=len(x))
        print(loss.item(), flush=True)
        time.sleep(0.05)
    except jp.LostRankError as error:
        assert torch.equal(before, w)
        print("lost", error.ranks, error, flush=True)
        sys.exit(7)
"""


def test_the_link_between_two_hosts_breaks():
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces need root on Linux")
    processes = []
    try:
        with benchmark.thin_wire(10) as (prefixes, address):
            for rank in range(2):
                environment = os.environ | {
                    "PYTHONPATH": str(Path(jp.__file__).parent.parent), "RANK": str(rank), "WORLD_SIZE": "2",
                    "MASTER_ADDR": address, "MASTER_PORT": "29533", "GLOO_SOCKET_IFNAME": f"jp{rank}",
                }  # fmt: skip
                command = [*prefixes[rank], sys.executable, "-W", "ignore", "-c", RANK]
                processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
            losses = [processes[0].stdout.readline() for _ in range(5)]
            assert float(losses[-1]) < float(losses[0])
            benchmark.ip("-n", prefixes[0][-1], "link", "set", "jp0", "down")
            start = time.monotonic()
            said = [process.communicate(timeout=40)[0].splitlines()[-1] for process in processes]
            assert time.monotonic() - start < 3 + 15
            assert said[0].startswith("lost (1,) rank 1 is lost")  # the store is with rank 0
            assert said[1].startswith("lost () a rank is lost; which one cannot be known")
            assert [process.returncode for process in processes] == [7, 7]
    except OSError as error:
        pytest.skip(f"network namespaces cannot be had: {error}")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
