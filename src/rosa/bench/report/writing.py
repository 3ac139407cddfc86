"""A comparison's report: printed, and as files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from rosa.bench.report.page import write_page
from rosa.bench.report.results import read_comparison
from rosa.bench.report.tables import (
    COLUMNS,
    columns,
    comparison_table,
    markdown,
    notes,
    shown_rows,
    table_rows,
)
from rosa.bench.storage import runs


def write_report(folder: Path, say: Any, output: Path | None = None) -> None:
    """Print a comparison's table; write it as report.md, .csv and .html, and all cells as .json.

    Args:
        folder: the comparison's folder.
        say: a rich console.
        output: where the files go; None takes the folder itself.
    """
    comparison = read_comparison(folder)
    output = output or folder
    output.mkdir(parents=True, exist_ok=True)
    names = columns(comparison)
    further = names[len(COLUMNS) :] or ("seconds",)
    narrow = ("method", "rank", "lr", "score", "spread", "trainable", *further)
    places = [names.index(name) for name in narrow]
    rows = [[cells[i] for i in places] for cells in shown_rows(comparison)]
    say.print(comparison_table(str(folder), narrow, rows))
    for note in notes(comparison):
        say.print(f"- {note}", highlight=False)
    (output / "report.md").write_text(markdown(comparison), encoding="utf-8")
    with (output / "report.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([row[name] for name in names] for row in table_rows(comparison))
    cells = {name: record.to_json() for name, record in comparison.cells.items()}
    whole = {"settings": comparison.settings, "cells": cells}
    runs.write_json(output / "report.json", whole)
    write_page(comparison, output / "report.html")
    say.print(f"wrote report.md, .csv, .html, and every cell's record in report.json, to {output}")
