"""All holds in memory, by name and by generation, the usage of each uid, and first answers. No I/O,
no clock."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from cprd.errors import Busy, LimitExceeded, NotHeld
from cprd.protocol import messages
from cprd.protocol.lifecycle import HELD, UNREADABLE, Hold, packed, unpacked
from cprd.protocol.names import Key
from cprd.protocol.replies import Replies

AWAKE = 16  # holds, the latest: what others keep in memory is packed


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of a uid."""

    holds: int = messages.HOLDS
    fds: int = messages.FDS


@dataclass(slots=True)
class Usage:
    """The sums of a uid."""

    holds: int = 0
    fds: int = 0


def _every(numbers: int | tuple[int, ...]) -> tuple[int, ...]:
    """The generations of a name, of which nearly all have a single one."""
    return numbers if isinstance(numbers, tuple) else (numbers,)


class Holds:
    """The records. Reading changes nothing; `put` and `remove` keep all indexes in step."""

    def __init__(
        self,
        quota: Quota | None = None,
        first_generation: int = 1,
        step: Callable[[], int] = lambda: 1,
    ) -> None:
        """`step`: how far the next generation is from the last; at random, generations tell nobody
        how much others save."""
        self._step = step
        self.quota = quota or Quota()
        self.next_generation = first_generation
        self.hidden = ""  # why a record may exist whose name cprd cannot read; "": no such record
        # Generations by uid and name, older first; of nearly all names a single one.
        self._names: dict[int, dict[str, int | tuple[int, ...]]] = {}
        self._awake: dict[int, Hold] = {}  # by generation
        self._at_rest: dict[int, bytes] = {}  # held, and not changed lately
        self._lately: deque[int] = deque()  # changed, so awake
        self._usage: dict[int, Usage] = {}
        self._deadlines: list[tuple[float, int]] = []
        self.replies = Replies()

    def __iter__(self) -> Iterator[Hold]:
        yield from tuple(self._awake.values())
        yield from map(unpacked, tuple(self._at_rest.values()))

    def __len__(self) -> int:
        return len(self._awake) + len(self._at_rest)

    def of(self, key: Key) -> tuple[Hold, ...]:
        """The records of a name, older first; at most a single record is committed."""
        names = self._names.get(key[0])
        if names is None:
            return ()
        return tuple(map(self._record, _every(names.get(key[1], ()))))

    def get(self, generation: int) -> Hold | None:
        hold = self._awake.get(generation)
        if hold is None and generation in self._at_rest:
            return unpacked(self._at_rest[generation])
        return hold

    def _record(self, generation: int) -> Hold:
        hold = self._awake.get(generation)
        return unpacked(self._at_rest[generation]) if hold is None else hold

    def _generations(self, uid: int) -> Iterable[int]:
        """Of the holds that `uid` may see."""
        if not uid:
            return (*self._awake, *self._at_rest)
        numbers: list[int] = []
        for of in self._names.get(uid, {}).values():
            numbers += _every(of)
        return numbers

    def visible(self, uid: int, after: int) -> Iterator[Hold]:
        """The holds that `uid` may see, of generations above `after`, older first."""
        for generation in sorted(number for number in self._generations(uid) if number > after):
            yield self._record(generation)

    def phases(self, uid: int) -> dict[str, int]:
        """How many holds that `uid` may see are in each phase."""
        awake = self._awake
        return Counter(
            awake[number].phase if number in awake else HELD for number in self._generations(uid)
        )

    def top(self, key: Key) -> Hold:
        """The newest record of a name. Raises NotHeld; Busy while a record may be hidden."""
        records = self.of(key)
        if not records:
            self.check_hidden(key)
            raise NotHeld(f"nothing is held under {key[1]!r}{self._elsewhere(key)}")
        return records[-1]

    def _elsewhere(self, key: Key) -> str:
        """For root, about a name of root's own: other users with that name. Only root asks so."""
        uid, name = key
        others = sorted(of for of in self._names if name in self._names[of]) if uid == 0 else []
        if not others:
            return ""
        few = ", ".join(f"{other}/{name}" for other in others[:5])
        more = ", ..." if len(others) > 5 else ""
        return f" of uid 0; but uid {others[0]} holds a {name!r}: {few}{more}"

    def older(self, hold: Hold) -> tuple[Hold, ...]:
        return tuple(other for other in self.of(hold.key) if other.generation < hold.generation)

    def check_hidden(self, key: Key) -> None:
        """Raises Busy where a name without a record may have a hidden record."""
        if self.hidden and not self.of(key):
            raise Busy(
                f"{key[1]!r} may be held, out of this cprd's sight: {self.hidden}; run the newer"
                " cprd again (docs/operations.md: blind)"
            )

    def usage(self, uid: int) -> Usage:
        return self._usage.get(uid, Usage())

    def usages(self) -> dict[int, Usage]:
        return self._usage

    def check_quota(self, uid: int, fds: int, replaced: tuple[Hold, ...]) -> None:
        """Raises LimitExceeded where another hold, of `fds` descriptors, is too much."""
        usage = self.usage(uid)
        if usage.holds - len(replaced) + 1 > self.quota.holds:
            raise LimitExceeded(
                f"uid {uid} has {usage.holds} holds; the quota is {self.quota.holds}: drop some, or"
                " raise limits.holds in cprd's configuration"
            )
        total = usage.fds - sum(hold.fds for hold in replaced) + fds
        if total > self.quota.fds:
            raise LimitExceeded(
                f"uid {uid} would have {total} descriptors held; the quota is {self.quota.fds}:"
                " drop holds, or raise limits.fds in cprd's configuration"
            )

    def next_deadline(self) -> float | None:
        """When the first lease or ttl ends."""
        first = self.first_to_end()
        return None if first is None else first.ends_at

    def first_to_end(self) -> Hold | None:
        """The hold with the earliest end of a lease or a ttl."""
        while self._deadlines:
            at, generation = self._deadlines[0]
            hold = self.get(generation)
            if hold is not None and hold.ends_at == at:
                return hold
            heapq.heappop(self._deadlines)
        return None

    def put(self, hold: Hold) -> None:
        """Add a record, or replace the record of the same generation."""
        generation = hold.generation
        old = self.get(generation)
        usage = self._usage.get(hold.uid)
        if usage is None:
            usage = self._usage[hold.uid] = Usage()
        if old is None:
            names = self._names.setdefault(hold.uid, {})
            others = names.get(hold.name, ())
            if others:
                names[hold.name] = tuple(sorted((*_every(others), generation)))
            else:
                names[hold.name] = generation
            usage.holds += 1
            usage.fds += hold.fds
            self.pass_generation(generation)
        else:
            usage.fds += hold.fds - old.fds
            self._at_rest.pop(generation, None)
        self._awake[generation] = hold
        self._lately.append(generation)
        if len(self._lately) > AWAKE:
            self._rest()
        ends_at = hold.ends_at
        if ends_at is not None:
            heapq.heappush(self._deadlines, (ends_at, generation))
            if len(self._deadlines) > 64 + 4 * len(self):
                ends = ((record.ends_at, record.generation) for record in self)
                self._deadlines = [(at, number) for at, number in ends if at is not None]
                heapq.heapify(self._deadlines)

    def _rest(self) -> None:
        """Pack the record that was changed the longest time ago, where the hold waits only."""
        generation = self._lately.popleft()
        hold = self._awake.get(generation)
        if hold is not None and hold.phase == HELD:
            del self._awake[generation]
            self._at_rest[generation] = packed(hold)

    def pass_generation(self, last: int) -> None:
        """No new hold has generation `last` or an older one."""
        if last >= self.next_generation:
            # `| 0`: a sum has room for a digit more, 16 bytes a hold.
            self.next_generation = (last + self._step()) | 0

    def remove(self, generation: int) -> None:
        old = self.get(generation)
        if old is None:
            return
        self._awake.pop(generation, None)
        self._at_rest.pop(generation, None)
        names = self._names[old.uid]
        others = names.pop(old.name)
        if isinstance(others, tuple):
            rest = tuple(number for number in others if number != generation)
            names[old.name] = rest if len(rest) > 1 else rest[0]
        usage = self._usage[old.uid]
        usage.holds -= 1
        usage.fds -= old.fds
        if not usage.holds:
            del self._usage[old.uid], self._names[old.uid]

    def adopt(self, holds: Iterable[Hold]) -> list[Hold]:
        """Take over the records of an earlier daemon.

        Returns the outdated records: older than a committed record of the same name. (The daemon
        died between writing the new record and ending the old record.)"""
        outdated: list[Hold] = []
        for hold in sorted(holds, key=lambda record: record.generation):
            if hold.committed:
                outdated += [old for old in self.of(hold.key) if old.phase != UNREADABLE]
                for old in outdated:
                    self.remove(old.generation)
            self.put(hold)
        return outdated
