"""A directory for the sockets of one hand-over, beside the VM's own monitor: what sees that one (a
QEMU in a chroot, another uid) sees ours as well, and nobody else can enter it."""

from __future__ import annotations

import os
import socket

from cprd.errors import LimitExceeded
from cprd.qemu.failure import Refused

_SUN_PATH = 107


class PrivatePlace:
    """Owns the directory and what is in it; close() removes both."""

    def __init__(self, beside: str, uid: int = -1) -> None:
        """`beside`: the path of a socket. `uid`: whose QEMU it is for (-1: ours). Raises
        Refused."""
        parent = os.path.dirname(os.path.abspath(beside))
        self.path = os.path.join(parent, f".cprd-{os.urandom(4).hex()}")
        try:
            os.mkdir(self.path, 0o700)
        except OSError as error:
            raise Refused(
                f"{parent}: {error.strerror}: our sockets lie beside the QEMU's monitor, so that"
                " directory must be writable"
            ) from None
        self.give_to(uid)

    def give_to(self, uid: int) -> None:
        """Let a QEMU of that uid use it (as root; otherwise it is ours anyway)."""
        if uid >= 0 and uid != os.geteuid() and os.geteuid() == 0:
            os.chown(self.path, uid, -1)
            self._uid = uid
        else:
            self._uid = -1

    def at(self, name: str) -> str:
        path = os.path.join(self.path, name)
        if len(os.fsencode(path)) > _SUN_PATH:
            self.close()
            raise LimitExceeded(
                f"{path}: longer than the {_SUN_PATH} bytes of a socket's address: put the QEMU's"
                " monitor into a directory with a shorter name"
            )
        return path

    def listen(self, name: str) -> socket.socket:
        """A listening socket there, the caller's."""
        path = self.at(name)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(path)
            os.chmod(path, 0o600)
            if self._uid >= 0:
                os.chown(path, self._uid, -1)
            sock.listen(1)
        except BaseException:
            sock.close()
            raise
        return sock

    def close(self) -> None:
        """Harmless again, and when somebody removed it."""
        try:
            for name in os.listdir(self.path):
                os.unlink(os.path.join(self.path, name))
            os.rmdir(self.path)
        except OSError:
            pass
