"""The hash of the audio: which copies of a recording it finds, and which it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from numpy.typing import NDArray

from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import run

RATE = 44_100


def encode(path: Path, pcm: NDArray[np.int16], codec: str, **tags: str) -> None:
    """Write `pcm`, [n, channels], with FFmpeg."""
    layout = "stereo" if pcm.shape[1] == 2 else "mono"
    with av.open(str(path), "w") as output:
        output.metadata.update(tags)
        stream: Any = output.add_stream(codec, rate=RATE, layout=layout)
        frame = av.AudioFrame.from_ndarray(pcm.reshape(1, -1), "s16", layout)
        frame.sample_rate, frame.pts = RATE, 0
        size = stream.codec_context.frame_size or 1024
        converter = av.AudioResampler(stream.codec_context.format, layout, RATE, frame_size=size)
        for piece in [*converter.resample(frame), *converter.resample(None)]:
            output.mux(stream.encode(piece))
        output.mux(stream.encode(None))


@pytest.mark.parametrize("channels", [1, 2])
def test_copies_of_the_samples_share_a_hash(
    tmp_path: Path, voice: Callable[..., NDArray[np.float32]], reference_engine: str, channels: int
) -> None:
    mono = voice(9.0)
    pcm = (np.stack([mono, 0.5 * mono], axis=1)[:, :channels] * 32767).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", pcm, RATE)
    soundfile.write(tmp_path / "a24.wav", pcm.astype(np.int32) << 16, RATE, subtype="PCM_24")
    soundfile.write(tmp_path / "a.flac", pcm, RATE)
    encode(tmp_path / "a.m4a", pcm, "alac", title="another")
    encode(tmp_path / "lossy1.mp3", pcm, "libmp3lame", title="one")
    encode(tmp_path / "lossy2.mp3", pcm, "libmp3lame", title="another", artist="A")
    soundfile.write(tmp_path / "later.wav", pcm[1:], RATE)
    run(str(tmp_path), str(tmp_path / "o.parquet"), engine=reference_engine, options=RunOptions(audio_hash=True))
    rows = pq.read_table(tmp_path / "o.parquet").to_pylist()
    hashes = {row["path"]: row["audio_hash"] for row in rows}
    same = [hashes[name] for name in ("a.wav", "a24.wav", "a.flac", "a.m4a")]
    assert len(set(same)) == 1
    assert hashes["lossy1.mp3"] == hashes["lossy2.mp3"]
    assert len({hashes[name] for name in ("a.wav", "lossy1.mp3", "later.wav")}) == 3
    assert all(len(value) == 32 for value in hashes.values())


def test_no_hash_unless_wanted_and_none_without_audio(library: Path, tmp_path: Path, reference_engine: str) -> None:
    (tmp_path / "c.csv").write_text(f"path\n{library}/empty.wav\n{library}/zero.wav\n", encoding="utf-8")
    run(str(tmp_path / "c.csv"), str(tmp_path / "o.parquet"), engine=reference_engine)
    assert "audio_hash" not in pq.read_schema(tmp_path / "o.parquet").names
    options = RunOptions(audio_hash=True, pool="mean")
    run(str(tmp_path / "c.csv"), str(tmp_path / "h.parquet"), engine=reference_engine, options=options)
    empty, zero = pq.read_table(tmp_path / "h.parquet")["audio_hash"].to_pylist()
    assert empty is None
    assert zero is not None
