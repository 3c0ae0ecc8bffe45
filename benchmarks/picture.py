"""Pictures of figures: wants matplotlib, and says so where there is none."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

from benchmarks.stage import Figure


def plotter() -> Any:
    """matplotlib.pyplot, drawing into files; None without matplotlib."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ModuleNotFoundError:
        print("no picture: wants matplotlib: python3 tools/bootstrap.py all bench")
        return None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "cprd"  # the same figures give the same file
    return importlib.import_module("matplotlib.pyplot")


def bars(figures: Sequence[Figure], path: str) -> bool:
    """One bar a figure with a bound: how much of the bound is used, so that 1 is the bound."""
    plot = plotter()
    shown = [figure for figure in figures if math.isfinite(figure.bound) and figure.value > 0]
    if plot is None or not shown:
        return False
    shares = [
        figure.bound / figure.value if figure.at_least else figure.value / figure.bound
        for figure in shown
    ]
    canvas, axes = plot.subplots(figsize=(10, 0.32 * len(shown) + 1.2), layout="constrained")
    colours = ["tab:green" if figure.good else "tab:red" for figure in shown]
    axes.barh(range(len(shown)), shares, color=colours)
    labels = [f"{figure.what}: {figure.value:.3g}{figure.unit}" for figure in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("share of the bound (1: the bound; left is better)")
    canvas.savefig(path, metadata={"Date": None})
    print(f"picture: {path}")
    return True


def curves(
    curves: Sequence[tuple[str, str, Sequence[tuple[float, float, float, float]]]], path: str
) -> bool:
    """One plot a curve (title, x label, points of x, lower quartile, median, upper quartile; in
    microseconds), both axes logarithmic."""
    plot = plotter()
    if plot is None:
        return False
    columns = 3
    rows = math.ceil(len(curves) / columns)
    canvas, grid = plot.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for axes, (title, label, points) in zip(grid.flat, curves, strict=False):
        xs, low, middle, high = zip(*points, strict=True)
        axes.fill_between(xs, low, high, alpha=0.25)
        axes.plot(xs, middle, marker="o", markersize=3)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(min(low) / 3, max(high) * 3)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.set_ylabel("us of CPU time", fontsize=8)
        axes.grid(visible=True, which="major", alpha=0.3)
    canvas.savefig(path, metadata={"Date": None})
    print(f"picture: {path}")
    return True
