"""What replicas of a learner compute together, by torch.distributed: gloo, and NCCL where each has a GPU of its own.

    Rendezvous ─→ where the first member of a group has the others meet
    Collective ─→ one group of members: sums of tensors over all, and what one of them has for the others

Everything here blocks, for at most its deadline, and belongs on a node's compute thread.

Source: Wijmans et al. 2020, "DD-PPO" (arXiv 1911.00357): gradients are averaged by all-reduce, and nobody serves.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import numpy as np

from ddrl_bus.algos.lazy import torch
from ddrl_bus.errors import LostReplicaError, UsageError
from ddrl_bus.transport.wire import Array

Dist = Any
"""Of torch.distributed, whose names differ between its builds."""
LOOK_AGAIN_S: Final = 0.01
CONNECT_S: Final = 0.5


class Rendezvous:
    """A key-value store that lives as long as its node, bound to `address` alone."""

    def __init__(self, address: str, deadline_s: float) -> None:
        dist: Dist = torch.distributed
        if not dist.is_available() or not hasattr(dist, "ProcessGroupGloo"):
            raise UsageError(
                f"torch {torch.__version__} was built without torch.distributed and gloo: one learner only"
            )
        host = address.strip("[]")
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, 0), family=family, backlog=1024)
        port = listening.getsockname()[1]
        self.address = f"{address}:{port}"
        self._store = dist.TCPStore(
            host, port, None, True, timedelta(seconds=deadline_s), False, True, listening.detach()
        )


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError:
        return False
    return True


class Collective:
    """A group that all its members form at the same time, each as a `rank` of its own.

    Args:
        store: address of the first member's `Rendezvous`.
        generation: tells this group from all others that meet there.
        address: of this host, as the others dial it.
        device: of the tensors that `sum` is given.
        deadline_s: longest time that anything here takes.
        obsolete: whether nobody wants this group any more; asked until all are there.
    Raises:
        LostReplicaError: the others did not come.
    """

    def __init__(
        self,
        store: str,
        generation: int,
        rank: int,
        world: int,
        address: str,
        device: torch.device,
        deadline_s: float,
        obsolete: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rank, self.world, self._generation, self._deadline = rank, world, generation, timedelta(seconds=deadline_s)
        self._dist: Dist = torch.distributed
        self._gloo: Dist = None
        self._nccl: Dist = None
        self._open = True
        host, _, port = store.rpartition(":")
        with self._together():
            self._wait_for(lambda: _listens(host.strip("[]"), int(port)), obsolete)
            store_: Dist = self._dist.TCPStore(host.strip("[]"), int(port), None, False, self._deadline)
            meeting = self._dist.PrefixStore(str(generation), store_)
            meeting.set(f"here-{rank}", "")
            self._wait_for(lambda: meeting.check([f"here-{rank}" for rank in range(world)]), obsolete)
            self._gloo = self._over_gloo(meeting, address.strip("[]"))
            if self._own_gpus(meeting, device):
                self._nccl = self._over_nccl(meeting)

    def _wait_for(self, holds: Callable[[], bool], obsolete: Callable[[], bool]) -> None:
        """What torch waits for as well, but until its deadline, whatever has become of the group meanwhile."""
        ends = time.monotonic() + self._deadline.total_seconds()
        while not holds():
            if obsolete():
                raise RuntimeError("another group is wanted")
            if time.monotonic() >= ends:
                raise RuntimeError("not all came before the deadline")
            time.sleep(LOOK_AGAIN_S)

    def _over_gloo(self, meeting: Dist, address: str) -> Dist:
        options = self._dist.ProcessGroupGloo._Options()
        options._devices = [self._dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = self._deadline
        return self._dist.ProcessGroupGloo(self._dist.PrefixStore("gloo", meeting), self.rank, self.world, options)

    def _own_gpus(self, meeting: Dist, device: torch.device) -> bool:
        """Whether every member has a GPU that no other one has; NCCL refuses to share."""
        gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
        meeting.set(f"gpu-{self.rank}", gpu)
        gpus = [meeting.get(f"gpu-{rank}") for rank in range(self.world)]
        return all(gpus) and len(set(gpus)) == self.world and self._dist.is_nccl_available()

    def _over_nccl(self, meeting: Dist) -> Dist:
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # it would end the process; we abort the group instead
        options = self._dist.ProcessGroupNCCL.Options()
        options._timeout = self._deadline
        nccl = self._dist.PrefixStore("nccl", meeting)
        return self._dist.ProcessGroupNCCL(nccl, self.rank, self.world, options)

    # ---- what members do together

    def sum(self, tensor: torch.Tensor) -> None:
        """Replaces a contiguous tensor by its sum over all members.

        Raises:
            LostReplicaError: somebody did not come to it, and the group is closed; the tensor holds nothing useful.
        """
        if self._nccl is None and tensor.device.type != "cpu":
            self.sum(on_host := tensor.cpu())
            tensor.copy_(on_host)
            return
        with self._together():
            self._wait((self._nccl or self._gloo).allreduce([tensor], self._dist.AllreduceOptions()))

    def gather(self, numbers: list[int]) -> list[list[int]]:
        """The int64 `numbers` of every member, by rank.  Raises: LostReplicaError, as `sum`."""
        everybodys = [torch.empty(len(numbers), dtype=torch.int64) for _ in range(self.world)]
        with self._together():
            self._wait(self._gloo.allgather([everybodys], [torch.tensor(numbers, dtype=torch.int64)]))
        return [each.tolist() for each in everybodys]

    def broadcast(self, array: Array | None, source: int) -> Array:
        """The uint8 `array` of the member `source`; the others give None.  Raises: LostReplicaError, as `sum`."""
        size = self.gather([0 if array is None else array.nbytes])[source][0]
        data = torch.empty(size, dtype=torch.uint8) if array is None else torch.from_numpy(array)
        options = self._dist.BroadcastOptions()
        options.rootRank = source
        with self._together():
            self._wait(self._gloo.broadcast([data], options))
        received: Array = data.numpy().astype(np.uint8, copy=False)
        return received

    def close(self) -> None:
        """Leaves; whoever waits for us in a collective fails at once."""
        self._open = False
        if self._nccl is not None:
            self._nccl.abort()
        self._gloo = self._nccl = None  # gloo's connections close with the last reference

    def _wait(self, work: Dist) -> None:
        try:
            ended = work.wait(self._deadline)
        finally:
            del work  # a traceback would keep it, and it keeps connections open that others are to see closed
        if not ended:
            raise RuntimeError("no end before the deadline")

    @contextmanager
    def _together(self) -> Iterator[None]:
        lost = f"generation {self._generation} of {self.world} replicas"
        if not self._open:
            raise LostReplicaError(f"{lost}: closed before")
        try:
            yield
        except RuntimeError as error:
            self.close()
            raise LostReplicaError(f"{lost}: {str(error).splitlines()[0]}") from None
