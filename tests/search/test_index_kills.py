"""An index that is killed at each step of being made or updated: whole or not there, and the next run ends it."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_library import made_tracks, write_output

from singerembed.errors import InputError
from singerembed.search.build import build_index
from singerembed.search.query import open_index

# In copies 1, 2, ... of a folder an index is built, and killed before the first, second, ... time that Python opens a
# file to write, renames, or removes something there, until one ends: process by process, which fork from one that has
# imported everything. The crops are quantised: principal components take 128 at least.
KILL_AT_EACH_STEP = """
import os, shutil, signal, sys
from singerembed.search import build, nearest
import faiss, sklearn.isotonic, sklearn.linear_model

build.EXACT_ROWS = nearest.EXACT_ROWS = 150
folder, output = sys.argv[1:]
status = 1
steps = 0
while status:
    steps += 1
    copy = f"{folder}-{steps}"
    shutil.copytree(folder, copy)
    child = os.fork()
    if child == 0:
        left = steps

        def kill_at_step(event, arguments):
            global left
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")) and copy in str(arguments[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill_at_step)
        build.build_index([output], f"{copy}/i.index", update=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
"""
# Threads that fork and spin cost more than they do.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def state_of(path: Path) -> set[tuple[str, str]] | None:
    """The tracks that count in an index, and what they are; None if it is not there. Anything in between raises."""
    try:
        index = open_index(str(path))
    except InputError:
        return None
    rows = np.flatnonzero(index.stored.active).tolist()
    names, prints = (index.stored.tracks[column].to_pylist() for column in ("track_id", "fingerprint"))
    for by in ("track", "crop"):
        assert index.search_track(names[rows[-1]], by=by, top=3).tracks
    assert int(index.stored.profiles.n_tracks.sum()) == len(rows)
    return {(names[row], prints[row]) for row in rows}


def files_of(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()} - {"lock"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("grown", [False, True])
def test_an_index_killed_at_any_step_is_whole_or_not_there(
    tmp_path: Path, grown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    for module in ("build", "nearest"):
        monkeypatch.setattr(f"singerembed.search.{module}.EXACT_ROWS", 150)
    folder = tmp_path / "work"
    folder.mkdir()
    library = made_tracks(6, 10, 3)
    if grown:
        code = KILL_AT_EACH_STEP.partition("folder, output")[0] + "build.build_index([sys.argv[1]], sys.argv[2])"
        twin = dataclasses.replace(library[3], track_id="twin")  # is a copy of what is replaced, and then counts
        first = write_output(tmp_path / "first.parquet", [*library[:55], twin])
        subprocess.run([sys.executable, "-c", code, first, str(folder / "i.index")], check=True, env=ENVIRONMENT)
        library[3] = dataclasses.replace(library[3], crops=library[3].crops[:2])
        library += [twin, dataclasses.replace(library[7], track_id="copy")]
        del library[20]  # and this one is taken out
    output = write_output(tmp_path / "output.parquet", library)
    subprocess.run(
        [sys.executable, "-c", KILL_AT_EACH_STEP, str(folder), output], check=True, timeout=300, env=ENVIRONMENT
    )
    copies = sorted(tmp_path.glob("work-*"), key=lambda copy: int(copy.name[5:]))
    before, after = state_of(folder / "i.index"), state_of(copies[-1] / "i.index")
    assert after is not None
    assert len(after) == 60
    assert before != after
    states = [state_of(copy / "i.index") for copy in copies]
    turn = states.index(after)
    assert states == [before] * turn + [after] * (len(states) - turn)
    assert turn > 5  # files were written before
    for copy in copies:
        for _ in range(2):  # files of the state before stay until the next call
            build_index([output], str(copy / "i.index"), update=True)
        assert state_of(copy / "i.index") == after
        assert [path.name for path in copy.iterdir()] == ["i.index"]
        assert files_of(copy / "i.index") == files_of(copies[0] / "i.index")


def test_an_index_killed_while_it_is_made_is_not_there(tmp_path: Path) -> None:
    output = write_output(tmp_path / "o.parquet", made_tracks(10, 10, 3))
    path = tmp_path / "i.index"
    code = (
        "import sys, time\n"
        "from singerembed.search.build import build_index\n"
        "n = 0\n"
        "def advance():\n"
        "    global n\n"
        "    n += 1\n"
        "    if n == 50:\n"
        "        print('half', flush=True); time.sleep(60)\n"
        "build_index([sys.argv[1]], sys.argv[2], advance=advance)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, output, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not path.exists()
    with pytest.raises(InputError, match="is not an index"):
        open_index(str(path))
    assert list(tmp_path.glob(".i.index.*"))
    assert build_index([output], str(path)).n_tracks == 100
    assert not list(tmp_path.glob(".i.index.*"))
