"""The examples and tables of docs/protocol.md and docs/bundle.md, made from vectors and code.

A page has marks: <!-- example request/save --> and <!-- fields save -->, each up to <!-- end -->.
"""

from __future__ import annotations

import json
import re
from typing import Any

from cprd.protocol import messages
from tools.vectors import BUNDLE, LIVE, ROOT, WIRE, Vector

PAGES = (ROOT / "docs/protocol.md", ROOT / "docs/bundle.md")


def block(file: str, vector: Vector) -> str:
    """A vector as a page shows it: words, and bytes."""
    lines = []
    if file in ("request", "answer"):
        shown = messages.decode(bytes.fromhex(vector["hex"]), messages.MAX_ANSWER)
        lines = [f"{file} {diagnostic(shown)}"]
    return "\n".join(["```", *lines, *_dump(vector), "```"])


def diagnostic(value: Any) -> str:
    """A value in words: JSON, with h'...' for bytes."""
    if isinstance(value, bytes):
        return f"h'{value.hex()}'"
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}": {diagnostic(v)}' for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(diagnostic, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _dump(vector: Vector, at: str = "") -> list[str]:
    if "descriptor" in vector:
        return [f"{at}descriptor {vector['descriptor']}"]
    if "memfd" in vector:
        return [f"{at}sealed memfd", *_hex(vector["memfd"], at + "  ")]
    if "hex" in vector and "queue" not in vector:
        return _hex(vector["hex"], at)
    lines = []
    for message in vector["queue"]:
        lines += [f"{at}message", *_hex(message["hex"], at + "  ")]
        for one in message["carries"]:
            if "queue" in one:
                lines.append(f"{at}  socket")
            lines += _dump(one, at + "    " if "queue" in one else at + "  ")
    return lines


def _hex(data: str, at: str) -> list[str]:
    raw = bytes.fromhex(data)
    lines = []
    for start in range(0, len(raw), 16):
        part = raw[start : start + 16]
        text = "".join(chr(c) if 32 <= c < 127 else "." for c in part)
        lines.append(f"{at}{part.hex(' '):<47}  {text}".rstrip())
    return lines


def fields_table(verb: str) -> str:
    """The fields of a request, as a table, and those of the answer."""
    fields = messages.REQUESTS[verb]
    answer = "; ".join(
        f"`{name}` {_bounds(field)}" + ("" if field.required else ", optional")
        for name, field in messages.ANSWERS[verb].items()
    )
    said = f"Answer: {answer or 'no fields'}."
    if not fields:
        return f"No fields. {said}"
    rows = ["| field | type and bounds | default |", "|---|---|---|"]
    for name, field in fields.items():
        default = "required" if field.required else _default(verb, name, field.default)
        rows.append(f"| `{name}` | {_bounds(field)} | {default} |")
    return "\n".join([*rows, "", said])


def _bounds(field: messages.Field) -> str:
    """The form of a field, with powers of two in short."""
    wants = field.wants
    for bits in (64, 31):
        wants = wants.replace(str((1 << bits) - 1), f"2^{bits}-1")
    return wants.replace(str(1 << 32), "2^32").replace("'", '"').replace("3.1536e+08", "315360000")


def _default(verb: str, name: str, default: Any) -> str:
    if default is not None:
        return f"`{diagnostic(default)}`"
    return {"lease": "as before", "ttl": "no end", "generation": "any"}.get(name, "none")


def filled(page: str, vectors: dict[str, Any]) -> str:
    """A page with each example and table of fields between its marks written anew."""

    def fill(found: re.Match[str]) -> str:
        what, name = found[1], found[2]
        if what == "fields":
            text = fields_table(name)
        else:
            file, _, which = name.partition("/")
            full = {"request": f"{WIRE}-requests", "answer": f"{WIRE}-answers"}
            full |= {"bundle": BUNDLE, "live": LIVE}
            (vector,) = [one for one in vectors[full[file]] if one["name"] == which]
            text = block(file, vector)
        return f"<!-- {what} {name} -->\n{text}\n<!-- end -->"

    return re.sub(r"<!-- (fields|example) (\S+) -->\n.*?<!-- end -->", fill, page, flags=re.S)
