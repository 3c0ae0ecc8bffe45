"""cprctl demo: restart a real server under load again and again, and watch nobody notice.

Starts a private cprd and a TCP server of its own (cprd/demo/server.py), keeps many connections to
it busy, and restarts it again and again, four times of ten by kill -9 at a random moment; one
successor is killed right after its claim. Exit status 0 only if no answer was lost or wrong and no
connection was dropped.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from cprd.errors import InvalidInput, Unavailable, absent

if TYPE_CHECKING:
    from rich.console import Console

    from cprd.demo.stage import Progress, Settings
    from cprd.demo.timeline import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--connections", type=int, default=500, metavar="N")
    parser.add_argument("--restarts", type=int, default=10, metavar="N")
    parser.add_argument("--seconds", type=float, default=14.0, metavar="S", help="how long")
    parser.add_argument("--rate", type=float, metavar="R", help="requests a second, in all")
    parser.add_argument("--svg", metavar="FILE", help="save the picture")


def run(args: argparse.Namespace) -> int:
    _check_packages()
    from rich.console import Console

    from cprd.demo import stage
    from cprd.demo.picture import svg

    settings = _settings(args)
    if args.svg:
        open(args.svg, "a", encoding="utf-8").close()  # better now than after all is done
    console = Console(highlight=False)
    try:
        if console.is_terminal:
            with _Live(console, settings) as live:
                report = stage.run(settings, live.show)
        else:
            report = stage.run(settings, _Lines(settings).show)
        sys.stdout.flush()
    except KeyboardInterrupt:
        console.print("stopped before its end; nothing is left behind")
        return 130
    _print(console, report)
    if args.svg:
        with open(args.svg, "w", encoding="utf-8") as file:
            file.write(svg(report))
        console.print(f"The picture is in {args.svg}", markup=False)
    return 0 if report.flawless else 1


def _check_packages() -> None:
    for package in ("rich", "trio"):
        if find_spec(package) is None:
            raise Unavailable(absent(package, "cprctl demo"))


def _settings(args: argparse.Namespace) -> Settings:
    from cprd.demo.stage import Settings

    if args.connections < 1 or args.restarts < 1 or not 0 < args.seconds <= 3600:
        raise InvalidInput("--connections and --restarts want at least 1, --seconds 1 to 3600")
    rate = min(3.0 * args.connections, 1500.0) if args.rate is None else args.rate
    if not 0 < rate < 1e6:
        raise InvalidInput("--rate wants more than 0 requests a second, and less than a million")
    return Settings(args.connections, args.restarts, args.seconds, rate)


class _Live:
    """Progress on a terminal: a bar that is drawn over."""

    def __init__(self, console: Console, settings: Settings) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("{task.fields[doing]:<28}"),
            BarColumn(10),
            TextColumn("{task.completed}/{task.total} restarts, {task.fields[counts]}"),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self.task = self.bar.add_task("", total=settings.restarts, doing="", counts="")

    def __enter__(self) -> _Live:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def show(self, now: Progress) -> None:
        counts = f"{now.answers:,} answers"
        self.bar.update(self.task, completed=now.restarts, doing=now.doing, counts=counts)
        self.bar.refresh()


class _Lines:
    """Progress into a pipe or a log: a line a restart."""

    def __init__(self, settings: Settings) -> None:
        self.restarts = -1
        self.total = settings.restarts

    def show(self, now: Progress) -> None:
        if now.restarts == self.restarts or (now.restarts == 0 and not now.answers):
            return
        self.restarts = now.restarts
        print(
            f"{now.seconds:5.1f} s  restart {now.restarts} of {self.total},"
            f" {now.connected} connected, {now.answers} answers",
            flush=True,
        )


def _print(console: Console, report: Report) -> None:
    """The picture, the table, the verdict."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from cprd.demo.picture import legend, terminal

    ascii_only = "utf" not in (console.encoding or "").lower()
    console.print()
    for line in terminal(report, min(console.width, 110), ascii_only=ascii_only):
        console.print(line, markup=False, no_wrap=True)
    console.print(legend(ascii_only=ascii_only), style="dim", markup=False)
    console.print()
    table = Table(box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows(report):
        table.add_row(name, value)
    console.print(table)
    if report.flawless:
        console.print("Nothing was lost. Nobody noticed more than a pause.", style="green")
    else:
        console.print("Something was lost: see above.", style="red")


def rows(report: Report) -> list[tuple[str, str]]:
    """The table under the picture."""
    blackouts = report.blackouts()
    crashed = [i + 1 for i, restart in enumerate(report.restarts) if restart.crashed]
    killed = [f"{i + 1}" for i, restart in enumerate(report.restarts) if restart.killed]
    note = f", in number {crashed[0]} the first successor was killed" if crashed else ""
    note = (f", number {' '.join(killed)} by kill -9" if killed else "") + note
    middle = sorted(blackouts)[len(blackouts) // 2] if blackouts else 0.0
    return [
        ("restarts", f"{len(blackouts)}{note}"),
        ("blackout of each, ms", " ".join(f"{b * 1000:.0f}" for b in blackouts)),
        ("of it with cprd, ms", " ".join(f"{r.with_cprd * 1000:.0f}" for r in report.restarts)),
        ("blackout, median", f"{middle * 1000:.0f} ms"),
        ("slowest answer", f"{report.slowest * 1000:.0f} ms"),
        ("requests answered", f"{len(report.answers):,}"),
        ("answers lost", str(report.lost)),
        ("answers wrong", str(report.wrong)),
        ("connections", f"{report.connections:,}, and {report.visits:,} short ones meanwhile"),
        ("connections dropped", str(report.dropped)),
    ]
