"""What `cprctl show` says of a descriptor, and that asking leaves it as it was."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cprd.linux.describe import describe, size
from cprd.linux.stdio import printable
from tests.support.patience import PATIENCE

ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@contextmanager
def owned(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


pytestmark = pytest.mark.usefixtures("nothing_leaks")


def test_tcp_says_addresses_and_state() -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = listener.getsockname()[1]
        assert describe(listener.fileno()) == f"tcp 127.0.0.1:{port} listening"
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        server = stack.enter_context(listener.accept()[0])
        local = client.getsockname()[1]
        assert describe(server.fileno()) == f"tcp 127.0.0.1:{port} -> 127.0.0.1:{local} established"
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""  # the FIN is here
        assert describe(server.fileno()).endswith("close-wait")


def test_tcp_over_ipv6_puts_the_address_in_brackets() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        assert describe(listener.fileno()) == f"tcp [::1]:{listener.getsockname()[1]} listening"


def test_a_socket_not_yet_bound_is_closed() -> None:
    with socket.socket() as sock:
        assert describe(sock.fileno()) == "tcp 0.0.0.0:0 closed"


def test_a_pending_socket_error_is_not_eaten() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server = listener.accept()[0]
        linger = struct.pack("ii", 1, 0)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        client.close()  # a reset
        with server:
            assert select.select([server], [], [], PATIENCE)[0]
            describe(server.fileno())
            with pytest.raises(ConnectionResetError):
                server.recv(1)


def test_udp_with_and_without_a_peer() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        assert describe(sock.fileno()) == f"udp 127.0.0.1:{port}"
        sock.connect(("127.0.0.1", 9))
        assert describe(sock.fileno()) == f"udp 127.0.0.1:{port} -> 127.0.0.1:9"


def test_unix_sockets_paths_states_and_hostile_names(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen()
        assert describe(listener.fileno()) == f"unix stream {path} listening"
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(str(path))
        server = stack.enter_context(listener.accept()[0])
        assert describe(client.fileno()) == f"unix stream -> {path} connected"
        assert describe(server.fileno()) == f"unix stream {path} connected"
        server.close()
        assert describe(client.fileno()) == f"unix stream -> {path} hung up"
        one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(one)
        stack.enter_context(two)
        assert describe(one.fileno()) == "unix seqpacket connected"
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        abstract.bind(b"\0cprd-test-\x1b[31m" + str(os.getpid()).encode())
        assert describe(abstract.fileno()) == f"unix dgram @cprd-test-\\x1b[31m{os.getpid()}"


def test_what_is_queued_in_a_socket_stays_there() -> None:
    one, two = socket.socketpair()
    with one, two:
        two.send(b"for the successor")
        two.close()
        assert describe(one.fileno()) == "unix stream hung up"
        assert one.recv(64) == b"for the successor"


def test_a_blocking_socket_stays_blocking_under_a_default_timeout() -> None:
    one, two = socket.socketpair()
    with one, two:
        socket.setdefaulttimeout(5)
        try:
            assert describe(one.fileno()).startswith("socket")
        finally:
            socket.setdefaulttimeout(None)
        assert not fcntl.fcntl(one, fcntl.F_GETFL) & os.O_NONBLOCK


def test_netlink() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.bind((0, 0))
        assert describe(sock.fileno()) == f"netlink, protocol 0, port {sock.getsockname()[0]}"


def test_memfd_says_size_and_seals() -> None:
    with owned(os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as fd:
        os.ftruncate(fd, 2 << 30)
        assert describe(fd) == "memfd ram 2.0 GiB, no seals"
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL_SEALS)
        assert describe(fd) == "memfd ram 2.0 GiB, sealed (shrink grow write seal)"
    with owned(os.memfd_create("")) as fd:
        assert describe(fd) == "memfd 0 B, no seals, and none can be added"


def test_a_file_in_dev_shm() -> None:
    path = f"/dev/shm/cprd-test-{os.getpid()}"
    with owned(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)) as fd:
        os.unlink(path)
        os.ftruncate(fd, 5000)
        assert describe(fd) == f"file {path} (deleted) 4.9 KiB in memory, read-write"


def test_eventfd_keeps_its_count() -> None:
    with owned(os.eventfd(3)) as fd:
        assert describe(fd) == "eventfd, count 3"
        assert os.eventfd_read(fd) == 3
    with owned(os.eventfd(20, os.EFD_SEMAPHORE)) as fd:
        assert describe(fd).startswith("eventfd, count 20")


def test_pipes_name_their_ends() -> None:
    read, write = os.pipe()
    with owned(read), owned(write):
        assert describe(read) == "pipe, read end"
        assert describe(write) == "pipe, write end"


def test_pidfd_of_the_living_and_of_the_dead() -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    with owned(os.pidfd_open(pid)) as fd:
        assert describe(fd) == f"pidfd of process {pid}"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert describe(fd) == "pidfd of a process that is gone"


def test_epoll_is_named_even_while_its_lock_is_worth_avoiding() -> None:
    with select.epoll() as poll:
        assert describe(poll.fileno()) == "epoll"


def test_timerfd_signalfd_and_inotify_by_way_of_libc() -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with owned(libc.timerfd_create(1, 0)) as fd:
        assert describe(fd) == "timerfd, monotonic"
    mask = (ctypes.c_ubyte * 128)()
    mask[1] = 0x40  # signal 15
    with owned(libc.signalfd(-1, mask, 0)) as fd:
        assert describe(fd) == "signalfd, signals 15"
    with owned(libc.inotify_init1(0)) as fd:
        assert describe(fd) == "inotify"


def test_files_directories_and_bare_paths() -> None:
    here = os.path.realpath(__file__)
    with owned(os.open(here, os.O_RDONLY)) as fd:
        assert describe(fd) == f"file {here}, read-only"
    folder = os.path.dirname(here)
    with owned(os.open(folder, os.O_RDONLY | os.O_DIRECTORY)) as fd:
        assert describe(fd) == f"directory {folder}"
    with owned(os.open("/", os.O_PATH)) as fd:
        assert describe(fd) == "path /"


def test_devices_by_name() -> None:
    with owned(os.open("/dev/null", os.O_RDWR)) as fd:
        assert describe(fd) == "device /dev/null"
    leader, follower = os.openpty()
    with owned(leader), owned(follower):
        assert describe(follower).startswith("terminal /dev/pts/")


def test_namespaces_speak_for_themselves() -> None:
    with owned(os.open("/proc/self/ns/net", os.O_RDONLY)) as fd:
        assert describe(fd).startswith("net:[")


@pytest.mark.hardware
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm to open")
def test_kvm_system_vm_and_vcpu() -> None:
    with owned(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)) as kvm:
        assert describe(kvm) == "kvm (/dev/kvm)"
        with owned(fcntl.ioctl(kvm, 0xAE01, 0)) as vm:  # KVM_CREATE_VM
            assert describe(vm) == "kvm vm"
            with owned(fcntl.ioctl(vm, 0xAE41, 0)) as vcpu:  # KVM_CREATE_VCPU
                assert describe(vcpu) == "kvm vcpu 0"


@pytest.mark.skipif(not os.access("/dev/net/tun", os.R_OK | os.W_OK), reason="no /dev/net/tun")
def test_tap_with_and_without_its_interface() -> None:
    with owned(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)) as fd:
        assert describe(fd) == "tun/tap (/dev/net/tun), no interface yet"
        name = f"cprd{os.getpid() % 100000}".encode()
        try:
            fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name, 0x1002))  # tap, no header
        except PermissionError:
            pytest.skip("this user may not make a tap interface")
        assert describe(fd) == f"tap {name.decode()}"


def test_a_closed_number_is_an_error() -> None:
    fd = os.open("/", os.O_PATH)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        describe(fd)


def test_a_regular_pipe_whose_reader_sleeps_in_it_does_not_hold_us_up() -> None:
    read, write = os.pipe()
    with owned(read):
        reader = threading.Thread(target=os.read, args=(read, 1))
        reader.start()
        assert describe(read) == "pipe, read end"
        os.close(write)
        reader.join()


def test_sizes_and_names_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1 << 20, 3 << 29)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.0 MiB",
        "1.5 GiB",
    ]
    assert printable("a\x1b[2J\nb") == "a\\x1b[2J\\nb"
    assert printable("caf\u00e9 \ud800") == "caf\u00e9 \\ud800"


def test_nothing_heavy_is_imported_for_it() -> None:
    import subprocess

    code = "import sys, cprd.linux.describe; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"trio", "rich", "asyncio", "subprocess", "dataclasses"} & set(done.stdout.split())
