"""The plot: processor time as bars, times nginx. Plain SVG, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from benchmarks.figures import Results
from benchmarks.tables import shown

_GROUPS = (
    ("per streamed token, 64 streams", "token_us@64"),
    ("per streamed token, 256 streams", "token_us@256"),
    ("per streamed token, 1,000 streams", "token_us@1000"),
    ("per small request", "request_us@most"),
)
_MOST = 8.0  # times nginx; longer bars are cut, and say so
_LEFT, _WIDTH, _RIGHT = 130, 480, 70
_BAR, _GAP = 18, 5
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
.bar { fill: #8c959f }
.corral { fill: #0969da }
.one { stroke: #8c959f; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .bar { fill: #6e7681 }
  .corral { fill: #58a6ff }
  .one { stroke: #6e7681 }
}"""


def svg(results: Results, contenders: Sequence[tuple[str, str]]) -> str:
    """`contenders` are names and titles, drawn in their order."""
    parts: list[str] = []
    y = 24
    for title, figure in _GROUPS:
        bars = [
            (name, label, ratio) for name, label in contenders if (ratio := results.ratio(name, figure)) is not None
        ]
        if not bars:
            continue
        parts.append(f'<text class="title" x="{_LEFT}" y="{y}">{escape(title)}, times nginx</text>')
        y += 10
        top = y
        for name, label, ratio in bars:
            parts.append(_bar(name, label, ratio, y))
            y += _BAR + _GAP
        one = _LEFT + _WIDTH / _MOST
        parts.append(f'<line class="one" x1="{one:g}" x2="{one:g}" y1="{top - 2}" y2="{y - _GAP + 2}"/>')
        y += 26
    width = _LEFT + _WIDTH + _RIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}" role="img" '
        f'aria-label="Processor time of proxies, times nginx">\n<style>{_STYLE}\n</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _bar(name: str, label: str, ratio: float, y: int) -> str:
    length = _WIDTH * min(ratio, _MOST) / _MOST
    middle = y + _BAR - 5
    number = f"{shown(ratio)} ×" + (" …" if ratio > _MOST else "")
    kind = "corral" if name == "corral" else "bar"
    return (
        f'<text x="{_LEFT - 8}" y="{middle}" text-anchor="end">{escape(label)}</text>'
        f'<rect class="{kind}" x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR}" rx="2"/>'
        f'<text x="{_LEFT + length + 6:.1f}" y="{middle}">{number}</text>'
    )
