"""Nuclei in H&E histology at seven sites: four tissues of PanNuke, MoNuSAC2020, TNBC, MoNuSeg.

The site that the paper calls MoNuSAC2018 is MoNuSeg 2018. Labels are 0 and 255 wherever there is a
nucleus of any kind and any number; MoNuSAC's areas that its experts call ambiguous are 128, which
site.yml maps to the background.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from fedfms.errors import SiteDataError
from fedfms_lab.prepare.pictures import (
    fill,
    objects_to_255,
    png,
    read_numbers,
    read_rgb,
    require_same_size,
)
from fedfms_lab.prepare.plan import Item, Made, SitePlan, chosen, items_of
from fedfms_lab.prepare.source import (
    Files,
    Source,
    pair_by_key,
    read_source,
    truncated,
    unexpected_shape,
)

Array = NDArray[Any]

NUCLEUS, AMBIGUOUS = 255, 128
# site -> fold of PanNuke and its name of the tissue
PANNUKE = {
    "PanNuke2Adrenal_gland": (2, "Adrenal_gland"),
    "PanNuke2Esophagus": (2, "Esophagus"),
    "PanNuke3Bile-duct": (3, "Bile-duct"),
    "PanNuke3Uterus": (3, "Uterus"),
}
SITES = (*PANNUKE, "MoNuSAC2020", "TNBC", "MoNuSAC2018")
_PANNUKE_SIDE = 256  # pixels
_PANNUKE_CHANNELS = 6  # five kinds of nuclei, then the background
_MONUSAC_KINDS = ("Epithelial", "Lymphocyte", "Macrophage", "Neutrophil")
_TNBC = re.compile(r"(slide|gt)_(\d+)", re.IGNORECASE)
_TNBC_PATIENTS = 11  # folders from 12 on are brain, in the extended set
_TCGA = r"^(TCGA-[A-Za-z0-9]{2}-[A-Za-z0-9]{4})"
_MASKS = (".png", ".tif", ".tiff", ".npy")


def plan_nuclei(
    source: Source, *, paper: bool = False, only: Sequence[str] | None = None
) -> list[SitePlan]:
    """One plan for each of the seven sites.

    Args:
        source: a folder below which the four downloads lie.
        paper: one in ten patients for validation, as the paper elsewhere; its nuclei came split.
        only: these sites alone.

    Raises:
        SiteDataError: "missing-download-file", "ambiguous-download", "unexpected-shape",
            "truncated-file".
        ConfigError: an unknown site.
    """
    return [_plan(source, name, paper) for name in chosen(SITES, only)]


def _plan(source: Source, name: str, paper: bool) -> SitePlan:
    notices: list[str] = []
    background = [0]
    counts: tuple[str, ...] = ()
    known: int | None = None
    if name in PANNUKE:
        fold, tissue = PANNUKE[name]
        items = _pannuke_items(source, fold, tissue)
        patient = r"^(fold\d_\d+)\.png$"
        what = f"fold {fold} of PanNuke, {tissue}; each patch counts as a patient of its own."
    elif name == "TNBC":
        items, known = _tnbc_items(source, notices), 50
        patient, what = r"^(\d+)_", "triple negative breast cancer (Naylor et al.)."
    elif name == "MoNuSAC2020":
        items, known = _outline_items(source, monusac=True), 294
        patient, what = _TCGA, "MoNuSAC 2020; 128 is what its experts call ambiguous."
        background, counts = [0, AMBIGUOUS], ("outlines_left_out",)
    else:
        items = _outline_items(source, monusac=False)
        patient, what = _TCGA, "this is MoNuSeg 2018, whatever its name says."
        counts = ("outlines_left_out",)
    return SitePlan(
        command="nuclei",
        given_name=name,
        items=items,
        settings={
            "format": "image",
            "classes": {"nucleus": [NUCLEUS]},
            "background": background,
            "channels": "rgb",
        },
        patient=patient,
        paper=paper,
        comments=[f"nuclei in H&E histology; {what}"],
        known_cases=known,
        count_names=counts,
        notes=notices,
    )


# ---------------------------------------------------------------------------------------- PanNuke


def _pannuke_items(source: Source, fold: int, tissue: str) -> list[Item]:
    arrays = {kind: _pannuke_array(source, fold, kind) for kind in ("images", "masks", "types")}
    images, masks = _open_array(arrays["images"]), _open_array(arrays["masks"])
    types = _open_array(arrays["types"])
    side = (_PANNUKE_SIDE, _PANNUKE_SIDE)
    for kind, values, last in (("images", images, 3), ("masks", masks, _PANNUKE_CHANNELS)):
        if values.shape != (len(types), *side, last) or values.dtype.kind not in "uif":
            raise unexpected_shape(
                arrays[kind],
                f"{' x '.join(map(str, values.shape))} of {values.dtype}",
                f"{len(types)} x {_PANNUKE_SIDE} x {_PANNUKE_SIDE} x {last} numbers, as many as "
                "types.npy has entries",
            )
    if types.ndim != 1 or types.dtype.kind != "U":
        raise unexpected_shape(arrays["types"], f"{types.dtype}", "one text for each patch")
    found = [int(number) for number in np.flatnonzero(types == tissue)]
    if not found:
        raise SiteDataError(
            f"{source.relative(arrays['types'])} names no patch of {tissue}",
            f"check that this is PanNuke's fold {fold}; it has "
            + ", ".join(sorted(map(str, set(types.tolist())))[:8]),
            code="missing-download-file",
        )
    return [
        Item(
            case=f"fold{fold}_{number:04d}",
            patient=f"fold{fold}_{number:04d}",
            sources=(arrays["images"], arrays["masks"]),
            part=f"[{number}]",
            make=functools.partial(_make_patch, arrays["images"], arrays["masks"], number),
        )
        for number in found
    ]


def _pannuke_array(source: Source, fold: int, kind: str) -> Path:
    """`Fold 2/images/fold2/images.npy` and types.npy, `Fold 2/masks/fold2/masks.npy`."""
    name = re.compile(rf"fold[ _-]?{fold}", re.IGNORECASE)
    found = source.where(
        lambda path: (
            path.name == f"{kind}.npy" and any(name.fullmatch(part) for part in source.parts(path))
        )
    )
    if len(found) > 1:
        raise SiteDataError(
            f"{kind}.npy of fold {fold} is there {len(found)} times: "
            + ", ".join(map(source.relative, found[:2])),
            "keep one copy of the download below the folder that you name",
            code="ambiguous-download",
        )
    if not found:
        inner = "masks" if kind == "masks" else "images"
        raise source.missing(
            f"{kind}.npy of PanNuke's fold {fold}", f"Fold {fold}/{inner}/fold{fold}/{kind}.npy"
        )
    return found[0]


def _open_array(path: Path) -> Array:
    """The array, of which only what is used is read."""
    try:
        values: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise truncated(path, str(error)) from None
    return values


def _make_patch(images: Path, masks: Path, number: int) -> Made:
    patch = np.asarray(_open_array(images)[number], np.float64)
    if not np.isfinite(patch).all() or patch.min() < 0 or patch.max() > 255:
        raise SiteDataError(
            f"{images}[{number}] has values outside 0 to 255",
            "download the fold again",
            code="unexpected-format",
        )
    # every kind of nucleus; numbers are of objects and pass 255, so nothing is added up or cast
    nuclei = (np.asarray(_open_array(masks)[number])[..., :-1] != 0).any(axis=-1)
    return Made(png(np.rint(patch).astype(np.uint8)), png(objects_to_255(nuclei)))


# ------------------------------------------------------------------------------------------- TNBC


def _tnbc_items(source: Source, notices: list[str]) -> list[Item]:
    """Slide_01/01_1.png with GT_01/01_1.png; the folder's number is the patient."""
    files: dict[str, Files] = {"slide": [], "gt": []}
    brain = 0
    for path in source.where(lambda path: path.suffix.lower() == ".png"):
        found = _TNBC.fullmatch(path.parent.name)
        if found is None:
            continue
        if int(found.group(2)) > _TNBC_PATIENTS:
            brain += found.group(1).lower() == "slide"
            continue
        stem = re.fullmatch(rf"{found.group(2)}_\d+", path.stem)
        if stem is None:
            raise SiteDataError(
                f"{source.relative(path)} is not called {found.group(2)}_NUMBER.png",
                "name the folder as it was downloaded, without files of your own",
                code="unexpected-file",
            )
        files[found.group(1).lower()].append((path.stem, path))
    if not files["slide"] or not files["gt"]:
        raise source.missing("slides and masks of TNBC", "Slide_01/01_1.png and GT_01/01_1.png")
    if brain:
        notices.append(f"{brain} pictures of brain (folders from 12 on) are not part of this site")
    pairs = pair_by_key(source, files["slide"], files["gt"])
    return items_of(pairs, _make_from_objects, lambda key: key.split("_")[0])


def _make_from_objects(image_path: Path, label_path: Path) -> Made:
    image, numbers = read_rgb(image_path), _any_channel(label_path)
    require_same_size(image_path, image, label_path, numbers)
    return Made(png(image), png(objects_to_255(numbers)), {})


def _any_channel(path: Path) -> Array:
    """(H, W) numbers that are not 0 wherever any colour of the mask is not."""
    try:
        return read_numbers(path)
    except SiteDataError as error:
        if error.code != "unexpected-shape":
            raise
    colours: Array = read_rgb(path).max(axis=2)
    return colours


# ------------------------------------------------------------------------------ MoNuSAC and MoNuSeg


def _outline_items(source: Source, *, monusac: bool) -> list[Item]:
    """Tissue images with outlines in Aperio's XML, by the stem they share.

    MoNuSAC: below a folder called MoNuSAC…, an .svs, a .tif and an .xml in a folder for each
    patient. MoNuSeg: `Tissue Images/x.tif` with `Annotations/x.xml`, or both in one folder. Where
    an image has no XML, a mask of the same stem in a folder called Masks takes its place: 0 is
    background, anything else a nucleus.
    """
    images: dict[str, Path] = {}
    outlines: Files = []
    masks: Files = []
    for path in source.where(lambda path: path.stem.upper().startswith("TCGA-")):
        parts = [part.casefold() for part in source.parts(path)]
        if any(part.startswith("monusac") for part in parts) != monusac:
            continue
        suffix = path.suffix.lower()
        if parts[-1:] == ["masks"] and suffix in _MASKS:
            masks.append((path.stem, path))
        elif suffix == ".xml":
            outlines.append((path.stem, path))
        elif suffix in (".tif", ".tiff", ".svs"):
            before = images.get(path.stem)
            if before is not None and before.suffix.lower() == suffix:
                pair_by_key(source, [(path.stem, before), (path.stem, path)], [])
            if before is None or before.suffix.lower() == ".svs":  # .tif is the same, and plainer
                images[path.stem] = path
    if not images:
        raise source.missing(
            f"images of {'MoNuSAC' if monusac else 'MoNuSeg'}",
            "MoNuSAC_images_and_annotations/TCGA-…/TCGA-…_1.tif with its .xml"
            if monusac
            else "Tissue Images/TCGA-….tif and Annotations/TCGA-….xml",
        )
    drawn = {stem for stem, _ in outlines}
    labels = [*outlines, *((stem, path) for stem, path in masks if stem not in drawn)]

    def patient_of(key: str) -> str:
        found = re.match(_TCGA, key)
        if found is None:
            raise SiteDataError(
                f"{source.relative(images[key])} does not start with a TCGA patient, TCGA-XX-XXXX",
                "name the folder as it was downloaded, without files of your own",
                code="unexpected-file",
            )
        return found.group(1)

    def make(image: Path, label: Path) -> Made:
        if label.suffix.lower() != ".xml":
            return _make_from_objects(image, label)
        return _make_from_outlines(image, label, _MONUSAC_KINDS if monusac else None)

    return items_of(pair_by_key(source, list(images.items()), labels), make, patient_of)


def _make_from_outlines(image_path: Path, label_path: Path, kinds: Sequence[str] | None) -> Made:
    """Outlines filled: nuclei 255, over what is ambiguous (128).

    Args:
        kinds: names of nuclei; besides them only "Ambiguous" is known. None: all are nuclei.
    """
    image = read_rgb(image_path)
    try:
        root = ElementTree.fromstring(read_source(label_path))
    except ElementTree.ParseError as error:
        raise truncated(label_path, str(error)) from None
    label = np.zeros(image.shape[:2], np.uint8)
    nuclei: list[Array] = []
    ambiguous: list[Array] = []
    no_area = outside = 0
    for annotation in root.iter("Annotation"):
        is_nucleus = kinds is None or _kind(annotation, label_path, kinds) != "Ambiguous"
        for region in annotation.iter("Region"):
            outline = _outline(region, label_path)
            if len(outline) < 3:  # clicks that enclose nothing
                no_area += 1
            elif (outline.min(axis=0) > label.shape[::-1]).any() or (outline.max(axis=0) < 0).any():
                outside += 1
            else:
                (nuclei if is_nucleus else ambiguous).append(outline)
    if outside > len(nuclei) + len(ambiguous):
        rows, columns = image.shape[0], image.shape[1]
        raise unexpected_shape(
            label_path,
            f"drawn on a larger picture ({outside} outlines lie outside)",
            f"outlines within {rows} x {columns} pixels (rows x columns) of {image_path.name}",
        )
    fill(label, ambiguous, AMBIGUOUS)
    fill(label, nuclei, NUCLEUS)
    return Made(png(image), png(label), {"outlines_left_out": no_area + outside})


def _kind(annotation: ElementTree.Element, path: Path, kinds: Sequence[str]) -> str:
    names = {entry.get("Name", "") for entry in annotation.findall("Attributes/Attribute")}
    known = names & {*kinds, "Ambiguous"}
    if len(known) == 1:
        return known.pop()
    if not any(True for _ in annotation.iter("Region")):
        return kinds[0]  # a layer that nobody drew on
    raise SiteDataError(
        f"{path} has a layer called {', '.join(sorted(names)) or 'nothing'}; known are "
        + ", ".join((*kinds, "Ambiguous")),
        "compare with the provider's file; layers must carry the kind of nucleus",
        code="unexpected-label-values",
    )


def _outline(region: ElementTree.Element, path: Path) -> Array:
    """(N, 2) of x and y."""
    if region.get("NegativeROA", "0") not in ("0", ""):
        raise SiteDataError(
            f"{path} has an outline that cuts out of others (NegativeROA)",
            "compare with the provider's file, whose outlines all add",
            code="unexpected-label-values",
        )
    try:
        points = [
            (float(vertex.get("X", "nan")), float(vertex.get("Y", "nan")))
            for vertex in region.iter("Vertex")
        ]
    except ValueError as error:
        raise truncated(path, str(error)) from None
    outline = np.array(points, np.float64).reshape(-1, 2)
    if not np.isfinite(outline).all():
        raise truncated(path, "a vertex has no X or Y")
    return outline
