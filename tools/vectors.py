"""Write tests/vectors/ anew from the code, and the examples and tables of docs/ (pages.py).

.venv/bin/python -m tools.vectors

Each vector has bytes in hex and the meaning. A test compares the files with the code in both
directions. Bytes that differ need another version of the wire, of the bundle or of the records.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack

from cprd.bundle import layout
from cprd.bundle.pack import pack
from cprd.errors import Busy, CprdError, Damaged, NotHeld, ProtocolError
from cprd.linux.memfd import missing_seals, sealed_memfd
from cprd.linux.rights import SO_PEEK_OFF, close_all, receive, send
from cprd.live import records
from cprd.live.owner import Owner
from cprd.protocol import messages
from cprd.state import State

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "tests/vectors"
WIRE = f"wire-{messages.VERSION}"
BUNDLE, LIVE = f"bundle-{layout.VERSION}", f"live-{records.VERSION}"

NONCE, TOKEN = bytes(range(16)), bytes(range(16, 32))
GENERATION = 1_700_000_000_000_000_001
CLAIM = {"name": "web", "generation": GENERATION, "token": TOKEN}
Vector = dict[str, Any]

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "hello": ("the first message of a connection", {"version": messages.VERSION}),
    "queue": ("with a number, which the answer repeats", {"id": 1}),
    "save": ("as little as a save says", {"name": "web", "fds": 1, "nonce": NONCE}),
    "save-all": (
        "all that a save may say: served once process 4242 has ended, for an hour from then on",
        {
            **{"name": "web", "fds": 300, "bytes": 70_000, "parked": 2, "depth": 1, "ttl": 3600.0},
            **{"after_exit": "process", "pid": 4242, "inode": 81_234, "queue": True},
            **{"if_exists": "replace", "require": "store", "nonce": NONCE, "id": 2},
        },
    ),
    "prepare": ("the first half of a save", {"name": "web", "fds": 1, "nonce": NONCE}),
    "commit": ("the second half", {**CLAIM, "nonce": NONCE}),
    "abort": ("instead of the second half", {**CLAIM, "nonce": NONCE}),
    "load": ("what is held now, for 30 s", {"name": "web", "nonce": NONCE}),
    "load-all": (
        "that generation alone, waiting 5 s for it, claimed for a minute",
        {"name": "web", "wait": 5.0, "lease": 60.0, "generation": GENERATION, "nonce": NONCE},
    ),
    "live": ("begin a live hold, or claim what is there", {"name": "web", "nonce": NONCE}),
    "put_back": ("after the end of a cprd that held in memory", {**CLAIM, "nonce": NONCE}),
    "end": ("nothing is kept any more", {**CLAIM, "nonce": NONCE}),
    "end-keep": ("for the next owner", {**CLAIM, "keep": True, "nonce": NONCE}),
    "renew": ("the lease begins anew, as long as before", CLAIM),
    "begin": ("process 4242 acts from now on", {**CLAIM, "pid": 4242, "nonce": NONCE}),
    "ended": ("process 4242 has ended", {"name": "web", "generation": GENERATION, "pid": 4242}),
    "confirm": ("the point of no return", {**CLAIM, "nonce": NONCE}),
    "confirm_next": (
        "the point of no return, with the state for the next start",
        {**CLAIM, "fds": 1, "after_exit": "peer", "nonce": NONCE},
    ),
    "reject": ("given back", {**CLAIM, "why": "no such device", "nonce": NONCE}),
    "confirm_next-live": (
        "the point of no return of a successor that keeps a live hold from now on",
        {**CLAIM, "fds": 0, "live": True, "nonce": NONCE},
    ),
    "reject-damaged": (
        "not whole",
        {**CLAIM, "why": "no manifest", "damaged": True, "nonce": NONCE},
    ),
    "release": ("served again", {"name": "web", "force": True, "nonce": NONCE}),
    "drop": ("ended without a successor, of uid 1000", {"name": "1000/web", "nonce": NONCE}),
    "wait": ("until a load would get it, 60 s at most", {"name": "web", "timeout": 60}),
    "list": ("from the first hold on", {}),
    "list-on": ("from where the last answer ended", {"after": GENERATION}),
    "show": ("one hold", {"name": "web"}),
    "status": ("the daemon", {}),
    "unknown-field": ("ignored: of a later version", {"verb": "show", "name": "web", "colour": 1}),
    "nil": ("nil is as good as left out", {"verb": "wait", "name": "web", "timeout": None}),
}
"""Name -> words and fields; the verb is the name up to a dash, unless the fields say so."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no-name": ({"verb": "show"}, "show: the field 'name' is missing"),
    "lease-0": (
        {"verb": "load", "name": "web", "lease": 0, "nonce": NONCE},
        "load: the field 'lease' wants seconds from 0.1 to 86400",
    ),
    "ttl-0": (
        {"verb": "save", "name": "web", "fds": 1, "ttl": 0, "nonce": NONCE},
        "save: the field 'ttl' wants seconds from 0.1 to 3.1536e+08",
    ),
    "name-as-bytes": (
        {"verb": "show", "name": b"web"},
        "show: the field 'name' wants a string of at most 300 bytes",
    ),
    "nonce-too-short": (
        {"verb": "drop", "name": "web", "nonce": b"abc"},
        "drop: the field 'nonce' wants 16 bytes",
    ),
    "unknown-verb": ({"verb": "paint", "name": "web"}, "unknown verb 'paint'"),
    "no-verb": ({"name": "web"}, "the field 'verb' wants the name of a verb"),
}
"""Name -> a request that is readable and makes no sense, and what the refusal says."""

_TWICE = "a message with a key twice"
NOISE: dict[str, tuple[str, str]] = {
    "no-map": ("93010203", "a message is a map"),
    "not-msgpack": ("c1", "not a msgpack message"),
    "two-values": ("8080", "not a msgpack message"),
    "a-number-as-key": ("8101a0", "not a msgpack message"),
    "a-key-twice": ("83a476657262a473686f77a46e616d65a3776562a46e616d65a3776562", _TWICE),
    "an-extension-type": ("81a476657262d40500", "not a msgpack message"),
}
"""Name -> bytes that are no message, and what the refusal says before the connection ends."""

_KEPT = {"kept": "store"}
_BEGUN = {"generation": GENERATION, "token": TOKEN, **_KEPT}
_ROW = {
    **{"name": "web", "generation": GENERATION, "phase": "claimed", "uid": 1000, "fds": 1},
    **{"bytes": 5, "age": 61.5, "attempts": 1},
    "reason": "claimed by pid 4243, whose lease has 28.5 s left",
    **{"last_reject": "", "claimant": 4243, "live": False, "last_end": ""},
}
_LIMITS = {"request": messages.MAX_REQUEST, "answer": messages.MAX_ANSWER, "lease": 3600.0}
ANSWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "hello": (
        "whom cprd sees, how claims of this connection can end, where holds are kept",
        {
            **{"version": messages.VERSION, "server": f"cprd {messages.RELEASE}", "uid": 1000},
            **{"pid": 4242, "lease_by": ["connection", "process", "time"], **_KEPT},
            "limits": {**_LIMITS, "holds": messages.HOLDS, "fds": messages.FDS},
        },
    ),
    "queue": ("and the sending end of a queue", {}),
    "save": ("", {"generation": GENERATION, **_KEPT}),
    "prepare": ("", {"generation": GENERATION, "token": TOKEN, **_KEPT}),
    "commit": ("", {"generation": GENERATION, **_KEPT}),
    "abort": ("", _KEPT),
    "load": (
        "and the bundle; the first claimant so far: without last_claimant",
        {
            **{"generation": GENERATION, "token": TOKEN, "attempts": 1, "last_reject": ""},
            **{"lease": 30.0, "saver": 4242, "saver_uid": 1000, "live": False, "last_end": ""},
            **_KEPT,
        },
    ),
    "live": ("begun: a connection that owns a live hold", {"found": False, **_BEGUN}),
    "live-found": (
        "and the bundle: what a killed owner left",
        {
            **{"found": True, **_BEGUN, "attempts": 1, "last_reject": "", "lease": 30.0},
            **{"saver": 4242, "saver_uid": 1000, "live": True, "last_end": "killed by SIGKILL"},
        },
    ),
    "put_back": ("", _BEGUN),
    "end": ("", _KEPT),
    "confirm_next-live": ("the token is for the owner", {**_BEGUN, "generation": GENERATION + 1}),
    "renew": ("0 where no lease runs: in doubt", {"lease": 30.0}),
    "begin": ("", _KEPT),
    "ended": ("", {}),
    "confirm": ("", _KEPT),
    "confirm_next": ("the generation of the new hold", {"generation": GENERATION + 1, **_KEPT}),
    "reject": ("", _KEPT),
    "release": ("", {"generation": GENERATION, **_KEPT}),
    "drop": ("", {"generation": GENERATION, **_KEPT}),
    "wait": ("", {"generation": GENERATION}),
    "list": ("all rows: without `more`", {"holds": [_ROW]}),
    "show": ("and the bundle", {"hold": _ROW}),
    "status": (
        "",
        {
            **{"server": f"cprd {messages.RELEASE}", "pid": 77, "uptime": 3600.5, **_KEPT},
            **{"phases": {"claimed": 1}, "uids": {"1000": {"holds": 1, "fds": 1}}},
            **{"connections": 2, "refused_accepts": 0, "closing": {}},
            "limits": {"holds": messages.HOLDS, "fds": messages.FDS, "lease": 3600.0},
        },
    ),
}
"""Name -> words and the "ok" map."""

ERRORS: dict[str, CprdError] = {
    "not-held": NotHeld("nothing is held under 'web'"),
    "busy": Busy(
        "'web' is held, and cannot be loaded now: claimed by pid 4243, whose lease has 28.5 s left",
        pid=4243,
        phase="claimed",
        until=5000.25,
    ),
    "damaged": Damaged(
        "'web' is held, and cannot be loaded now: damaged: the manifest of the bundle is not a"
        " sealed memfd; saved by pid 4242 of uid 1000; it can only be dropped",
        pid=4242,
        phase="damaged",
    ),
    "noise": ProtocolError("a message is a map"),
    "other-version": messages.OtherVersion("this is cprd 0.2.0, which speaks version 2"),
}


def every() -> dict[str, Any]:
    """All files: name -> content. The name has the version that the bytes have."""
    return {
        f"{WIRE}-requests": list(_requests()),
        f"{WIRE}-answers": list(_answers()),
        BUNDLE: list(_bundles()),
        LIVE: list(_live()),
    }


def stored(name: str) -> list[Vector]:
    found: list[Vector] = json.loads((PLACE / f"{name}.json").read_text(encoding="utf-8"))
    return found


def plain(value: Any) -> Any:
    """A value for JSON: bytes as {"hex": ...}."""
    if isinstance(value, bytes | bytearray | memoryview):
        return {"hex": bytes(value).hex()}
    if isinstance(value, dict):
        return {key: plain(value[key]) for key in sorted(value)}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def _requests() -> Iterator[Vector]:
    for number, (name, (words, fields)) in enumerate(REQUESTS.items()):
        message = {"verb": name.partition("-")[0], **fields}
        if "nonce" in message:
            message["nonce"] = bytes(range(number, number + 16))  # of each request another
        data = messages.encode(message)
        means = plain(messages.read_request(data))
        yield {"name": name, "words": words, "hex": data.hex(), "means": means}
    for name, (message, why) in REFUSED.items():
        hex = messages.encode(message).hex()
        yield {"name": name, "hex": hex, "refused": why, "connection": "goes on"}
    for name, (hex, why) in NOISE.items():
        yield {"name": name, "hex": hex, "refused": why, "connection": "ends"}


def _answers() -> Iterator[Vector]:
    for name, (words, fields) in ANSWERS.items():
        data = messages.encode(messages.ok(**fields))
        means = plain(messages.read_fields(name.partition("-")[0], fields))
        yield {
            "name": name,
            "verb": name.partition("-")[0],
            "words": words,
            "hex": data.hex(),
            "means": means,
        }
    for name, error in ERRORS.items():
        message = messages.refusal(error)
        data = messages.encode(message)
        yield {"name": name, "hex": data.hex(), "error": plain(message)}


# Queues


def capture(fd: int) -> Vector:
    """All messages of a queue, and what lies in them: {"queue": [{"hex", "carries"}]}. `fd` is
    borrowed."""
    found = []
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
        while True:
            try:
                data, fds, _ = receive(sock, 1 << 17, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            if not data:
                break
            try:
                found.append({"hex": data.hex(), "carries": [_carried(one) for one in fds]})
            finally:
                close_all(fds)
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
    return {"queue": found}


def _carried(fd: int) -> Vector:
    """A queue, a memfd, or an eventfd, whose count is a number for it."""
    what = os.readlink(f"/proc/self/fd/{fd}")
    if what.startswith("socket:"):
        return capture(fd)
    if what.startswith("/memfd:"):
        content = os.pread(fd, 1 << 20, 0).hex()
        return {"memfd": content, "sealed": missing_seals(fd) == []}
    count = os.eventfd_read(fd)
    os.eventfd_write(fd, count)
    return {"descriptor": count}


def build(vector: Vector) -> int:
    """What a vector describes, as a descriptor, which the caller owns."""
    if "descriptor" in vector:
        return os.eventfd(vector["descriptor"])
    if "memfd" in vector:
        fd = sealed_memfd("vector", [bytes.fromhex(vector["memfd"])])
        if vector["sealed"]:
            return fd
        os.close(fd)
        fd = os.memfd_create("vector", os.MFD_ALLOW_SEALING)
        os.write(fd, bytes.fromhex(vector["memfd"]))
        return fd
    inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with inlet, outlet:
        for message in vector["queue"]:
            fds = [build(one) for one in message["carries"]]
            try:
                send(inlet, bytes.fromhex(message["hex"]), fds)
            finally:
                close_all(fds)
        inlet.shutdown(socket.SHUT_WR)
        return outlet.detach()


def state_means(state: State) -> Vector:
    """What a successor finds in a state."""
    sections: list[Any] = []
    for key, section in state.sections():
        content = getattr(section, "data", None)
        if content is None:
            content = os.pread(section.fd, 1 << 20, 0)  # type: ignore[union-attr]
        kind = "msgpack" if section.packed else "bytes"
        sections.append({"key": key, "kind": kind, "hex": bytes(content).hex()})
    descriptors = [{"name": _text(name), "id": id, **_carried(fd)} for name, id, fd in state.fds()]
    return {"sections": sections, "descriptors": descriptors}


def _text(name: str) -> Any:
    data = name.encode("utf-8", "surrogateescape")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"hex": data.hex()}


# Bundles


def _states() -> Iterator[tuple[str, str, State, list[int]]]:
    """Name, words, a state, descriptors to close."""
    yield "empty", "no descriptors under keys, no sections", State(), []
    state, event = State(), os.eventfd(7)
    state["words"] = {"tally": 42}
    state["raw"] = b"bytes"
    state.save_fd("event", 3, event)
    yield "small", "one descriptor, a section of msgpack, a section of bytes", state, [event]
    state, fds = State(), [os.eventfd(1), os.eventfd(2)]
    state["large"] = b"\0" * (layout.INLINE + 1)
    state.save_fd("conn", -1, fds[0])
    state.save_fd(b"\xff".decode("utf-8", "surrogateescape"), 0, fds[1])
    yield (
        "memfd",
        "a section above 16 KiB in a memfd; a negative id; a name that is no UTF-8",
        state,
        fds,
    )
    state, fds = State(), [os.eventfd(n) for n in range(1, 254)]
    for number, fd in enumerate(fds):
        state.save_fd("c", number, fd)
    yield "tree", "253 descriptors under keys and the manifest: a node with two leaves", state, fds


def _bundles() -> Iterator[Vector]:
    for name, words, state, fds in _states():
        packed = pack(state)
        inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with inlet, outlet:
            packed.park(inlet)
            found = capture(outlet.fileno())
            means = state_means(state)
            packed.close()
        close_all(fds)
        says = {"fds": packed.fds, "bytes": packed.size, "parked": packed.parked}
        says["depth"] = packed.depth
        yield {"name": name, "words": words, **found, "save": says, "means": means}
    later = {**_NOTHING, "later": {1: [None, -2.5, True]}}
    yield {
        "name": "later-part",
        "words": "a part of a later manifest, with any value, is passed over",
        "queue": [{"hex": _header(layout.LEAF, 0, 1, 1).hex(), "carries": [_manifest(later)]}],
        "save": {"fds": 0, "bytes": 0, "parked": 1, "depth": 0},
        "means": {"sections": [], "descriptors": []},
    }
    yield from _no_bundles()


_NOTHING: dict[str, Any] = {"sections": [], "ids": b"", "names": b""}


def _manifest(parts: dict[str, Any]) -> Vector:
    return {"memfd": msgpack.packb(parts).hex(), "sealed": True}


def _header(kind: int, depth: int, here: int, total: int, version: int = layout.VERSION) -> bytes:
    return layout.HEADER.pack(layout.MAGIC, version, kind, depth, here, total, 0, 0)


def _no_bundles() -> Iterator[Vector]:
    """Bundles that cprd keeps, and that a reader refuses."""
    manifest = _manifest(_NOTHING)
    leaf = _header(layout.LEAF, 0, 1, 1)
    keyless = {"memfd": "81a873656374696f6e7390", "sealed": True}
    sections = "9294a1610000c40094a1610000c400"
    twice = {"memfd": f"83a873656374696f6e73{sections}a3696473c400a56e616d6573c400", "sealed": True}
    cases: dict[str, tuple[bytes, list[Vector], str, str]] = {
        "other-magic": (
            b"NONE" + leaf[4:],
            [manifest],
            "Damaged",
            "does not begin with its header",
        ),
        "later-version": (_header(1, 0, 1, 1, 2), [manifest], "Busy", "a bundle of version 2"),
        "counts": (_header(1, 0, 2, 2), [manifest], "Damaged", "says 2 descriptors, has 1"),
        "depth-of-a-leaf": (_header(1, 1, 1, 1), [manifest], "Damaged", "contradicts itself"),
        "unsealed": (leaf, [{**manifest, "sealed": False}], "Damaged", "not a sealed memfd"),
        "no-memfd": (leaf, [{"descriptor": 1}], "Damaged", "not a sealed memfd"),
        "no-keys": (leaf, [keyless], "Damaged", "a part is missing"),
        "parts": (
            leaf,
            [_manifest({**_NOTHING, **{f"later{n}": n for n in range(layout.MAX_PARTS - 2)}})],
            "Damaged",
            f"the limit is {layout.MAX_PARTS}",
        ),
        "section-twice": (leaf, [twice], "Damaged", "section 'a' twice"),
        "key-too-many": (
            _header(1, 0, 2, 2),
            [manifest, {"descriptor": 1}],
            "Damaged",
            "the manifest names 0 descriptors; there are 1",
        ),
        "child-missing": (
            _header(2, 1, 2, 2),
            [{"queue": [{"hex": leaf.hex(), "carries": [manifest]}]}, {"queue": []}],
            "Damaged",
            "nothing is queued in a part of it",
        ),
    }
    first = records.encode(records.ROOT, 7, 1, 0, [], 0, part=(1, 1))
    root = {"queue": [{"hex": first.hex(), "carries": []}]}
    cases["live-root"] = (layout.LIVE_ROOT, [root], "Busy", "a bundle of version 2")
    for name, (data, carried, error, why) in cases.items():
        queue = [{"hex": data.hex(), "carries": carried}]
        yield {"name": name, "queue": queue, "error": error, "why": why}


# Live holds


def _live() -> Iterator[Vector]:
    yield from _live_records()
    for name, words, change in _changes():
        tx, rx = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fd = rx.fileno()
        owner = Owner(tx, rx, 7)
        events = [os.eventfd(n) for n in range(1, 4)]
        try:
            change(owner, events)
            found = capture(fd)
        finally:
            owner.close()
            close_all(events)
        yield {"name": name, "words": words, **found, "means": live_means(found)}


def _changes() -> list[tuple[str, str, Any]]:
    def one(owner: Owner, events: list[int]) -> None:
        owner.save_fd("conn", 1, events[0])

    def several(owner: Owner, events: list[int]) -> None:
        owner.save_fd("conn", 1, events[0])
        owner.save_fd("conn", 2, events[1])
        owner.save_section("note", b"bytes")
        owner.delete_fd("conn", 1)

    return [
        ("hold-empty", "a hold in which nothing is kept", lambda owner, events: None),
        ("hold-one", "one descriptor", one),
        ("hold-deleted", "two descriptors and a section, the first deleted since", several),
    ]


def live_means(found: Vector) -> Vector:
    """What a successor reads."""
    from cprd.live import reader

    root = build(found)
    try:
        held = reader.read(root)
    finally:
        os.close(root)
    try:
        return {"hold": held.hold, "seq": held.seq, **state_means(held.state)}
    finally:
        held.state.close()
        held.close()


def _live_records() -> Iterator[Vector]:
    fd, section, memory = records.FD, records.SECTION, records.MEMORY
    save, raw, mapped = records.SAVE, records.RAW, records.MAPPED
    made = {
        "change": records.encode(records.CHANGE, 7, 9, 2, [(save, 5, (fd, b"conn", -1), b"")], 1),
        "snapshot": records.encode(
            *(records.SNAPSHOT, 7, 2, 3),
            [(raw, 4, (section, b"a", 0), b"xy"), records.deletion((fd, b"b", 6))],
            0,
        ),
        "attach": records.encode(
            records.ATTACH, 7, 2, 3, [records.deletion((memory, b"m", 0))], 2, [16, 17]
        ),
        "root-part": records.encode(records.ROOT, 7, 2, 3, [], 1, [255], part=(2, 3)),
        "own": records.encode(
            records.CHANGE, 7, 2, 0, [(mapped, 1, (memory, b"m", 0), b"")], 1, flags=records.OWN
        ),
    }
    for name, data in made.items():
        yield {"name": name, "hex": data.hex(), "means": record_means(data)}


def record_means(data: bytes) -> Vector:
    record = records.decode(data)
    fields = ("kind", "flags", "hold", "seq", "ordinal", "descriptors", "ids", "part", "parts")
    means = {field: plain(getattr(record, field)) for field in fields}
    means["entries"] = [
        {"op": op, "birth": birth, "space": key[0], "name": key[1].decode(), "id": key[2]}
        | ({"value": value.hex()} if op in records.VALUES else {})
        for op, birth, key, value in record.entries
    ]
    return means


def text_of(content: Any) -> str:
    """A file of vectors: a line for each."""
    lines = ",\n".join(json.dumps(vector, ensure_ascii=False) for vector in content)
    return f"[\n{lines}\n]\n"


def changed(vectors: dict[str, Any]) -> list[str]:
    """Names of stored vectors whose bytes would be others."""
    found = []
    for name, content in vectors.items():
        before = {one["name"]: _bytes(one) for one in stored(name)} if _is_stored(name) else {}
        now = {one["name"]: _bytes(one) for one in content}
        found += [f"{name}/{one}" for one in before if before[one] != now.get(one)]
    return found


def _is_stored(name: str) -> bool:
    return (PLACE / f"{name}.json").exists()


def _bytes(vector: Vector) -> Any:
    return vector.get("queue", vector.get("hex"))


def main() -> None:
    from tools.pages import PAGES, filled

    vectors = every()
    PLACE.mkdir(exist_ok=True)
    others = changed(vectors)
    if others and sys.argv[1:] != ["--unreleased"]:
        raise SystemExit(
            f"the bytes of {', '.join(others)} are others than before: count the version up"
            " (--unreleased: no release has the version yet)"
        )
    for name, content in vectors.items():
        (PLACE / f"{name}.json").write_text(text_of(content), encoding="utf-8")
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), vectors), encoding="utf-8")


if __name__ == "__main__":
    main()
