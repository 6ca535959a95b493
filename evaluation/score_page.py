"""One HTML page for one evaluation: figures with their intervals, groups, calibration, and the worst answers.

The page has no scripts and loads nothing; its plots are SVG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from command_line import replacing
from evaluation.intervals import Interval

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ page.title }}</title>
<style>
  :root { color-scheme: light dark; --line: #8885; --soft: #8882; --ink: #2563eb; --bad: #c2410c }
  @media (prefers-color-scheme: dark) { :root { --ink: #6ea5ff; --bad: #fb923c } }
  body { font: 15px/1.55 system-ui, "Noto Sans SC", "PingFang SC", "Microsoft YaHei", sans-serif;
         max-width: 68rem; margin: 1.5rem auto; padding: 0 1rem }
  h1 { margin-bottom: .2rem; overflow-wrap: anywhere }
  h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem }
  .wide { overflow-x: auto } table { border-collapse: collapse; font-size: .93em }
  th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
  td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
  td.t { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 9rem; max-width: 24rem }
  .note { opacity: .75; font-size: .92em; overflow-wrap: anywhere }
  svg { display: block; color: inherit } svg text { fill: currentColor; font: 11px system-ui, sans-serif }
</style>
{% macro whisker(value, low, high) %}<svg width="180" height="16" viewBox="0 0 180 16" role="img"
aria-label="{{ '%.3f' | format(value) }}"><line x1="2" x2="178" y1="8" y2="8" stroke="var(--soft)" stroke-width="10"/>
<line x1="{{ 2 + 176 * low }}" x2="{{ 2 + 176 * high }}" y1="8" y2="8" stroke="var(--ink)" stroke-width="3"/>
<circle cx="{{ 2 + 176 * value }}" cy="8" r="4.5" fill="var(--ink)"/></svg>{% endmacro %}
<h1>{{ page.title }}</h1>
<p class="note">{% for name, value in page.about.items() %}
{{ name }} {{ value }}{{ " · " if not loop.last }}{% endfor %}</p>

<h2>Figures</h2>
<div class="wide"><table><tr><th>figure<th class="n">value<th class="n">95 % interval<th>0 … 1 or 0 … 100</tr>
{% for name, value, interval, scale in page.figures %}<tr><td>{{ name }}<td class="n">{{ value | figure }}
<td class="n">{% if interval %}{{ interval[0] | figure }} … {{ interval[1] | figure }}{% endif %}
<td>{% if scale and interval %}{{ whisker(value / scale, interval[0] / scale, interval[1] / scale) }}{% endif %}</tr>
{% endfor %}</table></div>
<p class="note">Intervals tell of the choice of the questions: shares by Wilson's formula, all else by the bootstrap
(evaluation/intervals.py).{% for name, text in page.signatures.items() %} {{ name }}: {{ text }}.{% endfor %}</p>

{% for title, rows in page.groups.items() %}<h2>{{ title }}</h2>
<div class="wide"><table><tr><th><th class="n">count<th class="n">share<th class="n">95 % interval<th></tr>
{% for name, count, value, interval in rows %}<tr><td>{{ name }}<td class="n">{{ count }}
<td class="n">{{ "%.1f %%" | format(100 * value) }}
<td class="n">{{ "%.1f … %.1f %%" | format(100 * interval[0], 100 * interval[1]) }}
<td>{{ whisker(value, interval[0], interval[1]) }}</tr>
{% endfor %}</table></div>
{% endfor %}
{% if page.calibration %}<h2>Calibration</h2>
<svg width="300" height="262" viewBox="0 0 300 262" role="img"
aria-label="how often the likeliest choice is right, by its probability">
<rect x="40" y="10" width="220" height="220" fill="none" stroke="var(--line)"/>
<line x1="40" y1="230" x2="260" y2="10" stroke="var(--line)" stroke-dasharray="4 4"/>
{% for count, right, confidence in page.calibration %}
<circle cx="{{ 40 + 220 * confidence }}" cy="{{ 230 - 220 * right }}" r="{{ 2 + 9 * (count / page.calibrated) ** 0.5 }}"
fill="var(--ink)" fill-opacity=".55"><title>{{ count }}: {{ "%.3f" | format(right) }} right at
{{ "%.3f" | format(confidence) }}</title></circle>{% endfor %}
<text x="40" y="246">0</text><text x="252" y="246">1</text><text x="92" y="258">probability it was given</text>
<text x="26" y="232">0</text><text x="26" y="18">1</text>
<text x="14" y="160" transform="rotate(-90 14 160)">share that is right</text></svg>
<p class="note">A point for each bin of the likeliest choice's probability, as large as there are cases; on the line,
it is right as often as it claims to be.</p>{% endif %}

{% for title, counts in page.histograms.items() %}<h2>{{ title }}</h2>
<svg width="300" height="130" viewBox="0 0 300 130" role="img" aria-label="{{ title }}">
{% for count in counts %}<rect x="{{ 10 + loop.index0 * 280 / counts | length }}" width="{{ 270 / counts | length }}"
y="{{ 105 - 95 * count / (counts | max or 1) }}" height="{{ 95 * count / (counts | max or 1) }}" fill="var(--ink)">
<title>{{ count }}</title></rect>{% endfor %}
<line x1="10" x2="290" y1="105" y2="105" stroke="var(--line)"/>
<text x="8" y="120">0</text><text x="284" y="120">1</text></svg>
{% endfor %}
{% if page.worst %}<h2>{{ page.worst_title }}</h2>
<div class="wide"><table><tr>{% for name in page.worst[0] %}<th>{{ name }}{% endfor %}</tr>
{% for row in page.worst %}<tr>{% for value in row.values() %}<td class="{{ 't' if value is string else 'n' }}">
{{- value if value is string or value is integer else value | figure }}{% endfor %}</tr>
{% endfor %}</table></div>{% endif %}
</html>
"""


@dataclass
class ScorePage:
    """What the page shows.

    Attributes:
        about: what was evaluated, and how.
        figures: (name, value, interval or None, scale); a scale of 1 or 100 draws the interval.
        groups: by title, (name, count, share, interval).
        calibration: (count, share that is right, mean probability) of each bin.
        histograms: by title, counts of equal bins of 0 … 1.
        worst: rows of one shape.
    """

    title: str
    about: Mapping[str, Any]
    figures: Sequence[tuple[str, float, Interval | None, float | None]]
    signatures: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, Sequence[tuple[str, int, float, Interval]]] = field(default_factory=dict)
    calibration: Sequence[Sequence[float]] = ()
    histograms: Mapping[str, Sequence[int]] = field(default_factory=dict)
    worst: Sequence[Mapping[str, Any]] = ()
    worst_title: str = "The worst answers"

    @property
    def calibrated(self) -> float:
        """How many cases the fullest bin of the calibration has."""
        return max(count for count, _, _ in self.calibration)


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def figures_of(report: Mapping[str, Any]) -> list[tuple[str, float, Interval | None, float | None]]:
    """The figures of a report with "scores" and "intervals"."""
    percent = ("sacrebleu", "chrf")
    unbounded = ("loss", "perplexity", "bits_per_byte", "mean_tokens", "reference_perplexity", "margin")
    found = []
    for name, value in report["scores"].items():
        bounded = None if name.endswith(unbounded) else 100 if name in percent else 1
        found.append((name, value, report["intervals"].get(name), bounded))
    return found


def write_page(page: ScorePage, path: Path) -> None:
    """Write the page, whole or not at all."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters["figure"] = _figure
    html = environment.from_string(PAGE).render(page=page)
    with replacing(path, "free some space or choose another --output_path") as file:
        file.write(html.encode("utf-8", "replace"))
