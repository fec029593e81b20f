"""Kills on a cluster: python tests/soak/ray_kills.py [--minutes 4]

A Ray cluster of three nodes on this machine. While runs go over it, workers are killed every few seconds, nodes are
killed and others added, and the driver is killed and started again with the same command. Every output must equal that
of a local run that nobody disturbs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from kills import write_catalog

_SMALL = {"object_store_memory": 80 << 20, "include_dashboard": False}
_NODES = 3


class Cluster:
    """A head without cores, and nodes of one core that come and go."""

    def __init__(self) -> None:
        from ray import cluster_utils

        settings = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
        head = {"num_cpus": 0, "_system_config": settings, **_SMALL}
        self._cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        self._nodes = [self._cluster.add_node(num_cpus=1, **_SMALL) for _ in range(_NODES)]

    def workers(self) -> list[int]:
        """The processes in which units are embedded."""
        raylets = ",".join(str(node.all_processes["raylet"][0].process.pid) for node in self._nodes)
        command = ["pgrep", "-P", raylets, "-f", "^ray::Worker"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return [int(line) for line in found.stdout.split()]

    def replace_a_node(self, rng: random.Random) -> None:
        """SIGKILL to a node's processes; another joins."""
        lost = self._nodes.pop(rng.randrange(len(self._nodes)))
        self._cluster.remove_node(lost, allow_graceful=False)
        while len(self._nodes) < _NODES:
            with contextlib.suppress(Exception):  # a busy machine does not always get one up in Ray's time
                self._nodes.append(self._cluster.add_node(num_cpus=1, **_SMALL))

    def shutdown(self) -> None:
        self._cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="After which what is under way is finished in peace."
    )
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    rng = random.Random(arguments.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_catalog(folder / "catalog.csv", arguments.repeats)
        command = [sys.executable, "-m", "singerembed", "run", str(folder / "catalog.csv")]
        more = ["--unit-minutes", "40", "--json", "-q"]
        subprocess.run([*command, str(folder / "undisturbed.parquet"), *more], check=False, capture_output=True)
        expected = pq.read_table(folder / "undisturbed.parquet")
        cluster = Cluster()
        end = time.monotonic() + 60 * arguments.minutes
        outputs = 0
        while time.monotonic() < end:
            output = folder / f"{outputs}.parquet"
            ended = False
            while not ended:
                process = subprocess.Popen(
                    [*command, str(output), *more, f"--ray={cluster.address}"],
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                )  # fmt: skip
                counts["starts"] += 1
                counts += disturb(process, cluster, rng, end)
                ended = process.returncode == 3
                if not ended and process.returncode != -signal.SIGKILL:
                    raise SystemExit(f"exit {process.returncode}: {process.communicate()[1]}")
            assert pq.read_table(output).equals(expected), output
            said = process.communicate()[0]
            assert said.count("\n") == 1, said
            assert json.loads(said)["errors"] == {"not_found": arguments.repeats}
            outputs += 1
            output.unlink()
            print(dict(counts), flush=True)
        cluster.shutdown()
        leftovers = [p.name for p in folder.iterdir() if p.name not in {"catalog.csv", "undisturbed.parquet"}]
        assert not leftovers, leftovers
    print(
        f"{counts['workers']} workers, {counts['nodes']} nodes of {_NODES} and {counts['drivers']} drivers killed in "
        f"{counts['starts']} starts; {outputs} outputs of {expected.num_rows} rows, all equal to the undisturbed one"
    )


def disturb(process: subprocess.Popen[str], cluster: Cluster, rng: random.Random, end: float) -> Counter[str]:
    """Kill this and that until the driver ends, by itself or by our hand; after `end`, let it finish."""
    counts: Counter[str] = Counter()
    while True:
        try:
            process.wait(rng.uniform(1.0, 4.0))
            return counts
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() > end:
            continue
        victim: Any = rng.choices(["workers", "nodes", "drivers"], [10, 2, 1])[0]
        if victim == "workers":
            workers = cluster.workers()
            if not workers:
                continue
            os.kill(rng.choice(workers), signal.SIGKILL)
        elif victim == "nodes":
            cluster.replace_a_node(rng)
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        counts[victim] += 1


if __name__ == "__main__":
    main()
