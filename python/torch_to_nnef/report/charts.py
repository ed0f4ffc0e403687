"""Charts of a page: inline SVG in the page's own colours, each point and bar with its numbers as a tooltip."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch_to_nnef.quantize.rows import TensorRow

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 960, 260, 44, 22, 8
_HUES = 8  # colours in the style sheet; further roles share the last
_SMALL, _SMALL_HEIGHT = 220, 64


def role(row: TensorRow) -> str:
    """What kind of layer a weight belongs to: the name of its module without numbers, `q_proj` of `layers.3.attn.q_proj.weight`."""
    parts = [part for part in row.fqn.split(".")[:-1] if not part.isdecimal()]
    return parts[-1] if parts else row.fqn


def db_of(row: TensorRow) -> float | None:
    """The SNR that is shown of a weight: of its outputs where it was measured, else its own; dB."""
    return row.snr_db if row.output_snr_db is None else row.output_snr_db


def by_depth(rows: Sequence[TensorRow]) -> str:
    """A point a weight, in the order of the model, its error upwards; colours are roles."""
    points = [(i, row, db) for i, row in enumerate(rows) if (db := db_of(row)) is not None and math.isfinite(db)]
    if not points:
        return ""
    roles = list(dict.fromkeys(role(row) for _, row, _ in points))
    low, high = _rounded([db for _, _, db in points])
    count = max(1, points[-1][0])

    def place(index: int, db: float) -> tuple[float, float]:
        x = _LEFT + 10 + (_WIDTH - _LEFT - 20) * index / count
        return x, _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - db) / (high - low)

    marks = []
    for index, row, db in points:
        x, y = place(index, db)
        about = escape(f"{row.fqn}: {db:.1f} dB")
        marks.append(
            f'<circle class="h{_hue(roles, row)}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{about}</title></circle>'
        )
    lines = "".join(_line(place(0, db)[1], f"{db:g}") for db in _ticks(low, high))
    legend = "".join(f'<span class="h{min(i, _HUES - 1)}">{escape(name)}</span>' for i, name in enumerate(roles))
    axis = f'<text x="{_LEFT}" y="{_HEIGHT - 4}">first weight of the model</text>' + (
        f'<text class="end" x="{_WIDTH}" y="{_HEIGHT - 4}">last</text>'
    )
    return f"{_svg(_WIDTH, _HEIGHT, lines + ''.join(marks) + axis, 'chart')}<p class=legend>{legend}</p>"


def histogram(counts: Sequence[int], labels: Sequence[str], title: str) -> str:
    """Bars for `counts`, with the first, the middle and the last of `labels` below."""
    most, total = max(counts, default=0), sum(counts)
    if not most:
        return ""
    width = _SMALL / len(counts)
    bars = []
    for i, count in enumerate(counts):
        height = (_SMALL_HEIGHT - 16) * count / most
        about = escape(f"{labels[i]}: {count / total:.1%}")
        place = f'x="{i * width:.2f}" y="{_SMALL_HEIGHT - 14 - height:.2f}" width="{max(width - 1, 1):.2f}" height="{height:.2f}"'
        bars.append(f"<rect {place}><title>{about}</title></rect>")
    middle = len(counts) // 2
    texts = (
        f'<text x="0" y="{_SMALL_HEIGHT - 2}">{escape(labels[0])}</text>'
        f'<text class="mid" x="{_SMALL / 2}" y="{_SMALL_HEIGHT - 2}">{escape(labels[middle])}</text>'
        f'<text class="end" x="{_SMALL}" y="{_SMALL_HEIGHT - 2}">{escape(labels[-1])}</text>'
    )
    drawing = _svg(_SMALL, _SMALL_HEIGHT, "".join(bars) + texts, "small")
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}</figure>"


def histograms(rows: Sequence[TensorRow]) -> str:
    """Of the weights and the codes of `rows` together."""
    weights, codes = (_summed([getattr(row, name) for row in rows]) for name in ("weight_counts", "code_counts"))
    edges = len(weights)
    places = [f"{8 * (i + 0.5) / edges - 4:+.1f} rms" for i in range(edges)]
    return histogram(weights, places, "weights") + histogram(codes, [f"{code - 8:+d}" for code in range(16)], "codes")


def _summed(counts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*[c for c in counts if c], strict=True)]


def _hue(roles: Sequence[str], row: TensorRow) -> int:
    return min(roles.index(role(row)), _HUES - 1)


def _rounded(values: Sequence[float]) -> tuple[float, float]:
    """Multiples of 5 dB around `values`."""
    low, high = 5 * math.floor(min(values) / 5), 5 * math.ceil(max(values) / 5)
    return low, max(high, low + 5)


def _ticks(low: float, high: float) -> Iterator[float]:
    step = 5 * max(1, math.ceil((high - low) / 5 / 6))
    value = low
    while value <= high:
        yield value
        value += step


def _line(y: float, label: str) -> str:
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"></line>'
        f'<text class="end" x="{_LEFT - 8}" y="{y + 4:.1f}">{label}</text>'
    )


def _svg(width: int, height: int, content: str, kind: str) -> str:
    return f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img">{content}</svg>'
