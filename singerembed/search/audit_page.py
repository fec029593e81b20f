"""Renders suspect credits as an HTML page on which a person listens before they accuse."""

from __future__ import annotations

import html
from pathlib import Path
from urllib.parse import quote

import numpy as np

from singerembed import storage
from singerembed.evaluation.page import STYLE
from singerembed.search.calibration import singer_sums
from singerembed.search.store import StoredIndex, Vectors
from singerembed.search.verify import Verification

MAX_SUSPECTS = 200  # on the page; the Parquet file has all


def write_audit(
    found: Verification, index: StoredIndex, path: str, audio_root: str, max_chance: float, min_two_voices: float
) -> None:
    """Write the page to `path`. `audio_root`: what relative paths of recordings count from. Raises OutputError."""
    text = make_audit(found, index, audio_root, max_chance, min_two_voices)
    with storage.writing(path), storage.publishing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def make_audit(
    found: Verification, index: StoredIndex, audio_root: str, max_chance: float, min_two_voices: float
) -> str:
    """Return the page as HTML without external resources but the recordings."""
    rows, divided = found.suspects(max_chance), found.divided(min_two_voices)
    fit = found.calibration
    players = _Players(found, index, audio_root)
    body = [
        "<h1>Credits to check</h1>",
        f"<p>{len(rows):,} of {len(found.credits.track):,} tracks have a chance of {100 * max_chance:g} % or less, at "
        f"even odds, of being sung by the credited singer. A score is no proof: listen before you conclude.</p>",
        f"<p class=note>Calibrated on {fit.n_singers:,} singers: equal error rate {100 * fit.eer:.1f} %, Cllr "
        f"{fit.cllr:.2f} (at best {fit.min_cllr:.2f}), calibration error {100 * fit.ece:.1f} %, on singers left out. "
        f"{len(found.too_few):,} singers have too few tracks to check.</p>",
    ]
    if len(rows) > MAX_SUSPECTS:
        body.append(f"<p class=note>The first {MAX_SUSPECTS} are shown; the Parquet file has all.</p>")
    body.append(
        "<table class=fits><tr><th>chance<th>track<th>credited<th>nearest other<th>this track<th>credited singer"
        "<th>nearest other</tr>"
    )
    body += [players.row(int(row)) for row in rows[:MAX_SUSPECTS]]
    body.append("</table>")
    if len(divided):
        body.append("<h2>More than one voice?</h2><table class=fits><tr><th>chance<th>track<th>credited</tr>")
        for row in divided[:MAX_SUSPECTS].tolist():
            credits = found.credits
            singer = found.singers[credits.singer[row]] if credits.singer[row] >= 0 else "-"
            cells = (f"{100 * credits.two_voices[row]:.0f} %", credits.path[row], singer)
            body.append("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells) + "</tr>")
        body.append("</table>")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">',
            f"<title>Credits to check</title><style>{STYLE}audio {{ width: 15rem }}</style></head><body>",
            *body,
            "</body></html>",
        ]
    )


class _Players:
    """Rows of the table of suspects, with players for the crops that speak against a credit."""

    def __init__(self, found: Verification, index: StoredIndex, audio_root: str) -> None:
        self._found, self._index, self._root = found, index, audio_root
        self._vectors = index.vectors["tracks"].take(found.credits.track)
        self._total = singer_sums(self._vectors, found.credits.singer, len(found.singers))

    def row(self, row: int) -> str:
        """The HTML of one suspect."""
        credits, singers = self._found.credits, self._found.singers
        own, other = int(credits.singer[row]), int(credits.other[row])
        crops = self._crops(row)
        towards = self._total[other] / max(np.linalg.norm(self._total[other]), 1e-6)
        away = self._total[own] / max(np.linalg.norm(self._total[own]), 1e-6)
        crop = int((crops @ (towards - away)).argmax())
        is_near = credits.other_llr[row] > 0
        nearest = singers[other] if is_near else "(nobody in the library)"
        cells = [
            f"{100 * credits.chance[row]:.1f} %", html.escape(credits.path[row]), html.escape(singers[own]),
            html.escape(nearest), self._player(row, crop), self._typical(own, row, crops[crop]),
            self._typical(other, row, crops[crop]) if is_near else "",
        ]  # fmt: skip
        return "<tr>" + "".join(f"<td>{cell}" for cell in cells) + "</tr>"

    def _typical(self, singer: int, besides: int, crop: Vectors) -> str:
        """A player of the crop that is most like `crop`, in the track of `singer` that is most typical of them."""
        rows = np.flatnonzero((self._found.credits.singer == singer) & (np.arange(len(self._vectors)) != besides))
        row = int(rows[int((self._vectors[rows] @ self._total[singer]).argmax())])
        return self._player(row, int((self._crops(row) @ crop).argmax()))

    def _player(self, row: int, crop: int) -> str:
        credits = self._found.credits
        number = self._index.crops_of(int(credits.track[row])).start + crop
        start, end = (self._index.crops[name][number].as_py() for name in ("start", "end"))
        location = storage.resolve(self._root, credits.path[row])
        address = location if storage.is_remote(location) else f"file://{quote(storage.absolute(location))}"
        source = html.escape(f"{address}#t={start:g},{end:g}", quote=True)
        name = html.escape(f"{Path(credits.path[row]).name} at {start:g} s")
        return f'<audio controls preload=none src="{source}"></audio><br><span class=note>{name}</span>'

    def _crops(self, row: int) -> Vectors:
        part = self._index.crops_of(int(self._found.credits.track[row]))
        return self._index.vectors["crops"].take(np.arange(part.start, part.stop))
