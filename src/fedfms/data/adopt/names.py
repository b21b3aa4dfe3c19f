"""What names of files and folders say: words for images, labels, contrasts and parts of a split."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Literal

Role = Literal["image", "label"]


def words(text: str) -> frozenset[str]:
    """The words of a list that is written as one text."""
    return frozenset(text.split())


# in small letters; a number behind a word, as in manual1, is no part of it
LABEL_WORDS = words(
    "mask masks msk seg segs segm segmentation segmentations label labels labelmap labelmaps "
    "labelstr labelsts labelsva gt gts groundtruth truth annotation annotations annotated annot "
    "anno manual roi rois dseg contour contours delineation outline outlines target targets "
    "maske masken maska masque masques mascara mascaras segmentierung segmentierungen etikett "
    "etiquettes"
)
IMAGE_WORDS = words(
    "image images imagestr imagests imagesva img imgs scan scans volume volumes vol imaging input "
    "inputs original originals orig raw photo photos picture pictures slide slides tissue bild "
    "bilder aufnahme aufnahmen imagen imagenes"
)
# of the words for labels those that may mean something else, too: where the brain or the retina is
VAGUE_WORDS = words("mask masks msk roi rois target targets contour contours outline outlines")
# of labels that a program drew
MACHINE_WORDS = words(
    "auto automatic automated pred preds predicted prediction predictions ai inference nnunet unet"
)
# word -> the contrast that it is a word for
CONTRASTS = {
    word: contrast
    for contrast, spellings in {
        "t1": "t1 t1w t1n t1nat t1native",
        "t1ce": "t1ce t1c t1gd t1km t1post t1contrast",
        "t2": "t2 t2w t2n t2tse",
        "flair": "flair fla t2f t2flair",
        "adc": "adc",
        "dwi": "dwi hbv",
        "pd": "pd pdw",
        "swi": "swi",
        "ct": "ct",
        "pet": "pet suv",
        "cta": "cta",
        "mr": "mr mri",
    }.items()
    for word in words(spellings)
}
# words for the parts of a split
PARTS = {
    **dict.fromkeys(words("train training trn"), "train"),
    **dict.fromkeys(words("val valid validation validate dev imagesva labelsva"), "validation"),
    **dict.fromkeys(words("test testing tst imagests labelsts holdout"), "test"),
}
_KNOWN = LABEL_WORDS | IMAGE_WORDS | CONTRASTS.keys()
# letters and digits; with the marks of accents that are signs of their own, as macOS writes them
_MARKS = "\u0300-\u036f\u3099\u309a"
_RUN = re.compile(rf"[^\W_]+(?:[{_MARKS}]+[^\W_]*)*")
_NUMBERED = re.compile(r"([^\W\d_]+)\d+")


def known_words(text: str) -> Iterator[tuple[str, int, int, bool]]:
    """Of each run of letters and digits: in small letters, from where to where, and known or not.

    Of a known word with a number behind it (manual1, img0001) the letters alone.
    """
    for found in _RUN.finditer(text):
        run = _without_accents(found.group().lower())
        numbered = _NUMBERED.fullmatch(run)
        if run == "pt" and not re.search(r"[^\W_]", text[found.end() :]):
            yield "pet", found.start(), found.end(), True  # in front it is a patient
        elif run not in _KNOWN and numbered is not None and numbered.group(1) in _KNOWN:
            middle = found.end() - len(run) + len(numbered.group(1))
            yield numbered.group(1), found.start(), middle, True
            yield run[len(numbered.group(1)) :], middle, found.end(), False
        else:
            yield run, found.start(), found.end(), run in _KNOWN


def _without_accents(text: str) -> str:
    return re.sub(f"[{_MARKS}]", "", unicodedata.normalize("NFD", text))


def words_of(text: str) -> list[str]:
    """All words of a name, those in camel case too (GroundTruth, LungMask), in small letters."""
    words = [word for word, *_ in known_words(text)]
    for run in _RUN.findall(text):
        humps = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", run)
        if len(humps) > 1:
            words += [hump.lower() for hump in humps]
    return words


def role_of(text: str) -> Role | None:
    """What a name says that a file is; a word for labels counts more than one for images."""
    words = set(words_of(text))
    if words & LABEL_WORDS:
        return "label"
    return "image" if words & (IMAGE_WORDS | CONTRASTS.keys()) else None


def contrast_of(text: str) -> str | None:
    """The contrast that a name says: t1, t1ce, t2, flair …; the last one of several."""
    found = [CONTRASTS[word] for word in words_of(text) if word in CONTRASTS]
    specific = [one for one in found if one != "mr"] or found
    return specific[-1] if specific else None


def part_of(text: str) -> str | None:
    """train, validation or test, if a folder's name says so; train_0001 is the folder of a case."""
    if re.search(r"\d$", text):
        return None
    words = words_of(text)
    found = [PARTS[word] for word in words if word in PARTS]
    return found[-1] if found else None


def known_ends(text: str) -> str:
    """A name as a glob: known words at its ends stay, what is between them is a *.

    BraTS_001_t1 is *_t1, mask is mask, img0001 is img*, and anna is *.
    """
    words = list(known_words(text))
    first, last = 0, len(words)
    while first < last and words[first][3]:
        first += 1
    while last > first and words[last - 1][3]:
        last -= 1
    if first == last:
        return glob_literal(text) if words else "*"
    start, end = words[first][1], words[last - 1][2]
    return collapsed(glob_literal(text[:start]) + "*" + glob_literal(text[end:]))


def glob_literal(text: str) -> str:
    """A text as a glob that matches it alone; what site.yml cannot hold becomes any one character:
    signs of globs, line breaks, bytes of no text."""
    return re.sub(r"[*?\[\x02-\x1f\x7f-\x9f\ud800-\udfff]", "?", text)


def collapsed(pattern: str) -> str:
    """Wildcards with nothing but signs between them as one: *-*-* is *."""
    return re.sub(r"\*(?:(?:[^\w/*]|_)*\*)+", "*", pattern)


def class_name(text: str) -> str:
    """A text as a class may be called."""
    plain = unicodedata.normalize("NFKD", text.strip().lower().replace("ß", "ss"))
    plain = "".join(sign for sign in plain if not unicodedata.combining(sign))
    name = re.sub(r"[^a-z0-9]+", "_", plain).strip("_")[:63]
    return name if name and name[0].isalpha() else f"class_{name}" if name else "foreground"


def class_names(texts: Iterable[str]) -> dict[str, str]:
    """Several texts, each as a class may be called; no two of them alike.

    LN+ and LN- are ln_plus and ln_minus; what no letters tell apart gets a number.
    """
    of: dict[str, str] = {}
    every = sorted({*texts})
    plain = [class_name(text) for text in every]
    for text, name in zip(every, plain, strict=True):
        if plain.count(name) > 1:
            signs = text.replace("+", " plus ").replace("-", " minus ")
            name = class_name(signs)
        number, first = 1, name
        while name in of.values():
            number += 1
            name = f"{first}_{number}"
        of[text] = name
    return of
