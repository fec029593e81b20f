"""Walk through folders, and find the recordings in them in an order that is always the same."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from singerembed import storage
from singerembed.catalog.cue_sheet import CueFile, CueSheet, audio_name, read_cue_sheet
from singerembed.catalog.read import AUDIO_SUFFIXES
from singerembed.storage import Entry, Facts

# Where systems, network storages and shells keep what was deleted, thumbnails and copies.
_SYSTEM_FOLDERS = {
    "@eadir", "#recycle", "@recycle", "$recycle.bin", "recycler", "recycled", "#snapshot", "@recently-snapshot",
    "system volume information", "lost+found", "__macosx",
}  # fmt: skip
_PARTIAL_SUFFIXES = {".part", ".partial", ".crdownload", ".download", ".tmp", ".temp", ".aria2", ".!ut", ".!qb"}
NO_AUDIO, HIDDEN, SYSTEM, PARTIAL, CIRCLES, UNREADABLE = (
    "no audio", "hidden", "recycle bins and system folders", "partial downloads", "links in a circle",
    "unreadable folders",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A recording that was found."""

    path: str  # local path or URI
    facts: Facts | None = None  # None: not known yet
    sheet: CueSheet | None = None  # the cue sheet that cuts it into tracks
    cut: CueFile | None = None  # its entry there


@dataclass
class Walk:
    """Walks through folders; counts what it leaves out, by the reason.

    Memory holds the names of the folders between a root and the place where it is.
    """

    say: Callable[[str], None]  # called with one line for each folder that cannot be read
    left_out: Counter[str] = field(default_factory=Counter)
    own: str = ""  # the name of the file that is being written, which may lie in a folder that is walked

    def recordings(self, root: str) -> Iterator[Found]:
        """Yield the recordings under the folder `root`, depth first, each folder in the order of its names.

        Raises OSError where the root itself cannot be read.
        """
        stack: list[tuple[str, Iterator[Entry], _Identity]] = []
        entries, identity = self._listed(root), _identity(root)
        cuts = self._cuts(root, entries)
        stack.append((root, iter(entries), identity))
        while stack:
            folder, remaining, _ = stack[-1]
            entry = next(remaining, None)
            if entry is None:
                stack.pop()
                continue
            path = f"{folder.rstrip('/')}/{entry.name}"
            if not entry.is_folder:
                yield Found(path, entry.facts, *cuts.pop(path, (None, None)))
                continue
            try:
                identity = _identity(path)
                if identity is not None and any(identity == other for _, _, other in stack):
                    self.left_out[CIRCLES] += 1
                    continue
                entries = self._listed(path)
            except OSError as exc:
                self.left_out[UNREADABLE] += 1
                self.say(
                    f"{storage.printable(storage.redacted(path))}: {exc.strerror or exc}; what is in it is left out"
                )
                continue
            cuts |= self._cuts(path, entries)
            stack.append((path, iter(entries), identity))

    def _listed(self, folder: str) -> list[Entry]:
        """The folders, recordings and cue sheets in `folder`, sorted; the rest is counted."""
        wanted = []
        for entry in storage.entries(folder):
            reason = _reason_to_leave_out(entry)
            if entry.name == self.own:
                continue
            if reason:
                self.left_out[reason] += 1
            else:
                wanted.append(entry)
        return sorted(wanted, key=lambda entry: os.fsencode(entry.name))

    def _cuts(self, folder: str, entries: list[Entry]) -> dict[str, tuple[CueSheet, CueFile]]:
        """Which recordings of `folder` are cut by which cue sheet; the sheets are taken out of `entries`."""
        sheets = [entry.name for entry in entries if not entry.is_folder and _suffix(entry.name) == ".cue"]
        if not sheets:
            return {}
        entries[:] = [entry for entry in entries if entry.is_folder or _suffix(entry.name) != ".cue"]
        names = [entry.name for entry in entries if not entry.is_folder]
        cuts: dict[str, tuple[CueSheet, CueFile]] = {}
        for name in sheets:
            self.left_out[NO_AUDIO] += 1
            try:
                sheet = read_cue_sheet(f"{folder.rstrip('/')}/{name}")
            except OSError as exc:
                # Whole recordings in the place of the sheet's tracks would be others, and the tracks would have gone.
                self.left_out[UNREADABLE] += 1
                self.say(
                    f"{storage.printable(name)} in {storage.redacted(folder)}: {exc.strerror or exc}; the recordings "
                    "beside it are left out"
                )
                entries[:] = [entry for entry in entries if entry.is_folder]
                return {}
            for cut in sheet.split_files():
                audio = audio_name(cut.name, names)
                if audio is not None:
                    cuts.setdefault(f"{folder.rstrip('/')}/{audio}", (sheet, cut))
        return cuts


_Identity = tuple[int, int] | None  # device and inode of a local folder


def _identity(folder: str) -> _Identity:
    if storage.is_remote(folder):
        return None
    info = Path(folder).stat()
    return info.st_dev, info.st_ino


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _reason_to_leave_out(entry: Entry) -> str:
    """Why `entry` is neither walked nor listed; empty if it is."""
    if entry.name.startswith("."):  # with ._ twins, .Trash and .AppleDouble
        return HIDDEN
    if entry.is_folder:
        return SYSTEM if entry.name.lower() in _SYSTEM_FOLDERS else ""
    suffix = _suffix(entry.name)
    if suffix in _PARTIAL_SUFFIXES:
        return PARTIAL
    return "" if entry.is_file and (suffix in AUDIO_SUFFIXES or suffix == ".cue") else NO_AUDIO
