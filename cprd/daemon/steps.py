"""Steps of the life cycle: written down, then made true, then followed up.

Nothing here awaits: a request is atomic towards every other request.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import trio

from cprd.bundle import inspect
from cprd.daemon import log
from cprd.daemon.clock import now
from cprd.daemon.connection import Connection
from cprd.daemon.counting import Counting
from cprd.daemon.pidfds import Pidfds
from cprd.daemon.releasing import Releasing
from cprd.daemon.storage.notes import Notes
from cprd.daemon.storage.shelves import Keeper
from cprd.daemon.turns import Pace
from cprd.daemon.waiters import Waiters
from cprd.errors import CprdError, Damaged
from cprd.linux import processes
from cprd.linux.pause import point
from cprd.linux.rights import close_all
from cprd.protocol import living
from cprd.protocol.lifecycle import HELD, LIVE, NOT_PUT_BACK, Hold, changed, why_not
from cprd.protocol.messages import pid_text
from cprd.protocol.names import Key
from cprd.protocol.registry import Caller, Ended, Registry, Step

LONGEST_SLEEP = 60.0  # s: a timer of the event loop stands still while the machine sleeps
ORPHANED = 60.0  # s after a restart

ENDED = "ended"  # of an owner, where the kernel does not say how

Roles = dict[str, int]  # pidfds


class Steps:
    """The holds, processes, connections and waiters. `connections` belongs to the server."""

    def __init__(
        self,
        registry: Registry,
        keeper: Keeper,
        connections: set[Connection],
        releasing: Releasing,
        notes: Notes | None = None,
    ) -> None:
        self.registry = registry
        self.notes = notes or Notes("")
        self.counting = Counting(registry, keeper, releasing, self.observe)
        self.keeper = keeper
        self.connections = connections
        self.pidfds = Pidfds(self._process_ended)
        keeper.pidfds_of = self.pidfds.of
        self.waiters = Waiters()
        # By generation and token: the connection that last spoke for a claim.
        self._owners: dict[tuple[int, bytes], Connection] = {}
        self._deadline_moved = trio.Event()  # to before `_sleeps_until`
        self._sleeps_until = 0.0

    # At the start

    def adopt(self, left: list[tuple[Hold, Roles]], hidden: str) -> None:
        """Take over the holds and pidfds (owned from now on) of an earlier daemon."""
        self.registry.hidden = hidden
        if hidden:
            log.event("blind", level=log.ERROR, why=hidden)
        for old in self.registry.adopt(hold for hold, _ in left):
            log.event("outdated", **_named(old))
            self.keeper.forget(old)
        for hold, pidfds in left:
            if self.registry.get(hold.generation) is None:
                close_all(pidfds.values())
                continue
            self.pidfds.keep(hold.generation, pidfds, hold.roles)
            if hold.live and hold.allows("counted") and not hold.fds:
                self.counting.left(hold.generation)
            if hold.phase != HELD:
                log.event("adopted", phase=hold.phase, **_named(hold), fds=hold.fds)

    def adopt_notes(self) -> None:
        """Keep names for living owners of live holds whose roots ended with an earlier daemon."""
        for note in list(self.notes.read()):
            hold = note.hold
            there = self.registry.get(hold.generation)
            if there is not None and self.notes.match(there):
                continue  # this cprd has the root
            if self.registry.of(hold.key):  # from a store, where this hold ended, or never began
                self.notes.remove(hold.generation)
                continue
            owner = note.owner()
            if owner < 0:
                self.notes.remove(hold.generation)
                log.event("ended", level=log.WARNING, how=NOT_PUT_BACK, **_named(hold))
                continue
            self.registry.put(hold)
            self.pidfds.keep(hold.generation, {"owner": owner}, hold.roles)
            log.event("adopted", phase="live", **_named(hold), why=why_not(hold, now()))

    async def end_orphans(self) -> None:
        """End prepared saves when the saver cannot be watched, and has not come back in time."""
        orphans = [
            hold.generation
            for hold in self.registry
            if hold.allows("saver gone") and "saver" not in self.pidfds.of(hold.generation)
        ]
        if orphans:
            await trio.sleep(ORPHANED)
        for generation in orphans:
            if not any(generation in other.prepared for other in self.connections):
                self.observe(self.registry.saver_gone(generation))

    # Changing

    def perform(
        self,
        step: Step,
        *,
        bundle_fd: int = -1,
        pidfds: Mapping[int, Roles] | None = None,
        require_store: bool = False,
        taken_over: bool = False,
    ) -> None:
        """Write a step down, then make the step true; nothing for a step that changes nothing.
        Raises LimitExceeded; nothing changed then.

        `bundle_fd` is borrowed. `pidfds` (new only, by generation and role) are owned from now
        on, whatever comes of the step. `taken_over`: the claimant is to be the owner."""
        if not step.changes:
            for unused in (pidfds or {}).values():
                close_all(unused.values())
            return
        added = {of: self._news(of, roles) for of, roles in (pidfds or {}).items()}
        known: dict[int, Roles] = {}
        wanted: dict[int, Roles] = {}
        for hold in step.put:
            generation, roles = hold.generation, hold.roles
            fds = {**self.pidfds.of(generation), **added.get(generation, {})}
            known[generation] = fds
            wanted[generation] = {role: fd for role, fd in fds.items() if role in roles}
        try:
            for hold in step.put:
                if hold.phase == LIVE and "owner" in wanted[hold.generation]:
                    self.notes.write(hold, wanted[hold.generation]["owner"])
                elif taken_over and self.keeper.kept == "memory":
                    claimed = changed(hold, saver=hold.claimant)
                    self.notes.write(claimed, wanted[hold.generation]["claimant"])
            if self.keeper.kept == "store":  # and the next daemon would find the end without a root
                self._forget_notes(step)
            self.keeper.write(step, bundle_fd, wanted, require_store=require_store)
        except BaseException:
            for hold in step.put:
                self.notes.match(self.registry.get(hold.generation) or changed(hold, token=b""))
            for new in added.values():
                close_all(new.values())
            raise
        self._apply(step, known)

    def _news(self, generation: int, roles: Roles) -> Roles:
        """Pidfds of `roles`, owned, whose processes are not known yet; the others are closed: what
        is parked already is not parked again."""
        known = self.pidfds.of(generation)
        news = dict(roles)
        for role in roles.keys() & known.keys():
            if processes.same(known[role], roles[role]):
                os.close(news.pop(role))
        return news

    def observe(self, step: Step) -> None:
        """Perform a step that has happened anyway (a process ended, a lease is over).

        Where the step cannot be written down, the step is true all the same, and found again from
        the pidfds at the next start."""
        try:
            self.perform(step)
        except (CprdError, OSError) as error:
            log.event("not-written", level=log.ERROR, why=str(error))
            self._apply(
                step, {hold.generation: self.pidfds.of(hold.generation) for hold in step.put}
            )

    def _apply(self, step: Step, pidfds: Mapping[int, Roles]) -> None:
        """Make a step true, and follow up. Raises nothing."""
        asked: dict[str, Any] = (
            {} if step.by is None else {"by_uid": step.by.uid, "by_pid": step.by.pid}
        )
        before = {hold.generation: self.registry.get(hold.generation) for hold in step.put}
        self.registry.apply(step)
        point("daemon:applied")
        for hold in step.put:
            self.pidfds.keep(hold.generation, pidfds[hold.generation], hold.roles)
        for ended in step.ended:
            self._after_end(ended, asked)
        self.keeper.let_go(step.ended)
        self._forget_notes(step)
        for hold in step.put:
            self._after_put(before[hold.generation], hold, asked)
        at = self.registry.next_deadline()
        if at is not None and at < self._sleeps_until:
            self._deadline_moved.set()
        if self.waiters.waiting:
            for key in {hold.key for hold in (*step.put, *(ended.hold for ended in step.ended))}:
                self.waiters.serve(key)

    def _forget_notes(self, step: Step) -> None:
        """Forget the owners and claimants that are none after a step."""
        if not self.notes.noted:
            return
        for hold in step.put:
            self.notes.match(hold)
        for ended in step.ended:
            self.notes.remove(ended.hold.generation)

    def _after_end(self, ended: Ended, asked: Mapping[str, Any]) -> None:
        hold = ended.hold
        self.disown(hold)
        self.pidfds.keep(hold.generation, self.pidfds.of(hold.generation), ())
        log.event("ended", how=ended.how, **_named(hold), **asked)

    def _after_put(self, old: Hold | None, hold: Hold, asked: Mapping[str, Any]) -> None:
        if old is None or old.phase != hold.phase:
            log.event(
                hold.phase,
                **_named(hold),
                pid=hold.claimant or hold.saver,
                fds=hold.fds,
                attempts=hold.attempts or None,
                why=_why(old, hold),
                **asked,
            )
        if old is None:
            return
        uncounted = old.phase == LIVE or not hold.fds  # a claim may have come first
        if hold.live and old.phase != hold.phase and uncounted and hold.allows("counted"):
            self.counting.left(hold.generation)
        if hold.phase == HELD and old.allows("claimant gone"):
            self.look_for_damage(hold)
        if old.token and old.token != hold.token:
            self.disown(old)

    def look_for_damage(self, hold: Hold) -> None:
        """Find a hold damaged when the last claimant received from the bundle, not just peeked."""
        if not hold.parked:
            return
        try:
            inspect.check(self.keeper.bundle(hold.generation), hold.parked)
        except Damaged as error:
            self.observe(self.registry.found_damaged(hold.generation, str(error)))
        except (CprdError, OSError):
            pass  # no descriptor left to look with; the next load looks again

    # Processes, connections, time

    def refresh(self, key: Key) -> None:
        """Learn of ended processes before the event loop tells."""
        for hold in self.registry.of(key):
            self.pidfds.look(hold.generation)

    def look_for_exec(self, key: Key, by: Connection, caller: Caller) -> None:
        """Learn that the process of the owner of a live hold, which asks on `by`, has executed
        another program. Whoever repeats a request has not: the end of cprd ends a connection as
        well."""
        for hold in self.registry.of(key):
            replaced = hold.phase == LIVE and self._was_replaced(hold, by)
            if replaced and self.registry.recall(caller, key) is None:
                how = "its process executed another program"
                self.observe(living.owner_gone(self.registry, now(), hold.generation, how))

    def _was_replaced(self, hold: Hold, by: Connection) -> bool:
        """Whether `by` is of the owner's process, and the connection of the owner has ended. (A
        pidfd tells nothing of exec().)"""
        owner = self.pidfds.of(hold.generation).get("owner", -1)
        if min(owner, by.pidfd) < 0 or not processes.same(owner, by.pidfd):
            return False
        other = self._owners.get((hold.generation, hold.token))
        return other not in self.connections or other.has_hung_up

    def _process_ended(self, generation: int, role: str) -> None:
        hold = self.registry.get(generation)
        if hold is None:
            return
        if role == "claimant":
            how = "its process ended"
            self.observe(self.registry.claimant_gone(now(), generation, hold.token, how))
            return
        if role == "owner":
            how = self.last_end(hold)
            self.observe(living.owner_gone(self.registry, now(), generation, how))
            return
        if role == "after_exit":
            self.observe(self.registry.predecessor_gone(now(), generation))
            return
        gone = {"saver": self.registry.saver_gone, "acting": self.registry.acting_gone}
        self.observe(gone[role](generation))

    def last_end(self, hold: Hold) -> str:
        """How the last owner of a live hold ended, as far as the kernel tells by now."""
        pidfd = self.pidfds.of(hold.generation).get("owner", -1)
        if hold.last_end not in ("", ENDED):
            return hold.last_end
        return (processes.how_ended(pidfd) if pidfd >= 0 else "") or ENDED

    def process_ended(self, hold: Hold, pid: int) -> None:
        """The owner of a hold says that the process of a role has ended."""
        for role, watched in (("after_exit", hold.after_exit), ("acting", hold.acting)):
            if pid == watched > 0:
                self._process_ended(hold.generation, role)

    def own_claim(self, connection: Connection, generation: int, token: bytes) -> None:
        """The end of this connection, and of no other, ends the claim from now on. (A live hold
        belongs to a connection in the same way, whose end does not matter to the hold.)"""
        claim = (generation, token)
        other = self._owners.get(claim)
        if other is not connection:
            if other is not None:
                other.claims.discard(claim)
            self._owners[claim] = connection
        connection.claims.add(claim)

    def disown(self, hold: Hold) -> None:
        """The token of `hold` is over: the end of no connection matters to the hold any more."""
        if not hold.token:
            return
        claim = (hold.generation, hold.token)
        owner = self._owners.pop(claim, None)
        if owner is not None:
            owner.claims.discard(claim)
        if hold.allows("commit"):
            for connection in self.connections:
                connection.prepared.discard(hold.generation)

    async def end_claims(self, connection: Connection) -> None:
        """A connection ended: claims and prepared saves of the connection end, in pieces. A claim
        that another connection takes over meanwhile (`own_claim`) goes on."""
        pace = Pace()
        while connection.claims:
            generation, token = connection.claims.pop()
            how = "its connection ended"
            self.observe(self.registry.claimant_gone(now(), generation, token, how))
            await pace.pause()
        while connection.prepared:
            self.observe(self.registry.saver_gone(connection.prepared.pop()))
            await pace.pause()

    async def watch_deadlines(self) -> None:
        """End leases and ttls in time. Until cancelled."""
        while True:
            pace = Pace()
            while (step := self.registry.expire(now())) is not None:
                self.observe(step)
                await pace.pause()
            self.registry.replies.forget_old(now())
            at = self.registry.next_deadline()
            start = now()
            latest = start + LONGEST_SLEEP
            self._sleeps_until = latest if at is None else min(at, latest)
            self._deadline_moved = trio.Event()
            with trio.move_on_after(max(0.0, self._sleeps_until - start)):
                await self._deadline_moved.wait()


def _named(hold: Hold) -> dict[str, Any]:
    """The fields by which the log names a hold."""
    return {"uid": hold.uid, "name": hold.name, "generation": hold.generation}


def _why(old: Hold | None, hold: Hold) -> str | None:
    """Why a hold has its phase, for the log."""
    if old is not None and old.phase == LIVE and hold.phase == HELD:
        return f"its owner, {pid_text(hold.saver)}: {hold.last_end}"
    return hold.reason or (hold.last_reject if hold.phase == HELD else "") or None
