"""The servers that a QEMU is a client of, by UNIX sockets (a TPM, virtiofsd, the other end of a
chardev): who they are, by the kernel's word, and whether they can serve two QEMUs at a time.

The kernel tells the other end of each connection, and who listens there. A server that does not
listen any more has served its only client. A TPM emulator and a vhost-user server go on listening,
and leave a second client waiting: of those a single connection says that the place is taken. An NBD
server may have more places, and greets the client of a free one at once: that is tried.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, NamedTuple

from cprd.linux import unix_diag
from cprd.linux.sockets import others_with
from cprd.qemu import devices, disks, inventory
from cprd.qemu.command import Command, is_on, keyed
from cprd.qemu.process import command_line, sockets_of
from cprd.qemu.sockets import seen_from_here

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cprd.linux.unix_diag import UnixSocket
    from cprd.qemu.disks import Drive
    from cprd.qemu.monitor import Monitor


class Server(NamedTuple):
    """`path`: as bound; `file`: (device, inode) of that; `listens`: whether somebody listens there;
    `clients`: its connections; `who`: the process at the other end, for people, "" where unseen."""

    path: str
    file: tuple[int, int]
    listens: bool
    clients: int
    who: str = ""

    def can_take_another(self, *, alone: bool) -> bool:
        """Whether another client can be served beside those that it has. `alone`: for a TPM or a
        vhost-user device."""
        return self.listens and not (alone and self.clients == 1)


def at(path: str) -> Server | None:
    """The server at a path; None where the kernel does not tell."""
    every, file = unix_diag.every(), _file(path)
    if every is None:
        return None
    return _server(path, file, [it for it in every if file == it.file or path == it.path])


def _file(path: str) -> tuple[int, int]:
    try:
        there = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return there.st_dev, there.st_ino & 0xFFFFFFFF


def _server(path: str, file: tuple[int, int], sockets: list[UnixSocket], who: str = "") -> Server:
    listens = any(found.listening for found in sockets)
    return Server(path, file, listens, sum(1 for found in sockets if found.peer), who)


def connected(pid: int) -> list[Server] | None:
    """Each server that a process is a client of; None where the kernel does not tell (another
    network namespace, another user's process)."""
    every, own = unix_diag.every(), {int(inode) for inode in sockets_of(pid)}
    if every is None or not own:
        return None
    mine = {found.inode: found for found in every if found.inode in own}
    if not mine:
        return None
    found = []
    for there in every:
        client = mine.get(there.peer)
        if client is None or client.path or not there.path or there.kind != socket.SOCK_STREAM:
            continue
        named = others_with([there.inode])
        who = ", ".join(f"{name}, pid {pid}" for pid, name in named.items())
        same = [it for it in every if (it.path, it.file) == (there.path, there.file)]
        found.append(_server(there.path, there.file, same, who))
    return found


# The servers of disks

_GREETS = 2.0  # s


def full(drives: list[Drive], pid: int) -> list[str]:
    """A message for each NBD server of the drives of the QEMU `pid` that has no place for another
    client. Says nothing on the connection. Waits 2 s for each at most."""
    said = []
    for drive in drives:
        for image in drive["chain"]:
            address = _nbd(image["name"], pid)
            if address is not None and not _greets(address):
                said.append(
                    f"{disks.label(drive)} is on {image['name']}, a server that leaves another"
                    " client waiting: give that two places (qemu-nbd --shared=2), or save and start"
                )
    return said


def _nbd(name: str, pid: int) -> str | tuple[str, int] | None:
    """The path, or (host, port), of the server in an image's name; None for another image."""
    if not name.startswith(disks.NBD):
        return None
    where, unix, path = name.partition("?socket=")  # QEMU escapes nothing
    if unix:
        return seen_from_here(pid, path)
    host, _, port = where.partition("://")[2].partition("/")[0].rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdecimal() else None


def _greets(address: str | tuple[str, int]) -> bool:
    try:
        if isinstance(address, tuple):
            sock = socket.create_connection(address, _GREETS)
        else:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with sock:
            sock.settimeout(_GREETS)
            if isinstance(address, str):
                sock.connect(address)
            return sock.recv(8) == b"NBDMAGIC"
    except OSError:
        return False


# A QEMU that runs


def single(monitor: Monitor) -> list[str]:
    """A message for each server of a running QEMU that cannot serve another QEMU at the same time.
    Raises MonitorLost."""
    if monitor.process is None:
        return []
    pid = monitor.process.pid
    clients = {seen_from_here(pid, path): label for label, path in _clients(monitor)}
    alone = _alone(monitor, pid)
    said = full(inventory.drives(monitor, pid), pid)
    found = connected(pid)
    if found is None:
        named = {path: alone.get(label) for path, label in clients.items()}
        return said + [_message(what, path, "") for path, what in named.items() if what]
    for server in found:
        label = next((clients[path] for path in clients if server.file == _file(path)), "")
        if not server.can_take_another(alone=label in alone):
            what = alone.get(label, f"-chardev {label}" if label else "this QEMU")
            said.append(_message(what, server.path, server.who))
    return said


def _message(what: str, path: str, who: str) -> str:
    by = f" ({who})" if who else ""
    return (
        f"{what} is connected to {path}{by}, which serves a single QEMU, and ends with that: save,"
        " start that server anew, and start"
    )


def _clients(monitor: Monitor) -> Iterator[tuple[str, str]]:
    """(label, path) of each chardev that is the client of a UNIX socket."""
    for row in monitor.execute("query-chardev"):
        name = row["filename"].removeprefix("disconnected:")
        if name.startswith("unix:") and ",server" not in name and name != "unix:":
            yield row["label"], name[5:]


def _alone(monitor: Monitor, pid: int) -> dict[str, str]:
    """By the label of a chardev: the TPM or the vhost-user device that has the chardev for itself
    alone."""
    question = ("human-monitor-command", {"command-line": "info qtree"})
    models, tree = monitor.ask(("query-tpm", {}), question)
    found = {}
    for row in models or ():
        options = row.get("options", {})
        found[options.get("data", {}).get("chardev", "")] = f"-tpmdev {options.get('type', '?')}"
    for device in devices.parse(tree or "").values():
        if "vhost-user" in device["type"]:
            found[device.get("chardev", "").strip('"')] = f"-device {device['type']}"
    return found | _by_words(Command(command_line(pid), running=True))


# The words of a QEMU to come


def _by_words(command: Command) -> dict[str, str]:
    """As _alone."""
    found = {}
    for option in ("tpmdev", "netdev", "device"):
        for value in command.values(option):
            options = keyed(value)
            if options[""] == "emulator" or "vhost-user" in options[""]:
                found[options.get("chardev", "")] = f"-{option} {options['']}"
    return found


def taken(command: Command) -> list[str]:
    """A message for each server of COMMAND that has no place for another QEMU now."""
    alone = _by_words(command)
    said = []
    for name, options in command.chardevs().items():
        if options[""] != "socket" or is_on(options, "server"):
            continue
        path = options.get("path", "")
        server = at(path) if path else None
        if name in alone:
            if server is None or not server.can_take_another(alone=True):
                said.append(_message(alone[name], path or "a server", ""))
        elif server is not None and server.clients and not server.listens:
            if any(key.startswith("reconnect") for key in options):
                continue  # tries again and again
            said.append(
                f"-chardev {name} is to connect to {path}, where nobody listens any more: save,"
                " start that server anew, and start"
            )
    return said
