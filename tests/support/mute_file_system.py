"""A FUSE file system with one file, `file`, that answers until the file is open, and never again.

    python mute_file_system.py DIRECTORY [later|writeback]

needs root. It prints "mounted", then "open" when the file is; from then on a stat, a read and a
close of that file hang until this process is ended. With `later` it answers until it reads a line,
and prints "mute" then. With `writeback` that holds as well, and what is written stays in the page
cache: whoever drops a reference to a file that was written to then hangs, beyond SIGKILL. Messages
as in linux/fuse.h, protocol 7.31.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import stat
import struct
import sys

LOOKUP, FORGET, GETATTR, OPEN, RELEASE, FLUSH, INIT = 1, 2, 3, 14, 18, 25, 26
WRITEBACK_CACHE = 1 << 16
FILE = 2  # node id; the root is 1


def attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == 1 else stat.S_IFREG | 0o666
    return struct.pack("<6Q10I", node, 4096, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def main(directory: str, *how: str) -> None:
    writeback, later = "writeback" in how, bool(how)
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"mute", directory.encode(), b"fuse", 0, options) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    print("mounted", flush=True)
    while True:
        if sys.stdin in select.select([fuse, *([sys.stdin] if later else [])], [], [])[0]:
            print("mute", flush=True)
            signal.pause()
        request = os.read(fuse, 1 << 18)
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        status, body = 0, b""
        if opcode == INIT:
            flags = WRITEBACK_CACHE if writeback else 0
            body = struct.pack("<4I2H2I2HI7I", 7, 31, 0, flags, 8, 8, 4096, 1, 1, 0, 0, *[0] * 7)
        elif opcode == LOOKUP and request[40:] == b"file\0":
            body = struct.pack("<4Q2I", FILE, 0, 0, 0, 0, 0) + attributes(FILE)
        elif opcode == GETATTR:
            body = struct.pack("<Q2I", 0, 0, 0) + attributes(node)
        elif opcode == OPEN:
            body = struct.pack("<Q2I", 1, 0, 0)
        elif opcode == FORGET:
            continue
        elif later and opcode in (RELEASE, FLUSH):
            pass
        else:
            status = -(errno.ENOENT if opcode == LOOKUP else errno.ENOSYS)
        os.write(fuse, struct.pack("<IiQ", 16 + len(body), status, unique) + body)
        if opcode == OPEN and not later:
            print("open", flush=True)
            signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
