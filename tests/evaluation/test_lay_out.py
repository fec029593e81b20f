"""The layouts of the paper's data sets."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

FILES = {  # from names in the official pair files (github SonyCSLParis/ssl-singer-identity, metadata/) where there are
    "vocalset": ("female8/scales/lip_trill/f8_scales_lip_trill_e.wav", "female8/f8_scales_lip_trill_e_4_8_4s.wav"),
    "m4singer": ("Alto-7#体面/0005.wav", "Alto-7/Alto-7#体面-0005_4_8_4s.wav"),
    "nus48e": ("ADIZ/sing/01.wav", "ADIZ/ADIZ-sing-01_4_8_4s.wav"),
    "vctk": ("p225/p225_001_mic1.flac", "p225/p225-p225_001_mic1_4_8_4s.wav"),
}


@pytest.mark.parametrize("dataset", sorted(FILES))
def test_names_are_the_official_ones(dataset: str, tmp_path: Path) -> None:
    from lay_out import main

    source, expected = FILES[dataset]
    path = tmp_path / "in" / source
    path.parent.mkdir(parents=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(int(9.5 * 48_000)), 48_000)
    result = CliRunner().invoke(main, [dataset, str(tmp_path / "in"), str(tmp_path / "out"), "--pairs", "4"])
    assert result.exit_code == 0, result.output
    crops = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.wav"))
    assert crops == [expected.replace("_4_8_", "_0_4_"), expected]
    assert soundfile.info(tmp_path / "out" / expected).frames == 4 * 44_100
    assert (tmp_path / "out" / "speaker_pairs.txt").read_text(encoding="utf-8").startswith("1,")


def test_another_folder_is_refused(tmp_path: Path) -> None:
    from lay_out import main

    result = CliRunner().invoke(main, ["vctk", str(tmp_path), str(tmp_path / "out")])
    assert "holds no recordings as vctk has them" in result.output
