import inspect

import pytest

from fedfms import errors
from fedfms.errors import FedfmsError

KINDS = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, FedfmsError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_shows_its_problem_and_its_fix(kind):
    error = kind("3 cases have no label", "add the labels, then run: fedfms check-data")
    assert str(error) == "3 cases have no label\n  fix: add the labels, then run: fedfms check-data"
    assert (error.problem, error.fix) == (
        "3 cases have no label",
        "add the labels, then run: fedfms check-data",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_error_can_be_made_without_a_fix(kind):
    with pytest.raises(TypeError):
        kind("something is wrong")


@pytest.mark.parametrize("kind", KINDS)
def test_what_crosses_to_others_names_no_file_and_no_patient(kind):
    error = kind(
        "/data/patients/MUELLER_1955.nii.gz is truncated",
        "copy MUELLER_1955.nii.gz again",
        code="truncated-file",
    )
    assert "MUELLER" not in error.public and "/data" not in error.public
    assert kind.__name__ in error.public and "truncated-file" in error.public


def test_codes_are_stable_words_and_differ_between_kinds():
    codes = [kind("problem", "fix").code for kind in KINDS]
    assert len(set(codes)) == len(codes)
    assert all(code.replace("-", "").isalpha() and code.islower() for code in codes)


def test_a_code_of_its_own_goes_before_the_kinds_code():
    assert errors.SiteDataError("problem", "fix").code == "site-data"
    assert errors.SiteDataError("problem", "fix", code="unpaired-files").code == "unpaired-files"
