"""Facts about sockets, as root and as nobody: the kernel tells them in different ways."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cprd.linux import sockets

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def without_rights(look: Callable[[], bool]) -> bool:
    """What `look` returns in a process that is not root."""
    if os.geteuid() != 0:
        return look()
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            os.setgid(65534)
            os.setuid(65534)
            status = 0 if look() else 1
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 1)
    return status == 0


def open_to_all(path: Path) -> Path:
    for folder in (path, *path.parents):
        if folder.stat().st_mode & stat.S_IXOTH == 0:
            folder.chmod(0o755)
    return path


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_where_a_path_leads(tmp_path: Path, kind: int) -> None:
    place = open_to_all(tmp_path)
    path, moved, link = place / "a", place / "b", place / "link"
    with socket.socket(socket.AF_UNIX, kind) as sock, socket.socket(socket.AF_UNIX, kind) as other:
        sock.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            sock.listen()
        known = sockets.facts(sock.fileno())
        assert known is not None
        assert known.path == str(path)

        def leads(where: Path) -> bool:
            look = sockets.leads_to(str(where), sock.fileno(), known)
            assert (
                without_rights(lambda: sockets.leads_to(str(where), sock.fileno(), known)) == look
            )
            return look

        link.symlink_to(path)
        assert leads(path)
        assert leads(link)
        assert not leads(moved)
        path.rename(moved)
        assert not leads(path)
        assert leads(moved), "by the inode, whatever it was bound as"
        other.bind(str(path))
        assert not leads(path)
        moved.unlink()
        assert not leads(moved)


def test_queues_are_counted(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    clients: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path)
        unix.listen()
        for server in (tcp, unix):
            for count in (0, 1, 3):
                while len(clients) < count:
                    clients.append(socket.socket(server.family))
                    clients[-1].connect(server.getsockname())
                known = sockets.facts(server.fileno())
                assert known is not None
                assert sockets.connections(server.fileno(), known) == count
                assert sockets.queued(server.fileno(), known).startswith(str(count or ""))
            while clients:
                clients.pop().close()
                server.accept()[0].close()


def test_what_is_no_such_socket_has_no_facts() -> None:
    near, far = os.pipe()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        assert sockets.facts(near) is None
        assert sockets.facts(netlink.fileno()) is None
        assert sockets.facts(999_999) is None
    os.close(near)
    os.close(far)


def test_a_namespace_has_one_cookie() -> None:
    with socket.socket() as sock:
        known = sockets.facts(sock.fileno())
    assert known is not None
    assert known.namespace == sockets.namespace()
