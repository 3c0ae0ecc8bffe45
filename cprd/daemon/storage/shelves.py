"""Where holds physically lie: which shelf counts, and writing steps down before they are true.

`Keeper.write` puts a step where the step outlives this process, as far as the place allows: first
the bundle and pidfds on the shelf, then one record in the journal, which makes the change true.
Only then may the registry apply the step, and the client hear the answer. `let_go` does the slow
part afterwards.

A single shelf counts. Where systemd keeps the shelf, an empty stored shelf, the spare, is ready to
take over: so a shelf can be written anew at any moment, at once, without the store growing. (The
spare takes the two entries of the store which are always free; fdstore.py stores spares.) Every
shelf leads to the same journal: whichever shelf a kill leaves, the last record of each hold is
there. Without a manager all is the same, but the shelf lives no longer than the process (which may
re-execute).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial

from cprd.daemon import log
from cprd.daemon.releaser import DRAIN, HANDED_ON, LIVING, ROOT, WHOLE
from cprd.daemon.releasing import Releasing
from cprd.daemon.storage import adoption
from cprd.daemon.storage.journal import NOBODY, Journal, Place
from cprd.daemon.storage.record import (
    VERSION,
    encode,
    encode_last,
    last_version,
    reply_records,
)
from cprd.daemon.storage.recover import Dead, Pairs, recover
from cprd.daemon.storage.shelf import A_RECORD, Pidfd, Queue, Shelf, ShelfFull
from cprd.errors import LimitExceeded
from cprd.linux.pause import point
from cprd.linux.rights import close_all
from cprd.protocol.lifecycle import Hold
from cprd.protocol.registry import Ended, Step
from cprd.protocol.replies import Replies, Reply

FULL = "cprd's shelf is full: raise net.core.wmem_max, or drop holds"
NOT_STORED = (
    'require="store": this cprd keeps holds in memory only; run it as a systemd service with'
    " FileDescriptorStoreMax=, or as cprd --keep (see cprctl status)"
)
# On a shelf that has few holds, before the shelf is written anew: messages, and descriptors of
# ended holds. With these the kernel does not yet count too many of cprd in flight (2,024).
MANY_MESSAGES, MANY_ENDED, FEW = 1024, 500, 750
HOW = {LIVING: WHOLE, HANDED_ON: ROOT}  # a releaser is to let go, by the version of a last record

Pidfds = Mapping[str, int]


class Keeper:
    """The places of all holds, by generation, the journal and the counting shelf."""

    def __init__(
        self,
        releasing: Releasing,
        clock: Callable[[], float],
        replies: Replies,
        *,
        managed: bool = False,
    ) -> None:
        """`managed`: a `fdstore.Store` takes shelves out of the store before closing."""
        self.releasing = releasing
        self.managed = managed
        self.clock = clock
        self.replies = replies
        self.places: dict[int, Place] = {}
        self.dying: dict[int, Dead] = {}  # live holds that ended, until a releaser has let go
        self.journal = Journal.create()  # of new holds
        self.journals = [self.journal]  # others, of an earlier daemon, have older holds
        self.last_number = 1
        self.last_pidfd = 0
        self.shelf = Shelf.create(1)
        self.shelf.complete([self.journal.fd])
        self.spare: Shelf | None = None
        self.retired: list[Shelf] = []  # to be taken out of the store, then closed
        self.has_slots = False  # the shelf has, empty since the holds were taken over
        self.untouchable: list[Shelf] = []  # have messages that cannot be read: kept as they are
        self.wants_spare: Callable[[], None] = lambda: None
        self.next: Shelf | None = None  # is written, and does not count yet
        self._pieces: Iterator[None] = iter(())
        self._moves: Iterator[None] | None = None  # the journal is being moved
        self.compact_soon: Callable[[], None] | None = None  # else at once
        self.close_shelf: Callable[[Shelf], None] = Shelf.close  # with all ended holds there
        self.pidfds_of: Callable[[int], Pidfds] = lambda generation: {}  # borrowed

    @property
    def kept(self) -> str:
        """The place of the next write: "store" or "memory"."""
        return "store" if self.shelf.durable else "memory"

    def write(
        self, step: Step, bundle: int, pidfds: Mapping[int, Pidfds], *, require_store: bool = False
    ) -> None:
        """Write a step down. Raises LimitExceeded; then nothing has changed, but `bundle` may be
        drained.

        `bundle` (of a new hold, else -1) and the pidfds, by generation and role, stay the
        caller's."""
        replies = [step.reply] if step.reply is not None else []
        made: list[Hold] = []
        try:
            for hold in step.put:
                roles = pidfds.get(hold.generation, {})
                place = self.places.get(hold.generation)
                if place is None:
                    place = self._add(hold, bundle)
                    made.append(hold)
                self._record(place, hold, roles, replies)
            if made and require_store and not self.shelf.durable:
                raise LimitExceeded(NOT_STORED)
            point("keeper:put")
        except BaseException:
            for hold in made:
                self._unmake(hold)
            for hold in step.put:
                self._forget_parked(hold.generation)
            raise
        try:
            self._end(step.ended, [] if step.put else replies)
        except LimitExceeded as error:
            if not step.put:
                raise
            # The new record says so as well: committed, and newer.
            log.event("end-not-written", level=log.WARNING, why=str(error))
        point("keeper:ended")

    def _add(self, hold: Hold, bundle: int) -> Place:
        """A place with the bundle on the shelf, and no record yet."""
        try:
            place = Place(hold.uid, os.dup(bundle), self.journal, -1)
        except OSError as error:
            raise LimitExceeded(
                f"cprd has no descriptor left to hold with ({error.strerror}): raise LimitNOFILE="
                " of cprd.service, or drop holds"
            ) from None
        queue = Queue(hold.generation, hold.uid, place.bundle)
        try:
            self._append(lambda shelf: shelf.add_queues([queue]))
        except BaseException:
            place.close()
            raise
        self.places[hold.generation] = place
        return place

    def _unmake(self, hold: Hold) -> None:
        """A queue whose hold has no record is drained by the next daemon as well."""
        place = self.places.pop(hold.generation)
        if place.at >= 0:
            with suppress(LimitExceeded):
                self._write_end(place, hold.generation, (), VERSION)
        self.releasing.drain(hold.uid, place.bundle)

    def _forget_parked(self, generation: int) -> None:
        """Take no pidfd for parked: one may be closed by now, and the number be used anew."""
        place = self.places.get(generation)
        if place is not None and place.parked:
            place.parked = {role: (-1, number) for role, (_, number) in place.parked.items()}

    def _record(self, place: Place, hold: Hold, roles: Pidfds, replies: Sequence[Reply]) -> None:
        """Make a change of a hold true."""
        parked = self._park(place, hold.generation, roles) if roles else NOBODY
        numbers = {role: number for role, (_, number) in parked.items() if role in roles}
        place.at = place.append(encode(hold, numbers, replies), self.journal)
        point("journal:record")
        place.parked = {role: parked[role] for role in numbers} or NOBODY
        if self._moves is None and self.journal.is_worn:
            self._moves = self._move_journal()
            self._wear()

    def _park(self, place: Place, generation: int, roles: Pidfds) -> Mapping[str, tuple[int, int]]:
        """Park the pidfds that are not parked yet. Returns all, with their numbers."""
        parked = dict(place.parked)
        fresh: list[Pidfd] = []
        for role, fd in roles.items():
            if fd >= 0 and parked.get(role, (-1, 0))[0] != fd:
                self.last_pidfd += 1
                fresh.append(Pidfd(generation, self.last_pidfd, fd))
                parked[role] = fd, self.last_pidfd
        if fresh:
            self._append(lambda shelf: shelf.add_pidfds(fresh))
        return parked

    @property
    def on_next_shelf(self) -> int:
        """The descriptors of all holds."""
        return len(self.places) + sum(held.pidfds for held in self.places.values())

    def in_flight(self) -> tuple[int, Counter[int]]:
        """What is parked on shelves: in all, and by owner."""
        of: Counter[int] = Counter()
        for held in self.places.values():
            of[held.uid] += 2 * (1 + held.pidfds)  # now, and while the shelf is rewritten
        return sum(one.in_flight for one in self.shelves()), of

    def _end(self, all_ended: Iterable[Ended], replies: Sequence[Reply]) -> None:
        """End holds: the journal says so, with the replies, and the end is true."""
        for ended in all_ended:
            generation = ended.hold.generation
            place = self.places.get(generation)
            if place is not None:
                self._write_end(place, generation, replies, last_version(ended))

    def _write_end(
        self, place: Place, generation: int, replies: Sequence[Reply], version: int
    ) -> None:
        place.append(encode_last(place.uid, generation, replies, version), self.journal)
        point("journal:end")

    def _append(self, append: Callable[[Shelf], None]) -> None:
        """Append to the shelf, and to the next one if that is being written; a full shelf is
        written anew first. Raises LimitExceeded."""
        if _worn(self):
            self._wear()
        try:
            append(self.shelf)
        except ShelfFull:
            self.compact(must=True)
            try:
                append(self.shelf)
            except ShelfFull:
                raise LimitExceeded(FULL) from None
        try:
            if self.next is not None:
                append(self.next)
        except (LimitExceeded, ShelfFull):
            self.give_up()

    def _wear(self) -> None:
        try:
            (self.compact_soon or self.renew)()
        except LimitExceeded as error:
            log.event("shelf-not-compacted", level=log.WARNING, why=str(error))

    def compact(self, *, must: bool = False) -> None:
        """Write the shelf anew, without the ended holds.

        With a store a stored spare takes over. Without a spare the old shelf stays; when the
        shelf is full (`must`) an unstored shelf takes over: answers say "memory" meanwhile."""
        self.begin(must=must)
        while self.fill():
            pass

    def renew(self) -> None:
        """Write the shelf anew where much on the shelf has ended, and move a worn journal."""
        self.begin_renewing()
        while self.fill():
            pass

    def begin_renewing(self) -> None:
        """As `renew`, but `fill` is to be called until all is written."""
        if _worn(self):
            self.begin()

    def begin(self, *, must: bool = False) -> None:
        """As `compact`, but `fill` is to be called until all is written. Meanwhile the present
        shelf counts, and what comes lies on both."""
        if self.next is None and (must or self.spare is not None or not self.shelf.durable):
            self.next = self.spare or self.new_spare()
            self._pieces = self._write_all(self.next)

    def _move_journal(self) -> Iterator[None]:
        """Append all that counts anew, in pieces, and free what lies before."""
        journal = self.journal
        start = journal.begin_move()
        for number, (generation, place) in enumerate(list(self.places.items())):
            there = self.places.get(generation) is place
            if there and place.journal is journal and 0 <= place.at < start:
                place.at = journal.append(journal.read(place.at))
            if number % A_RECORD == A_RECORD - 1:
                yield
        for generation, dead in self.dying.items():
            journal.append(encode_last(dead.uid, generation, (), dead.version))
        for record in reply_records(self.replies.pending(self.clock())):
            journal.append(record)
            yield  # each uid may have thousands
        journal.end_move(start)

    def _write_all(self, new: Shelf) -> Iterator[None]:
        places = list(self.places.items())
        for at in range(0, len(places), A_RECORD):
            part = [(of, held) for of, held in places[at : at + A_RECORD] if of in self.places]
            self.add_places(new, part)
            yield
        # Last: a live hold may have ended before its turn came.
        new.add_queues([Queue(of, dead.uid, dead.bundle) for of, dead in self.dying.items()])

    def add_places(self, shelf: Shelf, places: Iterable[tuple[int, Place]]) -> None:
        pidfds: list[Pidfd] = []
        queues: list[Queue] = []
        for generation, held in places:
            queues.append(Queue(generation, held.uid, held.bundle))
            pidfds += held.strange
            if held.parked:
                open_now = self.pidfds_of(generation)
                for role, (_, number) in held.parked.items():
                    if role in open_now:
                        pidfds.append(Pidfd(generation, number, open_now[role]))
        shelf.add_queues(queues)
        shelf.add_pidfds(pidfds)

    def fill(self) -> bool:
        """Write a piece of the journal, or of the next shelf; with the last piece that shelf takes
        over. Returns whether more is left. Raises LimitExceeded."""
        if self._moves is not None:
            try:
                if next(self._moves, self) is None:
                    return True
            except BaseException:
                self._moves = None
                raise
            self._moves = None
        new = self.next
        if new is None:
            return False
        if self.spare not in (None, new):  # stored since: an unstored shelf is not to take over
            self.give_up()
            self.begin()
            return True
        try:
            for _ in self._pieces:
                return True
            replaced = (self.shelf, *self.retired)
            new.complete(self.journal_fds(), [other.number for other in replaced])
        except BaseException as error:
            self.give_up()
            if isinstance(error, ShelfFull):
                raise LimitExceeded(FULL) from None
            raise
        before, self.shelf = self.shelf, new
        log.event(
            "shelf",
            number=new.number,
            holds=len(self.places),
            replaces=before.number,
            kept=self.kept,
        )
        self.spare, self.next, self.has_slots = None, None, False
        self.retire(before)
        point("keeper:compacted")
        self.wants_spare()
        return False

    def journal_fds(self) -> list[int]:
        return [journal.fd for journal in self.journals]

    def give_up(self) -> None:
        """Retire the next shelf, which does not count yet."""
        new, self.next = self.next, None
        if new is not None:
            self.spare = None if self.spare is new else self.spare
            self.retire(new)
            self.wants_spare()

    def retire(self, old: Shelf) -> None:
        """Close a shelf; with a manager only after the store has let go of the shelf."""
        if self.managed:
            self.retired.append(old)
        else:
            self.close_shelf(old)

    def new_spare(self) -> Shelf:
        """An empty shelf, which the caller owns. No number is used twice."""
        self.last_number += 1
        return Shelf.create(self.last_number)

    def let_go(self, all_ended: Iterable[Ended]) -> None:
        """Drain the bundles of ended holds: soon, in the releasers of the owners. The empty queues
        stay on the shelf until the shelf is written anew."""
        for ended in all_ended:
            generation = ended.hold.generation
            old = self.places.pop(generation, None)
            if old is not None:
                close_all(one.fd for one in old.strange)
                self.drain(generation, Dead(old.uid, old.bundle, last_version(ended)))

    def drain(self, generation: int, dead: Dead) -> None:
        """Takes over the bundle."""
        point("bundle:drain")
        how, bundle = HOW.get(dead.version, DRAIN), dead.bundle
        if how != DRAIN:
            try:
                bundle = os.dup(dead.bundle)
                self.dying[generation] = dead
            except OSError:
                pass  # no descriptor left
        self.releasing.drain(dead.uid, bundle, how, partial(self._drained, generation))
        point("bundle:drained")

    def _drained(self, generation: int, said: bytes) -> None:
        del said
        dead = self.dying.pop(generation, None)
        if dead is not None:
            os.close(dead.bundle)  # empty

    def forget(self, hold: Hold) -> None:
        """End an outdated hold. A newer hold of the name may have the content of a live hold."""
        ended = Ended(hold, "outdated", heir=hold.live)
        try:
            self._end([ended], [])
        except LimitExceeded as error:
            log.event("end-not-written", level=log.WARNING, why=str(error))
        self.let_go([ended])

    def abandon(self) -> None:
        """Before the end of the daemon: what is kept in memory only ends with the daemon, and a
        foreign file could block that end. The releasers of the owners get a copy of each bundle,
        and close the copy afterwards: whatever a store has lives on. `close` is to follow."""
        if self.shelf.durable:
            return
        for place in self.places.values():
            try:
                self.releasing.close_after(place.uid, [os.dup(place.bundle)])
            except OSError as error:
                log.event("not-released", level=log.ERROR, uid=place.uid, why=str(error))

    def close(self) -> None:
        """Close all that this process has of holds and shelves. Nothing works afterwards."""
        every: tuple[Place | Shelf | Journal, ...]
        every = (*self.places.values(), *self.shelves(), *self.journals)
        for one in every:
            one.close()
        for dead in self.dying.values():
            os.close(dead.bundle)

    def bundle(self, generation: int) -> int:
        """The bundle of a hold: a descriptor, borrowed until something else is written."""
        return self.places[generation].bundle

    # After a restart

    def shelves(self) -> list[Shelf]:
        """All that must come along when the daemon re-executes."""
        ready = dict.fromkeys(one for one in (self.spare, self.next) if one is not None)
        return [*self.untouchable, *self.retired, *ready, self.shelf]

    def adopt(
        self, pairs: Pairs, durable: Collection[int], once: Collection[int] = ()
    ) -> tuple[list[tuple[Hold, dict[str, int]]], str]:
        """Take over the shelves of an earlier daemon (recover.recover).

        Returns the holds with pidfds by role, owned by the caller, and why a hold with an unknown
        name may exist ("": no such hold). Raises LimitExceeded, with nothing lost, where the holds
        find no room on one shelf."""
        found = recover(pairs, durable, once, self.clock(), self.releasing.draining)
        adoption.take_over(self, found)
        return list(found.holds.values()), found.hidden


def _worn(keeper: Keeper) -> bool:
    """Whether much of the counting shelf is of ended holds."""
    shelf, held = keeper.shelf, len(keeper.places)
    if keeper.has_slots or shelf.messages > min(max(MANY_MESSAGES, 2 * held), shelf.room // 2):
        return True
    many = 2 * held if held > FEW else MANY_ENDED
    # First the quick look, without pidfds.
    return shelf.in_flight - held > many and shelf.in_flight - keeper.on_next_shelf > many
