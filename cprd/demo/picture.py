"""The timeline as a picture: in the terminal, and as SVG that reads well in light and dark."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cprd.demo.timeline import ceiling, rates, round_up

if TYPE_CHECKING:
    from cprd.demo.timeline import Report, Restart

EIGHTHS = " ▁▂▃▄▅▆▇█"
HEIGHT = 7  # rows of the terminal's picture
MARGIN = 8  # columns left of it, for the axis
KINDS = {
    "restart": "restart",
    "kill": "kill -9",
    "crash": "restart, its first successor killed",
}
MARKS = [dict(zip(KINDS, marks, strict=True)) for marks in ("▲▼✗", "^vx")]


def terminal(report: Report, width: int, *, ascii_only: bool = False) -> list[str]:
    """Lines of at most `width` columns: bars of answers per second, restarts marked below."""
    columns = max(20, width - MARGIN - 1)
    values = rates(report.answers, report.seconds, columns)
    top = ceiling(values)
    lines = []
    for row in range(HEIGHT, 0, -1):
        label = f"{top * row / HEIGHT:,.0f}" if row in (HEIGHT, 1) else ""
        if row == 1:
            label = "0"
        cells = "".join(_cell(v / top * HEIGHT - (row - 1), ascii_only) for v in values)
        lines.append(f"{label:>{MARGIN - 2}} {'|' if ascii_only else '│'}{cells}".rstrip())
    marks = [" "] * columns
    for restart in report.restarts:
        at = min(columns - 1, int(restart.asked / report.seconds * columns))
        marks[at] = MARKS[ascii_only][_kind(restart)]
    lines.append(" " * MARGIN + "".join(marks).rstrip())
    lines.append(" " * MARGIN + _seconds_axis(report.seconds, columns))
    return lines


def legend(*, ascii_only: bool = False) -> str:
    """What the marks mean."""
    marks = MARKS[ascii_only]
    meant = "; ".join(f"{marks[kind]} {words}" for kind, words in KINDS.items())
    return f"answers a second; {meant}"


def _kind(restart: Restart) -> str:
    return "crash" if restart.crashed else "kill" if restart.killed else "restart"


def _cell(filled: float, ascii_only: bool) -> str:
    eighths = max(0, min(8, round(filled * 8)))
    if ascii_only:
        return " .#"[0 if eighths < 2 else 1 if eighths < 5 else 2]
    return EIGHTHS[eighths]


def _seconds_axis(seconds: float, columns: int) -> str:
    step = max(1, int(round_up(seconds / 8)))
    axis = [" "] * columns
    for second in range(0, int(seconds) + 1, step):
        at = int(second / seconds * columns)
        text = f"{second} s" if second == 0 else str(second)
        if at + len(text) <= columns:
            axis[at : at + len(text)] = text
    return "".join(axis).rstrip()


# -- SVG -----------------------------------------------------------------------------------------

WIDE, HIGH = 880, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 82, 66
BUCKET = 0.05  # seconds
_STYLE = """
  .card { fill: #ffffff; stroke: #d6dae1; }
  .ink { fill: #1d2530; }
  .dim { fill: #5d6775; }
  .grid { stroke: #e6e9ee; }
  .area { fill: #2f6fde; fill-opacity: .18; }
  .line { fill: none; stroke: #2f6fde; stroke-width: 1.5; stroke-linejoin: round; }
  .restart { stroke: #b26a00; stroke-dasharray: 3 3; }
  .restart-mark { fill: #b26a00; }
  .crash { stroke: #c62f3b; stroke-dasharray: 3 3; }
  .crash-mark { fill: #c62f3b; }
  .kill { stroke: #7a3db8; stroke-dasharray: 3 3; }
  .kill-mark { fill: #7a3db8; }
  text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; }
  .title { font-size: 15px; font-weight: 600; }
  .number { font-size: 11px; font-variant-numeric: tabular-nums; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #12171e; stroke: #2b333e; }
    .ink { fill: #e7ebf0; }
    .dim { fill: #98a3b1; }
    .grid { stroke: #222a34; }
    .area { fill: #6aa1ff; fill-opacity: .2; }
    .line { stroke: #6aa1ff; }
    .restart { stroke: #e0a24a; }
    .restart-mark { fill: #e0a24a; }
    .crash { stroke: #ff7680; }
    .crash-mark { fill: #ff7680; }
    .kill { stroke: #c08cf5; }
    .kill-mark { fill: #c08cf5; }
  }
"""


def svg(report: Report) -> str:
    """The whole picture as one SVG document, colours following the reader's scheme."""
    values = rates(report.answers, report.seconds, max(20, int(report.seconds / BUCKET)))
    top = ceiling(values)
    title, verdict = headline(report)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" role="img"'
        f' aria-label="{title}. {verdict}.">',
        f"<title>{title}. {verdict}.</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="card" x=".5" y=".5" width="{WIDE - 1}" height="{HIGH - 1}" rx="8"/>',
        f'<text class="ink title" x="{LEFT}" y="28">{title}</text>',
        f'<text class="dim" x="{LEFT}" y="47">{verdict}</text>',
        *_grid(report, top),
        *_area(values, top),
        *_marks(report),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def headline(report: Report) -> tuple[str, str]:
    """What was done and how it went, one short line each."""
    killed = sum(restart.killed for restart in report.restarts)
    title = f"{report.connections:,} connections, {len(report.restarts)} restarts of their server"
    title += f", {killed} by kill -9" if killed else ""
    blackouts = sorted(report.blackouts())
    pause = f", blackout {blackouts[len(blackouts) // 2] * 1000:.0f} ms (median)"
    verdict = (
        f"{len(report.answers):,} answers, {report.lost} lost, {report.wrong} wrong;"
        f" {report.dropped} connections dropped{pause if blackouts else ''}"
    )
    return title, verdict


def _x(report: Report, time: float) -> float:
    return LEFT + (WIDE - LEFT - RIGHT) * min(1.0, max(0.0, time / report.seconds))


def _y(value: float, top: float) -> float:
    return HIGH - BOTTOM - (HIGH - TOP - BOTTOM) * min(value, top) / top


def _grid(report: Report, top: float) -> list[str]:
    parts = []
    for quarter in range(3):
        value = top * quarter / 2
        y = _y(value, top)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDE - RIGHT}"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{value:,.0f}", "end"))
    parts.append(_text(LEFT - 8, TOP - 12, "per s", "end"))
    step = max(1, int(round_up(report.seconds / 10)))
    parts += [
        _text(_x(report, second), HIGH - BOTTOM + 32, f"{second} s", "middle")
        for second in range(0, int(report.seconds) + 1, step)
    ]
    return parts


def _text(x: float, y: float, what: str, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="dim number" {place}>{what}</text>'


def _triangle(kind: str, x: float, y: float, title: str = "") -> str:
    return f'<path class="{kind}-mark" d="M{x:.1f} {y}l5 9h-10z">{title}</path>'


def _area(values: list[float], top: float) -> list[str]:
    width = (WIDE - LEFT - RIGHT) / len(values)
    steps = "L".join(
        f"{LEFT + (i + 0.5) * width:.1f} {_y(value, top):.1f}" for i, value in enumerate(values)
    )
    first, last = LEFT + width / 2, WIDE - RIGHT - width / 2
    base = _y(0, top)
    return [
        f'<path class="area" d="M{first:.1f} {base:.1f}L{steps}L{last:.1f} {base:.1f}Z"/>',
        f'<path class="line" d="M{steps}"/>',
    ]


def _marks(report: Report) -> list[str]:
    parts = []
    for restart in report.restarts:
        x = _x(report, restart.asked)
        kind = _kind(restart)
        parts.append(f'<path class="{kind}" d="M{x:.1f} {TOP}V{HIGH - BOTTOM}"/>')
        title = f"<title>{kind} at {restart.asked:.2f} s</title>"
        parts.append(_triangle(kind, x, HIGH - BOTTOM + 5, title))
    y = HIGH - 12
    said = "answers per second; the bursts that catch up are cut off at the top"
    parts.append(_text(WIDE - RIGHT, y, said, "end"))
    left = LEFT + 5
    there = {"restart", *map(_kind, report.restarts)}
    for kind, words in KINDS.items():
        if kind in there:
            parts += [_triangle(kind, left, y - 9), _text(left + 11, y, words)]
            left += 25 + 6 * len(words)
    return parts
