"""A finished output as a reader sees it."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from singerembed.errors import OutputError
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import run
from singerembed.output.finished import FinishedOutput, track_bounds
from singerembed.output.schema import IDENTITY

# `singerembed run examples/catalog.csv FILE --crops 1 --embedding-dtype float16` by the release of that number.
OLD = Path(__file__).parent / "data" / "version-0.1.0.parquet"
EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = RunOptions(crops=1, embedding_dtype="float16")


def test_an_output_of_version_0_1_0_is_read() -> None:
    with closing(FinishedOutput(str(OLD))) as output:
        assert (output.counts.tracks, output.counts.crops, output.counts.silent, output.n_units) == (12, 12, 1, 1)
        assert output.rows(0).num_rows == 12
        assert len(track_bounds(output.rows(0))) == 13


def test_a_run_today_gives_the_same_rows_and_refuses_to_mix_versions(tmp_path: Path) -> None:
    new, old = tmp_path / "new.parquet", tmp_path / "old.parquet"
    run(str(EXAMPLES / "catalog.csv"), str(new), options=OPTIONS)
    shutil.copy(OLD, old)
    with pytest.raises(OutputError, match=r"version \(was 0\.1\.0"):
        run(str(EXAMPLES / "catalog.csv"), str(old), options=OPTIONS)
    a, b = pq.read_table(old), pq.read_table(new)
    # Levels: other machines sum in another order. Embeddings: that release had another engine.
    inexact = ["embedding", "peak_dbfs", "rms_dbfs"]
    assert a.drop_columns(inexact).equals(b.drop_columns([*inexact, "audio_note", *(field.name for field in IDENTITY)]))
    assert a["embedding"].type == b["embedding"].type
