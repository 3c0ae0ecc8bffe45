"""The walls of the house, read off the code by `ast`: imports run downward only, private names stay
in their folder, and nothing grows beyond a size that a reader can keep in mind."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

RANKS = {
    "errors": 0,
    "linux": 1,
    **dict.fromkeys(("state", "vmstate"), 2),
    **dict.fromkeys(("bundle", "protocol"), 3),
    **dict.fromkeys(("live", "systemd", "keep", "bind"), 4),
    **dict.fromkeys(("client", "daemon"), 5),
    **dict.fromkeys(("__init__", "trio", "asyncio"), 6),
    "cpr": 7,
    **dict.fromkeys(("qemu", "demo"), 8),
    "cli": 9,
    "__main__": 10,
}
"""Rooms from the ground up. Rooms of the same rank do not see each other; the public faces do."""

WORDS = frozenset(
    (
        *("it", "its", "that", "what", "who", "whom", "whose", "one", "ones"),
        *("they", "them", "their", "there", "this", "these", "those", "which"),
    )
)
LONGEST_FUNCTION = 60  # lines
LONGEST_CLASS = 400
MOST_WORDS = 6.0  # % of all words


def modules(root: Path) -> dict[str, Path]:
    """Dotted names, as import statements say them, and their files."""
    found = {}
    for path in sorted((root / "cprd").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    """The part of cprd that a module lies in: a folder, or a file of its own."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int, bool]]:
    """(module of cprd, line, whether for types only) of each import statement in a file."""
    tree = ast.parse(path.read_text())
    types_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent.name == "vmstate", f"{path}: a relative import"
            base = node.module or ""
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
                for alias in node.names
            ]
        for name in names:
            if name.split(".")[0] == "cprd":
                yield name, getattr(node, "lineno", 0), node in types_only


def upward(root: Path) -> list[str]:
    """Imports that run up, or sideways into a room of the same rank."""
    known = modules(root)
    wrong = []
    for module, path in known.items():
        mine = room(module)
        for target, line, types_only in imports(path, known):
            theirs = room(target)
            faces = RANKS[mine] == RANKS[theirs] == RANKS["__init__"]
            faces = faces or (module == "cprd" and types_only)  # names that are imported late
            if theirs != mine and RANKS[theirs] >= RANKS[mine] and not faces:
                wrong.append(f"{path.relative_to(root)}:{line} imports {target}")
    return wrong


def cycles(root: Path) -> list[str]:
    """Modules that lead back to themselves, imports for types only left out."""
    known = modules(root)
    graph = {
        module: {
            target
            for target, _, types_only in imports(path, known)
            if not types_only and target in known and target != module
        }
        for module, path in known.items()
    }
    changed = True
    while changed:  # whoever leads nowhere, or only to such, is in no cycle
        leaves = {module for module, targets in graph.items() if not targets & graph.keys()}
        graph = {module: targets for module, targets in graph.items() if module not in leaves}
        changed = bool(leaves)
    return sorted(graph)


def privates(root: Path) -> list[str]:
    """Names with a leading underscore that are used outside of the folder that defines them."""
    files = [(path, ast.parse(path.read_text())) for path in modules(root).values()]
    defined: dict[Path, set[str]] = {}
    for path, tree in files:
        mine = defined.setdefault(path.parent, set())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                mine.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                mine.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                mine.add(node.attr)
    ours = set().union(*defined.values()) - {
        "_replace",
        "_asdict",
        "_make",
    }  # public, of named tuples
    wrong = []
    for path, tree in files:
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cprd"):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") != "self":
                names = [node.attr] if node.attr in ours else []
            wrong += [
                f"{path.relative_to(root)} uses {name}"
                for name in names
                if re.match(r"_[a-z]", name) and name not in defined[path.parent]
            ]
    return wrong


def test_imports_run_downward() -> None:
    assert upward(ROOT) == []


def test_an_upward_import_is_found_in_a_function_too(tmp_path: Path) -> None:
    for name in ("linux", "daemon"):
        (tmp_path / "cprd" / name).mkdir(parents=True)
        (tmp_path / "cprd" / name / "__init__.py").touch()
    (tmp_path / "cprd/__init__.py").touch()
    (tmp_path / "cprd/daemon/releasing.py").touch()
    low = tmp_path / "cprd/linux/rights.py"
    low.write_text("def late():\n    from cprd.daemon import releasing\n    return releasing\n")
    assert upward(tmp_path) == ["cprd/linux/rights.py:2 imports cprd.daemon.releasing"]
    low.write_text("import cprd.daemon.releasing\n")
    assert upward(tmp_path) == ["cprd/linux/rights.py:1 imports cprd.daemon.releasing"]


def test_the_client_and_the_daemon_do_not_see_each_other(tmp_path: Path) -> None:
    for name in ("client", "daemon"):
        (tmp_path / "cprd" / name).mkdir(parents=True)
        (tmp_path / "cprd" / name / "__init__.py").touch()
    (tmp_path / "cprd/client/verbs.py").write_text("import cprd.daemon\n")
    assert upward(tmp_path) == ["cprd/client/verbs.py:1 imports cprd.daemon"]


def test_no_module_leads_back_to_itself(tmp_path: Path) -> None:
    assert cycles(ROOT) == []
    (tmp_path / "cprd/linux").mkdir(parents=True)
    (tmp_path / "cprd/linux/a.py").write_text("import cprd.linux.b\n")
    (tmp_path / "cprd/linux/b.py").write_text("def f():\n    import cprd.linux.a\n")
    assert cycles(tmp_path) == ["cprd.linux.a", "cprd.linux.b"]


def test_private_names_stay_in_their_folder() -> None:
    assert privates(ROOT) == []


def test_trio_is_for_the_daemon_its_client_and_the_demo() -> None:
    known = modules(ROOT)
    users = set()
    for module, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            if any(name.split(".")[0] == "trio" for name in names):
                users.add(room(module))
    assert users <= {"daemon", "trio", "demo"}


def test_the_limit_of_descriptors_is_set_in_one_file() -> None:
    setting = [
        str(path.relative_to(ROOT))
        for path in modules(ROOT).values()
        if "setrlimit" in path.read_text()
    ]
    assert setting == ["cprd/linux/nofile.py"]


def test_no_function_and_no_class_is_too_long() -> None:
    long = []
    for path in modules(ROOT).values():
        for node in ast.walk(ast.parse(path.read_text())):
            most = LONGEST_CLASS if isinstance(node, ast.ClassDef) else LONGEST_FUNCTION
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > most:
                    name = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                    long.append(f"{name}: {lines} lines")
    assert long == []


def share(texts: list[str]) -> float:
    """How many of all words, in percent, send the reader back to look for what they mean."""
    words = [word for text in texts for word in re.findall(r"[a-z']+", text.lower())]
    return 100 * sum(word in WORDS for word in words) / max(1, len(words))


def docstrings() -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    return [
        ast.get_docstring(node) or ""
        for path in modules(ROOT).values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds)
    ]


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", " ", page.read_text(), flags=re.S)


def test_docstrings_name_their_subjects() -> None:
    assert share(docstrings()) < MOST_WORDS


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda path: path.name
)
def test_pages_name_their_subjects(page: Path) -> None:
    assert share([prose(page)]) < MOST_WORDS


def test_the_page_on_the_architecture_lists_the_files_that_exist() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    listed = re.findall(r"^\| `([\w./]+\.(?:py|c))` \|", page, flags=re.M)
    there = [str(path.relative_to(ROOT / "cprd")) for path in modules(ROOT).values()]
    there += [str(path.relative_to(ROOT / "cprd")) for path in (ROOT / "cprd").rglob("*.c")]
    assert sorted(listed) == sorted(there)
