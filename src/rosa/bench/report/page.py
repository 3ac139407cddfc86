"""A comparison as one self-contained HTML page: no script, no other file, readable on a phone."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from rosa.bench.report import pictures
from rosa.bench.report.results import Comparison
from rosa.bench.report.tables import columns, notes, shown_rows

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 72rem;
  color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff;
  white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
.pictures { display: grid; gap: 1.5rem; margin-top: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; } figure img { width: 100%; height: auto; }
ul, dl { font-size: .9rem; padding-left: 1.2rem; }
li { overflow-wrap: anywhere; }
dl { padding: 0; display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
"""


def write_page(comparison: Comparison, path: Path) -> None:
    """Write a comparison's table, pictures and settings as one HTML file."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns(comparison))
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in shown_rows(comparison)
    )
    figures = "".join(
        f"<figure><h2>{escape(title)}</h2><img alt='{escape(title, quote=True)}' "
        f"src='data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}'></figure>"
        for title, svg in pictures.of_comparison(comparison).items()
    )
    settings = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in comparison.settings.items()
        if value is not None and value is not False and value != []
    )
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes(comparison))
    task = comparison.settings.get("task") or Path(comparison.settings.get("train") or "text").stem
    title = escape(f"{task}, {comparison.settings['model']}")
    path.write_text(
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        f"<h1>Methods compared on {title}</h1>"
        f"<div class='wide'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
        f"<ul>{listed}</ul><div class='pictures'>{figures}</div>"
        f"<details><summary>Settings shared by all runs</summary><dl>{settings}</dl></details>"
        "</body></html>\n",
        encoding="utf-8",
    )
