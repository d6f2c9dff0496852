"""Processes that evaluate one plane together over torch.distributed, and send a few numbers for it.

Two axes, which combine:

- *data*: each rank evaluates its own shard of the batch on the same plane. The loss, slope and curvature of the
  whole batch are means of the shards', weighted by their numbers of examples.
- *direction*: ranks evaluate blocks of directions, or of pairs of them, on the same batch.

A step sends 1 + K + K(K+1)/2 numbers in float64, as many again where moments of the slope over examples are wanted,
and some more to check that ranks agree, in one all-reduce, whatever the model's size. Every rank draws the tangents
from the seed; neither they nor parameters are sent. What fails on one rank raises on all of them, and then no rank has
moved its parameters.

>>> import torch.distributed as dist
>>> import jetplane as jp
>>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun: init_process_group()
>>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
>>> opt = jp.optim.FoMoH([w], process_group=dist.group.WORLD)
>>> x = torch.ones(5, 2)  # this rank's shard of the batch
>>> closure = lambda: (x @ w).square().mean()
>>> loss = opt.step(closure, weight=len(x))  # the loss of the whole batch
>>> first = opt.ranks.sent  # bytes, with what is found out about the closure before the first step
>>> loss = opt.step(closure, weight=len(x))
>>> opt.ranks.sent - first  # loss, slope, curvature, and what ranks compare
192
>>> dist.destroy_process_group()
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import platform
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import errors
from .._sharding import held_alike, local
from ..directions import AbstractDirections, CachedDirections
from ..errors import ArgumentError, HandshakeError, JetplaneError, LostRankError, RanksDifferError, RemoteError
from ..evaluation.leaving import plain_run
from ..evaluation.plane import PlaneModel
from ..evaluation.repeats import ADVICE
from ..evaluation.side_effects import RandomState, without_side_effects
from ..evaluation.specification import PlaneSpec
from .message import PlaneMessage
from .work import plan

if TYPE_CHECKING:  # torch builds without torch.distributed lack it
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
DATA, DIRECTION = "data", "direction"  # names of a mesh's dimensions
POLL = 1.0  # seconds between checks whether another rank has found the group broken
BROKEN = "jetplane/broken"  # where in the store of the group ranks report that it broke
GRACE = 3.0  # seconds that ranks of a broken group give each other to report
SAME_LOSS = 1e-5  # relative; ranks of one batch differ by rounding at most


# --- what ranks compare ---------------------------------------------------------------------------

_ODD = (0x2545F4914F6CDD1D, -0x61C8864680B583EB)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(params: Sequence[Tensor]) -> int:
    """64 bits of the values of parameters: equal for equal bits, else different (up to 1 in 2^64).

    The order of the elements of one parameter does not count.

    >>> a, b = torch.zeros(3), torch.zeros(3)
    >>> fingerprint([a]) == fingerprint([b])
    True
    >>> b[1] = 1e-30
    >>> fingerprint([a]) == fingerprint([b])
    False
    """
    sums = []
    for p in params:
        bits = p.detach().reshape(-1).view(_INTEGERS[p.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=p.device)
        for piece in bits.split(1 << 16 if p.device.type == "cpu" else 1 << 24):  # of a cache's size
            mixed = piece.to(torch.int64) * _ODD[0]  # a copy: bits of double precision are those of the parameter
            total += mixed.bitwise_xor_(mixed >> 31).mul_(_ODD[1]).sum()
        sums.append(total)
    result = 0
    for value in torch.stack(sums).tolist() if sums else []:
        result = (result * 6364136223846793005 + value + 1442695040888963407) % 2**64
    return result


@functools.cache
def code() -> str:
    """A digest of this package's own source."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _moments(number: int) -> list[float]:
    """The 16-bit pieces of a 64-bit number and their squares, whose sums tell whether all ranks have one number."""
    pieces = [(number >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]
    return [float(p) for piece in pieces for p in (piece, piece * piece)]


def _one(sums: list[float], ranks: int) -> bool:
    return all(ranks * squares == total * total for total, squares in zip(sums[::2], sums[1::2], strict=True))


def _differences(what: list[dict[str, Any]], ranks: list[int]) -> tuple[tuple[int, ...], str]:
    """Which ranks have other facts than most ranks have, and a sentence that lists them."""
    odd: set[int] = set()
    said = []
    for name in dict.fromkeys(name for facts in what for name in facts):
        values = [facts.get(name) for facts in what]
        usual = Counter(map(repr, values)).most_common(1)[0][0]
        others = [(rank, value) for rank, value in zip(ranks, values, strict=True) if repr(value) != usual]
        if others:
            odd.update(rank for rank, _ in others)
            said.append(f"{name}: " + ", ".join(f"{v!r} on rank {r}" for r, v in others[:4]) + f", {usual} on others")
    more = f"; and {len(said) - 4} more differences" if len(said) > 4 else ""
    return tuple(sorted(odd)), "; ".join(said[:4]) + more


# --- the ranks themselves -------------------------------------------------------------------------


class Ranks:
    """The processes that take one step together.

    Args:
        where: a process group, each rank of which has one shard of each batch, or a `DeviceMesh` with the dimensions
            "data", "direction" or both. The ranks of one row along "direction" share one shard.

    Attributes:
        size: number of ranks.
        parts: ranks that share the directions of a plane.
        shard: which shard of the batch this rank has, of ``size / parts``.
        steps: evaluations done together so far.
        sent: bytes handed to torch.distributed by this rank for them and for what comes with them. A ring
            all-reduce puts 2 (size - 1) / size times as many on the wire.

    Raises:
        ArgumentError: torch.distributed is not initialised, this process is not in the group, or the mesh has
            dimensions of other names.
    """

    def __init__(self, where: ProcessGroup | DeviceMesh) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ArgumentError(
                "process_group needs torch.distributed: call torch.distributed.init_process_group(), and start "
                "the processes with torchrun"
            )
        self._group, self.shard, self.part, self.parts = _located(where)
        self._members = dist.get_process_group_ranks(self._group)
        self.rank = dist.get_rank()
        self.size = len(self._members)
        self.steps = 0
        self.sent = 0
        self._greeted = False
        self._pending: Any = None  # a collective that was given up

    @property
    def wire_bytes(self) -> float:
        """Bytes of one evaluation that a rank sends, if the all-reduce is a ring; 0 before the first."""
        return 2 * (self.size - 1) / self.size * self.sent / max(self.steps, 1)

    def evaluate(
        self,
        closure: Callable[[], Any],
        run: Callable[[AbstractDirections], PlaneModel],
        directions: AbstractDirections,
        spec: PlaneSpec,
        params: Sequence[Tensor],
        state: dict[str, Any],
        facts: Callable[[], dict[str, Any]],
        weight: float,
        held: Mapping[str, Tensor] | None = None,
    ) -> PlaneModel:
        """The plane of the whole batch, the same bits on every rank.

        Args:
            closure: the loss of this rank's shard.
            run: evaluates it on the plane that directions, or some of them, span.
            directions: all of them.
            spec: of the plane that all directions span.
            params: must have the same values on all ranks.
            state: settings that must be equal on all ranks in every step.
            facts: settings that must be equal on all ranks at the start.
            weight: the number of examples of this rank's shard; 0 for an empty one, which is not evaluated.
            held: further tensors that must have the same bits on all ranks, by name.

        Raises:
            HandshakeError: before the first evaluation, ranks differ.
            RanksDifferError: parameters or state differ, or ranks that share a batch have different ones.
            LostRankError: a rank does not answer.
            RemoteError: another rank raised an error; a `JetplaneError` is raised here with its own type.
            ArgumentError: no rank has an example.
        """
        self.greet(facts)
        every = {f"parameter {i}": p for i, p in enumerate(params)} | dict(held or {})
        message = PlaneMessage(spec)
        body, value, failure, double = torch.zeros(message.length, dtype=torch.float64), 0.0, None, False
        moments = torch.zeros(message.length if spec.examples else 0, dtype=torch.float64)
        mark = int.from_bytes(hashlib.sha256(repr(state).encode()).digest()[:8], "big")
        try:
            _check_weight(weight)
            mark ^= fingerprint(self._alike(every.values()))
            if weight > 0:
                value, double = self._fill(body, moments, closure, run, directions, message, params)
        except BaseException as error:  # also Ctrl-C: the others must hear of it
            failure, weight, value = error, 0.0, 0.0
            body.zero_()
            moments.zero_()
        used = directions.used if isinstance(directions, CachedDirections) else None
        difference = _contrast(self.part, self.parts) * weight * value
        head = [
            float(failure is not None),
            *_moments(mark),
            *_moments(hash(tuple(sorted(used))) if used is not None else 0),
            weight if self.part == 0 else 0.0,
            difference, abs(difference),
            float(double),
        ]  # fmt: skip
        power = torch.ones(len(moments), dtype=torch.float64)  # of the weight: of counts 0, of sums 1, of products 2
        power[:1], power[1 + spec.k :] = 0, 2
        parts = torch.tensor(head, dtype=torch.float64), body * weight, moments * weight**power
        self.steps += 1
        with self._unbroken():
            summed = self._sum(torch.cat(parts), params[0].device).cpu()
        total, body, moments = summed.split([len(part) for part in parts])
        total = total.tolist()
        failed, marks, uses, (weights, difference, size, doubles) = total[0], total[1:9], total[9:17], total[17:]
        if failed:
            self._raise_for_all(failure)
        if not _one(marks, self.size):
            own = {name: f"{fingerprint(self._alike([tensor])):016x}" for name, tensor in every.items()}
            ranks, what = _differences(self._gather(state | own), self._members)
            raise RanksDifferError(f"ranks are not in the same state before this step. {what}", ranks)
        if weights == 0:
            raise ArgumentError("no rank has an example: the weights are 0 on all of them")
        if abs(difference) > SAME_LOSS * size:
            found = zip(self._members, self._gather((value, weight)), strict=True)
            said = (f"{v:.9g} and {w:g} on rank {r}" for r, (v, w) in found)
            raise RanksDifferError(
                "ranks along 'direction' must evaluate the same batch with the same random numbers; loss and weight "
                f"are {', '.join(said)}",
                tuple(self._members),
            )
        alike = _one(uses, self.size)
        if used is not None and not alike:
            self._unite(used, params)
        if isinstance(directions, CachedDirections) and not (alike and self.parts == 1):
            directions.forget()  # ranks that have kept different ones would round their sums differently
        plane = message.plane(body / weights, torch.float64 if doubles else torch.float32, params[0].device)
        return replace(plane, pooled=message.moments(moments / weights**power, params[0].device))

    def greet(self, facts: Callable[[], dict[str, Any]]) -> None:
        """The `handshake`, once."""
        if not self._greeted:
            self.handshake(facts() | {"size of the mesh": (self.size // self.parts, self.parts)})
            self._greeted = True

    def handshake(self, facts: dict[str, Any]) -> None:
        """Compare what must be the same on all ranks: these facts, and the code that runs.

        The optimizers do so before their first step. Call it with facts of your own, such as the size of the data.

        Raises:
            HandshakeError: something differs; the message names it, and who has it.
            LostRankError: a rank does not answer.
        """
        facts = {"code of jetplane": code(), "torch": torch.__version__, "machine": platform.machine()} | facts
        ranks, what = _differences(self._gather(facts), self._members)
        if what:
            raise HandshakeError(f"ranks do not run the same training. {what}", ranks)

    def mean(
        self, work: Callable[[], Tensor], count: int, weight: float, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The weighted mean over ranks of as many numbers, the same bits on every rank.

        Args:
            work: gives this rank's numbers, (count,); not called where the weight is 0.
            count: how many.
            weight: as in `evaluate`.
            dtype: in which they are sent.
            device: where they come from, and go to.

        Raises:
            LostRankError, RemoteError: as `evaluate`. What one rank's work raises, all ranks do.
        """
        message, failure = torch.zeros(2 + count, dtype=dtype, device=device), None
        try:
            if weight > 0:
                torch.mul(work(), weight, out=message[2:])
                message[1] = weight
        except BaseException as error:
            failure = error
            message.zero_()[0] = 1
        with self._unbroken():
            message = self._sum(message, device)
        failed, weights = message[:2].tolist()
        if failed:
            self._raise_for_all(failure)
        return (message[2:] / weights).to(device)

    def place(self, weight: float, device: torch.device) -> tuple[float, float]:
        """Where this rank's shard lies: the weights of the shards before it, and of the whole batch.

        Raises:
            LostRankError: a rank does not answer.
        """
        weights = torch.zeros(self.size // self.parts, dtype=torch.float64)
        weights[self.shard] = weight if self.part == 0 else 0.0
        with self._unbroken():
            weights = self._sum(weights, device)
        return weights[: self.shard].sum().item(), weights.sum().item()

    def agreed(self, what: str, work: Callable[[], Sequence[Tensor]], device: torch.device) -> list[Tensor]:
        """Tensors that each rank computes for itself, checked to have the same bits on all of them.

        Raises:
            RanksDifferError: they do not.
            LostRankError, RemoteError: as `evaluate`. What one rank's work raises, all ranks do.
        """
        made, mark, failure = [], 0, None
        try:
            made = list(work())
            mark = fingerprint(made)
        except BaseException as error:
            failure = error
        head = torch.tensor([float(failure is not None), *_moments(mark)], dtype=torch.float64)
        with self._unbroken():
            failed, *marks = self._sum(head, device).tolist()
        if failed:
            self._raise_for_all(failure)
        if not _one(marks, self.size):
            ranks, said = _differences(self._gather({what: f"{mark:016x}"}), self._members)
            raise RanksDifferError(f"ranks must have the same bits. {said}", ranks)
        return made

    def first(self, work: Callable[[], T | None]) -> T:
        """The result of the lowest rank whose result is not None. Its cost grows with the number of ranks.

        Raises:
            LostRankError, RemoteError: as `evaluate`. What one rank's work raises, all ranks do.
        """
        found, failure = None, None
        try:
            found = work()
        except BaseException as error:
            failure = error
        every = self._gather((failure is not None, found))
        if any(failed for failed, _ in every):
            self._raise_for_all(failure)
        return next(value for _, value in every if value is not None)

    def _fill(
        self,
        body: Tensor,
        sums: Tensor,
        closure: Callable[[], Any],
        run: Callable[[AbstractDirections], PlaneModel],
        directions: AbstractDirections,
        message: PlaneMessage,
        params: Sequence[Tensor],
    ) -> tuple[float, bool]:
        """Evaluate this rank's work items, and write their numbers, unweighted, into ``body`` and ``sums``.

        Returns:
            The loss, and whether it is in double precision.
        """
        spec = message.spec
        slope = torch.zeros(spec.k, dtype=torch.float64)
        shape = spec.curvature_shape
        curvature = None if shape is None else torch.zeros(shape, dtype=torch.float64)
        items = plan(spec, self.parts)[self.part]
        written: list[Tensor] = []
        if len(items) > 1:  # all but the last are to be without side effects
            with plain_run(params), without_side_effects() as log:
                closure()
            written = [tensor for tensor, *_ in log.saved.values()]
        values, counts = [], []
        total, products = torch.zeros_like(slope), torch.zeros(spec.k, spec.k, dtype=torch.float64)
        for n, item in enumerate(items):
            with _undone(written) if n + 1 < len(items) else contextlib.nullcontext():
                plane = run(item.chosen(directions))
            message.check(plane, len(item.directions))
            index = torch.tensor(item.directions)
            slope[index] += plane.slope.cpu().double() * item.slope
            if curvature is not None and plane.curvature is not None:
                item.add(curvature, plane.curvature.cpu().double(), index)
            values.append(plane.value.item())
            moments = plane.moments
            counts.append(math.nan if moments is None else moments.count)  # NaN makes the sum over ranks unknown
            if spec.examples and moments is not None:
                total[index] += moments.total.cpu() * item.slope
                item.add(products, moments.products.cpu(), index)
        if max(values) - min(values) > SAME_LOSS * abs(values[0]):
            raise errors.RandomClosureError(
                f"ranks that share directions call the closure {len(items)} times a step, and it gave different losses "
                f"on the same parameters: {values}; {ADVICE}"
            )
        body[0] = values[0] if self.part == 0 else 0.0
        body[1 : 1 + spec.k] = slope
        if curvature is not None:
            body[1 + spec.k :] = curvature[spec.entries()]
        if spec.examples:
            count = sum(counts) / len(counts)
            sums[0] = count if self.part == 0 or math.isnan(count) else 0.0
            sums[1 : 1 + spec.k] = total
            sums[1 + spec.k :] = products[spec.entries()]
        return values[0], plane.value.dtype == torch.float64

    def _alike(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The tensors that must be equal on all ranks; of sharded ones, those of which all ranks have the same part."""
        return [local(t) for t in tensors if held_alike(t, self._members)]

    def _sum(self, message: Tensor, device: torch.device, op: Any = None) -> Tensor:
        message = message.to(self._device(device))
        self.sent += message.numel() * message.element_size()
        work = dist.all_reduce(message, dist.ReduceOp.SUM if op is None else op, group=self._group, async_op=True)
        assert work is not None
        if message.device.type == "cpu":
            self._wait(work)
        else:
            work.wait()
        return message

    def _wait(self, work: Any) -> None:
        """Wait for a collective, and give up if another rank has found the group broken.

        In a ring, only the neighbours of a lost rank notice the loss.
        """
        while True:
            try:
                work.wait(timedelta(seconds=POLL))
                return
            except RuntimeError:
                if work.is_completed():
                    raise
                if _answer(lambda: self._store().check([BROKEN]), GRACE):
                    self._pending = work
                    raise

    def _device(self, device: torch.device) -> torch.device:
        return torch.device("cpu") if "gloo" in str(dist.get_backend_config(self._group)) else device

    def _store(self) -> Any:
        return dist.distributed_c10d._get_process_group_store(self._group)

    def _gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order. Its cost grows with the number of ranks."""
        values: list[Any] = [None] * self.size
        with self._unbroken():
            dist.all_gather_object(values, value, group=self._group)
        return values

    @contextlib.contextmanager
    def _unbroken(self) -> Iterator[None]:
        """A failure of torch.distributed means that a rank is lost; find out which."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, JetplaneError):
                raise
            lost, hint = self._missing()
            who = f"rank {', '.join(map(str, lost))} is lost: it ended, hangs or cannot be reached"
            if not lost:
                who = hint or "ranks gave up waiting, though all of them report by now"
            reason = str(error).splitlines()[0]
            raise LostRankError(
                f"{who} (evaluation {self.steps} of this process). Parameters are as before the step, and the process "
                f"group is broken: start again from a checkpoint. {reason}",
                lost,
            ) from error

    def _missing(self) -> tuple[tuple[int, ...], str]:
        """The ranks that do not report within the grace period, and a hint where that cannot be known."""
        missing = _answer(self._roll_call, 2 * (POLL + GRACE))
        # Others break off now, which ends what this rank still waits for; gloo aborts a process that leaves while
        # it waits.
        end = time.monotonic() + GRACE
        while self._pending is not None and not self._pending.is_completed() and time.monotonic() < end:
            time.sleep(0.1)
        if missing is None:
            return (), "a rank is lost; which one cannot be known, as the store that would tell cannot be reached"
        return tuple(missing), ""

    def _roll_call(self) -> list[int]:
        store = self._store()
        store.set(BROKEN, "")
        store.set(f"{BROKEN}/{self.rank}", "")
        end = time.monotonic() + POLL + GRACE
        missing = self._members
        while missing and time.monotonic() < end:
            time.sleep(0.1)
            missing = [r for r in missing if not store.check([f"{BROKEN}/{r}"])]
        return missing

    def _raise_for_all(self, failure: BaseException | None) -> NoReturn:
        """Raise the same type of error on every rank, so that all of them continue alike."""
        own = None if failure is None else (type(failure).__name__, str(failure))
        failures = {r: f for r, f in zip(self._members, self._gather(own), strict=True) if f is not None}
        first, (kind, _) = next(iter(failures.items()))
        if failure is not None and (first == self.rank or not isinstance(failure, Exception)):
            raise failure
        said = "; ".join(f"rank {r}: {message or name}" for r, (name, message) in failures.items())
        known = getattr(errors, kind, None)
        if isinstance(known, type) and issubclass(known, JetplaneError) and not issubclass(known, RemoteError):
            raise known(said) from failure
        said = "; ".join(f"rank {r}: {name}: {message}" for r, (name, message) in failures.items())
        raise RemoteError(f"another rank failed, and no parameter has moved. {said}", tuple(failures)) from failure

    def _unite(self, used: set[int], params: Sequence[Tensor]) -> None:
        """Add the parameters that another rank's loss uses: they move on all ranks."""
        mine = torch.zeros(len(params), dtype=torch.uint8)
        mine[sorted(used)] = 1
        with self._unbroken():
            every = self._sum(mine, params[0].device, dist.ReduceOp.MAX)
        used.update(every.nonzero().flatten().tolist())


def _located(where: Any) -> tuple[Any, int, int, int]:
    """The process group, this rank's shard, and its place among those that share the directions of a plane."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(where, DeviceMesh):
        if not isinstance(where, dist.ProcessGroup) or dist.get_rank(where) < 0:
            raise ArgumentError(f"expected a process group that this process is in, or a DeviceMesh; got {where!r}")
        return where, dist.get_rank(where), 0, 1
    names = where.mesh_dim_names or ()
    if not names or not set(names) <= {DATA, DIRECTION}:
        raise ArgumentError(
            f"expected a mesh with dimensions {DATA!r} and {DIRECTION!r}, or one of them, got {names}; give it to "
            "init_device_mesh as mesh_dim_names"
        )
    if where.get_coordinate() is None:
        raise ArgumentError(f"this process, rank {dist.get_rank()}, is not in the mesh {where.mesh.tolist()}")
    ranks = where.mesh.flatten().tolist()
    if where.ndim == 1:
        group = where.get_group()
    elif sorted(ranks) == list(range(dist.get_world_size())):
        group = dist.group.WORLD
    else:
        group = dist.new_group(ranks, use_local_synchronization=True)
    shard = where.get_local_rank(DATA) if DATA in names else 0
    if DIRECTION not in names:
        return group, shard, 0, 1
    return group, shard, where.get_local_rank(DIRECTION), where.size(names.index(DIRECTION))


@contextlib.contextmanager
def _undone(written: list[Tensor]) -> Iterator[None]:
    """Set random states and the tensors that a closure writes to back to what they were."""
    before, random = [t.clone() for t in written], RandomState()
    try:
        yield
    finally:
        random.restore()
        for tensor, values in zip(written, before, strict=True):
            tensor.copy_(values)


def _answer(ask: Callable[[], T], seconds: float) -> T | None:
    """The answer of a store, or None if it fails or gives none within so many seconds."""
    answers: queue.Queue[T | None] = queue.Queue()

    def run() -> None:
        try:
            answers.put(ask())
        except RuntimeError:
            answers.put(None)

    threading.Thread(target=run, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return None


def _contrast(part: int, parts: int) -> float:
    """Factors that add up to zero over the ranks of one batch: so do equal losses times them."""
    return (part + 1) ** 2 - sum(p * p for p in range(1, parts + 1)) / parts if parts > 1 else 0.0


def _check_weight(weight: float) -> None:
    if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise ArgumentError(
            f"weight, the number of examples of this rank, must be finite and at least 0; got {weight!r}"
        )
