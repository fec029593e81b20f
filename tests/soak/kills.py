"""A hundred kills: python tests/soak/kills.py [--kills 100] [--separate FILE]

SIGKILL to the whole process group at random moments of a run, children included, and the same command again, until the
output is there; then the next output. Every output must equal, embeddings bit for bit, that of an undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def write_catalog(path: Path, repeats: int) -> None:
    """The examples, over and over, and a recording that is missing in each turn."""
    files = sorted(p for p in (EXAMPLES / "audio").iterdir())
    rows = [f"{turn}-{file.stem},{file}" for turn in range(repeats) for file in [*files, Path("missing.wav")]]
    path.write_text("track_id,path\n" + "\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--separate", metavar="FILE", help="run with this separator")
    arguments = parser.parse_args()
    separating = ["--separate", arguments.separate] if arguments.separate else []
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_catalog(folder / "catalog.csv", arguments.repeats)
        command = [sys.executable, "-m", "singerembed", "run", str(folder / "catalog.csv"), *separating]
        started = time.monotonic()
        subprocess.run([*command, str(folder / "undisturbed.parquet"), "-q"], check=False)
        undisturbed = time.monotonic() - started
        expected = pq.read_table(folder / "undisturbed.parquet")
        kills = runs = outputs = 0
        while kills < arguments.kills:
            output = folder / f"{outputs}.parquet"
            while not output.exists():
                process = subprocess.Popen(
                    [*command, str(output), "--unit-minutes", "40", "-q"], start_new_session=True
                )
                runs += 1
                try:
                    process.wait(rng.uniform(0.2, 1.2 * undisturbed) if kills < arguments.kills else None)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    kills += 1
                    process.wait()
            # The unit's size is part of the metadata, so rows are compared.
            assert pq.read_table(output).replace_schema_metadata(None).equals(expected.replace_schema_metadata(None)), (
                output
            )
            outputs += 1
            output.unlink()
        leftovers = [p.name for p in folder.iterdir() if p.name not in {"catalog.csv", "undisturbed.parquet"}]
        assert not leftovers, leftovers
    print(
        f"{kills} kills in {runs} runs; {outputs} outputs of {expected.num_rows} rows, all equal to the undisturbed one"
    )


if __name__ == "__main__":
    main()
