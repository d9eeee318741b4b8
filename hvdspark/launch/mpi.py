"""The MPI control plane: the process manager through which MPI ranks find each other, and Horovod's settings for it.

An MPI library does not care who started its processes. It wants a *process manager* that tells it what other ranks
there are and keeps the addresses that they leave for each other, and speaks to it in PMI-1, a protocol of lines
(source: MPICH, ``src/pmi``; Slurm's managers and MPICH's own, hydra, speak it as well). The barrier tasks have started
the ranks already, each under its guard, so the manager is all that is missing. Hydra would start processes of its own
beside the guards, and it listens to anybody on all interfaces; this one takes the job's own ranks only, and holds only
what they need to find each other.
"""

from __future__ import annotations

import itertools
import re
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from hvdspark.launch.lines import LineServer, Member

# The name of the MPI that speaks PMI-1 itself, and that of its library.
MPICH, LIBRARY = "MPICH", "libmpi.so.12"

# Where a rank finds its manager: "address:port:token". The process takes it out of its environment.
MANAGER = "HVDSPARK_PMI"

_KEY_BYTES, _VALUE_BYTES = 64, 1024
_KEYS_PER_RANK = 64
_FIELD = re.compile(r"(\w+)=(\S*)")


def library_path(library: str) -> str:
    """Return where a library is: in this environment, or wherever the system finds it."""
    own = Path(sys.prefix, "lib", library)
    return str(own) if own.exists() else library


class ProcessManager(LineServer):
    """The process manager of one MPI job.

    Parameters
    ----------
    address, hosts, token
        As for :class:`~hvdspark.launch.lines.LineServer`.
    places
        For each rank the number of its host, as far as that is known; see :meth:`place`.
    """

    def __init__(self, address: str, hosts: Iterable[str], places: Sequence[int], token: str) -> None:
        super().__init__(address, hosts, len(places), token)
        self._values: dict[str, str] = {}
        self._places: Sequence[int] = ()
        self._awaited: dict[str, list[Member]] = {}
        self._left: Counter[int] = Counter()
        self.place(places)
        # MPI names its shared memory so: two jobs of a host must not have the same.
        self._space = f"hvdspark-{secrets.token_hex(8)}"
        self._keys: Counter[int | None] = Counter()
        self._waiting: set[int | None] = set()
        self._commands: Mapping[str, Callable[[Member, Mapping[str, str]], bool]] = {
            "put": self._put,
            "get": self._get,
            "await": self._await,
            "barrier_in": self._barrier,
        }
        self._answers = {
            "init": "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0",
            "get_maxes": f"cmd=maxes kvsname_max={_KEY_BYTES} keylen_max={_KEY_BYTES} vallen_max={_VALUE_BYTES} rc=0",
            "get_appnum": "cmd=appnum appnum=0 rc=0",
            "get_my_kvsname": f"cmd=my_kvsname kvsname={self._space} rc=0",
            "get_universe_size": f"cmd=universe_size size={len(places)} rc=0",
            "finalize": "cmd=finalize_ack rc=0",
        }

    def place(self, places: Sequence[int], *, servers: bool = False) -> None:
        """Say where the ranks are, before any of them is admitted.

        Parameters
        ----------
        places
            For each rank the number of its host.
        servers
            Whether every host has a server of its own, which is a member too, with a number after those of the ranks
            and in the order of hosts. When all ranks of a host have left, its server's connection is ended, and theirs
            when it has.
        """
        self._places = places
        self._values["PMI_process_mapping"] = process_mapping(places)
        self.size = len(places) + (max(places) + 1 if servers else 0)

    def lost(self, member: Member) -> None:
        """End the connections of those who were there for the one that has left."""
        assert member.number is not None
        if self.size == len(self._places):
            return
        if member.number >= len(self._places):
            place = member.number - len(self._places)
            ended = [rank for rank, its in enumerate(self._places) if its == place]
        else:
            place = self._places[member.number]
            self._left[place] += 1
            ended = [len(self._places) + place] if self._left[place] == self._places.count(place) else []
        for number in ended:
            if number in self.members and self.members[number].connection.fileno() >= 0:
                self._end(self.members[number])

    def obey(self, member: Member, line: str) -> bool:
        """Answer a request; one that no rank makes, such as for more processes, ends the connection."""
        fields = dict(_FIELD.findall(line))
        name = fields.get("cmd", "")
        if name in self._answers:
            return member.say(self._answers[name])
        return name in self._commands and self._commands[name](member, fields)

    def _put(self, member: Member, fields: Mapping[str, str]) -> bool:
        key, value = fields.get("key", ""), fields.get("value", "")
        fits = 0 < len(key) <= _KEY_BYTES and len(value) <= _VALUE_BYTES
        if not fits or key in self._values or self._keys[member.number] >= self._quota(member):
            return member.say("cmd=put_result rc=-1 msg=refused")
        self._keys[member.number] += 1
        self._values[key] = value
        for waiting in self._awaited.pop(key, ()):
            self._get(waiting, fields)
        return member.say("cmd=put_result rc=0 msg=success")

    def _quota(self, member: Member) -> int:
        """Return how many keys it may write: a host's server as many as the ranks for which it speaks."""
        assert member.number is not None
        place = member.number - len(self._places)
        return _KEYS_PER_RANK * (self._places.count(place) if place >= 0 else 1)

    def _get(self, member: Member, fields: Mapping[str, str]) -> bool:
        value = self._values.get(fields.get("key", ""))
        if value is None:
            return member.say("cmd=get_result rc=-1 msg=not_found value=unknown")
        return member.say(f"cmd=get_result rc=0 msg=success value={value}")

    def _await(self, member: Member, fields: Mapping[str, str]) -> bool:
        """Answer as to ``get``, as soon as the key is there: this is not PMI-1, but for our own servers of hosts."""
        key = fields.get("key", "")
        if key in self._values:
            return self._get(member, fields)
        self._awaited.setdefault(key, []).append(member)
        return True

    def _barrier(self, member: Member, _: Mapping[str, str]) -> bool:
        self._waiting.add(member.number)
        if len(self._waiting) == self.size:
            self._waiting.clear()
            for waiting in self.members.values():
                waiting.say("cmd=barrier_out rc=0")
        return True


def process_mapping(places: Sequence[int]) -> str:
    """Say which ranks share a host, in PMI's words: blocks of (first host, hosts, ranks on each).

    Parameters
    ----------
    places
        For each rank the number of its host; ranks of a host are neighbours.
    """
    blocks = [f"({host},1,{len(list(ranks))})" for host, ranks in itertools.groupby(places)]
    return f"(vector,{','.join(blocks)})"


def mpi_environment(manager: tuple[str, int], token: str) -> dict[str, str]:
    """Return the variables that make Horovod use MPI and find its process manager."""
    return {
        "HOROVOD_CONTROLLER": "mpi",
        "HOROVOD_CPU_OPERATIONS": "mpi",
        MANAGER: f"{manager[0]}:{manager[1]}:{token}",
    }
