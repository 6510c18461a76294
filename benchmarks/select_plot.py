"""Time, memory and share of the margin over n, drawn from saved results of `bench_select.py --codes`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

EXACT = ("incremental", "pruned", "lazy")
COLOURS = {"incremental": "#4c72b0", "pruned": "#55a868", "partitioned": "#c44e52", "sparse": "#8172b2"}
WIDTH, HEIGHT, LEFT, GAP, TOP = 250, 190, 60, 85, 40

Result = dict[str, Any]


def share(result: Result, results: Sequence[Result]) -> float | None:
    """Return the share of the margin between chance and exact that a result recovers; None without both."""

    def value(names: Sequence[str]) -> float | None:
        same = [r for r in results if all(r[key] == result[key] for key in ("n", "k", "clusters"))]
        return next((r["value"] for r in reversed(same) if r["name"] in names), None)

    exact, chance = value(EXACT), value(("random",))
    return None if exact is None or chance is None else (result["value"] - chance) / (exact - chance)


@dataclass(frozen=True)
class Axis:
    """Numbers on a line of pixels.

    Attributes:
        low: the number at its start.
        high: the number at its end.
        log: whether equal factors are equally far.
    """

    low: float
    high: float
    log: bool = False

    def place(self, number: float) -> float:
        """Return 0 at the start to 1 at the end."""
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, number))
        return (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Return round numbers within."""
        if self.log:
            steps = (m * 10.0**e for e in range(-1, 7) for m in (1, 2, 5))
            return [x for x in steps if self.low <= x <= self.high]
        return [self.low + (self.high - self.low) * i / 4 for i in range(5)]


def round_up(number: float) -> float:
    """Return the next of 1, 2, 4, 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(number))
    return next(power * m for m in (1, 2, 4, 8, 10) if power * m >= number)


def brief(number: float) -> str:
    """Return a size as 20k or 1M."""
    return f"{number / 1e6:g}M" if number >= 1e6 else f"{number / 1e3:g}k"


def draw(results: Sequence[Result]) -> str:
    """Return an SVG with a panel for each measure; of equal runs the last counts.

    Args:
        results: lines that `--save` wrote.
    """
    last = {(r["name"], r["n"], r["k"], r["clusters"]): r for r in results}
    runs = [r for r in last.values() if r["name"] != "random"]
    panels: list[tuple[str, Callable[[Result], float | None], Callable[[list[float]], Axis]]] = [
        ("seconds of processor time", lambda r: r["cpu"], lambda y: Axis(min(y) / 1.5, max(y) * 1.5, log=True)),
        ("peak memory, GiB", lambda r: r["peak"] / 2**30, lambda y: Axis(0.0, round_up(max(y)))),
        ("share of the margin", lambda r: share(r, results), lambda y: Axis(math.floor(min(y) * 20 - 1) / 20, 1.0)),
    ]
    parts: list[str] = []
    sizes = sorted({r["n"] for r in runs})
    x = Axis(sizes[0] / 1.3, sizes[-1] * 1.3, log=True)
    for p, (title, measure, axis) in enumerate(panels):
        points = [(r, y) for r in runs if (y := measure(r)) is not None]
        if points:
            parts += panel(title, LEFT + p * (WIDTH + GAP), points, (x, axis([y for _, y in points])), sizes)
    return framed([*parts, *legend(runs)])


def panel(
    title: str, left: float, points: list[tuple[Result, float]], axes: tuple[Axis, Axis], sizes: list[int]
) -> list[str]:
    """Return one panel: a line an algorithm and number of picks, filled dots for the smallest number."""
    x, y = axes
    parts = [f'<text x="{left}" y="{TOP - 14}" font-weight="bold">{title}</text>']
    parts.append(f'<path d="M{left} {TOP}V{TOP + HEIGHT}H{left + WIDTH}" fill="none" stroke="#555"/>')
    for number in y.ticks():
        at = TOP + HEIGHT * (1 - y.place(number))
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{number:.4g}</text>')
    for n in sizes:
        at = left + WIDTH * x.place(n)
        parts.append(f'<text x="{at:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{brief(n)}</text>')
    few = min(r["k"] for r, _ in points)
    for algorithm, colour in COLOURS.items():
        for k in sorted({r["k"] for r, _ in points}):
            line = sorted((r["n"], v) for r, v in points if r["algorithm"] == algorithm and r["k"] == k)
            spots = [(left + WIDTH * x.place(n), TOP + HEIGHT * (1 - y.place(v))) for n, v in line]
            joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in spots)
            if len(spots) > 1:
                parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}"/>')
            fill = colour if k == few else "white"
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{fill}" stroke="{colour}"/>' for a, b in spots]
    return parts


def legend(runs: Sequence[Result]) -> list[str]:
    """Return what colours and dots mean."""
    names = [name for name in COLOURS if any(r["algorithm"] == name for r in runs)]
    parts, below = [], TOP + HEIGHT + 55
    for i, name in enumerate(names):
        parts.append(f'<circle cx="{LEFT + 10 + i * 110}" cy="{below}" r="4" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{LEFT + 20 + i * 110}" y="{below + 4}">{name}</text>')
    picks = sorted({r["k"] for r in runs})
    words = f"k = {picks[0]:,}" + "".join(f"; hollow: k = {k:,}" for k in picks[1:])
    parts.append(f'<text x="{LEFT + 20 + len(names) * 110}" y="{below + 4}">{words}; n = instances</text>')
    return parts


def framed(parts: Iterable[str]) -> str:
    """Return parts as a file, on white, so that it can be read on a dark page."""
    width, height = LEFT + 3 * (WIDTH + GAP) - 30, TOP + HEIGHT + 75
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"'
    return "\n".join([f'{head} font-size="12">', '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])
