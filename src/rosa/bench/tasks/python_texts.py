"""Two kinds of text that every machine has: English prose about Python, and Python code.

The prose is the language reference that `help` shows (`pydoc_data.topics`) with the docstrings of
the standard library; the code is the standard library's source, its docstrings taken out. They
differ a little from one Python version to the next.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from rosa.errors import UserError

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Tests repeat themselves, tables are no text, and some distributions leave these out.
_LEFT_OUT = {
    *("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"),
    *("encodings", "pydoc_data", "ensurepip", "tkinter", "__pycache__"),
}
LEAST = 1_000_000
"""Characters of either kind, below which the sources are taken to be missing."""


def prose_and_code() -> tuple[str, str]:
    """English prose about Python, and Python code: about 2 and 7 million characters.

    Raises:
        UserError: this Python lacks the source files of its standard library.
    """
    from pydoc_data.topics import topics

    prose, code = list(topics.values()), []
    for source, tree in _modules():
        prose.append("\n\n".join(p for text in _docstrings(tree) for p in _paragraphs(text)))
        code.append(_without_docstrings(source, tree))
    return _joined(prose), _joined(code)


def _joined(texts: list[str]) -> str:
    # By a hash: neighbours in a folder are alike, and should not all stand in one split.
    kept = sorted((t.strip("\n") for t in texts if t.strip()), key=_hash)
    whole = "\n\n".join(kept)
    if len(whole) < LEAST:
        raise UserError(
            "this Python lacks the source files of its standard library, from which the built-in "
            "texts are made: use a Python that has its .py files, or give --source and --target"
        )
    return whole


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _modules() -> Iterator[tuple[str, ast.Module]]:
    """Each source file's text and tree; parsed, never imported: importing may act."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        if _LEFT_OUT & set(path.relative_to(stdlib).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            yield source, ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):  # examples of wrong code
            continue


def _nodes(tree: ast.Module) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in _nodes(tree):
        if (text := ast.get_docstring(node)) is not None:  # type: ignore[arg-type]
            yield text


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs that are no session at the interpreter."""
    return (part for part in re.split(r"\n\s*\n", text) if ">>>" not in part)


def _without_docstrings(source: str, tree: ast.Module) -> str:
    lines = source.splitlines()
    for node in _nodes(tree):
        if ast.get_docstring(node, clean=False) is None:  # type: ignore[arg-type]
            continue
        first = node.body[0]  # type: ignore[attr-defined]
        for number in range(first.lineno - 1, first.end_lineno or first.lineno):
            lines[number] = ""
    kept = [line for i, line in enumerate(lines) if line.strip() or (i and lines[i - 1].strip())]
    return "\n".join(kept)
