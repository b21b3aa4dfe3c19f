"""What a segmentation takes over from the headers of its series, and what becomes of the rest.

Programs that remove names leave words where dates belong, empty or shortened identifiers, or
nothing. A segmentation gets only what is valid in DICOM: a value that says the same in another form
is rewritten, one that says nothing is left blank, and an identifier that has to be there is made
from what is there, so that all files of one series agree. Nothing about a patient is made up, and
all that was done is said.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom.config
from pydicom import Dataset
from pydicom.datadict import dictionary_VM, dictionary_VR
from pydicom.multival import MultiValue
from pydicom.uid import (
    UID,
    CTImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)
from pydicom.valuerep import DSfloat, validate_value

from fedfms.data.dicom.series import no_warnings
from fedfms.errors import SiteDataError

if TYPE_CHECKING:
    from fedfms.data.dicom.series import Series

# Of the modules Patient, General Study and Patient Study; these must be there and may be empty.
_MAY_BE_BLANK = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
# These may be missing. What else the modules have (comments, history, occupation) a mask needs not.
_MAY_BE_MISSING = (
    *("IssuerOfPatientID", "PatientIdentityRemoved", "DeidentificationMethod"),
    *("DeidentificationMethodCodeSequence", "StudyDescription"),
    *("PatientAge", "PatientSize", "PatientWeight", "PositionReferenceIndicator"),
    *("PatientSpeciesDescription", "PatientSpeciesCodeSequence", "PatientBreedDescription"),
    *("PatientBreedCodeSequence", "BreedRegistrationSequence", "PatientSexNeutered"),
    *("ResponsiblePerson", "ResponsiblePersonRole", "ResponsibleOrganization"),
)
# Of the modules Clinical Trial Subject and Study: the first three must be there for the others.
_TRIAL = (
    *("ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialSubjectID"),
    *("ClinicalTrialProtocolName", "ClinicalTrialSiteID", "ClinicalTrialSiteName"),
    "ClinicalTrialTimePointID",
)
_ALLOWED = {  # where only some words are
    "PatientSex": ("M", "F", "O"),
    "PatientIdentityRemoved": ("YES", "NO"),
    "PatientSexNeutered": ("ALTERED", "UNALTERED"),
    "LossyImageCompression": ("00", "01"),
}
_CLASS_OF_MODALITY = {
    "CT": CTImageStorage,
    "MR": MRImageStorage,
    "PT": PositronEmissionTomographyImageStorage,
}
# What is done to attributes, in the order in which it is said; `_Done` has their names by it.
_REWRITTEN = "rewritten as DICOM writes it"
_BLANK = "not valid and left blank"
_LEFT_OUT = "not valid and left out"
_MADE = "missing and made from what is there"
_MADE_INVALID = "not valid and made from what is there"
_KEPT = "kept with leading zeros, so that programs find what they name"
_OTHER = ""  # a clause of its own
_Done = dict[str, list[str]]
_UID_LETTERS = re.compile(r"\d+(\.\d+)+")


class _Invalid(Exception):
    """A value that DICOM does not allow at its place."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The images as a segmentation refers to them.

    headers: one for each slice, in the order of the slices, with all that highdicom wants and
        nothing that is not valid; their SOPClassUID is that of MR images, which every reader knows,
        or of a picture without a place, which has no frame of reference.
    classes: SOPInstanceUID of each slice to its true SOPClassUID; empty where the slices have no
        identifiers of their own, so that nothing can refer to them.
    character_set: of the texts in `headers`; None: plain ASCII.
    series_number: of the images; 0 where it says nothing.
    said: what was done, as clauses; without values, which may be a patient's.
    """

    headers: tuple[Dataset, ...]
    classes: dict[str, str]
    character_set: str | None
    series_number: int
    said: tuple[str, ...]


def sources_of(series: Series) -> Sources:
    """Headers for a segmentation of a series.

    Raises:
        SiteDataError: "several-patients", "several-studies"; the files of the one series do not
            agree on whom they show.
    """
    with no_warnings():  # pydicom's quote values
        return _sources_of(series)


def _sources_of(series: Series) -> Sources:
    first = series.headers[0]
    for keyword, code, what in (
        ("PatientID", "several-patients", "patients"),
        ("StudyInstanceUID", "several-studies", "studies"),
    ):
        found = {text for header in series.headers if (text := _text(header, keyword))}
        if len(found) > 1:
            raise SiteDataError(
                f"the slices of one series name {len(found)} {what} ({keyword}), so nobody can "
                "say whose mask this would be",
                "put the files of each into a folder of its own; if a program for removing names "
                "gave every file a new one, let it give all files of a series the same",
                code=code,
            )
    done: _Done = {
        what: [] for what in (_REWRITTEN, _BLANK, _LEFT_OUT, _MADE, _MADE_INVALID, _KEPT, _OTHER)
    }
    shared = Dataset()
    for keyword in _MAY_BE_BLANK:
        setattr(shared, keyword, _taken(first, keyword, done, _BLANK) or "")
    for keyword in _MAY_BE_MISSING:
        _set(shared, keyword, _taken(first, keyword, done))
    methods = ("DeidentificationMethod", "DeidentificationMethodCodeSequence")
    if shared.get("PatientIdentityRemoved") == "YES" and not any(m in shared for m in methods):
        del shared.PatientIdentityRemoved  # is not valid without
        done[_OTHER].append("PatientIdentityRemoved has no DeidentificationMethod and is left out")
    trial = {keyword: _taken(first, keyword, done) for keyword in _TRIAL}
    if all(trial[keyword] for keyword in _TRIAL[:3]):
        for keyword in _TRIAL[:6]:
            setattr(shared, keyword, trial[keyword] or "")
        _set(shared, _TRIAL[6], trial[_TRIAL[6]])
    if _taken(first, "LossyImageCompression", done) == "01":
        shared.LossyImageCompression = "01"
        for keyword in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            _set(shared, keyword, _taken(first, keyword, done))
    _identify(shared, series, done)
    headers = _slices(shared, series, done)
    classes = _references(series, headers, done)
    plain = all(str(element.value).isascii() for element in shared.iterall())
    number = _text(first, "SeriesNumber")
    return Sources(
        headers,
        classes,
        None if plain else "ISO_IR 192",
        int(number) if re.fullmatch(r"\d{1,8}", number) else 0,
        tuple(
            clause
            for what, names in done.items()
            for clause in ([f"{_listed(names)} {what}"] if what and names else names)
        ),
    )


def _set(shared: Dataset, keyword: str, value: Any) -> None:
    if value:
        setattr(shared, keyword, value)


# ------------------------------------------------------------------------------- single attributes


def _text(header: Dataset, keyword: str) -> str:
    """A value as text, whatever it is; empty where there is none or nobody can read it."""
    try:
        return str(header.get(keyword) or "").strip(" \0")
    except Exception:  # a wrong type or nonsense makes pydicom raise nearly anything
        return "?"


def _taken(header: Dataset, keyword: str, done: _Done, refused: str = _LEFT_OUT) -> Any:
    """A valid value, perhaps rewritten; None where there is none, or none that is valid."""
    try:
        element = header[keyword]
        value = element.value
        if dictionary_VR(keyword) == "SQ":
            if not value:
                return None
            if not isinstance(value, Sequence) or not all(map(_is_valid_item, value)):
                raise _Invalid
            return list(value)
        if value is None or value == "" or value == []:
            return None
        if isinstance(value, MultiValue | list):
            if dictionary_VM(keyword) == "1":
                raise _Invalid
            return [_checked(keyword, str(one)) for one in value]
        text = str(value).strip(" \0")
        valid = _checked(keyword, text) if text else ""
    except KeyError:
        return None
    except Exception:  # not valid, or so far from it that pydicom raises nearly anything
        done[refused].append(keyword)
        return None
    if valid != text:
        done[_REWRITTEN].append(keyword)
    return valid or None


def _checked(keyword: str, text: str) -> str:
    """A value in the form of its value representation, rewritten if that leaves its meaning.

    Raises:
        _Invalid, ValueError: it has no such form.
    """
    vr = dictionary_VR(keyword)
    text = _REWRITE.get(vr, str)(text)
    if keyword == "PatientSex":
        text = {"MALE": "M", "FEMALE": "F", "OTHER": "O"}.get(text.upper(), text.upper())
    if text not in _ALLOWED.get(keyword, (text,)):
        raise _Invalid
    # control letters, the replacement of bytes that no character set explains, and "\", which
    # separates values
    if any(unicodedata.category(letter) == "Cc" or letter in "\ufffd\\" for letter in text):
        raise _Invalid
    validate_value(vr, text, pydicom.config.RAISE)
    return text


def _date(text: str) -> str:
    """YYYYMMDD; years first with separators say the same."""
    whole = re.fullmatch(r"(\d{4})([-./]?)(\d\d)\2(\d\d)", text)
    if whole is None:
        raise _Invalid
    date = whole[1] + whole[3] + whole[4]
    datetime.strptime(date, "%Y%m%d")  # there is such a day
    return date


def _time(text: str) -> str:
    """HHMMSS.FFFFFF, or less of it; colons say the same."""
    whole = re.fullmatch(r"(\d\d):?(?:(\d\d)(?::?(\d\d)(\.\d{1,6})?)?)?", text)
    if whole is None:
        raise _Invalid
    return "".join(part or "" for part in whole.groups())


def _age(text: str) -> str:
    """Three digits and a unit; leading zeros are often lost."""
    whole = re.fullmatch(r"(\d{1,3})([DWMY])", text.upper())
    if whole is None:
        raise _Invalid
    return whole[1].zfill(3) + whole[2]


def _number(text: str) -> str:
    if not np.isfinite(float(text)):
        raise _Invalid
    return text


_REWRITE: dict[str, Callable[[str], str]] = {"DA": _date, "TM": _time, "AS": _age, "DS": _number}


def _is_valid_item(item: Dataset) -> bool:
    """Whether an item of a sequence, with all below it, holds only what DICOM knows and allows."""
    for element in item:
        if element.tag.is_private or not element.keyword:
            return False
        if element.VR == "SQ":
            if not all(map(_is_valid_item, element.value)):
                return False
        else:
            values = element.value if isinstance(element.value, MultiValue) else [element.value]
            for value in values:
                if value not in (None, "") and _checked(element.keyword, str(value)) != str(value):
                    return False
    return True


# ------------------------------------------------------------------------------------ identifiers


def _usable(text: str) -> bool:
    """Whether this can stand as UID. Leading zeros are not valid, but programs look for them."""
    return len(text) <= 64 and _UID_LETTERS.fullmatch(text) is not None


def _made(what: str, *parts: object) -> str:
    """The same parts always give the same UID."""
    return str(generate_uid(entropy_srcs=[f"fedfms {what}", *(str(part) for part in parts)]))


def _identify(shared: Dataset, series: Series, done: _Done) -> None:
    """UIDs of study, series and frame of reference: those of the images, else made from them.

    A text that is no UID, date or number tells studies apart only if it has digits: scripts write
    the same word into the files of all patients.
    """
    first = series.headers[0]
    study = next((text for h in series.headers if (text := _text(h, "StudyInstanceUID"))), "")
    own, frame = _text(first, "SeriesInstanceUID"), _text(first, "FrameOfReferenceUID")
    told = [
        _text(first, keyword)
        for keyword in ("PatientID", "StudyDate", "StudyTime", "AccessionNumber", "StudyID")
    ]
    pixels = hashlib.sha256(series.values.tobytes()).hexdigest()

    def of_study() -> tuple[str, ...]:
        """What the series of a study share, if it tells studies apart."""
        patient, date, time, accession, _ = map(_tells, told)
        if _tells(study) or accession or (date and (time or patient)):
            return (study, *told)
        return (frame,) if _usable(frame) else (own, pixels)

    def of_frame() -> tuple[str, ...]:
        """That two series lie in one frame is only for them to say."""
        if _tells(frame):
            return (frame, str(shared.StudyInstanceUID))
        return (str(shared.SeriesInstanceUID),)

    needed = [
        ("StudyInstanceUID", study, of_study),
        ("SeriesInstanceUID", own, lambda: (own, pixels)),
    ]
    if series.has_place:
        needed.append(("FrameOfReferenceUID", frame, of_frame))
    for keyword, text, parts in needed:
        if _usable(text):
            _keep(shared, keyword, text, done)
        else:
            setattr(shared, keyword, _made(keyword, *parts()))
            done[_MADE_INVALID if text else _MADE].append(keyword)


def _tells(text: str) -> bool:
    return any(letter.isdigit() for letter in text)


def _keep(header: Dataset, keyword: str, text: str, done: _Done) -> None:
    setattr(header, keyword, text)
    if not UID(text).is_valid and keyword not in done[_KEPT]:
        done[_KEPT].append(keyword)


def _slices(shared: Dataset, series: Series, done: _Done) -> tuple[Dataset, ...]:
    """A header for each slice, with its place; SOPInstanceUID still to come."""
    spacing = float(np.linalg.norm(series.affine[:3, 2]))
    thickness = _thickness(series.headers[0])
    if thickness is None and series.has_place:
        done[_OTHER].append("SliceThickness is missing or not valid, so the slices' distance is it")
    headers = []
    for source in series.headers:
        header = Dataset()
        header.update(shared)
        header.Rows, header.Columns = int(source.Rows), int(source.Columns)
        headers.append(header)
        if not series.has_place:
            header.SOPClassUID = SecondaryCaptureImageStorage
            continue
        header.SOPClassUID = MRImageStorage
        for keyword in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"):
            setattr(header, keyword, _decimals(source[keyword].value))
        header.SliceThickness = _decimals([spacing if thickness is None else thickness])[0]
    return tuple(headers)


def _thickness(header: Dataset) -> float | None:
    try:
        value = float(_text(header, "SliceThickness"))
    except ValueError:
        return None
    return value if np.isfinite(value) and value > 0 else None


def _decimals(values: Iterable[Any]) -> list[DSfloat]:
    """At most 16 letters each, which is what a decimal string may have."""
    return [DSfloat(float(value), auto_format=True) for value in values]


def _references(series: Series, headers: Sequence[Dataset], done: _Done) -> dict[str, str]:
    """SOPInstanceUID into each header, and what may refer to them."""
    uids = [
        _text_or_meta(s, "SOPInstanceUID", "MediaStorageSOPInstanceUID") for s in series.headers
    ]
    if len(set(uids)) == len(uids) and all(map(_usable, uids)):
        for header, uid in zip(headers, uids, strict=True):
            _keep(header, "SOPInstanceUID", uid, done)
        classes = [_class_of(source, done) for source in series.headers]
        return dict(zip(uids, classes, strict=True))
    for number, header in enumerate(headers):
        header.SOPInstanceUID = _made("SOPInstanceUID", header.SeriesInstanceUID, number)
    said = "the slices have no valid SOPInstanceUID of their own"
    if len(set(uids)) == 1 and _usable(uids[0]) and len(uids) > 1:
        said = "the slices are frames of one file"
    done[_OTHER].append(f"{said}, so the segmentation lies in their place but names none of them")
    return {}


def _class_of(source: Dataset, done: _Done) -> str:
    text = _text_or_meta(source, "SOPClassUID", "MediaStorageSOPClassUID")
    if _usable(text):
        return text
    said = "SOPClassUID is missing or not valid, so the modality's is named"
    if said not in done[_OTHER]:
        done[_OTHER].append(said)
    return str(_CLASS_OF_MODALITY.get(_text(source, "Modality"), SecondaryCaptureImageStorage))


def _text_or_meta(source: Dataset, keyword: str, meta_keyword: str) -> str:
    """A UID of the image, or of its file where programs forgot that it stands there too."""
    text = _text(source, keyword)
    return text if _usable(text) else _text(source.file_meta, meta_keyword) or text


def _listed(names: Sequence[str]) -> str:
    *some, last = names
    return f"{', '.join(some)} and {last} are" if some else f"{last} is"
