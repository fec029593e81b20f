"""Ten thousand damaged recordings: python tests/soak/fuzz.py [--files 10000] [--separate FILE]

Real files of every codec with flipped bits, cuts, spliced middles, shuffled blocks and swapped extensions. The run must
neither crash nor hang, and must account for every track.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
Mutation = Callable[[bytearray, random.Random], bytearray]


def flip_bits(content: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice([1, 3, 30, 300])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def flip_header(content: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice([1, 4, 16])):
        content[rng.randrange(min(200, len(content)))] = rng.randrange(256)
    return content


def cut(content: bytearray, rng: random.Random) -> bytearray:
    return content[: rng.randrange(len(content))]


def behead(content: bytearray, rng: random.Random) -> bytearray:
    return content[rng.randrange(1, len(content)) :]


def splice(content: bytearray, rng: random.Random) -> bytearray:
    at, size = rng.randrange(len(content)), rng.choice([1, 100, 10_000])
    return content[:at] + rng.randbytes(size) + content[at + rng.choice([0, size]) :]


def extremes(content: bytearray, rng: random.Random) -> bytearray:
    """Fields of a header at their largest: sizes, rates and counts that promise too much."""
    at = rng.randrange(min(120, len(content) - 4))
    content[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"])
    return content


MUTATIONS: tuple[Mutation, ...] = (flip_bits, flip_header, cut, behead, splice, extremes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--separate", metavar="FILE", help="run with this separator")
    arguments = parser.parse_args()
    separating = ["--separate", arguments.separate] if arguments.separate else []
    rng = random.Random(arguments.seed)
    originals = sorted((EXAMPLES / "audio").iterdir())
    suffixes = [p.suffix for p in originals]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for i in range(arguments.files):
            original = rng.choice(originals)
            content = rng.choice(MUTATIONS)(bytearray(original.read_bytes()), rng)
            suffix = original.suffix if rng.random() < 0.8 else rng.choice(suffixes)
            (folder / f"{i}{suffix}").write_bytes(content)
            rows.append(f"{i},{i}{suffix}")
        (folder / "catalog.csv").write_text("track_id,path\n" + "\n".join(rows) + "\n", encoding="utf-8")
        output = folder / "out.parquet"
        command = [sys.executable, "-m", "singerembed", "run", str(folder / "catalog.csv"), str(output), *separating]
        started = time.monotonic()
        result = subprocess.run(
            [*command, "--json", "--track-timeout", "30"], capture_output=True, text=True, check=False, timeout=3600
        )
        seconds = time.monotonic() - started
        assert result.returncode == 3, result.stderr
        counts = json.loads(result.stdout)
        found = duckdb.connect().execute(f"select count(distinct track_id) from '{output}'").fetchall()[0][0]
        assert found == counts["tracks"] == arguments.files
        crashes = result.stderr.count("crash ")
        print(
            f"{arguments.files} damaged files, {counts['crops']} crops, {seconds:.0f} s, {crashes} crashes of the run"
        )
        print(f"errors: {counts['errors']}")


if __name__ == "__main__":
    main()
