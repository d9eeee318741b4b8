"""A host's PMIx server: what Open MPI's ranks ask for their places, and through which they find each other.

Open MPI speaks PMIx, and how that sounds is its library's own affair. The library has the server's side as well, for
those who start processes. This is such a server: it tells the ranks of its host what the job's process manager knows,
and what they leave for ranks of other hosts it exchanges with the servers there through that manager. So there is no
``mpirun``, no daemon and no remote shell. It is a process of its own, because a rank aborts when its server is gone, be
that with another rank or with native code that fails; the task of the host's first rank keeps it
(:class:`hvdspark.launch.openmpi.HostServer`), until the manager ends its connection: then all ranks of the host are
through.

Usage: ``python -I -S pmix.py MANAGER LIBRARY PLACE FOLDER`` on a bare interpreter, so that it costs milliseconds.
``MANAGER`` is the descriptor of a connection to the process manager, ``PLACE`` the host's number, ``FOLDER`` is for
temporary files. By what variables ranks find it, it leaves with the manager; then it writes a line to standard output.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import itertools
import json
import os
import queue
import re
import select
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# From pmix_common.h, whose numbers are part of PMIx' standard.
_OPERATION_SUCCEEDED, _NOT_FOUND, _NOT_SUPPORTED = -157, -46, -47
_STRING, _UINT32 = 3, 14
_ALL_RANKS = 2**32 - 2
_NAME_BYTES = 255

# Longer than ranks take to come.
_SILENCE_S = 3600

# Under what name the variables are left by which the ranks of a host find its server.
SERVER = "server-{}"

_CHUNK_BYTES = 768  # in base 64 a value of the process manager


class Manager:
    """The job's process manager, seen by one of its members; see :class:`hvdspark.launch.mpi.ProcessManager`.

    Parameters
    ----------
    connection
        The member's connection to it, on which nothing is read ahead.

    Raises
    ------
    ConnectionError
        By any of the methods, when the manager ends the connection.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rwb", buffering=0)

    @property
    def name(self) -> str:
        """The job's name, which is random."""
        return self._ask("get_my_kvsname")["kvsname"]

    @property
    def places(self) -> list[int]:
        """For each rank the number of its host."""
        mapping = self._ask("get", "key=PMI_process_mapping")["value"]
        blocks = re.findall(r"\((\d+),1,(\d+)\)", mapping)
        return [int(place) for place, count in blocks for _ in range(int(count))]

    def put(self, name: str, data: bytes) -> None:
        """Leave some data under a name."""
        text = base64.b64encode(data).decode()
        limit = 4 * _CHUNK_BYTES // 3
        chunks = [text[start : start + limit] for start in range(0, len(text), limit)]
        for number, chunk in enumerate(chunks):
            self._ask("put", f"key={name}.{number} value={chunk}")
        self._ask("put", f"key={name} value={len(chunks)}")  # the last, for which the others wait

    def get(self, name: str) -> bytes:
        """Return what somebody has left, or will leave, under a name."""
        count = int(self._ask("await", f"key={name}")["value"])
        texts = [self._ask("get", f"key={name}.{number}")["value"] for number in range(count)]
        return base64.b64decode("".join(texts))

    def _ask(self, command: str, rest: str = "") -> dict[str, str]:
        try:
            self._connection.sendall(f"cmd={command} {rest}\n".encode())
            answer = self._stream.readline().decode()
        except (BrokenPipeError, ConnectionResetError):
            answer = ""
        if not answer:
            raise ConnectionError("the job's process manager has ended the connection")
        fields = dict(re.findall(r"(\w+)=(\S*)", answer))
        if fields.get("rc", "0") != "0":
            raise ConnectionError(f"the job's process manager answers {command} {rest[:80]} with {answer.strip()}")
        return fields


class _Process(ctypes.Structure):
    """``pmix_proc_t``."""

    _fields_ = (("name", ctypes.c_char * (_NAME_BYTES + 1)), ("rank", ctypes.c_uint32))


class _Array(ctypes.Structure):
    """``pmix_data_array_t``."""

    _fields_ = (("type", ctypes.c_uint16), ("size", ctypes.c_size_t), ("array", ctypes.c_void_p))


_ProcessPointer = ctypes.POINTER(_Process)
_OnRelease = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_OnEnd = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)
_OnData = ctypes.CFUNCTYPE(
    None, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, _OnRelease, ctypes.c_void_p
)
_Connected = ctypes.CFUNCTYPE(ctypes.c_int, _ProcessPointer, ctypes.c_void_p)
_Finalized = ctypes.CFUNCTYPE(ctypes.c_int, _ProcessPointer, ctypes.c_void_p, _OnEnd, ctypes.c_void_p)
_Abort = ctypes.CFUNCTYPE(
    ctypes.c_int,
    _ProcessPointer,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    _OnEnd,
    ctypes.c_void_p,
)
_Fence = ctypes.CFUNCTYPE(
    ctypes.c_int,
    _ProcessPointer,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    _OnData,
    ctypes.c_void_p,
)
_Lookup = ctypes.CFUNCTYPE(ctypes.c_int, _ProcessPointer, ctypes.c_void_p, ctypes.c_size_t, _OnData, ctypes.c_void_p)


class _Module(ctypes.Structure):
    """``pmix_server_module_t``: what the library asks its host; what is not there it knows to be unsupported."""

    _fields_ = (
        ("client_connected", _Connected),
        ("client_finalized", _Finalized),
        ("abort", _Abort),
        ("fence_nb", _Fence),
        ("direct_modex", _Lookup),
        ("all_others", ctypes.c_void_p * 64),
    )


class Server:
    """The server of a host.

    Parameters
    ----------
    library
        PMIx' library, of the same installation as the ranks'.
    connection
        To the job's process manager.
    place
        The host's number.
    folder
        For temporary files.
    """

    def __init__(self, library: str, connection: socket.socket, place: int, folder: str) -> None:
        self._pmix = ctypes.CDLL(library)
        self._pmix.PMIx_Error_string.restype = ctypes.c_char_p
        self._pmix.PMIx_Info_list_start.restype = ctypes.c_void_p
        self._connection = connection
        self._manager = Manager(connection)
        self._name, self._places = self._manager.name, self._manager.places
        self._place, self._folder = place, folder
        self._fences: queue.SimpleQueue[tuple[bytes, Any, int]] = queue.SimpleQueue()
        self._woken, self._wake = os.pipe()
        # Ctypes keeps none of them alive.
        self._module = _Module(
            _Connected(lambda *_: _OPERATION_SUCCEEDED),
            _Finalized(lambda *_: _OPERATION_SUCCEEDED),
            _Abort(lambda *_: _OPERATION_SUCCEEDED),
            _Fence(self._note_fence),
            # All that a rank leaves goes into a fence.
            _Lookup(lambda *_: _NOT_FOUND),
        )

    def open(self) -> None:
        """Begin to listen, and leave with the manager by what variables the ranks of this host find this server."""
        size, hosts = len(self._places), max(self._places) + 1
        here = [rank for rank, place in enumerate(self._places) if place == self._place]
        # Nobody is reached by these names, but the own one is what MPI tells the user.
        own_name = os.uname().nodename
        names = [own_name if place == self._place else f"hvdspark-{place}" for place in range(hosts)]
        by_place = itertools.groupby(range(size), self._places.__getitem__)
        folders = {"pmix.srvr.tmpdir": self._folder, "pmix.sys.tmpdir": self._folder}
        self._call("server_init", ctypes.byref(self._module), *self._infos({**folders, "pmix.hname": own_name}))
        _hear_only_those_who_speak()
        job: dict[str, str | int] = {
            "pmix.univ.size": size,
            "pmix.job.size": size,
            "pmix.max.size": size,
            "pmix.job.napps": 1,
            "pmix.num.nodes": hosts,
            "pmix.local.size": len(here),
            "pmix.lpeers": ",".join(map(str, here)),
            "pmix.nmap": self._encoded("generate_regex", ",".join(names)),
            "pmix.pmap": self._encoded("generate_ppn", ";".join(",".join(map(str, ranks)) for _, ranks in by_place)),
            "pmix.nsdir": self._folder,
            "pmix.tmpdir": self._folder,
        }
        name = self._name.encode()
        self._call("server_register_nspace", name, len(here), *self._infos(job), None, None)
        for rank in here:
            client = _Process(name, rank)
            self._call("server_register_client", ctypes.byref(client), os.getuid(), os.getgid(), None, None, None)
        first, variables = _Process(name, here[0]), ctypes.POINTER(ctypes.c_char_p)()
        self._call("server_setup_fork", ctypes.byref(first), ctypes.byref(variables))
        lines = itertools.takewhile(bool, (variables[number] for number in itertools.count()))
        found = dict(line.decode().partition("=")[::2] for line in lines)
        self._manager.put(SERVER.format(self._place), json.dumps(found).encode())

    def serve(self) -> None:
        """Do what the library asks for, until the manager ends the connection."""
        kept = []
        for turn in itertools.count():
            ready, _, _ = select.select([self._woken, self._connection.fileno()], [], [])
            if self._woken not in ready:
                return
            os.read(self._woken, 1)
            data, callback, about = self._fences.get()
            try:
                joined = self._exchange(turn, data)
            except ConnectionError:
                return
            # The library says when it no longer needs it; but there are a few only, and they are small.
            kept.append(ctypes.create_string_buffer(joined, len(joined)))
            callback(0, ctypes.addressof(kept[-1]), len(joined), about, _OnRelease(), None)

    def _exchange(self, turn: int, data: bytes) -> bytes:
        """Give the servers of all hosts what the ranks of this one left, and return what all of them left."""
        self._manager.put(f"fence-{turn}-{self._place}", data)
        return b"".join(self._manager.get(f"fence-{turn}-{place}") for place in sorted({*self._places}))

    def _note_fence(
        self,
        processes: Sequence[_Process],
        count: int,
        _infos: int | None,
        _info_count: int,
        data: int,
        size: int,
        callback: Any,
        about: int,
    ) -> int:
        """Take a fence, in the library's own thread, which must not wait."""
        ranks = {processes[number].rank for number in range(count)}
        if ranks != {_ALL_RANKS} and len(ranks) != len(self._places):
            return _NOT_SUPPORTED
        self._fences.put((ctypes.string_at(data, size) if size else b"", callback, about))
        os.write(self._wake, b"f")
        return 0

    def _infos(self, values: Mapping[str, str | int]) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
        """Make PMIx' array of attributes; returns where it is, and its length."""
        found, listed = _Array(), ctypes.c_void_p(self._pmix.PMIx_Info_list_start())
        for key, value in values.items():
            if isinstance(value, str):
                self._call("Info_list_add", listed, key.encode(), value.encode(), _STRING)
            else:
                self._call("Info_list_add", listed, key.encode(), ctypes.byref(ctypes.c_uint32(value)), _UINT32)
        self._call("Info_list_convert", listed, ctypes.byref(found))
        return ctypes.c_void_p(found.array), ctypes.c_size_t(found.size)

    def _encoded(self, function: str, text: str) -> str:
        """Have the library put a list into its own form."""
        found = ctypes.c_char_p()
        self._call(function, text.encode(), ctypes.byref(found))
        assert found.value is not None
        return found.value.decode()

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._pmix, f"PMIx_{function}")(*arguments)
        if status not in (0, _OPERATION_SUCCEEDED):
            raise OSError(f"PMIx_{function} failed: {self._pmix.PMIx_Error_string(status).decode()} ({status})")


def _hear_only_those_who_speak() -> None:
    """Have the system keep connections from the library until something is said on them.

    The library waits for the first words of whoever connects, and does nothing else meanwhile (PMIx 5.0.11): one that
    connects and is silent would keep all ranks out.
    """
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(descriptor.name))) as found:
            if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _SILENCE_S)


def main() -> NoReturn:
    """Serve until all ranks of the host are through."""
    descriptor, library, place, folder = sys.argv[1:]
    with socket.socket(fileno=int(descriptor)) as connection:
        server = Server(library, connection, int(place), folder)
        server.open()
        sys.stdout.write("up\n")
        sys.stdout.flush()
        server.serve()
    # The library's own threads would keep an ordinary exit waiting.
    os._exit(0)


if __name__ == "__main__":
    main()
