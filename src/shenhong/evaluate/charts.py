"""Curves, shares and expert loads as blocks of a report: hand-set SVG and HTML that follow the page's colours.

As Markdown a curve is a short table of its points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from shenhong.evaluate.page import Table, escape, escape_markdown

COLOURS = 6  # --c0 … --c5 of the page
_WIDTH, _HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 8, 34
_POINTS = 240  # drawn of a curve; more are averaged in equal stretches
_ROWS = 8  # of a curve as Markdown


@dataclass(frozen=True)
class Series:
    name: str
    x: Sequence[float]
    y: Sequence[float]

    def finite(self) -> Series:
        pairs = [(x, y) for x, y in zip(self.x, self.y, strict=True) if _finite(x) and _finite(y)]
        return Series(self.name, [x for x, _ in pairs], [y for _, y in pairs])

    def thinned(self, points: int) -> Series:
        """At most `points` points, each the mean of a stretch; the last stays itself."""
        if len(self.x) <= points:
            return self
        cut = np.array_split(np.arange(len(self.x) - 1), points - 1)
        x, y = np.asarray(self.x, dtype=float), np.asarray(self.y, dtype=float)
        return Series(
            self.name,
            [*(float(x[i].mean()) for i in cut), float(x[-1])],
            [*(float(y[i].mean()) for i in cut), float(y[-1])],
        )


@dataclass(frozen=True)
class Curves:
    """Lines over one axis. y_from_zero: whether the axis begins at 0; x_time: seconds shown as minutes."""

    title: str
    x_name: str
    series: Sequence[Series]
    y_from_zero: bool = False
    clean: tuple[Series, ...] = field(init=False)

    def __post_init__(self) -> None:
        found = (series.finite() for series in self.series)
        object.__setattr__(self, "clean", tuple(series for series in found if series.x))

    def html(self) -> str:
        if not self.clean:
            return ""
        drawn = [series.thinned(_POINTS) for series in self.clean]
        xs = [x for series in drawn for x in series.x]
        ys = [y for series in drawn for y in series.y]
        x_ticks = ticks(min(xs), max(xs), 5)
        low = 0.0 if self.y_from_zero else min(ys)
        y_ticks = ticks(low, max(ys), 5)
        x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-12)
        y_low, y_high = y_ticks[0], y_ticks[-1]

        def across(x: float) -> float:
            return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

        def down(y: float) -> float:
            return _TOP + (y_high - y) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

        out = []
        for tick in y_ticks:
            y = down(tick)
            out.append(
                f"<line class=axis x1={_LEFT} x2={_WIDTH - _RIGHT} y1={y:.1f} y2={y:.1f} />"
                f"<text x={_LEFT - 5} y={y + 3.5:.1f} text-anchor=end>{escape(short(tick))}</text>"
            )
        for tick in x_ticks:
            if x_low <= tick <= x_high:
                out.append(
                    f"<text x={across(tick):.1f} y={_HEIGHT - _BOTTOM + 14} text-anchor=middle>"
                    f"{escape(short(tick))}</text>"
                )
        out.append(
            f"<text x={(_WIDTH + _LEFT) / 2:.0f} y={_HEIGHT - 3} text-anchor=middle>"
            f"{escape(self.x_name)}</text>"
        )
        for i, series in enumerate(drawn):
            colour = f"var(--c{i % COLOURS})"
            points = " ".join(
                f"{across(x):.1f},{down(y):.1f}" for x, y in zip(series.x, series.y, strict=True)
            )
            if len(series.x) > 1:
                out.append(f'<polyline class=curve style="stroke:{colour}" points="{points}" />')
            if len(series.x) <= 40:
                out.extend(
                    f'<circle cx={across(x):.1f} cy={down(y):.1f} r=2.4 style="fill:{colour}">'
                    f"<title>{escape(f'{short(x)}: {y:.5g}')}</title></circle>"
                    for x, y in zip(series.x, series.y, strict=True)
                )
        last = "; ".join(f"{s.name} ends at {short(s.y[-1])}" for s in drawn)
        keys = "".join(
            f'<span><i style="background:var(--c{i % COLOURS})"></i>{escape(s.name)}'
            f" · {escape(short(s.y[-1]))}</span>"
            for i, s in enumerate(drawn)
        )
        return (
            f"<figure class=card><figcaption>{escape(self.title)}</figcaption>"
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{escape(last)}">'
            f"{''.join(out)}</svg><div class=key>{keys}</div></figure>"
        )

    def markdown(self) -> str:
        if not self.clean:
            return ""
        tables = []
        for series in self.clean:
            thin = series.thinned(_ROWS)
            rows = [[short(x), f"{y:.4g}"] for x, y in zip(thin.x, thin.y, strict=True)]
            tables.append(
                Table([self.x_name, f"{self.title}: {series.name}"], rows, words=0).markdown()
            )
        return "\n\n".join(tables)


@dataclass(frozen=True)
class Shares:
    """Parts of a whole as one bar: (name, amount, amount in words)."""

    title: str
    parts: Sequence[tuple[str, float, str]]

    def html(self) -> str:
        whole = sum(amount for _, amount, _ in self.parts) or 1.0
        bar, key = "", ""
        for i, (name, amount, words) in enumerate(self.parts):
            colour = f"var(--c{i % COLOURS})"
            bar += (
                f'<span style="background:{colour};width:{100 * amount / whole:.2f}%" '
                f'title="{escape(name)}: {escape(words)}"></span>'
            )
            share = f"{100 * amount / whole:.1f} %"
            key += (
                f'<span><i style="background:{colour}"></i>'
                f"{escape(name)} {escape(words)} · {share}</span>"
            )
        return (
            f"<figure class=card><figcaption>{escape(self.title)}</figcaption>"
            f"<div class=shares>{bar}</div><div class=key>{key}</div></figure>"
        )

    def markdown(self) -> str:
        whole = sum(amount for _, amount, _ in self.parts) or 1.0
        rows = [[n, words, f"{100 * amount / whole:.1f} %"] for n, amount, words in self.parts]
        return Table([self.title, "time", "share"], rows).markdown()


@dataclass(frozen=True)
class Loads:
    """Load of each expert of each layer over the mean load of the layer: 1 is even."""

    title: str
    layers: Sequence[Sequence[float]]  # shares that sum to 1, or counts

    def relative(self) -> list[list[float]]:
        return [[x * len(row) / (sum(row) or 1.0) for x in row] for row in self.layers]

    def html(self) -> str:
        rows = self.relative()
        experts = max(map(len, rows), default=0)
        cells = ""
        for i, row in enumerate(rows):
            cells += f"<b>MoE {i + 1}</b>"
            for e, load in enumerate(row):
                # 0 is empty, an even load is at a third of the colour, three times even is full.
                cells += (
                    f'<i style="background:rgba(var(--heat),{min(1.0, load / 3):.3f})" '
                    f'title="layer {i + 1}, expert {e}: {load:.2f} × even"></i>'
                )
            cells += "<i></i>" * (experts - len(row)) + f"<b>max {max(row, default=0.0):.2f}</b>"
        return (
            f"<figure class=card><figcaption>{escape(self.title)}</figcaption><div class=heat "
            f'style="grid-template-columns:auto repeat({experts},1fr) auto">{cells}</div></figure>'
        )

    def markdown(self) -> str:
        rows = [
            [
                f"MoE {i + 1}",
                f"{min(row):.2f}",
                f"{max(row):.2f}",
                " ".join(f"{x:.2f}" for x in row),
            ]
            for i, row in enumerate(self.relative())
            if row
        ]
        table = Table(["layer", "least", "most", "each expert, 1 = even"], rows)
        return f"{escape_markdown(self.title)}\n\n{table.markdown()}"


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that span [low, high], about `count` of them, at least two."""
    if high - low <= max(1e-290, 1e-9 * max(abs(low), abs(high))):
        high = low + (abs(low) * 0.1 or 1.0)
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def short(number: float) -> str:
    """1200000 as 1.2M, 0.00025 as 2.5e-4, the rest with four digits."""
    size = abs(number)
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= scale and (unit != "k" or size >= 1e4):
            return f"{number / scale:.3g}{unit}"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{number:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{number:.4g}"


def _finite(number: object) -> bool:
    return isinstance(number, int | float) and math.isfinite(number)
