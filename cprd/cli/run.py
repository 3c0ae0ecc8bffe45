"""cprctl run: start a service, from the hold NAME or cold; cprd keeps the listeners.

Each --listen is a descriptor `listener`, or NAME, with its position as id (listener, listener.1,
...). Held or cold, cprd keeps the listeners for the next start from before CMD begins: CMD may exit
or crash, a hold is there at every moment. A second `run` while CMD lives ends with exit status 4. A
held socket is taken for a --listen when clients of the address reach the socket. A listener that
serves no --listen is closed, and the length of the queue is said.
"""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from functools import partial
from itertools import combinations
from socket import SOCK_DGRAM
from typing import NamedTuple

from cprd import Daemon, State
from cprd.bind import environment, object_for
from cprd.cli.addresses import KEY, Listen, parse_all, resolve
from cprd.cli.arguments import SHORTEST, YEARS, add_name, connect, seconds
from cprd.cli.become import Crew, Deferred, RaisedLimit, become, not_become, program
from cprd.cli.load import Look, claim_that_fits, look_at, save_back
from cprd.cli.matching import NEW, Held, Plan, conflict, elsewhere, plan
from cprd.cli.names import fd_name
from cprd.cli.opening import CannotListen, Opened, adjust, remove
from cprd.errors import AlreadyHeld, CprdError, InvalidInput, NotHeld, Timeout, Unavailable
from cprd.linux.child import in_a_child
from cprd.linux.sockets import facts, has_ipv6, leads_to, namespace, others_with, queued
from cprd.linux.stdio import note

MARK = "cprctl.run"  # the section of a hold with the keys, other than `listener`, that are ours
HOLDS = 100  # that are looked through for the one with an address
LET_GO = 3.0  # seconds; what was confirmed is closed within one


class Start(NamedTuple):
    """One start: the arguments, and the descriptors for the command."""

    name: str
    asked: list[Listen]
    ttl: float | None
    bind: bool
    crew: Crew
    opened: Opened
    look: Look
    limit: RaisedLimit
    ours: set[tuple[str, int]]  # the keys that are run's own, beside `listener`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "cprctl run NAME [--listen [NAME=]ADDR[,OPTION...] ...] [--bind] [--ttl S] [--cold]"
        " [--owner USER] -- CMD [ARG ...]"
    )
    parser.epilog = (
        "ADDR: [HOST:]PORT, udp:[HOST:]PORT, unix:PATH, seqpacket:PATH or dgram:PATH."
        " OPTION: mode=660, owner=USER:GROUP, backlog=N, reuseport, v6only, freebind, device=IF."
        " Without --listen every listening socket of the hold is kept. CMD finds its descriptors"
        " as from systemd: LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES; with --bind it binds by itself,"
        " to exactly the addresses of --listen, and knows nothing of all this."
    )
    add_name(parser)
    parser.add_argument("--listen", action="append", default=[], metavar="ADDR")
    parser.add_argument(
        "--bind", action="store_true", help="answer the bind() of a CMD that opens its own sockets"
    )
    parser.add_argument(
        "--ttl",
        type=seconds(YEARS, SHORTEST),
        metavar="S",
        help="let go of it S seconds after CMD's end",
    )
    parser.add_argument(
        "--cold", action="store_true", help="start without cprd, and unheld, when nobody answers"
    )
    parser.set_defaults(takes_command=True)


def run(args: argparse.Namespace) -> int:
    asked = addresses(args)
    file = program(args.command)
    preload = object_for(file, args.command) if args.bind else ""
    start = Start(
        name=args.name,
        asked=asked,
        ttl=args.ttl,
        bind=bool(preload),
        crew=Crew(),
        opened=Opened(),
        look=look_at(args),
        limit=RaisedLimit(),
        ours={listen.key for listen in asked},
    )
    crew = start.crew
    try:
        deferred = _begin(args, start)
        _unblock(start)
        variables = partial(_variables, start, preload) if preload else None
        become(file, args.command, crew, start.limit, deferred, variables)
    except BaseException as error:
        start.opened.undo()
        if crew.warm is None:
            raise
        back = (save_back if crew.fds else _nothing) if crew.warm else _drop
        not_become(error, args.name, lambda: back(args, crew))


def addresses(args: argparse.Namespace) -> list[Listen]:
    """The --listen arguments, with numeric hosts. Raises InvalidInput, also for two addresses where
    the kernel refuses the second, and CprdError for a name without an address."""
    parsed = parse_all(args.listen)
    ipv6 = has_ipv6() if any(listen.both for listen in parsed) else True
    asked = [resolve(listen, ipv6=ipv6) for listen in parsed]
    for one, other in combinations(asked, 2):
        if conflict(one, other):
            raise InvalidInput(
                f"--listen {one.text} and --listen {other.text}: the kernel gives an address to one"
                " socket (or give both reuseport)"
            )
    for listen in asked if args.bind else ():
        if not listen.path and not listen.port:
            raise InvalidInput(f"--listen {listen.text}: --bind wants the port that CMD binds")
    return asked


def _begin(args: argparse.Namespace, start: Start) -> Deferred:
    """Fill the crew, by way of cprd or, with --cold, without."""
    try:
        daemon = connect(args)
    except (Unavailable, Timeout) as error:
        if not args.cold:
            raise
        note(f"cprctl: started without cprd, so nothing is held for the next start: {error}")
        _open_all(start)
        return Deferred()
    with daemon:
        try:
            return begin(daemon, start)
        except CannotListen as failed:
            raise CprdError(f"{failed}{_holder(args, start.name, failed)}") from None


def _holder(args: argparse.Namespace, name: str, failed: CannotListen) -> str:
    """The other hold with the address, for an error message (ss(8) shows no process); "" when
    none is found within a few seconds."""
    if not failed.in_use or failed.listen.path:
        return ""
    kind, end = ("udp ", "") if failed.listen.kind == SOCK_DGRAM else ("tcp ", " listening")
    address = f":{failed.listen.port}{end}"

    def look() -> dict[str, str]:
        with connect(args) as daemon:
            for row in daemon.list()[:HOLDS]:
                with suppress(CprdError):
                    mine = row["uid"] == os.geteuid()
                    other = row["name"] if mine else f"{row['uid']}/{row['name']}"
                    shown = daemon.show(other) if other != name else {"descriptors": ()}
                    for each in shown["descriptors"]:
                        what = str(each["what"])
                        if what.startswith(kind) and what.endswith(address):
                            return {"name": other, "what": what}
        return {}

    try:
        found = in_a_child(look, patience=3.0)
    except CprdError:
        return ""
    if not found:
        return ""
    return (
        f": {found['name']} holds {found['what']} (cprctl drop {found['name']}, or another name?)"
    )


def begin(daemon: Daemon, start: Start) -> Deferred:
    """Fill the crew from the hold, or with new listeners; crew.warm says which."""
    warm = partial(_warm, daemon, start)
    try:
        return warm()
    except NotHeld as error:
        if not start.asked:
            raise NotHeld(
                f"{error}; and no --listen says what to open: is {start.name!r} the right name?"
            ) from None
    try:
        return _cold(daemon, start)
    except AlreadyHeld:
        pass  # somebody else was faster
    except CprdError:
        # It may be a service that started between our look and now which has the address: then
        # its hold says so, better than "address in use".
        with suppress(NotHeld):
            return warm()
        raise
    return warm()


# -- warm ----------------------------------------------------------------------------------------


def _warm(daemon: Daemon, start: Start) -> Deferred:
    """Claim, and confirm with the listeners as the next hold. Raises NotHeld, Busy, CprdError."""
    crew, opened = start.crew, start.opened
    with claim_that_fits(daemon, start.name, start.look, start.limit) as claim:
        held, plan = _adopt(claim.state, start)
        new = {i for i, j in enumerate(plan.taken) if j < 0}
        opened.open(start.asked[i] for i in new.difference(plan.later))
        _insert_new(start)
        crew.fdnames()
        _check_bind(start)
        kept = _listeners(start)
        deferred = Deferred()
        claim.confirm(next=kept, after_exit=True, ttl=start.ttl)
        crew.warm = True
        opened.keep()
        _close(claim.state, held, plan)
    if plan.later:
        # Only now that nobody holds what was in the way can the address be bound.
        opened.open((start.asked[i] for i in plan.later), patience=LET_GO)
        _insert_new(start)
        everything = _listeners(start)
        assert everything is not None
        daemon.save(start.name, everything, if_exists="replace", ttl=start.ttl, after_exit=True)
        opened.keep()
    return deferred


def _adopt(state: State, start: Start) -> tuple[list[Held], Plan]:
    """Move `state` into the crew: first the sockets that serve --listen arguments, in that order,
    then the rest. Listeners that are to be closed stay in `state`. Raises CprdError when a socket
    of the program is in the way of a new socket."""
    here = namespace()
    marked = {(str(name), int(id)) for name, id in state.pop(MARK, ())}
    held = _held(state, start, start.ours | marked)
    if not start.asked:
        start.ours.update(marked)
    made = plan(start.asked, held, here)
    for i, j in made.blocked:
        raise CprdError(
            f"cannot listen on {start.asked[i].text}: {start.name} holds {_spell(held[j])}, which"
            f" is in the way: ask for that address, or cprctl drop {start.name}"
        )
    for listen, j in zip(start.asked, made.taken, strict=True):
        if j != NEW:
            start.crew.add(*listen.key, state.take_fd(*held[j].key))
            adjust(start.crew.fds[-1], listen)
    if not start.asked:
        made = made._replace(left=[], useless={}, later=[])
    left = {held[j].key for j in made.left}
    staying = [each for each in held if each.key not in left]
    _say_elsewhere(staying, here)
    _say_shared(start, staying)
    start.crew.take(state, but=left)
    return held, made


def _held(state: State, start: Start, ours: set[tuple[str, int]]) -> list[Held]:
    """The sockets among the descriptors of `state`. `ours`: keys of `cprctl run`."""
    paths = {listen.path for listen in start.asked if listen.is_file}
    found = []
    for name, id, fd in state.fds():
        known = facts(fd)
        if known is None:
            continue
        leads = frozenset(path for path in paths if leads_to(path, fd, known))
        mine = name == KEY or (name, id) in ours
        found.append(Held((name, id), fd, known, mine, leads))
    return found


def _spell(held: Held) -> str:
    return f"{fd_name(*held.key)} ({held.facts})"


def _say_elsewhere(held: list[Held], here: int | None) -> None:
    for each in held:
        if each.facts.listening and elsewhere(each.facts, here):
            note(
                f"cprctl: the held {_spell(each)} belongs to another network namespace: nobody"
                " reaches it by an address of this one (--listen ADDR opens one here)"
            )


def _say_shared(start: Start, held: list[Held]) -> None:
    """Name other processes with a listener open."""
    inodes = {each.facts.inode for each in held if each.ours or each.facts.listening}
    for pid, name in others_with(inodes).items():
        note(
            f"cprctl: pid {pid} ({name}) has a listener of {start.name} open, and may take its"
            " connections: did CMD go into the background, or leave workers behind? CMD has to"
            " stay in the foreground"
        )


def _close(state: State, held: list[Held], made: Plan) -> None:
    """Close the sockets that no --listen wants, say how much was queued, remove the files."""
    for j in made.left:
        each = held[j]
        waiting = queued(each.fd, each.facts)
        why = made.useless.get(j) or "it is not asked for by any --listen any more"
        lost = f", with {waiting} that nobody had taken" if waiting else ""
        note(f"cprctl: the held listener {each.facts} is closed{lost}: {why}")
        path = each.facts.path
        if os.path.isabs(path) and leads_to(path, each.fd, each.facts):
            file = os.stat(path)  # which stays where anybody serves: the search ends nowhere early
            if not others_with([each.facts.inode], most=float("inf")):
                remove(path, file.st_dev, file.st_ino)
        state.delete_fd(*each.key)


def _insert_new(start: Start) -> None:
    """Put the new listeners among the others, in the order of --listen."""
    at = 0
    for listen in start.asked:
        if listen.key in start.opened:
            start.crew.insert(at, *listen.key, start.opened.take(listen.key))
        at += listen.key in start.crew.keys[at : at + 1]


def _is_listener(start: Start, key: tuple[str, int], fd: int) -> bool:
    known = facts(fd)
    return known is not None and (key in start.ours or key[0] == KEY or known.listening)


def _listeners(start: Start) -> State | None:
    """The listeners as the next hold, borrowed from the crew; None without listeners."""
    state = State()
    for key, fd in zip(start.crew.keys, start.crew.fds, strict=False):
        if _is_listener(start, key, fd):
            state.save_fd(*key, fd)
    named = [list(key) for key in sorted(start.ours) if key[0] != KEY]
    if named:
        state[MARK] = named
    return state if state.fd_count else None


def _unblock(start: Start) -> None:
    """Make listeners block again, as systemd does: the last command may have set O_NONBLOCK."""
    for key, fd in zip(start.crew.keys, start.crew.fds, strict=False):
        if _is_listener(start, key, fd):
            os.set_blocking(fd, True)


# -- a command that binds by itself --------------------------------------------------------------


def _check_bind(start: Start) -> None:
    """Refuse, before the confirm, a hold with more than listeners. Raises CprdError."""
    if not start.bind:
        return
    crew = start.crew
    keyed = zip(crew.keys, crew.fds, strict=False)
    lost = [fd_name(*key) for key, fd in keyed if not _is_listener(start, key, fd)]
    lost += [f"section.{key}" for key in crew.sections]
    if lost:
        raise CprdError(
            f"{start.name} holds more than listeners, which a command started with --bind cannot"
            f" take: {', '.join(lost[:5])}; start it without --bind, or cprctl drop {start.name}"
        )


def _variables(start: Start, preload: str) -> dict[str, str]:
    """The environment by which the preloaded object knows the listeners."""
    paths = {listen.key: listen.path for listen in start.asked if listen.is_file}
    sockets = []
    for key, fd in zip(start.crew.keys, start.crew.fds, strict=True):
        known = facts(fd)
        assert known is not None
        path = paths.get(key, known.path)
        sockets.append((fd, known.inode, path if leads_to(path, fd, known) else ""))
    return environment(preload, sockets)


def _nothing(args: argparse.Namespace, crew: Crew) -> str:
    """Every held listener was in the way of a new one, and the new one failed all the same."""
    del crew
    return f"{args.name} held only what was in the way, and holds nothing now"


# -- cold ----------------------------------------------------------------------------------------


def _cold(daemon: Daemon, start: Start) -> Deferred:
    """Open the listeners and hold them. Raises AlreadyHeld, or CprdError for a bad address."""
    try:
        _open_all(start)
        state = _listeners(start)
        assert state is not None
        daemon.save(start.name, state, if_exists="error", ttl=start.ttl, after_exit=True)
        start.crew.warm = False
        return Deferred()
    except BaseException:
        start.crew.close()
        start.opened.undo()
        raise


def _open_all(start: Start) -> None:
    start.opened.open(start.asked)
    _insert_new(start)


def _drop(args: argparse.Namespace, crew: Crew) -> str:
    """End the hold of a cold start that failed."""
    if crew.fds:
        with connect(args) as daemon:
            daemon.drop(args.name)
    return "nothing was held before, and nothing is now"
