"""Segmentations of series whose headers were changed to remove names, read by others."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom import DataElement, Dataset
from pydicom.uid import CTImageStorage, MRImageStorage

sys.path.insert(0, str(Path(__file__).parent / "data"))  # the DICOM files of the readers' tests
from dicom_files import grid, series, stored_values, write_series

from fedfms.contracts.site import SiteConfig
from fedfms.data.content import read_bytes
from fedfms.data.dicom.images import read_series
from fedfms.data.grid import Cut
from fedfms.errors import SiteDataError
from fedfms.predict.headers import Sources, sources_of
from fedfms.predict.write import Origin, dicom_bytes

SITE = SiteConfig(
    data_root=Path(), format="dicom", images="images/*", labels="labels/*", classes={"disc": (1,)}
)
ORIGIN = Origin("fedmsa vit_demo", ("disc", "cup"), {"model_sha256": "ab" * 32})
SHAPE = (14, 12, 5)

Edit = Callable[[Dataset], object]


def drop(*keywords: str) -> Edit:
    def edit(slice_: Dataset) -> None:
        for keyword in keywords:
            if keyword in slice_:
                delattr(slice_, keyword)
            meta = keyword.replace("SOP", "MediaStorageSOP")
            if meta in slice_.file_meta:
                delattr(slice_.file_meta, meta)

    return edit


def put(**values: object) -> Edit:
    def edit(slice_: Dataset) -> None:
        for keyword, value in values.items():
            setattr(slice_, keyword, value)

    return edit


def as_vr(keyword: str, vr: str, value: object) -> Edit:
    def edit(slice_: Dataset) -> None:
        slice_.add(DataElement(pydicom.datadict.tag_for_keyword(keyword), vr, value))

    return edit


def written(folder: Path, *edits: Edit, name: str = "a") -> list[Dataset]:
    """A series after the edits of all its slices, written as a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the values are meant to be odd
        slices = series(name, grid("oblique", SHAPE), stored_values(3, SHAPE))
        for slice_ in slices:
            for edit in edits:
                edit(slice_)
        folder.mkdir(parents=True)
        for number, slice_ in enumerate(slices):  # as it is, valid or not
            slice_.preamble = b"\0" * 128
            pydicom.dcmwrite(folder / f"IM{number:04d}", slice_, enforce_file_format=False)
    return slices


def segmented(folder: Path) -> tuple[Sources, Path, np.ndarray]:
    """What is taken over of the headers, the file, and its masks (class, column, row, slice)."""
    found = read_series(folder, read_bytes(folder, SITE), SITE)
    cut = Cut.of(found.affine, found.values.shape, "axial")
    masks = np.random.default_rng(7).random((2, *cut.slices(found.values).shape)) > 0.6
    sources = sources_of(found)
    file = folder.with_suffix(".seg.dcm")
    file.write_bytes(dicom_bytes(masks, cut, sources, ORIGIN))
    return sources, file, np.stack([cut.voxels(mask) for mask in masks])


def require_valid(dataset: Dataset) -> None:
    """Every value of a file as its value representation allows, by pydicom's own rules."""
    for element in dataset.iterall():
        if element.VR == "SQ" or element.value is None:
            continue
        many = isinstance(element.value, pydicom.multival.MultiValue | list)
        for value in element.value if many else [element.value]:
            text = value.original_string if hasattr(value, "original_string") else value
            plain = str(text) if isinstance(text, str | pydicom.valuerep.PersonName) else text
            pydicom.valuerep.validate_value(element.VR, plain, pydicom.config.RAISE)


def require_in_place(file: Path, slices: Sequence[Dataset], masks: np.ndarray) -> None:
    """By the position that each frame states alone, each mask lies on the slice that it is of."""
    seg = pydicom.dcmread(file)
    frames = pydicom.pixels.pixel_array(seg)
    places = {
        tuple(np.round([float(x) for x in s.ImagePositionPatient], 6)): k
        for k, s in enumerate(slices)
    }
    got = np.zeros_like(masks)
    for frame, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        position = group.PlanePositionSequence[0].ImagePositionPatient
        k = places[tuple(np.round([float(x) for x in position], 6))]
        segment = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        got[segment - 1, :, :, k] = frame.T
    np.testing.assert_array_equal(got, masks)


BLANK = [  # what programs write, and the attribute that cannot be taken over
    (put(PatientBirthDate="ANONYMIZED"), "PatientBirthDate"),
    (put(PatientBirthDate="00000000"), "PatientBirthDate"),
    (put(PatientBirthDate="01.02.1950"), "PatientBirthDate"),  # day or month first: nobody knows
    (put(PatientBirthDate="19501340"), "PatientBirthDate"),
    (put(PatientBirthDate="1950"), "PatientBirthDate"),
    (put(PatientSex="UNKNOWN"), "PatientSex"),
    (put(PatientSex="anonymous and much too long"), "PatientSex"),
    (put(PatientSex=["M", "F"]), "PatientSex"),
    (as_vr("PatientSex", "US", 3), "PatientSex"),
    (put(PatientID="x" * 128), "PatientID"),  # a SHA-512
    (as_vr("PatientID", "LO", ["a", "b"]), "PatientID"),
    (put(PatientName="x" * 80), "PatientName"),
    (put(StudyID="a study of 1987 with a long name"), "StudyID"),
    (put(AccessionNumber="REMOVED BY ANONYMIZER"), "AccessionNumber"),
    (put(StudyDate="ANON"), "StudyDate"),
    (put(StudyTime="noon"), "StudyTime"),
    (put(StudyTime="250000"), "StudyTime"),
    (as_vr("StudyDate", "UN", b"\x01\x02\x03"), "StudyDate"),
]


@pytest.mark.parametrize(("edit", "keyword"), BLANK, ids=lambda value: str(value)[:20])
def test_a_value_that_is_not_valid_is_left_blank_and_said(tmp_path, edit, keyword):
    slices = written(tmp_path / "s", edit)
    sources, file, masks = segmented(tmp_path / "s")
    assert f"{keyword} is not valid and left blank" in "; ".join(sources.said)
    seg = hd.seg.segread(file)
    assert not seg[keyword].value
    require_valid(seg)
    require_in_place(file, slices, masks)
    for other in ("PatientID", "PatientBirthDate", "StudyDate", "StudyInstanceUID"):
        if other != keyword:
            assert seg[other].value == slices[0][other].value


REWRITTEN = [
    (put(StudyDate="2020-01-01"), "StudyDate", "20200101"),
    (put(StudyDate="2020/01/01"), "StudyDate", "20200101"),
    (put(PatientBirthDate="1950.01.02"), "PatientBirthDate", "19500102"),
    (put(StudyTime="12:00:00"), "StudyTime", "120000"),
    (put(StudyTime="12:00:00.25"), "StudyTime", "120000.25"),
    (put(StudyTime="12:00"), "StudyTime", "1200"),
    (put(PatientSex="Male"), "PatientSex", "M"),
    (put(PatientSex="f"), "PatientSex", "F"),
    (put(PatientAge="45Y"), "PatientAge", "045Y"),
]


@pytest.mark.parametrize(("edit", "keyword", "value"), REWRITTEN, ids=lambda value: str(value)[:20])
def test_a_value_that_says_the_same_in_another_form_is_rewritten(tmp_path, edit, keyword, value):
    written(tmp_path / "s", edit)
    sources, file, _ = segmented(tmp_path / "s")
    assert sources.said == (f"{keyword} is rewritten as DICOM writes it",)
    seg = pydicom.dcmread(file)
    assert str(seg[keyword].value) == value
    require_valid(seg)


def test_what_may_be_missing_is_left_out_and_private_text_never_comes_along(tmp_path):
    def private(slice_: Dataset) -> None:
        block = slice_.private_block(0x0011, "CTP", create=True)
        block.add_new(1, "LO", "Secret^Private")
        slice_.PatientComments = "Secret^Comment"
        slice_.PatientAge = "forty"
        slice_.PatientWeight = "70"
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator = "x" * 40, "DCM"  # SH: at most 16
        slice_.PatientIdentityRemoved = "YES"
        slice_.DeidentificationMethod = ["CTP", "RSNA"]
        slice_.DeidentificationMethodCodeSequence = [item]

    written(tmp_path / "s", private)
    sources, file, _ = segmented(tmp_path / "s")
    assert sources.said == (
        "DeidentificationMethodCodeSequence and PatientAge are not valid and left out",
    )
    seg = pydicom.dcmread(file)
    assert (seg.PatientIdentityRemoved, seg.PatientWeight) == ("YES", 70)
    assert list(seg.DeidentificationMethod) == ["CTP", "RSNA"]
    assert b"Secret^Private" not in file.read_bytes()
    assert b"Secret^Comment" not in file.read_bytes()
    require_valid(seg)


def test_names_that_were_removed_by_nobody_knows_what_are_not_said_to_be_removed(tmp_path):
    written(tmp_path / "s", put(PatientIdentityRemoved="YES"))
    sources, file, _ = segmented(tmp_path / "s")
    assert sources.said == ("PatientIdentityRemoved has no DeidentificationMethod and is left out",)
    assert "PatientIdentityRemoved" not in pydicom.dcmread(file)


@pytest.mark.parametrize(
    ("keyword", "gone"),
    [
        ("FrameOfReferenceUID", drop("FrameOfReferenceUID")),
        ("FrameOfReferenceUID", put(FrameOfReferenceUID="")),
        ("StudyInstanceUID", drop("StudyInstanceUID")),
        ("SeriesInstanceUID", drop("SeriesInstanceUID")),
        ("StudyInstanceUID", put(StudyInstanceUID="ANONYMIZED")),
        ("FrameOfReferenceUID", put(FrameOfReferenceUID="1." + "2" * 70)),
        ("StudyInstanceUID", put(StudyInstanceUID="1.2..3")),
    ],
)
def test_an_identifier_that_must_be_there_is_made_and_stays_the_same(tmp_path, keyword, gone):
    slices = written(tmp_path / "s", gone)
    sources, file, masks = segmented(tmp_path / "s")
    (said,) = sources.said
    assert said.startswith(keyword)
    assert said.endswith("and made from what is there")
    seg = hd.seg.segread(file)
    require_valid(seg)
    require_in_place(file, slices, masks)
    made = {keyword: str(sources.headers[0][keyword].value)}
    if keyword != "SeriesInstanceUID":  # the segmentation's own is another, of course
        made[keyword] = str(seg[keyword].value)
    else:
        assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == made[keyword]
    again, _, _ = segmented(tmp_path / "s")
    assert again.headers[0][keyword].value == made[keyword]
    uids = [slice_.SOPInstanceUID for slice_ in slices]
    got = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(got.transpose(3, 2, 1, 0), masks)


@pytest.mark.parametrize(
    "edits", [(drop("StudyInstanceUID"),), (put(StudyInstanceUID="STUDY OF ANNA"),)]
)
def test_series_of_one_study_agree_on_its_made_identifier_and_other_patients_do_not(
    tmp_path, edits
):
    def study(name: str, series_name: str, **changes: str) -> str:
        written(tmp_path / name, put(**changes), *edits, name=series_name)
        return str(segmented(tmp_path / name)[0].headers[0].StudyInstanceUID)

    here = {"PatientID": "P1", "AccessionNumber": "7"}
    one = study("one", "t1", **here)
    assert study("two", "t2", **here) == one
    assert study("three", "t1", PatientID="P2", AccessionNumber="7") != one
    blank = {"PatientID": "", "AccessionNumber": "", "StudyDate": "", "StudyTime": ""}
    assert study("four", "t1", **blank) != study("five", "t2", **blank)


@pytest.mark.parametrize("edit", [drop("FrameOfReferenceUID"), put(FrameOfReferenceUID="GONE")])
def test_two_series_without_a_frame_of_reference_are_not_said_to_lie_in_one(tmp_path, edit):
    frames = set()
    for name in ("t1", "t2"):
        written(tmp_path / name, edit, name=name)
        frames.add(str(segmented(tmp_path / name)[0].headers[0].FrameOfReferenceUID))
    assert len(frames) == 2


def test_one_text_in_the_files_of_all_patients_joins_nobody(tmp_path):
    made = set()
    for number in range(2):
        slices = series("same", grid("axial", SHAPE), stored_values(number, SHAPE))
        folder = tmp_path / f"p{number}"
        folder.mkdir()
        for index, slice_ in enumerate(slices):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for keyword in ("Study", "Series", "SOP"):
                    setattr(slice_, f"{keyword}InstanceUID", "ANONYMIZED")
                slice_.FrameOfReferenceUID = "ANONYMIZED"
                slice_.PatientID = slice_.StudyDate = slice_.StudyTime = "ANONYMIZED"
                slice_.AccessionNumber = slice_.StudyID = ""
                slice_.preamble = b"\0" * 128
                pydicom.dcmwrite(folder / f"{index}", slice_, enforce_file_format=False)
        header = segmented(folder)[0].headers[0]
        made |= {
            str(header[keyword].value)
            for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
        }
    assert len(made) == 6


def test_references_name_the_images_as_they_are(tmp_path):
    def odd(slice_: Dataset) -> None:
        slice_.SOPInstanceUID = str(slice_.SOPInstanceUID)[:50] + f".0{slice_.InstanceNumber}"
        slice_.SOPClassUID = CTImageStorage

    slices = written(tmp_path / "s", odd)
    sources, file, masks = segmented(tmp_path / "s")
    assert sources.said == (
        "SOPInstanceUID is kept with leading zeros, so that programs find what they name",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seg = hd.seg.segread(file)
    (referenced,) = seg.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == slices[0].SeriesInstanceUID
    images = {str(i.ReferencedSOPInstanceUID) for i in referenced.ReferencedInstanceSequence}
    assert images == {str(s.SOPInstanceUID) for s in slices}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        (image,) = frame.DerivationImageSequence[0].SourceImageSequence
        assert image.ReferencedSOPClassUID == CTImageStorage
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        (source,) = [s for s in slices if s.SOPInstanceUID == image.ReferencedSOPInstanceUID]
        np.testing.assert_allclose(position, source.ImagePositionPatient, atol=1e-6)
    require_in_place(file, slices, masks)


@pytest.mark.parametrize(
    ("edit", "class_uid"),
    [
        (
            lambda s: delattr(s, "SOPInstanceUID"),
            MRImageStorage,
        ),  # it stands before the dataset too
        (lambda s: delattr(s, "SOPClassUID"), MRImageStorage),
        (put(SOPClassUID="1.3.12.2.1107.5.9.1"), "1.3.12.2.1107.5.9.1"),  # a maker's own
        (drop("SOPClassUID"), MRImageStorage),  # by its modality
        (put(Modality="OT", SOPClassUID="UNKNOWN"), MRImageStorage),
    ],
)
def test_images_are_named_by_what_is_left_of_their_identifiers(tmp_path, edit, class_uid):
    slices = written(tmp_path / "s", edit)
    _, file, masks = segmented(tmp_path / "s")
    seg = hd.seg.segread(file)
    uids = [slice_.file_meta.MediaStorageSOPInstanceUID for slice_ in slices]
    got = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(got.transpose(3, 2, 1, 0), masks)
    for image in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence:
        assert image.ReferencedSOPClassUID == class_uid


@pytest.mark.parametrize(
    "edit",
    [
        drop("SOPInstanceUID"),
        put(SOPInstanceUID="ANONYMIZED"),
        put(SOPInstanceUID="1.2.3"),  # the same for all
    ],
)
def test_images_without_identifiers_are_not_named_and_masks_lie_in_their_place(tmp_path, edit):
    slices = written(
        tmp_path / "s", edit, lambda s: s.file_meta.pop("MediaStorageSOPInstanceUID", 0)
    )
    sources, file, masks = segmented(tmp_path / "s")
    assert "names none of them" in sources.said[-1]
    seg = hd.seg.segread(file)
    require_valid(seg)
    assert "ReferencedSeriesSequence" not in seg
    require_in_place(file, slices, masks)
    volume = seg.get_volume(segment_numbers=[1], allow_missing_positions=True)
    assert volume.array.sum() == masks[0].sum()


@pytest.mark.parametrize("value", [None, "", "0", "thin"])
def test_without_a_thickness_the_slices_are_as_thick_as_they_lie_apart(tmp_path, value):
    edit = drop("SliceThickness") if value is None else as_vr("SliceThickness", "LO", value)
    slices = written(tmp_path / "s", edit)
    sources, file, masks = segmented(tmp_path / "s")
    assert sources.said == (
        "SliceThickness is missing or not valid, so the slices' distance is it",
    )
    measures = pydicom.dcmread(file).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert float(measures.SliceThickness) == pytest.approx(3.5)
    require_in_place(file, slices, masks)


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        ("ISO_IR 100", "Müller^Jürgen"),
        ("ISO_IR 192", "Łukasz^Żak"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
    ],
)
def test_a_name_in_any_alphabet_stays_itself(tmp_path, character_set, name):
    written(tmp_path / "s", put(SpecificCharacterSet=character_set, PatientName=name))
    sources, file, _ = segmented(tmp_path / "s")
    assert sources.said == ()
    assert str(pydicom.dcmread(file).PatientName) == name


@pytest.mark.parametrize("character_set", ["ISO_IR 999", "latin1", "", None])
def test_an_unknown_character_set_is_no_reason_to_stop(tmp_path, character_set):
    folder = tmp_path / "s"
    written(folder, put(SpecificCharacterSet="ISO_IR 100", PatientName="Mueller^J"))
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        if character_set is None:
            del dataset.SpecificCharacterSet
        else:
            dataset.SpecificCharacterSet = character_set
        dataset.save_as(file)
        file.write_bytes(file.read_bytes().replace(b"Mueller^J", b"M\xfcller^JJ"))
    _, written_file, _ = segmented(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        name = str(hd.seg.segread(written_file).PatientName)
    assert name in ("Müller^JJ", "")


@pytest.mark.parametrize(
    ("keyword", "code"),
    [("PatientID", "several-patients"), ("StudyInstanceUID", "several-studies")],
)
def test_one_series_of_several_patients_is_refused(tmp_path, keyword, code):
    def each(slice_: Dataset) -> None:
        setattr(slice_, keyword, f"1.2.{slice_.InstanceNumber}")

    written(tmp_path / "s", each)
    with pytest.raises(SiteDataError, match="own") as error:
        segmented(tmp_path / "s")
    assert error.value.code == code


def test_nothing_of_a_patient_reaches_a_log(tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    written(tmp_path / "s", put(PatientName="Mustermann", PatientBirthDate="3. Mai 1950"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        segmented(tmp_path / "s")
    told = [caplog.text, *map(str, caught), *capsys.readouterr()]
    assert not any(word in text for text in told for word in ("Mustermann", "1950"))


def test_a_plain_series_has_nothing_to_be_said(tmp_path):
    slices = series("plain", grid("sagittal", SHAPE), stored_values(3, SHAPE))
    write_series(tmp_path / "s", slices)
    sources, file, masks = segmented(tmp_path / "s")
    assert sources.said == ()
    seg = pydicom.dcmread(file)
    for keyword in (
        *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID"),
        *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "FrameOfReferenceUID"),
    ):
        assert seg[keyword].value == slices[0][keyword].value
    assert seg.SeriesNumber == 1004
    require_valid(seg)
    require_in_place(file, slices, masks)
