"""Find out how a catalogue file is written: compression, encoding, delimiter, quoting.

The rules, applied to the first 64 KB and overruled by what the user says:

- compression: gzip or Zstandard by the file's first bytes, whatever its name is;
- encoding: by a byte-order mark UTF-8, UTF-16 or UTF-32; else UTF-8;
- delimiter: the first of comma, semicolon, tab and | (of tab and the others for .tsv and .tab) by which the first line
  has the column of paths;
- quoting: as RFC 4180 has it; none in .tsv and .tab files, which databases write without.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import pyarrow as pa

from singerembed import storage
from singerembed.errors import UsageError

_LOOK_BYTES = 65_536
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
_MARKS = [  # the longer ones first: a UTF-32 mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
]
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "|"}
UTF8 = "utf-8"


@dataclass(frozen=True)
class TextOptions:
    """What the user says of a catalogue's text; None: find it out."""

    delimiter: str | None = None  # one character
    encoding: str | None = None  # a name that Python knows
    quoting: str | None = None  # "csv" or "none"

    def __post_init__(self) -> None:
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise UsageError(f"--delimiter {self.delimiter!r} is not one character")
        if self.quoting not in {None, "csv", "none"}:
            raise UsageError(f"--quoting {self.quoting!r} is neither csv nor none")
        try:
            codecs.lookup(self.encoding or UTF8)
        except LookupError as exc:
            raise UsageError(f"--encoding {self.encoding!r} is not known") from exc


@dataclass(frozen=True)
class Layout:
    """How a catalogue file is written."""

    kind: str  # "csv", "tsv", "jsonl" or "parquet", by its name; empty: another name
    compression: str = ""  # "gzip", "zstd" or none
    encoding: str = UTF8
    delimiter: str = ","
    quoted: bool = True

    @property
    def remarks(self) -> list[str]:
        """What a person would not expect from the file's name."""
        usual = "\t" if self.kind == "tsv" else ","
        found = [f"{self.compression}-compressed"] if self.compression else []
        found += [self.encoding] if self.encoding not in {UTF8, "utf-8-sig"} else []
        if self.kind in {"csv", "tsv"} and self.delimiter != usual:
            found.append(f"separated by {_DELIMITERS.get(self.delimiter, repr(self.delimiter))}")
        return found

    def open(self, path: str) -> BinaryIO:
        """Open the bytes of `path`, decompressed. Raises OSError."""
        file = storage.open_input(path)
        if self.compression == "gzip":
            return cast(BinaryIO, gzip.GzipFile(fileobj=file))
        if self.compression == "zstd":
            return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd")))
        return file

    def open_text(self, path: str) -> io.TextIOWrapper:
        """Open `path` as text. Bytes that are not UTF-8 become surrogates, as in Python's names of files."""
        errors = "surrogateescape" if self.encoding.startswith(UTF8) else "strict"
        return io.TextIOWrapper(self.open(path), encoding=self.encoding, errors=errors, newline="")

    def reader(self, file: io.TextIOWrapper) -> Any:
        """A `csv.reader` of the text `file`."""
        if self.quoted:
            return csv.reader(file, delimiter=self.delimiter, strict=True)
        return csv.reader(file, delimiter=self.delimiter, quoting=csv.QUOTE_NONE, strict=True)


def find_layout(path: str, path_column: str, options: TextOptions) -> Layout:
    """Look at the first 64 KB of the catalogue `path`. Raises OSError."""
    kind = _kind(path)
    with storage.open_input(path) as file:
        start = file.read(4)
    compression = next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), "")
    with Layout(kind, compression).open(path) as file:
        head = file.read(_LOOK_BYTES)
    encoding = options.encoding or next((name for mark, name in _MARKS if head.startswith(mark)), UTF8)
    quoted = options.quoting == "csv" if options.quoting else kind != "tsv"
    layout = Layout(kind, compression, encoding, options.delimiter or ",", quoted)
    if options.delimiter or kind not in {"csv", "tsv"}:
        return layout
    text = codecs.getincrementaldecoder(encoding)("replace").decode(head)
    first = "\t" if kind == "tsv" else ","
    for delimiter in dict.fromkeys([first, *_DELIMITERS]):
        candidate = Layout(kind, compression, encoding, delimiter, quoted)
        if path_column in _header(candidate, text):
            return candidate
    return Layout(kind, compression, encoding, first, quoted)


def has_catalog_name(path: str) -> bool:
    """Say whether `path` is named as a catalogue is."""
    return _kind(path) != ""


def _kind(path: str) -> str:
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED_SUFFIXES:
        del suffixes[-1]
    kinds = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
    return (kinds | {".parquet": "parquet", ".pq": "parquet"}).get(suffixes[-1] if suffixes else "", "")


def _header(layout: Layout, text: str) -> list[str]:
    try:
        return list(next(layout.reader(io.StringIO(text, newline="")), []))  # type: ignore[arg-type]
    except csv.Error:
        return []
