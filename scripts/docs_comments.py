"""A griffe extension: the comment behind a field of a dataclass, or above it, is its text in the API reference."""

from __future__ import annotations

import ast
from typing import Any

import griffe


def field_comment(lines: list[str], first: int, last: int) -> str:
    """Return the comment of the statement on lines `first` to `last`, from 1: behind it, else the lines above it."""
    # What stands behind a statement of one line, and is not in a string: fields' defaults hold no "#".
    _, mark, behind = lines[last - 1].partition("  # ")
    if mark:
        return behind.strip()
    above: list[str] = []
    for line in reversed(lines[: first - 1]):
        if not line.strip().startswith("# "):
            break
        above.insert(0, line.strip().removeprefix("# "))
    return " ".join(above)


class FieldComments(griffe.Extension):
    """Takes comments for docstrings where an attribute has none."""

    def on_attribute_instance(
        self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_context: Any
    ) -> None:
        """Give `attr` its comment, if it is an annotated field of a class."""
        if attr.docstring or not isinstance(node, ast.AnnAssign) or attr.parent is None or not attr.parent.is_class:
            return
        if isinstance(attr.filepath, list):  # of a namespace package, which holds no classes
            return
        text = field_comment(attr.lines_collection[attr.filepath], node.lineno, node.end_lineno or node.lineno)
        if text:
            attr.docstring = griffe.Docstring(text, lineno=node.lineno, parent=attr)
