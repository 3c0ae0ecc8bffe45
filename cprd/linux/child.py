"""Look at foreign descriptors from a child process.

Whoever peeks a bundle gets the descriptors of others installed, and must close them again; close()
of a file on a dead FUSE mount, or of a socket that lingers, can hang for as long as it likes. Here
it hangs an orphan with nothing in its hands but those descriptors, never the command.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

from cprd.errors import CODES, CprdError, LimitExceeded, Timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

T = TypeVar("T", bound="Mapping[str, Any]")

PATIENCE = 20.0  # seconds; a peek of 60,000 descriptors takes one or two
MEMORY = 1 << 30  # bytes that a look may take
_ANSWER = 256 << 20  # bytes of an answer


def in_a_child(look: Callable[[], T], patience: float = PATIENCE, *, memory: int = MEMORY) -> T:
    """What `look` returns in a process of its own, or the CprdError that it raises there.

    That process runs with the soft RLIMIT_NOFILE raised, and is not waited for once it has
    answered. Raises Timeout, and kills it, when it has not after `patience` seconds; LimitExceeded
    when it took more than `memory` bytes."""
    import select
    import signal
    import time

    import msgpack

    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        # The looker is a grandchild: what we become by exec must not find a child it never had.
        os.close(read)
        if os.fork() == 0:
            _answer(look, write, memory)
        os._exit(0)
    os.close(write)
    try:
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass  # whoever started us ignores SIGCHLD: it ended, and left no status behind
        answer = bytearray()
        deadline = time.monotonic() + patience
        poll = select.poll()
        poll.register(read, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                if len(answer) >= 4:
                    os.kill(int.from_bytes(answer[:4], "big"), signal.SIGKILL)
                raise Timeout(
                    f"the look at what is held took over {patience:g} s, and was given up: one of"
                    " its descriptors may belong to a file system that does not answer"
                )
            chunk = os.read(read, 1 << 16)
            if not chunk:
                break
            answer += chunk
            if len(answer) > _ANSWER:
                raise LimitExceeded(f"what is held takes over {_ANSWER >> 20} MiB to describe")
    finally:
        os.close(read)
    if len(answer) <= 4:
        raise CprdError("the process that looked died: see the kernel's log (memory?)")
    kind, value = msgpack.unpackb(memoryview(answer)[4:], strict_map_key=False)
    if kind:
        raise CODES.get(kind, CprdError)(value)
    answered: T = value
    return answered


def _answer(look: Callable[[], object], write: int, memory: int) -> None:
    """In the child: look, write the answer as one msgpack value, let go of the pipe, end."""
    import msgpack

    from cprd.linux.nofile import limit_memory, raise_soft_limit

    swollen = msgpack.packb(
        ["LimitExceeded", f"a look at what is held takes more than {memory >> 20} MiB of memory"]
    )
    try:
        os.write(write, os.getpid().to_bytes(4, "big"))
        raise_soft_limit()
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):  # a pipeline that we were in must not wait for an orphan
            os.dup2(null, standard)
        limit_memory(memory)
        try:
            answer = msgpack.packb(["", look()], default=str, unicode_errors="surrogateescape")
        except CprdError as error:
            answer = msgpack.packb([type(error).__name__, str(error)])
        except MemoryError:
            answer = swollen
        except Exception as error:
            answer = msgpack.packb(["CprdError", f"{type(error).__name__}: {error}"])
        rest = memoryview(answer)
        while rest:
            rest = rest[os.write(write, rest) :]
        os.close(write)
    finally:
        os._exit(0)
