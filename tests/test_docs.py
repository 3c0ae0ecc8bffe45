"""What the documents show is what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from cprd.holds import TRANSITIONS
from cprd.wire import REQUESTS

ROOT = Path(__file__).parent.parent


def test_the_table_of_transitions_is_the_one_in_the_code() -> None:
    page = (ROOT / "docs/lifecycle.md").read_text()
    table = page.split("| phase | event | then |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", table, re.M)
    assert {(phase, event): then for phase, event, then in rows} == TRANSITIONS


def test_every_verb_is_documented_with_its_fields() -> None:
    page = (ROOT / "docs/protocol.md").read_text()
    documented: dict[str, set[str]] = {}
    for verbs, fields in re.findall(r"^\| (`[^|]+`) \| ([^|]*)\|", page, re.M):
        for verb in re.findall(r"`(\w+)`", verbs):
            documented[verb] = {field for field in re.split(r",\s*", fields.strip()) if field}
    assert documented == {verb: set(fields) for verb, fields in REQUESTS.items()}


def test_pages_that_are_linked_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_importing_cprd_pulls_in_nothing_heavy() -> None:
    heavy = {"trio", "asyncio", "rich", "dataclasses", "inspect", "logging", "subprocess", "json"}
    code = "import sys, cprd; print(' '.join(sys.modules))"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not heavy & set(said.stdout.split())
