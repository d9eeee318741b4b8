"""The rendezvous server: what Horovod's Gloo needs of it, and what it denies everybody else."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator

import pytest

from hvdspark.launch.gloo import RendezvousServer, close_rendezvous, gloo_environment

TOKEN = "0123456789abcdef"


@pytest.fixture
def server() -> Iterator[RendezvousServer]:
    with RendezvousServer("127.0.0.1", ["127.0.0.1"], ranks=2, token=TOKEN) as running:
        yield running


def ask(
    server: RendezvousServer, method: str, path: str, body: bytes | None = None, token: str = TOKEN
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*server.address, timeout=5)
    try:
        # As Horovod makes it of the address that it is given.
        connection.request(method, f"/{token}:{server.address[1]}{path}", body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_a_value_is_found_once_it_is_put(server: RendezvousServer) -> None:
    assert ask(server, "GET", "/global/0")[0] == 404
    assert ask(server, "PUT", "/global/0", b"\x00address\xff")[0] == 200
    assert ask(server, "GET", "/global/0") == (200, b"\x00address\xff")


def test_a_key_is_written_once(server: RendezvousServer) -> None:
    ask(server, "PUT", "/global/0", b"mine")
    assert ask(server, "PUT", "/global/0", b"forged")[0] == 409
    assert ask(server, "GET", "/global/0") == (200, b"mine")


def test_a_scope_is_free_again_once_all_its_ranks_are_through(server: RendezvousServer) -> None:
    for rank in ("0", "1"):
        ask(server, "PUT", f"/global/{rank}", b"x")
        ask(server, "PUT", f"/global/rank_{rank}", b"host")
    ask(server, "DELETE", "/global/0")
    assert ask(server, "GET", "/global/1")[0] == 200
    ask(server, "DELETE", "/global/1")
    assert ask(server, "GET", "/global/1")[0] == 404
    assert ask(server, "PUT", "/global/0", b"again")[0] == 200


@pytest.mark.parametrize("path", ["/secret/0", "/global", "/global/a/b", "//", "/../etc/passwd"])
def test_other_paths_are_refused(server: RendezvousServer, path: str) -> None:
    assert ask(server, "PUT", path, b"x")[0] == 400
    assert ask(server, "GET", path)[0] == 404


def test_a_value_larger_than_a_rank_needs_is_refused(server: RendezvousServer) -> None:
    assert ask(server, "PUT", "/global/0", b"x" * 10_000)[0] == 400
    assert ask(server, "GET", "/global/0")[0] == 404


def test_a_large_value_comes_back_whole() -> None:
    value = bytes(range(256)) * 1000
    with RendezvousServer("127.0.0.1", ["127.0.0.1"], ranks=600, token=TOKEN) as server:
        assert ask(server, "PUT", "/global/0", value)[0] == 200
        assert ask(server, "GET", "/global/0") == (200, value)


@pytest.mark.parametrize("token", ["", "0", TOKEN[:-1], TOKEN + "0", TOKEN.upper()])
@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE"])
def test_who_does_not_know_the_token_is_not_answered(server: RendezvousServer, token: str, method: str) -> None:
    ask(server, "PUT", "/global/0", b"mine")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        ask(server, method, "/global/0", b"forged" if method == "PUT" else None, token=token)
    assert ask(server, "GET", "/global/0") == (200, b"mine")


def test_a_host_that_is_not_of_the_job_is_not_answered() -> None:
    with (
        RendezvousServer("127.0.0.1", ["127.0.0.9"], ranks=2, token=TOKEN) as server,
        pytest.raises((http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)),
    ):
        ask(server, "GET", "/global/0")


def test_once_all_have_met_for_good_nobody_gets_in(server: RendezvousServer) -> None:
    close_rendezvous(gloo_environment(server.address, TOKEN[::-1], "lo"))
    assert ask(server, "PUT", "/global/0", b"x")[0] == 200
    close_rendezvous(gloo_environment(server.address, TOKEN, "lo"))
    with pytest.raises(ConnectionRefusedError):
        ask(server, "GET", "/global/0")
    # Asked for a second time, or by a rank that meets otherwise, it is no error.
    close_rendezvous(gloo_environment(server.address, TOKEN, "lo"))
    close_rendezvous({})


def test_the_port_is_closed_when_the_job_is_over() -> None:
    with RendezvousServer("127.0.0.1", ["127.0.0.1"], ranks=2, token=TOKEN) as server:
        address = server.address
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)


def test_horovod_is_told_where_to_meet_and_which_interface_to_use() -> None:
    environment = gloo_environment(("127.0.0.1", 4711), TOKEN, "lo")
    assert environment["HOROVOD_GLOO_RENDEZVOUS_ADDR"] == f"127.0.0.1:4711/{TOKEN}"
    assert environment["HOROVOD_GLOO_RENDEZVOUS_PORT"] == "4711"
    assert environment["HOROVOD_GLOO_IFACE"] == "lo"
    assert environment["HOROVOD_CONTROLLER"] == "gloo"
