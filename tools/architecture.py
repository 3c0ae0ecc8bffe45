"""Write the table of files in docs/architecture.md anew, from the first sentence of each docstring.

python3 tools/architecture.py
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/architecture.md"
BEGIN, END = "<!-- files -->\n", "<!-- end of files -->\n"


def summary(path: Path) -> str:
    """The first sentence that a file says of itself."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".c":
        said = re.sub(r"^/\*\s*|\n \*", "", text.split("*/")[0])
    else:
        said = ast.get_docstring(ast.parse(text)) or ""
    first = re.split(r"(?<=[.:])\s", " ".join(said.split()) + " ", maxsplit=1)[0]
    return first.rstrip(".:").replace("|", "\\|")


def table() -> str:
    """A heading a folder, a row a file."""
    package = ROOT / "cprd"
    folders = sorted({path.parent for path in package.rglob("*.py")})
    lines = []
    for folder in folders:
        files = sorted((*folder.glob("*.py"), *folder.glob("*.c")))
        name = folder.relative_to(ROOT)
        lines += [f"### {name}/", "", "| file | what the file is for |", "|---|---|"]
        lines += [f"| `{path.relative_to(package)}` | {summary(path)} |" for path in files]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
