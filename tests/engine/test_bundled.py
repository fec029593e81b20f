"""The engine in the box: what it is, and that it tells the singers of the examples."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from singerembed.engine.file import read_engine_file
from singerembed.engine.load import bundled_engine_path
from singerembed.jobs.run import run
from singerembed.model.spec import BUNDLED_NAME

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_it_says_what_it_is_in_few_bytes_and_nothing_of_the_machine_that_made_it() -> None:
    engine = read_engine_file(bundled_engine_path())
    assert (engine.spec.name, engine.spec.method) == (BUNDLED_NAME, "teacher")
    assert Path(bundled_engine_path()).stat().st_size < 11_000_000
    assert engine.build["training"]["recipe"] == "free_voices_training"
    header = json.dumps([engine.build, engine.verification])
    assert '"/' not in header  # a path
    assert '"~' not in header


def test_every_singer_of_the_examples_is_nearest_to_themself(tmp_path: Path) -> None:
    run(str(EXAMPLES / "catalog.csv"), str(tmp_path / "out.parquet"))
    table = pq.read_table(tmp_path / "out.parquet")
    assert json.loads(table.schema.metadata[b"singerembed"])["engine"]["name"] == BUNDLED_NAME
    songs: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for row in table.to_pylist():
        if row["status"] == "ok":
            songs[row["singer"]][row["track_id"]].append(np.array(row["embedding"]) / np.linalg.norm(row["embedding"]))
    for singer, mine in songs.items():
        similarity = {other: _similarity(mine, theirs) for other, theirs in songs.items()}
        assert max(similarity, key=lambda other: similarity[other]) == singer, (singer, similarity)


def _similarity(mine: dict[str, list[np.ndarray]], theirs: dict[str, list[np.ndarray]]) -> float:
    """Mean cosine over crops of different recordings."""
    recordings = [pair for pair in product(mine, theirs) if pair[0] != pair[1]]
    return float(np.mean([a @ b for one, other in recordings for a in mine[one] for b in theirs[other]]))
