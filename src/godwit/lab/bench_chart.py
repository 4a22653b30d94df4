# SPDX-License-Identifier: GPL-2.0-or-later
"""A chart of the bench's results as SVG: how many times better than the peer, for each target that compares the two.

A bar to the right of the line in the middle is better, whichever way the metric
goes; the scale is logarithmic, so that twice as good and half as good are as long.
A notch marks the target. Each bar has its figure and its verdict in words. Colours
suit light and dark surroundings, as the reader's system prefers.
"""

from __future__ import annotations

import math
from html import escape

from godwit.lab.bench import Results
from godwit.lab.bench_report import comparable, label, ratio
from godwit.lab.bench_targets import OURS, PEER, Verdict

SCALE, FIGURES, LETTER, MARGIN = 480, 130, 6.6, 12  # pixels: of width, a letter's on the average
TOP, ROW, BOTTOM = 72, 22, 30
LEAST, MOST = 1 / 4, 32.0  # of the scale
TICKS = (1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32)

_MARKS = {Verdict.MET: "✓", Verdict.MISSED: "✗", Verdict.UNDECIDED: "?"}

_STYLE = """
  :root { color-scheme: light dark; }
  .ground { fill: #ffffff; } .text { fill: #1f2328; } .faint { fill: #59636e; }
  .grid { stroke: #d1d9e0; } .one { stroke: #59636e; } .mark { stroke: #1f2328; }
  .met { fill: #2f6f9f; } .missed { fill: #b85c1e; } .undecided { fill: #818b98; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117; } .text { fill: #f0f6fc; } .faint { fill: #9198a1; }
    .grid { stroke: #3d444d; } .one { stroke: #9198a1; } .mark { stroke: #f0f6fc; }
    .met { fill: #58a6d6; } .missed { fill: #e08a45; } .undecided { fill: #7d8590; }
  }
  text { font: 12px system-ui, sans-serif; }
  .title { font-size: 15px; font-weight: 600; }
"""


def _x(times: float) -> float:
    """Where a ratio is on the scale; what is beyond it is at its end."""
    part = (math.log2(min(max(times, LEAST), MOST)) - math.log2(LEAST)) / (math.log2(MOST) - math.log2(LEAST))
    return part * SCALE


def _times(value: float) -> str:
    return f"1/{1 / value:g}" if value < 1 else f"{value:g}"


def svg(results: Results) -> str:
    """The chart."""
    bars = comparable(results)
    labels = [f"{label(results, target.case)}: {target.metric}" for target, _ in bars]
    before = MARGIN + LETTER * max(map(len, labels), default=0)  # where the scale begins
    width, height = math.ceil(before + SCALE + FIGURES), TOP + ROW * len(bars) + BOTTOM
    title = f"{OURS} beside {PEER}: how many times better"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' role="img" aria-labelledby="title summary">',
        f'<title id="title">{title}</title>',
        f'<desc id="summary">{escape(_summary(results))}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{width}" height="{height}"/>',
        f'<text class="text title" x="{MARGIN}" y="24">{title}</text>',
        f'<text class="faint" x="{MARGIN}" y="44">ratios of medians, turned so that right is better; the notch is the'
        " target</text>",
    ]
    bottom = height - BOTTOM
    for tick in TICKS:
        x = before + _x(tick)
        parts.append(
            f'<line class="{"one" if tick == 1 else "grid"}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{bottom}"/>'
        )
        parts.append(f'<text class="faint" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_times(tick)}×</text>')
    for number, (target, value) in enumerate(bars):
        verdict = target.verdict(results)
        times = value if target.least else 1 / value
        wanted = before + _x(target.bound if target.least else 1 / target.bound)
        y = TOP + ROW * number
        middle = y + ROW / 2 + 4
        left, right = sorted((before + _x(1), before + _x(times)))
        figure = f"{ratio(value)} × {_MARKS[verdict]} {verdict.value}"
        parts += [
            f'<text class="text" x="{before - 8:.1f}" y="{middle}" text-anchor="end">{escape(labels[number])}</text>',
            f'<rect class="{verdict.value}" x="{left:.1f}" y="{y + 4}" width="{max(right - left, 1):.1f}"'
            f' height="{ROW - 8}"/>',
            f'<line class="mark" x1="{wanted:.1f}" x2="{wanted:.1f}" y1="{y + 1}" y2="{y + ROW - 1}"'
            ' stroke-width="2"/>',
            f'<text class="text" x="{before + SCALE + MARGIN:.1f}" y="{middle}">{figure}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _summary(results: Results) -> str:
    """The chart in words, for who cannot see it."""
    return "; ".join(
        f"{label(results, target.case)}, {target.metric}: {ratio(value)} times {PEER}'s,"
        f" target {target.words.partition(' ×')[0]}, {target.verdict(results).value}"
        for target, value in comparable(results)
    )
