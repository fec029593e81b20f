"""Speakers from Debian packages under free licences: recordings, and voices of Festival and Flite.

A speaker's licence is that of the package, in `/usr/share/doc/PACKAGE/copyright`. If speakers of two packages may be
one person (the same language in two alphabets, the same name in two languages), only one of the packages is used.

Games keep their voices in archives, which are read as they are: zip files, the `queen.1c` of Flight of the Amazon Queen
and the `sky.dsk` of Beneath a Steel Sky, as ScummVM lays them out. The last one needs the package propack of PyPI.
"""

from __future__ import annotations

import io
import struct
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from singerembed.errors import UsageError

SAMPLE_RATE = 44_100
MAX_SECONDS = 60.0  # per speaker; more adds more text than voice
_MIN_FILE_SECONDS = 0.25
_MIN_LINE_SECONDS = 1.0
_SILENCE_DB = -45.0  # relative to the file's peak; quieter ends are trimmed
_SKY_HEADER = 22  # bytes before a packed file of sky.dsk
_SUFFIXES = {".wav", ".ogg", ".opus", ".gsm", ".mp3", ".au"}

Samples = NDArray[np.float64]
Recording = Callable[[], tuple[Samples, int]]  # read when called: [samples, channels], and their rate in Hz

# Texts for synthetic voices: article 1 of the Universal Declaration of Human Rights, and numbers.
_TEXTS = {
    "ca": "Tots els essers humans neixen lliures i iguals en dignitat i en drets. Son dotats de rao i de consciencia, "
    "i han de comportar-se fraternalment els uns amb els altres. Un, dos, tres, quatre, cinc, sis, set, vuit, nou, "
    "deu.",
    "cs": "Vsichni lide rodi se svobodni a sobe rovni co do dustojnosti a prav. Jsou nadani rozumem a svedomim a maji "
    "spolu jednat v duchu bratrstvi. Jedna, dva, tri, ctyri, pet, sest, sedm, osm, devet, deset.",
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience "
    "and should act towards one another in a spirit of brotherhood. One, two, three, four, five, six, seven, eight.",
    "fi": "Kaikki ihmiset syntyvat vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on annettu jarki ja "
    "omatunto, ja heidan on toimittava toisiaan kohtaan veljeyden hengessa. Yksi, kaksi, kolme, nelja, viisi, kuusi.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और अन्तरात्मा की देन "
    "प्राप्त है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignita e diritti. Essi sono dotati di ragione e di "
    "coscienza e devono agire gli uni verso gli altri in spirito di fratellanza. Uno, due, tre, quattro, cinque, sei.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и "
    "должны поступать в отношении друг друга в духе братства.",
}


@dataclass(frozen=True)
class Speaker:
    """A voice and its source."""

    name: str
    package: str
    folder: str = ""  # of recordings, relative to the file system's root or in the archive
    pattern: str = "*"  # of the names in it; alternatives are separated by |
    archive: str = ""  # that holds the folder, relative to the file system's root
    many: bool = False  # several people: recordings must not be joined to a clip
    plenty: int = 1  # times as many clips as of others are cut from the recordings
    festival: str = ""  # or a voice of Festival
    flite: str = ""  # or a voice of Flite
    text: str = ""  # text for a synthetic voice, a key of _TEXTS


def _recorded(package: str, folder: str, names: Sequence[str]) -> Iterator[Speaker]:
    for name in names:
        yield Speaker(f"{folder.split('/')[2]}-{name}", package, f"{folder}/{name}")


def _asterisk(name: str, package: str, folder: str) -> Speaker:
    return Speaker(f"asterisk-{name}", package, f"usr/share/asterisk/sounds/{folder}")


def _tuxpaint(language: str) -> Speaker:
    """Names of things, said by one person of each language."""
    folder = "usr/share/tuxpaint/stamps"
    return Speaker(f"tuxpaint-{language}", "tuxpaint-stamps-default", folder, f"*_desc_{language}.ogg")


def _fillets(language: str, role: str) -> Speaker:
    """A role of the dialogues of Fish Fillets: m and v are the two fishes."""
    folder = "usr/share/games/fillets-ng/sound"
    return Speaker(f"fillets-{language}-{role}", f"fillets-ng-data-{language}", folder, f"{language}/*-{role}-*.ogg")


def _festival(package: str, voice: str, text: str) -> Speaker:
    return Speaker(f"festival-{voice}", package, festival=voice, text=text)


def _archived(name: str, package: str, archive: str, folder: str, pattern: str = "*") -> Speaker:
    return Speaker(name, package, folder, pattern, f"usr/share/games/{archive}")


def _megaglest(name: str, folder: str) -> Speaker:
    """What a unit of MegaGlest says when it is chosen and when it obeys."""
    home = f"usr/share/games/megaglest/techs/megapack/{folder}"
    return Speaker(f"megaglest-{name}", "megaglest-data", home, f"{name}_ack*|{name}_sel*")


_HEDGEWARS_FOLDER = "usr/share/games/hedgewars/Data/Sounds/voices"
_HEDGEWARS = (
    "British", "Classic", "Default", "Default_es", "Default_pl", "Default_ru", "Default_uk", "HillBilly", "Mobster",
    "Pirate", "Russian", "Russian_pl", "Singer", "Surfer",
)  # fmt: skip
_KLETTRES = (
    "ar", "cs", "de", "en", "en_GB", "es", "he", "hu", "it", "lt", "ml", "nb", "nds", "nl", "pt_BR", "tn", "uk",
)  # fmt: skip
_KTUBERLING = ("ca", "da", "el", "fr", "gl", "nn", "ru", "sl", "wa")
_NEXUIZ = (
    "carni-lycan", "fricka", "insurrectionist", "marine", "pyria-skadi", "reptilian", "soldier", "specop", "torus",
)  # fmt: skip
_NEXUIZ_ARCHIVE = "nexuiz/data/data.pk3"
_ROLES_OF_QUEEN = (
    "AND", "APE", "BOB", "BUD", "CHEF", "CHIEF", "DEATH", "FAYE", "FRANK", "HENRY", "IAN", "JIM", "JOHN", "KLUNK",
    "LARIS", "LOLA", "LOU", "MAN", "NAOMI", "ORACLE", "PRIN", "SEC", "SHOWERAM", "SPARKY", "TAM", "WEDGE",
    "WITCH", "ZOMBIE",
)  # fmt: skip
_QUEEN = "usr/share/scummvm/flight-of-the-amazon-queen/queen.1c"
_SKY = "usr/share/scummvm/beneath-a-steel-sky/sky.dsk"
_WARZONE_ARCHIVE = "warzone2100/base.wz"
_WARZONE = ("memressp", "tutorial", "extra", "taunts/taunt1", "taunts/taunt2", "taunts/taunt3")
_0AD_ARCHIVE = "0ad/mods/public/public.zip"
_0AD = (
    ("greek", "female"), ("latin", "female"), ("latin", "male"), ("napatan", "female"), ("napatan", "male"),
    ("persian", "female"), ("persian", "male"),
)  # fmt: skip
SPEAKERS = (
    *_recorded("klettres-data", "usr/share/klettres", _KLETTRES),
    *_recorded("ktuberling-data", "usr/share/ktuberling/sounds", _KTUBERLING),
    _asterisk("allison", "asterisk-core-sounds-en-wav", "en_US_f_Allison"),
    _asterisk("june", "asterisk-core-sounds-fr-wav", "fr_CA_f_June"),
    _asterisk("carlo", "asterisk-core-sounds-it-wav", "it_IT_m_Carlo"),
    _asterisk("ivrvoice", "asterisk-core-sounds-ru-wav", "ru_RU_f_IvrvoiceRU"),
    _asterisk("menardi", "asterisk-prompt-it-menardi-wav", "it_IT_f_Menardi"),
    _asterisk("colombia", "asterisk-prompt-es-co", "es"),
    _asterisk("armelle", "asterisk-prompt-fr-armelle", "fr"),
    _festival("festvox-ca-ona-hts", "upc_ca_ona_hts", "ca"),
    _festival("festvox-czech-dita", "czech_dita", "cs"),
    _festival("festvox-czech-krb", "czech_krb", "cs"),
    _festival("festvox-czech-machac", "czech_machac", "cs"),
    _festival("festvox-czech-ph", "czech_ph", "cs"),
    _festival("festvox-hi-nsk", "hindi_NSK_diphone", "hi"),
    _festival("festvox-italp16k", "lp_diphone", "it"),
    _festival("festvox-itapc16k", "pc_diphone", "it"),
    _festival("festvox-kallpc16k", "kal_diphone", "en"),
    _festival("festvox-ru", "msu_ru_nsh_clunits", "ru"),
    _festival("festvox-suopuhe-lj", "suo_fi_lj_diphone", "fi"),
    _festival("festvox-suopuhe-mv", "hy_fi_mv_diphone", "fi"),
    _festival("festvox-us-slt-hts", "cmu_us_slt_arctic_hts", "en"),
    Speaker("flite-awb", "flite", flite="awb", text="en"),
    Speaker("flite-rms", "flite", flite="rms", text="en"),
    *map(_tuxpaint, ("be", "bg", "da", "el", "es", "ro", "ru")),  # not fr and ca: of those speakers are held out
    *(_fillets("cs", role) for role in ("c", "hs", "m", "pap", "v", "x")),
    *(_fillets("nl", role) for role in ("m", "v")),
    # Some of these, and of the roles below, are of one actor: no harm where a teacher's embedding is the target.
    *(Speaker(f"hedgewars-{name}", "hedgewars-data", f"{_HEDGEWARS_FOLDER}/{name}") for name in _HEDGEWARS),
    Speaker("queen-JOE", "flight-of-the-amazon-queen", "JOE", archive=_QUEEN, plenty=3),
    *(Speaker(f"queen-{role}", "flight-of-the-amazon-queen", role, archive=_QUEEN) for role in _ROLES_OF_QUEEN),
    Speaker("queen-scenes", "flight-of-the-amazon-queen", "scenes", archive=_QUEEN, many=True, plenty=5),
    Speaker("sky", "beneath-a-steel-sky", "speech", archive=_SKY, many=True, plenty=10),
    *(_archived(f"nexuiz-{name}", "nexuiz-data", _NEXUIZ_ARCHIVE, f"sound/player/{name}") for name in _NEXUIZ),
    _archived("nexuiz-announcer", "nexuiz-data", _NEXUIZ_ARCHIVE, "sound/announcer/male"),
    _archived("nexuiz-tutorial", "nexuiz-data", _NEXUIZ_ARCHIVE, "sound/tutorial"),
    *(
        _archived(f"warzone-{name.split('/')[-1]}", "warzone2100-data", _WARZONE_ARCHIVE, f"audio/{name}")
        for name in _WARZONE
    ),
    *(
        _archived(f"0ad-{language}-{sex}", "0ad-data", _0AD_ARCHIVE, f"audio/voice/{language}/civ", f"civ_{sex}_*")
        for language, sex in _0AD
    ),
    *_recorded("kajongg", "usr/share/kajongg/voices", ("male1", "male2", "female1", "female2")),
    *(
        Speaker(f"kajongg-de-{name}", "kajongg", f"usr/share/kajongg/voices/de/{name}")
        for name in ("male1", "male2", "female1", "female2")
    ),
    # Not he: a Hebrew speaker is held out.
    *_recorded("planetblupi-common", "usr/share/planetblupi/sound", ("de", "en_US", "fr", "it")),
    Speaker("gcin-3", "gcin-voice", "usr/share/gcin-voice/ogg", "3.ogg"),
    Speaker("gcin-5", "gcin-voice", "usr/share/gcin-voice/ogg", "5.ogg"),
    Speaker("qabcs-en", "qabcs-data", "usr/share/qabcs/abcs/en/sounds"),
    Speaker("qabcs-uk", "qabcs-data", "usr/share/qabcs/abcs/uk/sounds"),
    _megaglest("archer", "commondata/sounds"),
    _megaglest("horseman", "commondata/sounds"),
    _megaglest("technician", "commondata/sounds"),
    _megaglest("battlemage", "factions/magic/units/battlemage/sounds"),
    _megaglest("summoner", "factions/magic/units/summoner/sounds"),
    _megaglest("cudgel", "factions/norsemen/units/cudgel_lady/sounds"),
    _megaglest("genie", "factions/persian/units/genie/sounds"),
    _megaglest("princess", "factions/persian/units/princess/sounds"),
    Speaker("redeclipse-announcer", "redeclipse-data", "usr/share/games/redeclipse/data/sounds/announcer"),
    Speaker("scratch-singers", "scratch", "usr/share/scratch/Media/Sounds/Vocals", many=True),
    Speaker("codec2", "codec2-examples", "usr/share/codec2/wav", "[!aw]*", many=True),
    _tuxpaint("lt"),
    _tuxpaint("nl"),
    Speaker("tuxpaint-en", "tuxpaint-stamps-default", "usr/share/tuxpaint/stamps", "*_desc.ogg"),
    _asterisk("allison-es", "asterisk-core-sounds-es-wav", "es_MX_f_Allison"),
    *_recorded("unknown-horizons", "usr/share/unknown-horizons/content/audio/voice", ("de", "en", "fr")),
    Speaker("saytime", "saytime", "usr/share/saytime"),
    Speaker("freedroidrpg", "freedroidrpg-data", "usr/share/freedroidrpg/data/sound/effects/tux_ingame_comments"),
)
PACKAGES = tuple(dict.fromkeys(["festival", *(speaker.package for speaker in SPEAKERS)]))


def read_speech(
    speaker: Speaker, root: Path, rng: np.random.Generator, seconds: float = MAX_SECONDS
) -> tuple[Samples, float]:
    """Return up to `seconds` of a speaker, float64 [samples] at 44.1 kHz, and the original sample rate in Hz.

    Files are read in random order. Raises UsageError if the package is not installed.
    """
    if not speaker.folder:
        return _synthesised(speaker)
    pieces: list[Samples] = []
    rates: list[int] = []
    length = 0.0
    for pcm, rate in _pieces(speaker, root, rng, _MIN_FILE_SECONDS):
        pieces.append(pcm)
        rates.append(rate)
        length += len(pcm) / SAMPLE_RATE
        if length >= seconds:
            break
    if not pieces:
        raise _absent(speaker, root)
    return np.concatenate(pieces), float(np.median(rates))


def read_lines(speaker: Speaker, root: Path, rng: np.random.Generator, count: int) -> list[Samples]:
    """Return up to `count` recordings of a speaker, each float64 [samples] at 44.1 kHz, in random order.

    Raises UsageError if the package is not installed.
    """
    lines = [pcm for pcm, _ in islice(_pieces(speaker, root, rng, _MIN_LINE_SECONDS), count)]
    if not lines:
        raise _absent(speaker, root)
    return lines


def _absent(speaker: Speaker, root: Path) -> UsageError:
    home = root / (speaker.archive or speaker.folder)
    return UsageError(f"{home} holds no speech. Install the package {speaker.package}")


def _pieces(speaker: Speaker, root: Path, rng: np.random.Generator, shortest: float) -> Iterator[tuple[Samples, int]]:
    """Yield recordings of at least `shortest` seconds at 44.1 kHz, trimmed, with a peak of 1, and their own rates."""
    recordings = _recordings(speaker, root)
    for number in rng.permutation(len(recordings)):
        try:
            pcm, rate = recordings[number]()
        except soundfile.LibsndfileError:
            continue  # a damaged file in the package
        pcm = _trimmed(pcm.mean(axis=1))
        if len(pcm) >= shortest * rate:
            yield soxr.resample(pcm / np.abs(pcm).max(), rate, SAMPLE_RATE), rate


def _recordings(speaker: Speaker, root: Path) -> list[Recording]:
    """List a speaker's recordings, sorted by name; none if the package is not installed."""
    if not speaker.archive:
        home = root / speaker.folder
        files = {path for pattern in speaker.pattern.split("|") for path in home.rglob(pattern)}
        return [partial(soundfile.read, path, always_2d=True) for path in sorted(files) if path.suffix in _SUFFIXES]
    archive = root / speaker.archive
    if not archive.is_file():
        return []
    read = {".1c": _queen, ".dsk": _sky}.get(archive.suffix, _zipped)
    patterns = [f"{speaker.folder}/{pattern}" for pattern in speaker.pattern.split("|")]
    return [
        recording for name, recording in sorted(read(archive).items()) if any(fnmatch(name, each) for each in patterns)
    ]


def _zipped(archive: Path) -> dict[str, Recording]:
    file = zipfile.ZipFile(archive)  # closed with the last of its recordings; a directory can take a second to read
    names = [name for name in file.namelist() if Path(name).suffix in _SUFFIXES]
    return {name: partial(lambda name: _decoded(file.read(name)), name) for name in names}


def _queen(archive: Path) -> dict[str, Recording]:
    """List the MP3 files of Flight of the Amazon Queen: ROLE/NAME of dialogues, and scenes/NAME."""

    def read(offset: int, size: int) -> tuple[Samples, int]:
        return _decoded(_bytes(archive, offset, size))

    head = _bytes(archive, 0, 15)
    table = _bytes(archive, 15, 21 * int.from_bytes(head[13:]))
    files = {name.rstrip(b"\0").decode(): place for name, _, *place in struct.iter_unpack(">12sBII", table)}
    # A dialogue has a number, with which the names of its recordings begin.
    roles = {
        f"{int.from_bytes(_bytes(archive, offset + 24, 2)):02d}": name[:-4].rstrip("0123456789")
        for name, (offset, _) in files.items()
        if name.endswith(".DOG")
    }
    found: dict[str, Recording] = {}
    for name, place in files.items():
        if name.endswith(".SB"):
            role = "JOE" if name.startswith("JOE") else "scenes" if name.startswith("C") else ""
            if name[:2] in roles and name[6:7] in "JP":
                role = "JOE" if name[6] == "J" else roles[name[:2]]  # Joe is who the player plays
            found[f"{role}/{name}"] = partial(read, *place)
    return found


def _sky(archive: Path) -> dict[str, Recording]:
    """List the speech of Beneath a Steel Sky: packed files, of 8 bit at 11 025 Hz, whose numbers are from 50 000."""

    def read(offset: int, size: int) -> tuple[Samples, int]:
        pcm = np.frombuffer(propack.unpack(_bytes(archive, offset, size)), np.uint8)
        return pcm[:, None] / 128.0 - 1.0, 11_025

    try:
        propack = import_module("propack")
    except ImportError as exc:
        raise UsageError(f"{archive} is packed. Run: pip install propack") from exc
    found: dict[str, Recording] = {}
    for number, place, size in struct.iter_unpack("<H3s3s", archive.with_suffix(".dnr").read_bytes()[4:]):
        offset = int.from_bytes(place, "little")
        if offset >> 23:  # then in units of 16 bytes
            offset = (offset & 0x7FFFFF) << 4
        offset += _SKY_HEADER
        if 50_000 <= number < 60_000 and _bytes(archive, offset, 3) == b"RNC":
            found[f"speech/{number}"] = partial(read, offset, (int.from_bytes(size, "little") & 0x3FFFFF) - _SKY_HEADER)
    return found


def _bytes(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _decoded(data: bytes) -> tuple[Samples, int]:
    pcm, rate = soundfile.read(io.BytesIO(data), always_2d=True)
    return pcm, int(rate)


def _synthesised(speaker: Speaker) -> tuple[Samples, float]:
    with tempfile.TemporaryDirectory() as folder:
        text, wav = Path(folder) / "text", Path(folder) / "speech.wav"
        text.write_text(_TEXTS[speaker.text], encoding="utf-8")
        if speaker.festival:
            command = ["text2wave", "-eval", f"(voice_{speaker.festival})", "-o", str(wav), str(text)]
        else:
            command = ["flite", "-voice", speaker.flite, "-f", str(text), "-o", str(wav)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            pcm, rate = soundfile.read(wav)
        except (OSError, subprocess.SubprocessError, soundfile.LibsndfileError) as exc:
            raise UsageError(
                f"cannot synthesise {speaker.name} ({exc}). Install the package {speaker.package}"
            ) from exc
    return soxr.resample(pcm / np.abs(pcm).max(), rate, SAMPLE_RATE), float(rate)


def _trimmed(pcm: Samples) -> Samples:
    loud = np.flatnonzero(np.abs(pcm) > np.abs(pcm).max(initial=0) * 10 ** (_SILENCE_DB / 20))
    return pcm[loud[0] : loud[-1] + 1] if len(loud) else pcm[:0]
