"""Charts as SVG whose colours and text are the page's: they follow its theme and are read by screen readers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from bench.report import Result, strongest

WIDTH, LINE, LEFT, RIGHT = 1040, 20, 430, 310


class Axis:
    """A logarithmic axis: numbers between `low` and `high` onto pixels between `begin` and `end`."""

    def __init__(self, low: float, high: float, begin: float, end: float) -> None:
        self.low, self.high, self.begin, self.end = low, high, begin, end

    def __call__(self, number: float) -> float:
        share = math.log(min(max(number, self.low), self.high) / self.low) / math.log(self.high / self.low)
        return round(self.begin + share * (self.end - self.begin), 1)

    def powers(self, base: int) -> Iterator[float]:
        """Return the powers of `base` on the axis."""
        first, last = (math.log(edge, base) for edge in (self.low, self.high))
        yield from (float(base) ** power for power in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1))


def ratios(result: Result, title: str) -> str:
    """Draw a line per row: the ratio to its strongest alternative and the interval, on a logarithmic axis."""
    rows = [row for row in result["rows"] if "wrong" not in row and strongest(row)[0]]
    if not rows:
        return "<p>No row has an alternative.</p>"
    found = [(row["name"].replace(" |", ","), *strongest(row)) for row in rows]
    low = min(0.5, *(other["low"] for *_, other in found)) * 0.95
    high = max(2.0, *(other["high"] for *_, other in found)) * 1.05
    axis, bottom = Axis(low, high, LEFT, WIDTH - RIGHT), LINE * len(found) + 10
    parts = []
    for tick in axis.powers(2):
        kind = "one" if tick == 1 else "grid"
        parts.append(f'<line class="{kind}" x1="{axis(tick)}" x2="{axis(tick)}" y1="0" y2="{bottom}"/>')
        parts.append(_text(axis(tick), bottom + 16, f"{tick:g}×", "tick middle"))
    for index, (name, against, other) in enumerate(found):
        y = LINE * index + 15
        kind = "ahead" if other["low"] > 1 else "behind" if other["high"] < 1 else "even"
        ratio, begin, end = (axis(other[key]) for key in ("ratio", "low", "high"))
        told = f"{name}: {other['ratio']:.2f}× ({other['low']:.2f} … {other['high']:.2f}), against {against}"
        marks = (
            f'<line class="range" x1="{begin}" x2="{end}" y1="{y}" y2="{y}"/><circle cx="{ratio}" cy="{y}" r="4.5"/>'
        )
        parts.append(f'<g class="{kind}"><title>{escape(told)}</title>{marks}</g>')
        parts.append(_text(LEFT - 12, y + 4, _short(name, 66), "end"))
        parts.append(_text(WIDTH - RIGHT + 14, y + 4, f"{other['ratio']:.2f}×  {_short(against, 40)}", "against"))
    return _svg(WIDTH, bottom + 28, f"Ratios of {title}", parts)


def roofline(result: Result, title: str) -> str:
    """Draw operations per second over operations per byte, under the ceilings of the same run; both logarithmic."""
    rows = [row for row in result["rows"] if "wrong" not in row and row["work"] is not None]
    ceilings, width, height = result["ceilings"], 760, 400
    if not rows:
        return "<p>No row counts its work.</p>"
    points = []
    for row in rows:
        # Rows without a product stand at the left edge, at their bytes per second times that edge.
        intensity = max(row["work"]["flops"] / row["work"]["bytes"], 2**-5)
        points.append((row, intensity, intensity * row["work"]["bytes"] / row["ours_ms"] * 1e3))
    memory = ceilings["moved"][max(ceilings["moved"], key=int)]
    tops = dict(ceilings["flops"])
    across = Axis(2**-6, 2**12, 84, width - 150)
    up = Axis(min(reached for *_, reached in points) / 2, 2 * max(tops.values()), height - 40, 10)
    parts = [_text(across.begin, height - 6, "operations per byte", "tick")]
    for tick in across.powers(16):
        parts.append(f'<line class="grid" x1="{across(tick)}" x2="{across(tick)}" y1="10" y2="{height - 40}"/>')
        parts.append(_text(across(tick), height - 24, f"{tick:g}" if tick >= 1 else f"1/{1 / tick:g}", "tick middle"))
    for tick in up.powers(10):
        parts.append(f'<line class="grid" y1="{up(tick)}" y2="{up(tick)}" x1="{across.begin}" x2="{across.end}"/>')
        parts.append(_text(across.begin - 6, up(tick) + 4, _operations(tick), "tick end"))
    for dtype, top in tops.items():
        corner = top / memory
        ends = [(across.low, memory * across.low), (corner, top), (across.high, top)]
        path = " ".join(f"{across(x)},{up(y)}" for x, y in ends)
        parts.append(f'<polyline class="roof" points="{path}"/>')
        parts.append(_text(across.end + 6, up(top) + 4, f"{dtype}, {_operations(top)}", "tick"))
    for row, intensity, reached in points:
        name, share = row["name"].replace(" |", ","), row["roofline"]
        told = f"{name}: {_operations(reached)}, {share:.0%} of its roofline"
        kind = "narrow" if row["dtype"] in ("bfloat16", "float16", "int8", "int4") else "wide"
        point = f'<circle class="point {kind}" cx="{across(intensity)}" cy="{up(reached)}" r="5">'
        parts.append(f"{point}<title>{escape(told)}</title></circle>")
    return _svg(width, height, f"Roofline of {title}; hollow: 16 bits or less", parts)


def targets(rows: Sequence[tuple[str, float, str]]) -> str:
    """Draw how far each target of a GPU was reached; the line is the target."""
    most, parts = max([1.0, *(share for _, share, _ in rows)]), []
    scale = (WIDTH - LEFT - RIGHT) / most
    for index, (name, share, measured) in enumerate(rows):
        y = LINE * index + 15
        kind = "ahead" if share >= 1 else "behind"
        parts.append(f'<g class="{kind}"><rect x="{LEFT}" y="{y - 7}" width="{share * scale:.1f}" height="14"/></g>')
        parts.append(_text(LEFT - 12, y + 4, _short(name, 66), "end"))
        parts.append(_text(WIDTH - RIGHT + 14, y + 4, measured, "against"))
    edge, bottom = LEFT + scale, LINE * len(rows) + 10
    parts.append(f'<line class="one" x1="{edge:.1f}" x2="{edge:.1f}" y1="0" y2="{bottom}"/>')
    return _svg(WIDTH, bottom + 10, "Reached of each target", parts)


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    label = escape(title, quote=True)
    drawn = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    # Wider than a phone: who has no mouse scrolls it by the arrow keys.
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Chart: {label}">{drawn}</div>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(text)}</text>'


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _operations(number: float) -> str:
    for name, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {name}FLOP/s"
    return f"{number:.3g} FLOP/s"
