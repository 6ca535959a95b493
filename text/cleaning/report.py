"""What the cleaning took out and why, for people (HTML) and for programs (JSON)."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from command_line import replacing
from text.cleaning.rules import RULES, Thresholds, edges_of

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem }
td, th { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
td.n, th.n { text-align: right; white-space: nowrap }
.bar { background: #c43; height: .7rem; display: inline-block }
details { color: #555 }
pre { white-space: pre-wrap; word-break: break-all; background: #f6f6f6; padding: .3rem .6rem; margin: .3rem 0 }
.now { font-weight: bold; background: #ffe }
"""


def summary_lines(statistics: dict[str, Any]) -> list[str]:
    """The result for the terminal."""
    read, kept = statistics["read"], statistics["kept"]
    share = 100 * kept["characters"] / max(1, read["characters"])
    lines = [
        f"{kept['documents']:,} of {read['documents']:,} documents stay, {share:.1f} % of the characters; "
        f"{statistics['mended']:,} were mended"
    ]
    for what, title in (("rejected", "documents that went"), ("removed", "pieces taken out of documents")):
        if statistics[what]:
            lines.append(f"{title}:")
            ordered = sorted(statistics[what].items(), key=lambda item: -item[1]["count"])
            lines += [f"  {entry['count']:>10,}  {reason}" for reason, entry in ordered]
    if statistics["masked"]:
        lines.append("masked: " + ", ".join(f"{count:,} {kind}" for kind, count in statistics["masked"].items()))
    return lines


def write_report(path: str, statistics: dict[str, Any], thresholds: Thresholds, command: dict[str, Any]) -> None:
    """Write `path` (.html) and the same as .json beside it."""
    changes = {rule.name: list(_changes(rule, statistics, thresholds)) for rule in RULES}
    changes = {name: rows for name, rows in changes.items() if rows}
    content = {"options": command, **statistics, "thresholds": changes}
    with replacing(Path(path).with_suffix(".json"), "choose another --report") as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())
    with replacing(path, "choose another --report") as file:
        file.write(_page(statistics, changes, command).encode())


def _changes(rule: Any, statistics: dict[str, Any], thresholds: Thresholds) -> Iterator[dict[str, Any]]:
    """How many documents a rule alone would take at other values of its threshold; the one in force is marked."""
    counts = statistics["histograms"].get(rule.number)
    if not counts or not sum(counts):
        return
    edges, total = edges_of(rule.number), sum(counts)
    for option, takes_below in ((rule.least, True), (rule.most, False)):
        if not option:
            continue
        now = float(getattr(thresholds, option))
        below = [sum(counts[:index]) for index in range(len(edges))]
        gone = below if takes_below else [total - count for count in below]
        # Every value at which the share changes by half a per cent or more, and the nearest one to what is in force
        nearest = min(range(len(edges)), key=lambda index: abs(edges[index] - now))
        shown = {nearest}
        for index in range(1, len(edges)):
            last = max((i for i in shown if i < index), default=0)
            if abs(gone[index] - gone[last]) >= 0.005 * total and 0 < gone[index] < 0.6 * total:
                shown.add(index)
        for index in sorted(shown):
            yield {
                "option": option,
                "threshold": round(float(edges[index]), 4),
                "documents": int(gone[index]),
                "share": gone[index] / total,
                "in_force": index == nearest and (now != 0 or takes_below),
            }


def _page(statistics: dict[str, Any], changes: dict[str, list[dict]], command: dict[str, Any]) -> str:
    read, kept = statistics["read"], statistics["kept"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Cleaning</title><style>{STYLE}</style>",
        "<h1>Cleaning</h1><table><tr><th><th class=n>documents<th class=n>characters</tr>",
    ]
    for name, counts in (("read", read), ("kept", kept)):
        parts.append(f"<tr><td>{name}<td class=n>{counts['documents']:,}<td class=n>{counts['characters']:,}</tr>")
    shares = (kept[unit] / max(1, read[unit]) for unit in ("documents", "characters"))
    parts.append("<tr><td>share" + "".join(f"<td class=n>{share:.2%}" for share in shares) + "</tr></table>")
    parts.append(f"<p>{statistics['mended']:,} documents were mended.")
    parts += (f" {count:,} × {html.escape(kind)} masked." for kind, count in statistics["masked"].items())
    for what, title in (("rejected", "Documents that went"), ("removed", "Pieces taken out of documents")):
        parts.append(f"<h2>{title}</h2>")
        entries = sorted(statistics[what].items(), key=lambda item: -item[1]["count"])
        if not entries:
            parts.append("<p>None.")
            continue
        most = entries[0][1]["count"]
        parts.append("<table><tr><th>reason<th class=n>count<th class=n>characters<th></tr>")
        for reason, entry in entries:
            examples = "".join(f"<pre>{html.escape(example)}</pre>" for example in entry["examples"])
            parts.append(
                f"<tr><td>{html.escape(reason)}<details><summary>examples</summary>{examples}</details>"
                f"<td class=n>{entry['count']:,}<td class=n>{entry['characters']:,}"
                f"<td><span class=bar style='width:{12 * entry['count'] / most:.2f}rem'></span></tr>"
            )
        parts.append("</table>")
    parts.append(
        "<h2>What a threshold would change</h2><p>How many of the documents that were measured each rule alone takes "
        "at other values of its option. Values are rounded to those of a histogram; the one nearest to what was in "
        "force is marked."
    )
    for name, rows in changes.items():
        parts.append(f"<h3>{html.escape(name)}</h3><table><tr><th>option<th class=n>value<th class=n>goes<th></tr>")
        for row in rows:
            parts.append(
                f"<tr{' class=now' if row['in_force'] else ''}><td>--{row['option']}<td class=n>{row['threshold']:g}"
                f"<td class=n>{row['documents']:,} ({row['share']:.2%})"
                f"<td><span class=bar style='width:{12 * row['share']:.2f}rem'></span></tr>"
            )
        parts.append("</table>")
    options = html.escape(json.dumps(command, ensure_ascii=False, indent=1))
    parts.append(f"<h2>Options</h2><pre>{options}</pre></html>\n")
    return "\n".join(parts)
