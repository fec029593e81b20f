"""Runs on Ray clusters of several nodes, each a set of processes on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

import singerembed
from singerembed.catalog.read import Track
from singerembed.engine.file import EngineFile
from singerembed.errors import ClusterError, InterruptedRun, SingerEmbedError, UsageError
from singerembed.jobs.options import RunOptions
from singerembed.jobs.ray_cluster import Slot, embed_on_ray, slots_of
from singerembed.jobs.run import run
from singerembed.jobs.units import Listener
from singerembed.model.spec import ModelSpec
from singerembed.output.schema import Counts, TrackRows

ray = pytest.importorskip("ray")

RATE = 44_100
TRACKS, SECONDS = 48, 12  # of each
# In every process: one recording kills the process that decodes it, another whoever so much as opens it.
HOOK = """
import os, signal
import soundfile
from singerembed.jobs import track

decode, open_recording = soundfile.SoundFile.__init__, track.open_recording

def decode_or_die(self, file, *rest, **options):
    if "crash.wav" in str(file):
        os.kill(os.getpid(), signal.SIGSEGV)
    decode(self, file, *rest, **options)

def open_or_die(location, *rest, **options):
    if location.endswith("killer.wav"):
        os.kill(os.getpid(), signal.SIGKILL)
    return open_recording(location, *rest, **options)

soundfile.SoundFile.__init__ = decode_or_die
track.open_recording = open_or_die
"""


class Watch(Listener):
    """A listener that remembers."""

    def __init__(self, published: Callable[[int], object] = lambda _n: None) -> None:
        self.descriptions: list[str] = []
        self.units: list[int] = []
        self.embedded_counts, self.published_counts = Counts(), Counts()
        self._published = published

    def started(self, _spec: ModelSpec, description: str, _total: int) -> None:
        self.descriptions.append(description)

    def embedded(self, _track: Track, rows: TrackRows) -> None:
        self.embedded_counts.add(rows)

    def published(self, unit: int, counts: Counts) -> None:
        self.units.append(unit)
        self.published_counts.merge(counts)
        self._published(len(self.units))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without cores, where this process is, and two nodes of one core each."""
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("hook")
    (folder / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(folder))
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    settings = {"health_check_period_ms": 500, "health_check_failure_threshold": 2, "health_check_timeout_ms": 1000}
    small = {"object_store_memory": 80 << 20, "include_dashboard": False}
    made = Cluster(True, head_node_args={"num_cpus": 0, "_system_config": settings, **small})
    made.nodes = [made.add_node(num_cpus=1, **small) for _ in range(2)]
    made.small = small
    yield made
    ray.shutdown()
    made.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings, two of which the hook has views on, and a catalogue of the others."""
    folder = tmp_path_factory.mktemp("music")
    rng = np.random.default_rng(0)
    for name in [*(f"{i}" for i in range(6)), "crash", "killer"]:
        soundfile.write(folder / f"{name}.wav", 0.1 * rng.standard_normal(SECONDS * RATE), RATE)
    rows = [f"t{i},{i % 6 if i % 7 else 'missing'}.wav,artist {i}" for i in range(TRACKS)]
    (folder / "catalog.csv").write_text("track_id,path,artist\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return folder


def options(cluster: Any = None, **others: Any) -> RunOptions:
    where = {"ray": cluster.address} if cluster else {"workers": 1}
    return RunOptions(**{"unit_minutes": 8.0, **where, **others})


@pytest.fixture(scope="module")
def expected(music: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("expected") / "o.parquet"
    run(str(music / "catalog.csv"), str(output), options=options())
    return pq.read_table(output)


def worker_processes(cluster: Any) -> list[int]:
    """The processes in which units are embedded."""
    raylets = ",".join(str(node.all_processes["raylet"][0].process.pid) for node in cluster.nodes)
    command = ["pgrep", "-P", raylets, "-f", "^ray::Worker"]
    return [int(line) for line in subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()]


# --- where workers go -----------------------------------------------------------------------------------------------


def node(name: str, resources: dict[str, float], *, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "NodeManagerAddress": name, "Alive": alive, "Resources": resources}


def engine_of(backend: str) -> EngineFile:
    name, _, precision = backend.partition(" in ")
    return EngineFile(ModelSpec(name="a", method="b", precision=precision or "fp32"), name, b"", {}, {})


@pytest.mark.parametrize(
    ("resources", "backend", "threads", "shares"),
    [
        ({"CPU": 2.0}, "onnxruntime", None, [(2, 0)]),
        ({"CPU": 8.0}, "onnxruntime", None, [(8, 0)]),
        ({"CPU": 18.0}, "onnxruntime", None, [(6, 0)] * 3),
        ({"CPU": 10.0}, "onnxruntime", 4, [(4, 0)] * 2),
        ({"CPU": 2.0}, "onnxruntime", 4, [(2, 0)]),
        ({"CPU": 16.0, "GPU": 3.0}, "onnxruntime", None, [(6, 1), (5, 1), (5, 1)]),
        ({"CPU": 16.0, "GPU": 2.0}, "tensorrt", None, [(8, 1)] * 2),
        ({"CPU": 16.0}, "tensorrt", None, []),
        ({"CPU": 16.0, "GPU": 2.0}, "native in int8", None, [(8, 0)] * 2),
        ({}, "onnxruntime", None, []),
        ({}, "onnxruntime", 4, []),
    ],
)
def test_workers_a_node(
    resources: dict[str, float], backend: str, threads: int | None, shares: list[tuple[int, int]]
) -> None:
    slots = slots_of([node("a", resources)], engine_of(backend), threads)
    assert [(slot.cores, slot.gpus) for slot in slots] == shares
    assert [slot.number for slot in slots] == list(range(len(shares)))


def test_a_node_that_left_has_no_workers() -> None:
    nodes = [node("a", {"CPU": 4.0}, alive=False), node("b", {"CPU": 4.0})]
    assert slots_of(nodes, engine_of("onnxruntime"), None) == [Slot("b", "b", 0, 4, 0)]


# --- the same rows --------------------------------------------------------------------------------------------------


def test_two_nodes_give_the_rows_of_one_process(cluster: Any, music: Path, expected: Any, tmp_path: Path) -> None:
    watch = Watch()
    output = tmp_path / "o.parquet"
    summary = run(str(music / "catalog.csv"), str(output), options=options(cluster), listeners=[watch])
    assert pq.read_table(output).equals(expected)
    assert summary.counts == summary.embedded == watch.embedded_counts == watch.published_counts
    assert sorted(watch.units) == list(range(TRACKS // 2))
    assert len(watch.descriptions) == 1
    assert watch.descriptions[0].startswith("Ray, 2 x (")
    assert watch.descriptions[0].endswith("on 2 nodes")
    assert not Path(f"{output}.parts").exists()
    assert run(str(music / "catalog.csv"), str(output), options=options(cluster)).already_done


def stopped(music: Path, output: Path, chosen: RunOptions) -> None:
    watch = Watch()
    with pytest.raises(InterruptedRun, match="goes on from here") as caught:
        run(
            str(music / "catalog.csv"), str(output), options=chosen, listeners=[watch],
            stop=lambda: signal.SIGTERM if len(watch.units) >= 3 else 0,
        )  # fmt: skip
    assert caught.value.exit_code == 143
    assert not output.exists()


@pytest.mark.parametrize("begin_on_ray", [True, False])
def test_a_run_goes_from_one_machine_to_a_cluster_and_back(
    cluster: Any, music: Path, expected: Any, tmp_path: Path, begin_on_ray: bool
) -> None:
    output = tmp_path / "o.parquet"
    on_ray, here = options(cluster), options()
    stopped(music, output, on_ray if begin_on_ray else here)
    watch = Watch()
    summary = run(str(music / "catalog.csv"), str(output), options=here if begin_on_ray else on_ray, listeners=[watch])
    assert summary.units_before >= 3
    assert summary.units_before + len(watch.units) == TRACKS // 2
    assert pq.read_table(output).equals(expected)


def test_retry_errors_on_ray(cluster: Any, music: Path, tmp_path: Path) -> None:
    lines = [f"t{i},{music}/{i % 6}.wav" for i in range(6)]
    lines[3] = "t3,late.wav"
    catalog, output = tmp_path / "c.csv", tmp_path / "out"
    catalog.write_text("track_id,path\n" + "\n".join(lines) + "\n", encoding="utf-8")
    chosen = options(cluster, partitioned=True)
    assert run(str(catalog), str(output), options=chosen).counts.errors == {"not_found": 1}
    (tmp_path / "late.wav").write_bytes((music / "0.wav").read_bytes())
    watch = Watch()
    again = run(
        str(catalog), str(output), options=options(cluster, partitioned=True, retry_errors=True), listeners=[watch]
    )
    assert (watch.units, again.embedded.tracks, again.counts.errors) == ([1], 1, {})
    assert pq.read_table(output / "unit-000001.parquet")["track_id"].to_pylist() == ["t2"] * 3 + ["t3"] * 3


# --- deaths ---------------------------------------------------------------------------------------------------------


def test_killed_workers_and_a_killed_node_cost_nothing(
    cluster: Any, music: Path, expected: Any, tmp_path: Path
) -> None:
    killed: list[str] = []

    def kill(published: int) -> None:
        if published == 2:
            os.kill(worker_processes(cluster)[0], signal.SIGKILL)
            killed.append("worker")
        if published == 6:
            lost = cluster.nodes.pop()
            cluster.remove_node(lost, allow_graceful=False)
            killed.append("node")
            cluster.nodes.append(cluster.add_node(num_cpus=1, **cluster.small))

    output = tmp_path / "o.parquet"
    summary = run(str(music / "catalog.csv"), str(output), options=options(cluster), listeners=[Watch(kill)])
    assert killed == ["worker", "node"]
    assert pq.read_table(output).equals(expected)
    assert summary.counts.tracks == TRACKS


def test_recordings_that_kill_become_error_rows(cluster: Any, music: Path, tmp_path: Path) -> None:
    catalog, output = tmp_path / "c.csv", tmp_path / "o.parquet"
    names = ["0", "crash", "1", "2", "3", "killer", "4", "5"]
    catalog.write_text("path\n" + "".join(f"{music}/{name}.wav\n" for name in names), encoding="utf-8")
    command = [
        sys.executable, "-m", "singerembed", "run", str(catalog), str(output), "--unit-minutes", "8",
        f"--ray={cluster.address}", "--json",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 3
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["engine", "wrote", "errors", "see"]
    counts = json.loads(result.stdout)
    assert counts["errors"] == {"decoder_crashed": 1, "worker_died": 1}
    rows = {Path(row["path"]).stem: row for row in pq.read_table(output).to_pylist() if row["status"] == "error"}
    assert rows["crash"]["error_code"] == "decoder_crashed"
    assert rows["killer"]["error"] == "3 worker processes died while they embedded nothing but this"
    assert counts["crops"] == 6 * SECONDS // 4


def test_a_killed_driver_leaves_nobody_behind(cluster: Any, music: Path, expected: Any, tmp_path: Path) -> None:
    output = tmp_path / "o.parquet"
    command = [
        sys.executable, "-m", "singerembed", "run", str(music / "catalog.csv"), str(output), "--unit-minutes", "8",
        f"--ray={cluster.address}",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    parts = Path(f"{output}.parts")
    wait_for(lambda: list(parts.glob("unit-*")))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not worker_processes(cluster))
    done = sorted(parts.glob("unit-*"))
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert result.returncode == 3, result.stderr
    assert f"{len(done)} units were done before" in result.stderr
    assert pq.read_table(output).equals(expected)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- what cannot work is said ---------------------------------------------------------------------------------------


def refused(music: Path, output: Path, chosen: RunOptions) -> str:
    with pytest.raises(SingerEmbedError) as caught:
        run(str(music / "catalog.csv"), str(output), options=chosen)
    assert isinstance(caught.value, ClusterError | UsageError)
    return str(caught.value)


def test_another_version_is_refused(cluster: Any, music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = "9.9"
    monkeypatch.setattr("singerembed.jobs.ray_cluster.version", lambda _name: here)
    message = refused(music, tmp_path / "o.parquet", options(cluster))
    there = singerembed.__version__
    assert f"has singerembed {there}, and this machine has 9.9. Install the same" in message


def test_an_output_that_nodes_do_not_see_is_refused(
    cluster: Any, music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(address: str, job: Any, *rest: Any) -> Counts:
        Path(f"{job.output}.parts", "run.json").rename(tmp_path / "run.json")
        return embed_on_ray(address, job, *rest)

    monkeypatch.setattr("singerembed.jobs.run.embed_on_ray", elsewhere)
    assert "must lie on a file system that all nodes share" in refused(music, tmp_path / "o.parquet", options(cluster))


def test_devices_are_rays_to_give(cluster: Any, music: Path, tmp_path: Path) -> None:
    assert "--devices" in refused(music, tmp_path / "o.parquet", options(cluster, devices=(0,)))


def test_no_cluster_there(music: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "singerembed", "run", str(music / "catalog.csv"), str(tmp_path / "o.parquet")]
    result = subprocess.run([*command, "--ray=127.0.0.1:1"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: cannot reach the Ray cluster at 127.0.0.1:1: ")
    swallowed = subprocess.run([*command[:4], "--ray", *command[4:]], capture_output=True, text=True, check=False)
    assert swallowed.returncode == 2
    assert "is no address" in swallowed.stderr


# --- a cluster of one's own -----------------------------------------------------------------------------------------


def test_without_an_address_a_cluster_is_started_and_ended(music: Path, expected: Any, tmp_path: Path) -> None:
    output, log = tmp_path / "o.parquet", tmp_path / "log.jsonl"
    command = [
        sys.executable, "-m", "singerembed", "run", str(music / "catalog.csv"), str(output), "--unit-minutes", "8",
        "--log-json", str(log), "--json", "--ray",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 3, result.stderr
    lines = result.stderr.splitlines()
    # The warning: these tones are taken for mixes.
    assert [line.split()[0] for line in lines] == ["engine", "warning", "wrote", "errors", "see"]
    assert json.loads(result.stdout)["tracks"] == TRACKS
    assert pq.read_table(output).equals(expected)
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    kinds = [event["event"] for event in events]
    assert (kinds.count("started"), kinds.count("track"), kinds.count("unit")) == (1, TRACKS, TRACKS // 2)
    assert events[-1]["outcome"] == "finished"


def test_ray_is_imported_for_ray_only(music: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from singerembed import RunOptions, run\n"
        "from singerembed.cli import main\n"
        "from singerembed.jobs import ray_cluster\n"
        "run(sys.argv[1], sys.argv[2], options=RunOptions(unit_minutes=8))\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'ray'])\n"
    )
    command = [sys.executable, "-c", code, str(music / "catalog.csv"), str(tmp_path / "o.parquet")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_without_ray_the_extra_is_named(music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SingerEmbedError, match=r"pip install 'singerembed\[ray\]'"):
        run(str(music / "catalog.csv"), str(tmp_path / "o.parquet"), options=RunOptions(ray="local"))
