"""Other processes, as the kernel sees them."""

from __future__ import annotations

from pathlib import Path

from tests.support.patience import until

LOOKS = 4  # in a row that find a process quiet


def state(pid: int) -> str:
    """The state letter of a process (R, S, T, Z, ...), "" when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def await_quiet(*pids: int) -> None:
    """Wait until each of these processes sleeps in all its threads and has used no CPU time from
    one look to the next: what it was sent it has read, and done all that it can do."""
    before: dict[str, str] = {}
    quiet = 0

    def look() -> bool:
        nonlocal before, quiet
        now = {path: text for pid in pids for path, text in _threads(pid).items()}
        asleep = all(text.startswith("S") for text in now.values())
        quiet = quiet + 1 if asleep and now == before else 0
        before = now
        return quiet >= LOOKS

    until(look, lambda: f"busy: {before}")


def _threads(pid: int) -> dict[str, str]:
    """State and time on a CPU of each thread."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            spent = (task / "schedstat").read_text().split()[0]
            letter = (task / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue  # it has ended meanwhile
        found[str(task)] = f"{letter} {spent}"
    return found
