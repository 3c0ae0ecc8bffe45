"""cprctl run: start a service, with what is held under NAME or cold; its listeners stay held.

Each --listen is a descriptor `listener` with its position as id (listener, listener.1, ...). Held
or cold, cprd keeps the listeners for the next start from before CMD begins: whether it exits or
crashes, there is no moment without a hold, and a second `run` while CMD lives is told so (exit 4).
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from cprd import Daemon, State
    from cprd.cli import Verbs
    from cprd.cli.addresses import Address
    from cprd.cli.become import Crew, Deferred, RaisedLimit
    from cprd.cli.load import Look

KEY = "listener"


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "run",
        help="start a service with what is held, or cold",
        usage="cprctl run NAME [--listen ADDR ...] -- CMD [ARG ...]",
        description=__doc__,
        epilog="ADDR: [HOST:]PORT, udp:[HOST:]PORT, unix:PATH, seqpacket:PATH or dgram:PATH."
        " Without --listen every listening socket of the hold is kept. CMD finds its descriptors"
        " as from systemd: LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES.",
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--listen", action="append", default=[], metavar="ADDR")
    parser.set_defaults(run=run, takes_command=True)


def run(args: argparse.Namespace) -> int:
    from cprd.cli.addresses import parse
    from cprd.cli.become import Crew, RaisedLimit, become, not_become, program
    from cprd.cli.connection import connect
    from cprd.cli.load import look_at, save_back

    addresses = [parse(text) for text in args.listen]
    file = program(args.command)
    limit = RaisedLimit()
    crew = Crew()
    look = look_at(args)
    try:
        with connect(args) as daemon:
            deferred = start(daemon, args.name, addresses, crew, look=look, limit=limit)
        become(file, args.command, crew, limit, deferred)
    except BaseException as error:
        if crew.warm is None:
            raise
        back = save_back if crew.warm else _undo
        not_become(error, args.name, lambda: back(args, crew))


def start(
    daemon: Daemon,
    name: str,
    addresses: list[Address],
    crew: Crew,
    *,
    look: Look,
    limit: RaisedLimit,
) -> Deferred:
    """Fill `crew` from the hold, or with new listeners; crew.warm says which."""
    from cprd.errors import AlreadyHeld, CprdError, NotHeld

    warm = partial(_warm, daemon, name, addresses, crew, look=look, limit=limit)
    try:
        return warm()
    except NotHeld:
        pass
    try:
        return _cold(daemon, name, addresses, crew)
    except AlreadyHeld:
        pass  # somebody else was faster
    except CprdError:
        # It may be a service that started between our look and now which has the address: then
        # its hold says so, better than "address in use".
        with suppress(NotHeld):
            return warm()
        raise
    return warm()


def _warm(
    daemon: Daemon,
    name: str,
    addresses: list[Address],
    crew: Crew,
    *,
    look: Look,
    limit: RaisedLimit,
) -> Deferred:
    """Claim, and confirm with the listeners as the next hold. Raises NotHeld, Busy."""
    from cprd.cli.become import Deferred
    from cprd.cli.load import claim_that_fits

    with claim_that_fits(daemon, name, look, limit) as claim:
        _adopt(claim.state, addresses, crew)
        crew.fdnames()
        kept = _listeners(crew)
        deferred = Deferred()
        claim.confirm(next=kept, after_exit=True)
        crew.warm = True
    return deferred


def _adopt(state: State, addresses: list[Address], crew: Crew) -> None:
    """All of `state` into `crew`, its listeners as `addresses` want them: first, in their order."""
    import os

    from cprd.cli.addresses import match, open_listener
    from cprd.linux.stdio import note

    if addresses:
        ids = match(addresses, {id: fd for _, id, fd in state.fds(KEY)})
        for position, (id, address) in enumerate(zip(ids, addresses, strict=True)):
            fd = state.take_fd(KEY, id) if id >= 0 else open_listener(address).detach()
            crew.add(KEY, position, fd)
        for _, id, fd in list(state.fds(KEY)):
            note(
                f"cprctl: the held listener {KEY}.{id} (descriptor {fd}) is not asked for by any"
                " --listen any more: closed"
            )
            os.close(state.take_fd(KEY, id))
    crew.take(state)


def _listeners(crew: Crew) -> State | None:
    """What is to be held for the next start, borrowed from `crew`; None when there is nothing."""
    from cprd import State
    from cprd.cli.addresses import is_listener

    state = State()
    for (name, id), fd in zip(crew.keys, crew.fds, strict=False):
        if name == KEY or is_listener(fd):
            state.save_fd(name, id, fd)
    return state if state.fd_count else None


def _cold(daemon: Daemon, name: str, addresses: list[Address], crew: Crew) -> Deferred:
    """Open the listeners and hold them. Raises AlreadyHeld, or CprdError for a bad address."""
    import os

    from cprd.cli.addresses import open_listener
    from cprd.cli.become import Deferred

    try:
        for position, address in enumerate(addresses):
            crew.add(KEY, position, open_listener(address).detach())
        state = _listeners(crew)
        if state is not None:
            daemon.save(name, state, if_exists="error", after_exit=True)
        crew.warm = False
        return Deferred()
    except BaseException:
        for fd in crew.fds:
            os.close(fd)
        crew.keys.clear()
        crew.fds.clear()
        raise


def _undo(args: argparse.Namespace, crew: Crew) -> str:
    """A cold start that came to nothing leaves nothing held."""
    from cprd.cli.connection import connect

    if crew.fds:
        with connect(args) as daemon:
            daemon.drop(args.name)
    return "nothing was held before, and nothing is now"
