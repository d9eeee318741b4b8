"""How the tasks of a barrier stage tell each other something: every task gives a text, and gets those of all.

Spark's ``allGather`` does that everywhere, but a task that waits in it looks for the answer once in a second. Where
all tasks are on one host they meet at a Unix socket instead, which takes milliseconds. Its name is a nonce of the
driver's, and only processes of the same user are let in. Either way a task that does not come is waited for so long
and no longer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from hvdspark.errors import RendezvousError
from hvdspark.launch import topology
from hvdspark.launch.control import choose
from hvdspark.launch.pool import is_own

if TYPE_CHECKING:
    from pyspark import BarrierTaskContext

_RETRY_S = 0.005


@dataclass(frozen=True)
class Offer:
    """What a task tells the others.

    Parameters
    ----------
    address
        Where it can be reached.
    machine
        What tells its machine from others.
    servers
        Where ranks meet, by control plane, and where the alarm is (``"alarm"``): from the first rank's task.
    mpi, has_rdma
        What it found on its host, where that decides: the name of the MPI, and whether there is RDMA.
    rows
        What it found of the rows that came with it, see :class:`~hvdspark.data.feed.TakenRows`.
    gpus
        The GPUs that Spark gave it.
    error, is_passing
        What is wrong, then there is nothing else; and whether another attempt may go well.
    """

    address: str = ""
    machine: str = ""
    servers: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    mpi: str = ""
    has_rdma: bool = False
    rows: str | None = None
    gpus: Sequence[str] = ()
    error: str | None = None
    is_passing: bool = False


def exchange(barrier: BarrierTaskContext, offer: Offer, nonce: str, timeout_s: float) -> list[Offer]:
    """Exchange offers with all tasks of the stage; parameters, result and errors as of :func:`gather`."""
    texts = gather(barrier, json.dumps(asdict(offer)), nonce, timeout_s)
    return [Offer(**json.loads(text)) for text in texts]


@dataclass(frozen=True)
class Agreement:
    """What all tasks agree on.

    Parameters
    ----------
    peers
        The tasks with their addresses and machines.
    plane, reason
        The control plane and why it is that one.
    mpi
        The MPI of all hosts; empty where the ranks do not meet by it.
    meeting, alarm
        Where ranks meet, and where the alarm is.
    """

    peers: list[topology.Peer]
    plane: str
    reason: str
    mpi: str
    meeting: tuple[str, int]
    alarm: tuple[str, int]


def agree(peers: Sequence[topology.Peer], offers: Sequence[Offer], controller: str) -> Agreement:
    """Conclude from what all tasks say; all of them conclude the same.

    Raises
    ------
    RendezvousError
        With the first error that any of the tasks has.
    """
    wrong = next((offer for offer in offers if offer.error is not None), None)
    if wrong is not None:
        raise RendezvousError(wrong.error or "", is_passing=wrong.is_passing)
    known = [
        dataclasses.replace(peer, address=offer.address, machine=offer.machine)
        for peer, offer in zip(peers, offers, strict=True)
    ]
    lost = topology.unreachable(known)
    if lost:
        raise RendezvousError(
            f"host {lost[0].host} offers only the loopback address {lost[0].address} to a job over several hosts; name"
            " an interface with nics=[…], or let the host's name resolve to its network address"
        )
    servers = next(offer.servers for offer in offers if offer.servers)
    mpis = {offer.mpi: peer.host for offer, peer in zip(offers, known, strict=True)}
    plane, reason = choose(
        controller,
        hosts=len(topology.places(known)),
        mpis=mpis,
        all_have_rdma=all(offer.has_rdma for offer in offers),
    )
    if plane == "mpi" and len(mpis) > 1:
        found = " and ".join(f"{mpi} on {host}" for mpi, host in sorted(mpis.items()))
        raise RendezvousError(
            f"controller='mpi', but the hosts have different MPIs: Horovod is compiled for {found}; install the same"
            " wheel of Horovod on all of them, or use 'gloo'"
        )
    addresses = {name: (host, port) for name, (host, port) in servers.items()}
    mpi = next(iter(mpis)) if plane == "mpi" else ""
    return Agreement(known, plane, reason, mpi, addresses[plane], addresses["alarm"])


def gather(barrier: BarrierTaskContext, text: str, nonce: str, timeout_s: float) -> list[str]:
    """Exchange texts with all tasks of the stage.

    Parameters
    ----------
    barrier
        This task's context.
    text
        What this task has to say.
    nonce
        A name that no other stage uses.
    timeout_s
        Seconds to wait for the other tasks.

    Returns
    -------
    list of str
        By partition.

    Raises
    ------
    RendezvousError
        When a task does not come in time.
    """
    places = barrier.getTaskInfos()
    if len({place.address.rpartition(":")[0] for place in places}) > 1:
        return gather_apart(barrier, text, timeout_s)
    name = f"hvdspark-{nonce}-{barrier.stageId()}-{barrier.attemptNumber()}"
    return gather_here(name, barrier.partitionId(), len(places), text, timeout_s)


def gather_apart(barrier: BarrierTaskContext, text: str, timeout_s: float) -> list[str]:
    """Exchange texts with tasks on other hosts; parameters, result and errors as of :func:`gather`."""
    texts, errors = list[str](), list[Exception]()

    def ask() -> None:
        try:
            texts.extend(barrier.allGather(text))
        except Exception as exc:  # noqa: BLE001 - for the thread that waits
            errors.append(exc)

    # Spark lets it wait for a year. The thread stays in it then; the task goes, and its failure tells the driver.
    asking = threading.Thread(target=ask, name="hvdspark meeting", daemon=True)
    asking.start()
    asking.join(timeout_s)
    if errors:
        raise errors[0]
    if not texts:
        raise _not_met(timeout_s, "one of them hangs, or its executor does not reach the driver")
    return texts


def gather_here(name: str, own: int, count: int, text: str, timeout_s: float) -> list[str]:
    """Exchange texts with the other processes of this host that use the same name.

    Parameters
    ----------
    name
        Name of the meeting.
    own, count
        This process's number, from 0, and how many there are.
    text
        What this process has to say.
    timeout_s
        Seconds to wait for the others.

    Returns
    -------
    list of str
        By number.

    Raises
    ------
    RendezvousError
        When the others do not come in time.
    """
    deadline = time.monotonic() + timeout_s
    # An abstract name, as Linux has them: it needs no file and is seen where the loopback is the same.
    address = f"\0{name}"
    found = {own: text}
    try:
        return _receive_all(address, count, found, deadline) if own == 0 else _send(address, own, text, deadline)
    except (OSError, ValueError) as exc:
        missing = [number for number in range(count) if number not in found]
        awaited = f"; still awaited: {', '.join(map(str, missing))}" if own == 0 and missing else ""
        raise _not_met(timeout_s, f"{exc}{awaited}") from exc


def _not_met(timeout_s: float, why: str) -> RendezvousError:
    return RendezvousError(f"the tasks did not find each other within {timeout_s:g} s: {why}", is_passing=True)


def _receive_all(address: str, count: int, found: dict[int, str], deadline: float) -> list[str]:
    """Collect the texts of all others in ``found``, then tell everybody."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(address)
        listener.listen(count)
        streams = []
        while len(found) < count:
            listener.settimeout(_left(deadline))
            connection = stack.enter_context(listener.accept()[0])
            if not is_own(connection):
                connection.close()
                continue
            connection.settimeout(_left(deadline))
            stream = stack.enter_context(connection.makefile("rw", encoding="utf-8"))
            number, said = json.loads(stream.readline())
            found[number] = said
            streams.append(stream)
        texts = [found[number] for number in range(count)]
        for stream in streams:
            stream.write(json.dumps(texts) + "\n")
            stream.flush()
    return texts


def _send(address: str, own: int, text: str, deadline: float) -> list[str]:
    """Say one's own, and hear that of all."""
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_left(deadline))
            try:
                connection.connect(address)
            except ConnectionRefusedError:
                time.sleep(_RETRY_S)  # the first task is not there yet
                continue
            if not is_own(connection):
                raise PermissionError("another user is listening in the first task's place")
            with connection.makefile("rw", encoding="utf-8") as stream:
                stream.write(json.dumps([own, text]) + "\n")
                stream.flush()
                texts: list[str] = json.loads(stream.readline())
                return texts


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("time is up")
    return left
