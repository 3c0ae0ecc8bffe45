"""Where holds physically lie, and writing steps down before they count.

`write` puts a step where it outlives this process as far as the place allows; only then may the
registry apply it and the client hear of it. `let_go` does afterwards what can take time.

There is one shelf that counts. Where systemd keeps it, a second one, empty and stored as well, lies
ready to take its place: so a shelf can be written anew at any moment, at once, and without the
store growing; that is the two entries of the store which are always free. See `store` for how they
get there. While the shelf that counts is not stored (the store is full), what an older one that is
stored leads to stays as it is: a slot is not replaced by one that only the newer shelf knows.
Without a manager everything is the same, only that the shelf lives no longer than the process
(which may re-execute itself).
"""

from __future__ import annotations

import os
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

from cprd.daemon import log
from cprd.daemon.closer import Closer
from cprd.daemon.storage import shelf, slot
from cprd.daemon.storage.shelf import Shelf, ShelfFull
from cprd.daemon.storage.slot import Answered, Slot, SlotFull, Unreadable
from cprd.errors import LimitExceeded
from cprd.linux.pause import point
from cprd.protocol.registry import UNREADABLE, Hold, Step

MAX_RECORDS = 30  # in one slot, before it is written anew; each parks up to three pidfds again
OUTCOMES = 512  # of one uid that are remembered across a restart
OUTCOMES_FOR = 300.0  # s
FULL = "cprd's shelf is full: raise net.core.wmem_max, or drop holds"
NOT_STORED = (
    'require="store": this cprd keeps holds in memory only; run it as a systemd service with'
    " FileDescriptorStoreMax=, or as cprd --keep (see cprctl status)"
)
MANY_MESSAGES = 1024  # on a shelf that has few slots, before it is written anew

Pidfds = Mapping[str, int]


class Keeper:
    """The slots of all holds, by generation, and the shelf that they lie on."""

    def __init__(
        self, closer: Closer, clock: Callable[[], float], *, managed: bool = False
    ) -> None:
        """`managed`: a `store.Store` tends it, and takes shelves out of the store before they are
        closed."""
        self.closer = closer
        self.managed = managed
        self.clock = clock
        self.slots: dict[int, Slot] = {}
        self._last_number = 1
        self.shelf = Shelf.create(1)
        self.shelf.complete()
        self.spare: Shelf | None = None
        self.retired: list[Shelf] = []  # to be taken out of the store, then closed
        self.untouchable: list[Shelf] = []  # something on them cannot be read: kept as they are
        self.beside: list[Shelf] = []  # count as well, until the next one takes over their slots
        # Of requests that ended holds: by uid, and by nonce, older first.
        self.outcomes: dict[int, OrderedDict[bytes, Answered]] = {}
        self.wants_spare: Callable[[], None] = lambda: None

    @property
    def kept(self) -> str:
        """Where what is written now is kept."""
        return "store" if self.shelf.durable else "memory"

    def write(
        self,
        step: Step,
        bundle: int,
        pidfds: Mapping[int, Pidfds],
        *,
        require_store: bool = False,
    ) -> None:
        """Write a step down. `bundle` (of a hold that is new, else -1) and the pidfds by
        generation and role stay the caller's. Raises LimitExceeded; then nothing has changed."""
        answers = [self._answered(step)] if step.nonce else []
        made: list[Hold] = []
        try:
            for hold in step.put:
                roles = pidfds.get(hold.generation, {})
                old = self.slots.get(hold.generation)
                if old is None:
                    self._add(hold, Slot.create(hold, bundle, roles, answers))
                    made.append(hold)
                    if require_store and not self.shelf.durable:
                        raise LimitExceeded(NOT_STORED)
                else:
                    self._rewrite(old, hold, roles, answers)
            point("keeper:put")
        except BaseException:
            for hold in made:
                self._unmake(hold)
            raise
        try:
            self._end([ended.hold for ended in step.ended], [] if step.put else answers)
        except LimitExceeded as error:
            if not step.put:
                raise
            # What was put says that it ended: it is committed, and newer.
            log.event("end-not-written", level=log.WARNING, why=str(error))
        point("keeper:ended")

    def _answered(self, step: Step) -> Answered:
        return {"uid": step.uid, "nonce": step.nonce, "answer": step.answer, "at": self.clock()}

    def _unmake(self, hold: Hold) -> None:
        made = self.slots.pop(hold.generation)
        try:
            made.mark_dead(hold)
        except LimitExceeded:
            pass  # draining it says so as well
        self._drain(made, hold.uid)

    def _end(self, holds: Iterable[Hold], answers: Sequence[Answered]) -> None:
        """Holds end: their slots say so, with what was answered (that is what makes it true); then
        the shelf has the answers too, because the slots will be drained."""
        outcomes = []
        for hold in holds:
            dying = self.slots.get(hold.generation)
            if dying is not None:
                dying.mark_dead(hold, answers)
                outcomes += [{**a, "generation": hold.generation} for a in dying.answers]
        self._remember(outcomes)

    def _add(self, hold: Hold, new: Slot) -> None:
        try:
            self._append(lambda: self.shelf.add_slots([slot.fileno_pair(new)]))
        except BaseException:
            new.close()
            raise
        self.slots[hold.generation] = new

    def _append(self, append: Callable[[], None]) -> None:
        """Append to the shelf; a full one is written anew first. Raises LimitExceeded."""
        many = max(MANY_MESSAGES, 2 * len(self.slots))
        if self.shelf.messages > min(many, self.shelf.room // 2):
            try:
                self.compact()
            except LimitExceeded as error:
                log.event("shelf-not-compacted", level=log.WARNING, why=str(error))
        try:
            append()
        except ShelfFull:
            self.compact(must=True)
            try:
                append()
            except ShelfFull:
                raise LimitExceeded(FULL) from None

    @property
    def _may_replace(self) -> bool:
        """Whether a new slot would be as safe as an old one: not when the shelf that counts is not
        stored, and an older one is."""
        older = (*self.retired, *self.beside, *self.untouchable)
        return self.shelf.durable or not any(one.was_durable for one in older)

    def _rewrite(self, old: Slot, hold: Hold, roles: Pidfds, answers: Sequence[Answered]) -> None:
        """A new record in the slot; a slot that is full of them is replaced by a fresh one."""
        try:
            if old.records >= MAX_RECORDS and self._may_replace:
                raise SlotFull
            old.append(hold, roles, answers)
        except SlotFull:
            if self._may_replace and self._replace(old, hold, roles, answers):
                return
            try:
                old.grow()
                old.append(hold, roles, answers)
            except SlotFull:
                raise LimitExceeded(
                    f"the record of {hold.name!r} is full, and the manager's store has no room for"
                    " a new one: raise FileDescriptorStoreMax= of cprd.service"
                ) from None

    def _replace(self, old: Slot, hold: Hold, roles: Pidfds, answers: Sequence[Answered]) -> bool:
        """A fresh slot instead of a full one. False, with nothing changed, when the shelf had to be
        written anew for it, and could not be to the store."""
        bundle = old.bundle()
        try:
            fresh = Slot.create(hold, bundle, roles, (*old.answers, *answers))
        finally:
            os.close(bundle)
        self._add(hold, fresh)
        point("keeper:replaced")
        if not self._may_replace:
            self._unmake(hold)
            self.slots[hold.generation] = old
            return False
        try:
            old.mark_dead(hold)
        except LimitExceeded as error:  # the later one of two counts
            log.event("end-not-written", level=log.WARNING, why=str(error))
        self._drain(old, hold.uid)
        return True

    def _remember(self, outcomes: Sequence[Answered]) -> None:
        """Keep answers to requests whose holds have ended."""
        if not outcomes:
            return
        self._know(outcomes)
        try:
            self._append(lambda: self.shelf.add_outcomes(outcomes))
        except LimitExceeded as error:
            log.event("outcome-not-written", level=log.WARNING, why=str(error))

    def _know(self, outcomes: Iterable[Answered]) -> None:
        for outcome in outcomes:
            of_uid = self.outcomes.setdefault(outcome["uid"], OrderedDict())
            of_uid[outcome["nonce"]] = outcome
            if len(of_uid) > OUTCOMES:
                of_uid.popitem(last=False)

    def settled(self, uid: int, nonce: bytes) -> None:
        """The answer to this request has arrived: nobody will ask for it again."""
        of_uid = self.outcomes.get(uid)
        if of_uid is not None and of_uid.pop(nonce, None) is not None and not of_uid:
            del self.outcomes[uid]

    def _outcomes(self) -> list[Answered]:
        """Those that may still be asked for, older first; the others are forgotten."""
        oldest = self.clock() - OUTCOMES_FOR
        for uid, of_uid in list(self.outcomes.items()):
            while of_uid and next(iter(of_uid.values()))["at"] < oldest:
                of_uid.popitem(last=False)
            if not of_uid:
                del self.outcomes[uid]
        every = [outcome for of_uid in self.outcomes.values() for outcome in of_uid.values()]
        every.sort(key=lambda outcome: float(outcome["at"]))
        return every

    def compact(self, *, must: bool = False) -> None:
        """Write the shelf anew, without what ended. With a store it takes a spare one that is
        stored already; while there is none the old one has to do, and when it is full (`must`)
        one that is not stored: answers say "memory" until a stored one takes over."""
        if self.shelf.durable and self.spare is None and not must:
            return
        new = self.spare or self.new_spare()
        try:
            new.add_slots([slot.fileno_pair(held) for held in self.slots.values()])
            new.add_outcomes(self._outcomes()[-new.room :])  # so many take a quarter of its room
            replaced = [self.shelf, *self.beside]
            new.complete([other.number for other in (*replaced, *self.retired)])
        except BaseException as error:
            self.spare = None
            self._retire(new)
            self.wants_spare()
            if isinstance(error, ShelfFull):
                raise LimitExceeded(FULL) from None
            raise
        log.event(
            "shelf",
            number=new.number,
            slots=len(self.slots),
            replaces=self.shelf.number,
            kept="store" if new.durable else "memory",
        )
        self.shelf, self.spare, self.beside = new, None, []
        for old in replaced:
            self._retire(old)
        point("keeper:compacted")
        self.wants_spare()

    def _retire(self, old: Shelf) -> None:
        """Be done with a shelf; what the store may have of it is taken out first."""
        if self.managed:
            self.retired.append(old)
        else:
            old.close()

    def new_spare(self) -> Shelf:
        """An empty shelf, which the caller owns. Numbers are never used twice."""
        self._last_number += 1
        return Shelf.create(self._last_number)

    def let_go(self, ended: Iterable[Hold]) -> None:
        """Free what ended holds held: soon, in their owners' worker threads."""
        for hold in ended:
            old = self.slots.pop(hold.generation, None)
            if old is not None:
                self._drain(old, hold.uid)

    def forget(self, hold: Hold) -> None:
        """End a hold that was found to be over already."""
        try:
            self._end([hold], [])
        except LimitExceeded as error:  # draining it says so as well
            log.event("end-not-written", level=log.WARNING, why=str(error))
        self.let_go([hold])

    def _drain(self, old: Slot, uid: int) -> None:
        self.closer.run(uid, old.drain)

    def bundle(self, generation: int) -> int:
        """The bundle of a hold: a descriptor that the caller owns."""
        return self.slots[generation].bundle()

    # After a restart

    def shelves(self) -> list[Shelf]:
        """All that must come along when the daemon re-executes itself."""
        spare = [] if self.spare is None else [self.spare]
        return [*self.untouchable, *self.retired, *self.beside, *spare, self.shelf]

    def adopt(
        self,
        pairs: Mapping[int, tuple[socket.socket, socket.socket]],
        durable: frozenset[int],
        once: frozenset[int] = frozenset(),
    ) -> tuple[list[tuple[Hold, dict[str, int]]], str]:
        """Take over the shelves that an earlier daemon left: (outlet, inlet) by number. The store
        has those of `durable`, and had those of `once`.

        Returns the holds with their pidfds by role (the caller owns them), and why there may be
        holds that nobody can name ("": there are none)."""
        blind = ""
        reads: dict[int, tuple[Shelf, shelf.Read]] = {}
        replaced: set[int] = set()
        for number in sorted(pairs):
            outlet, inlet = pairs[number]
            old = Shelf(number, inlet, outlet)
            old.durable = number in durable
            old.was_durable = old.durable or number in once
            read, old.messages = shelf.read(outlet)
            old.counts = read.complete
            reads[number] = old, read
            if read.complete:
                replaced.update(read.replaces)
            self._last_number = max(self._last_number, number, *read.replaces, 0)
        # There is more than one that counts where cprd was downgraded, or upgraded after that: an
        # older one leaves alone what it cannot read of a newer one's shelf, and has one of its own.
        lying = _Lying()
        over: list[tuple[int, int]] = []  # slots of shelves that do not count
        self.shelf.close()
        self.shelf = self.new_spare()
        for number, (old, read) in reads.items():
            if read.unknown and number not in replaced:
                blind = blind or f"shelf {number} cannot be read: {read.unknown}"
            counts = read.complete and number not in replaced
            if not counts and not read.unknown:  # all living slots that are on it lie elsewhere
                over += read.slots
                self._retire(old)
                continue
            alone = read.unreadable or read.unknown
            (self.untouchable if alone else self.beside).append(old)
            self._know(read.outcomes)
            for fds in read.slots:
                why = self._adopt_slot(fds, lying, number)
                blind = blind or why
        if self.beside:
            self.shelf.close()
            self.shelf = self.beside.pop()
        # Slots that only a shelf leads to which is left alone: the one that counts leads to them as
        # well from now on, so that they are as safe as what is saved anew.
        ours = {self.shelf.number, *(other.number for other in self.beside)}
        strays = [
            slot.fileno_pair(held)
            for held in self.slots.values()
            if not lying.on[lying.inode(held.outlet.fileno())] & ours
        ]
        fresh = self.shelf.number not in reads
        try:
            if fresh:
                self.shelf.add_slots(strays)
            elif strays:
                self._append(lambda: self.shelf.add_slots(strays))
        except (LimitExceeded, ShelfFull) as error:  # they go on lying where they lie
            log.event("shelf-not-compacted", level=log.WARNING, why=str(error) or FULL)
        if fresh:
            self.shelf.complete()
        known = {outcome["nonce"] for outcome in self._outcomes()}
        self._remember(
            [
                {**answer, "generation": 0}
                for dead in lying.ended
                for answer in dead.answers
                if answer["nonce"] not in known
            ]
        )
        for pair in over:
            self._adopt_rest(pair, lying)
        for dead in lying.ended:
            self._drain(dead, dead.uid)
        if self.beside:
            try:
                self.compact()
            except LimitExceeded as error:
                log.event("shelf-not-compacted", level=log.WARNING, why=str(error))
        return list(lying.found.values()), blind

    def answers(self) -> list[Answered]:
        """All that were given to requests some of which may be repeated; older first."""
        every = self._outcomes()
        for held in self.slots.values():
            every += held.answers
        every.sort(key=lambda answer: float(answer["at"]))
        return every

    def _adopt_slot(self, fds: tuple[int, int], lying: _Lying, number: int) -> str:
        """One slot, (outlet, inlet), of shelf `number`, which this owns now. Returns why nobody can
        tell whose it is, as a rule ""."""
        inode = lying.inode(fds[0])
        known = inode in lying.on
        lying.on.setdefault(inode, set()).add(number)
        if known:  # the same slot, on two shelves
            _close_pairs([fds])
            return ""
        old = _as_slot(fds)
        pidfds: dict[str, int] = {}
        try:
            hold, pidfds = old.read()
        except Unreadable as error:
            hold = Hold(
                uid=error.uid,
                name=error.name,
                generation=error.generation,
                phase=UNREADABLE,
                reason=str(error),
                created=self.clock(),
            )
        except ValueError as error:
            self.slots[-1 - len(self.slots)] = old  # stays on the shelf, come what may
            return f"a slot cannot be read: {error}"
        if hold is None:
            lying.ended.append(old)
            return ""
        earlier = self.slots.get(hold.generation)
        if earlier is not None:
            _close_roles(lying.found[hold.generation][1])
            self._drain(earlier, hold.uid)  # the daemon died while it wrote this slot anew
        self.slots[hold.generation] = old
        lying.found[hold.generation] = hold, pidfds
        return ""

    def _adopt_rest(self, fds: tuple[int, int], lying: _Lying) -> None:
        """One slot of a shelf that does not count, which this owns now. As a rule it lies elsewhere
        as well. One that has ended may not have been drained: to let go of what it held is for its
        owner's worker, not for whoever closes that shelf."""
        inode = lying.inode(fds[0])
        if inode in lying.on:
            _close_pairs([fds])
            return
        lying.on[inode] = set()
        old = _as_slot(fds)
        try:
            hold, pidfds = old.read()
        except (Unreadable, ValueError):
            old.close()
            return
        _close_roles(pidfds)
        if hold is None:
            lying.ended.append(old)
        else:
            old.close()


class _Lying:
    """What was found on shelves: holds and their pidfds by generation, slots that have ended, and
    on which shelves each slot lies."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[Hold, dict[str, int]]] = {}
        self.ended: list[Slot] = []
        self.on: dict[int, set[int]] = {}  # by inode: it is the same slot that two may lead to

    @staticmethod
    def inode(fd: int) -> int:
        return os.fstat(fd).st_ino


def _as_slot(fds: tuple[int, int]) -> Slot:
    outlet, inlet = (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd) for fd in fds
    )
    return Slot(inlet, outlet)


def _close_pairs(pairs: Iterable[tuple[int, int]]) -> None:
    for pair in pairs:
        for fd in pair:
            os.close(fd)


def _close_roles(pidfds: Pidfds) -> None:
    for fd in pidfds.values():
        os.close(fd)
