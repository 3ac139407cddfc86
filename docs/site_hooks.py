"""What MkDocs calls as it builds the site: formulas to MathML, what the code tells of itself."""

from __future__ import annotations

import ast
import re
from dataclasses import MISSING, Field, fields
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from typer.main import get_command

import rosa
from rosa import RosaConfig
from rosa.bench.setup.methods import METHODS
from rosa.cli.commands import app

SOURCES = Path(rosa.__file__).parent
WRITTEN_ON_SAVING = ("base_fingerprint", "loading")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page, with the commands, settings, methods or files where it asks for them."""
    for made in (commands, settings, methods, files):
        if (mark := f"<!-- {made.__name__} -->") in markdown:
            markdown = markdown.replace(mark, made())
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """The page's HTML, its formulas as MathML, which browsers draw without a script."""
    return _FORMULA.sub(_as_mathml, html)


def _as_mathml(found: re.Match[str]) -> str:
    display = "inline" if found[2] == "(" else "block"
    return convert(unescape(found[3]), display=display)


def settings() -> str:
    """The fields of `RosaConfig`, which its docstring gets only when it is imported."""
    rows = [
        f"| `{f.name}` | {_cell(f.metadata['help'])} | `{_written(f)}` |"
        for f in fields(RosaConfig)
        if f.name in RosaConfig.__annotations__ and f.name not in WRITTEN_ON_SAVING
    ]
    return "\n".join(["| field | meaning | default |", "| --- | --- | --- |", *rows])


def _written(field: Field[Any]) -> str:
    return "{}" if field.default is MISSING else repr(field.default)


def methods() -> str:
    """What `--method` can be."""
    rows = [f"| `{name}` | {_cell(row.about)} | {row.lr:g} |" for name, row in METHODS.items()]
    return "\n".join(["| method | what is trained | `--lr` |", "| --- | --- | --- |", *rows])


def files() -> str:
    """The files of the source, with the first line of each."""
    rows = []
    for path in sorted(SOURCES.rglob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        if not path.name.startswith("__"):
            rows.append(f"| `{path.relative_to(SOURCES)}` | {_cell(said.splitlines()[0])} |")
    return "\n".join(["| file | what it is for |", "| --- | --- |", *rows])


def commands() -> str:
    """Every command with its options, as its help has them, in Markdown."""
    return "\n\n".join(
        _command(name, command)
        for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
        if not command.hidden
    )


def _command(name: str, command: Any) -> str:
    parts = [f"## rosa {name}", _prose(command.help or "")]
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        if parameter.name != "help":
            panel = getattr(parameter, "rich_help_panel", None) or ""
            panels.setdefault(panel, []).append(_option(parameter))
    for panel, rows in panels.items():
        heading = [f"**{panel}**"] if panel else []
        table = ["| option | meaning | default |", "| --- | --- | --- |", *rows]
        parts += [*heading, "\n".join(table)]
    return "\n\n".join(parts)


def _prose(text: str) -> str:
    """A command's help: its examples, which are indented there, stay blocks of code."""
    paragraphs = [p.strip("\n") for p in re.split(r"\n\s*\n", text.replace("\b", ""))]
    return "\n\n".join(
        "```sh\n" + re.sub(r"\s*\n\s*", " ", p.strip()) + "\n```"
        if p.strip().startswith("rosa ")
        else p
        for p in paragraphs
    )


def _option(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        names, default = f"`{parameter.name.upper()}`", "required"
    else:
        names = ", ".join(f"`{name}`" for name in parameter.opts)
        default = "required" if parameter.required else _default(parameter.default)
    return f"| {names} | {_cell(getattr(parameter, 'help', None) or '')} | {default} |"


def _default(value: Any) -> str:
    if callable(value) or value is None or value is False or value in ("", (), []):
        return ""
    return f"`{', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
