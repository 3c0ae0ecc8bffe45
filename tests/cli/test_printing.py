"""Nothing that a peer may have said reaches a terminal as it is: one function prints."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from cprd.linux.stdio import note, say
from tests.support.checkout import CHECKOUT

OWN = {  # (file, function): why it may write by itself
    ("cprd/linux/stdio.py", "say"): "the function",
    ("cprd/linux/stdio.py", "note"): "the function",
    ("cprd/cli/table.py", "_table"): "rich, with cells that are printable",
    ("cprd/qemu/spawn.py", "_write"): "escapes where a terminal reads",
    ("cprd/daemon/log.py", "_write"): "lines of cprd's log, whose values are escaped",
    ("cprd/keep/log.py", "event"): "the same",
}
NO_PEER = ("cprd/demo/", "cprd/cli/demo.py")  # says nothing but what itself has made


def writes(path: Path) -> Iterator[tuple[str, int]]:
    """(function, line) of each call that writes to stdout or stderr."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and is_write(call):
                    yield node.name, call.lineno


def is_write(call: ast.Call) -> bool:
    func = call.func
    if isinstance(func, ast.Name):
        return func.id == "print"
    if not isinstance(func, ast.Attribute):
        return False
    if func.attr == "print":
        return True
    if func.attr in ("write", "writelines"):
        on = ast.unparse(func.value)
        if on in ("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"):
            return True
        first = call.args[0] if call.args else None
        return on == "os" and isinstance(first, ast.Constant) and first.value in (1, 2)
    return False


def test_only_one_function_prints() -> None:
    found = set()
    for path in sorted((CHECKOUT / "cprd").rglob("*.py")):
        name = str(path.relative_to(CHECKOUT))
        if not name.startswith(NO_PEER):
            found |= {(name, function) for function, _ in writes(path)}
    assert found == set(OWN), "use cprd.linux.stdio.say or note"


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "a\nb", "\x9b31m", "\u202egnp", "\udcff"])
def test_what_is_printed_is_printable(capsys: pytest.CaptureFixture[str], text: str) -> None:
    say(text)
    note(text)
    for said in capsys.readouterr():
        assert said.endswith("\n")
        assert said[:-1].isprintable()
        assert said[:-1].isascii() or text.isascii()
