"""Writes the results of an evaluation: a folder with all files, or a single page."""

from __future__ import annotations

import json
from pathlib import Path

from singerembed import storage
from singerembed.errors import UsageError
from singerembed.evaluation.figures import save_figures
from singerembed.evaluation.page import make_page
from singerembed.evaluation.pairs import write_pair_file
from singerembed.evaluation.result import Evaluation
from singerembed.evaluation.table import as_csv, as_markdown
from singerembed.evaluation.views import View, make_view
from singerembed.output.finished import check_result_path

COMPARED_POINTS = 1500  # points per map in a comparison of models; a map takes 3 s


def check_folder(folder: str) -> None:
    """Raise UsageError unless `write_folder` may write to `folder`."""
    _check_local(folder)
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError(f"{folder} is there, and is no folder. Give -o another name")


def check_page_path(path: str) -> None:
    """Raise UsageError unless `write_page` may write to `path`."""
    _check_local(path)
    check_result_path(path, ".html")


def _check_local(path: str) -> None:
    if storage.is_remote(path):
        raise UsageError(f"{path}: pages and figures are written to a local disk. Write them there, and copy them")


def write_folder(evaluation: Evaluation, folder: str) -> None:
    """Write evaluation.json, table.md, table.csv, pairs.txt, index.html and figures/ to `folder`.

    Raises OutputError if it cannot be written.
    """
    root = Path(folder)
    with storage.writing(folder):
        root.mkdir(parents=True, exist_ok=True)
        _publish(root / "evaluation.json", json.dumps(evaluation.to_dict(), indent=1, allow_nan=False))
        _publish(root / "table.md", as_markdown(evaluation))
        _publish(root / "table.csv", as_csv(evaluation))
        write_pair_file(str(root / "pairs.txt"), evaluation.pairs, evaluation.crops.names)
        views = [make_view(result, evaluation.crops, max_points=COMPARED_POINTS) for result in evaluation.results]
        _publish(root / "index.html", make_page(evaluation, views, "Singer embeddings compared"))
        save_figures(evaluation, views, str(root / "figures"))


def write_page(evaluation: Evaluation, path: str) -> str:
    """Write the page of stored embeddings to `path`, and figures to a folder next to it. Return that folder.

    Raises OutputError.
    """
    views: list[View] = [make_view(result, evaluation.crops) for result in evaluation.results]
    figures = str(Path(path).with_suffix("")) + "-figures"
    _publish(Path(path), make_page(evaluation, views, f"Singer embeddings of {Path(evaluation.data.source).name}"))
    with storage.writing(figures):
        save_figures(evaluation, views, figures)
    return figures


def _publish(path: Path, text: str) -> None:
    with storage.writing(str(path)), storage.publishing(str(path)) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
