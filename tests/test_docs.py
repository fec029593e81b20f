"""What the documentation shows is run word for word, and no command or public name is left out of it."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import duckdb
import pytest
import yaml

import singerembed
from singerembed.cli.main import cli

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from command_reference import help_texts, render
from docs_comments import field_comment
from docs_hooks import outside_code

ROOT = Path(__file__).parents[1]
PAGES = ("tutorial.md", "api.md", "search.md")
# The tables show two decimals of similarities, and one of levels; instruction sets differ in the last digits.
SHOWN = 0.011
_BLOCK = re.compile(
    r"(?:^<!-- skip:(?P<skip>[^\n]*)-->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```\n(?P<table>\n(?:^\|[^\n]*\n)+)?",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block of a page, and the table that shows its result, if there is one."""

    where: str
    language: str
    text: str
    skip: str | None  # the reason
    table: list[list[str]]  # cells of its rows, the heading first


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("text"))
        lines = (found["table"] or "").strip().splitlines()
        rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in lines if "---" not in row]
        yield Block(f"docs/{page}:{line}", found["language"], found["text"], found["skip"], rows)


def run(block: Block, folder: Path) -> None:
    commands = {"bash": ["bash", "-euo", "pipefail", "-s"], "python": [sys.executable, "-"]}
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        commands[block.language],
        input=block.text,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{block.where}: {result.stdout}{result.stderr}"


def query(block: Block) -> None:
    result = duckdb.connect().execute(block.text)
    names, rows = [column[0] for column in result.description or []], result.fetchall()
    assert rows, f"{block.where}: no rows"
    if block.table:
        assert block.table[0] == names, block.where
        assert len(block.table[1:]) == len(rows), block.where
        for shown, row in zip(block.table[1:], rows, strict=True):
            assert all(map(same, shown, row)), f"{block.where}: the page shows {shown}, the query gives {row}"


def same(shown: str, value: Any) -> bool:
    """Whether a cell of a table shows `value`."""
    if isinstance(value, float):
        return math.isclose(float(shown), value, rel_tol=0, abs_tol=SHOWN)
    return shown == ("NULL" if value is None else str(value))


@pytest.mark.parametrize("page", PAGES)
def test_examples_run_as_they_stand(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for block in blocks(page):
        assert block.language in {"bash", "sql", "python", "output"}, block.where
        if block.skip is not None:
            assert block.skip.strip(), f"{block.where}: a skipped block needs its reason"
        elif block.language == "sql":
            query(block)
            ran += 1
        elif block.language != "output":
            run(block, tmp_path)
            ran += 1
    assert ran


def test_a_wrong_table_would_be_seen() -> None:
    assert same("0.94", 0.9391)
    assert same("-inf", -math.inf)
    assert same("NULL", None)
    assert not same("0.94", 0.97)
    assert not same("ok", "silent")


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_is_in_the_reference(name: str) -> None:
    command, text = cli.commands[name], help_texts()[f"singerembed {name}"]
    assert command.help
    assert f"## singerembed {name}\n" in render()
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert all(option in text for option in parameter.opts), parameter.name
        else:
            assert parameter.name is not None
            assert (parameter.metavar or parameter.name.upper()) in text


@pytest.mark.parametrize("name", singerembed.__all__)
def test_every_public_name_is_on_the_page_of_the_api(name: str) -> None:
    assert f"\n::: singerembed.{name}\n" in (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_comments_of_fields_are_their_text() -> None:
    lines = ["    # Where it lies,", "    # on disk.", "    path: str", "    rate: int = 1  # Hz", "    name: str"]
    assert field_comment(lines, 3, 3) == "Where it lies, on disk."
    assert field_comment(lines, 4, 4) == "Hz"
    assert field_comment(lines, 5, 5) == ""


def test_links_in_code_are_left_alone() -> None:
    text = "[a](b)\n```\n[a](b)\n```\n[a](b) and ![c](d)"
    assert outside_code(text, lambda _link: "x") == "x\n```\n[a](b)\n```\nx and x"


def test_pre_commit_runs_the_linters_of_ci() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [hook["entry"] for hook in hooks] == [line for line in lines if line.startswith(("ruff", "mypy"))]
