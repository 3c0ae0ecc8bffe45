"""What is still to be let go of, across an exec: reexec passes the work on, releasing goes on."""

from __future__ import annotations

from typing import NamedTuple


class Passed(NamedTuple):
    """Work across an exec. All descriptors are owned."""

    releasers: list[tuple[int, int, int]]  # uid, messages without an acknowledgement, socket
    closing: list[tuple[int, int]]  # uid, descriptor
    draining: list[tuple[int, int]]  # the same, not sent yet
    sent: list[tuple[int, int]]  # the same, with the releaser
