"""Speakers from Debian packages under free licences: recordings, and voices of Festival and Flite.

A speaker's licence is that of the package, in `/usr/share/doc/PACKAGE/copyright`. If speakers of two packages may be
one person (the same language in two alphabets, the same name in two languages), only one of the packages is used.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from singerembed.errors import UsageError

SAMPLE_RATE = 44_100
MAX_SECONDS = 60.0  # per speaker; more adds more text than voice
_MIN_FILE_SECONDS = 0.25
_SILENCE_DB = -45.0  # relative to the file's peak; quieter ends are trimmed

Samples = NDArray[np.float64]

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
    folder: str = ""  # of recordings, relative to the file system's root
    pattern: str = "*"  # of the names in it
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


_HEDGEWARS_FOLDER = "usr/share/games/hedgewars/Data/Sounds/voices"
_HEDGEWARS = (
    "British", "Classic", "Default", "Default_es", "Default_pl", "Default_ru", "Default_uk", "HillBilly", "Mobster",
    "Pirate", "Russian", "Russian_pl", "Singer", "Surfer",
)  # fmt: skip
_KLETTRES = (
    "ar", "cs", "de", "en", "en_GB", "es", "he", "hu", "it", "lt", "ml", "nb", "nds", "nl", "pt_BR", "tn", "uk",
)  # fmt: skip
_KTUBERLING = ("ca", "da", "el", "fr", "gl", "nn", "ru", "sl", "wa")
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
    # Some of these are of one actor: no harm where a teacher's embedding is the target.
    *(Speaker(f"hedgewars-{name}", "hedgewars-data", f"{_HEDGEWARS_FOLDER}/{name}") for name in _HEDGEWARS),
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
    files = sorted(
        path
        for path in (root / speaker.folder).rglob(speaker.pattern)
        if path.suffix in {".wav", ".ogg", ".opus", ".gsm"}
    )
    pieces: list[Samples] = []
    rates: list[int] = []
    length = 0.0
    for number in rng.permutation(len(files)):
        try:
            pcm, rate = soundfile.read(files[number], always_2d=True)
        except soundfile.LibsndfileError:
            continue  # a damaged file in the package
        pcm = _trimmed(pcm.mean(axis=1))
        if len(pcm) < _MIN_FILE_SECONDS * rate:
            continue
        pieces.append(soxr.resample(pcm / np.abs(pcm).max(), rate, SAMPLE_RATE))
        rates.append(rate)
        length += len(pieces[-1]) / SAMPLE_RATE
        if length >= seconds:
            break
    if not pieces:
        raise UsageError(f"{root / speaker.folder} holds no speech. Install the package {speaker.package}")
    return np.concatenate(pieces), float(np.median(rates))


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
