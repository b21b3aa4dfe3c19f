"""The template explains every variable of site.yml, with its true default."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from fedfms.contracts.policy import Policy
from fedfms.contracts.site import SiteConfig
from fedfms.provisioning.render import TEMPLATES

TEMPLATE = TEMPLATES / "site"
TEXT = (TEMPLATE / "site.yml").read_text()
FIELDS = {
    field.name: field
    for field in dataclasses.fields(SiteConfig)
    if field.metadata.get("in_file", True)
}


def test_every_variable_is_explained_and_no_other():
    keys = set(re.findall(r"^(?:# )?([a-z_]+):(?: |$)", TEXT, re.MULTILINE))
    kinds = {"nifti", "image", "npy", "dicom", "gray", "rgb", "neighbours"}  # explained values
    assert keys - kinds == set(FIELDS)


@pytest.mark.parametrize(
    "name",
    [
        "background",
        "missing_contrast",
        "overlap",
        "unlabelled",
        "plane",
        "channels",
        "keep_empty_every",
        "validation_fraction",
        "validation_seed",
        "device",
        "features_gib",
        "min_cases",
        "stall_seconds",
    ],
)
def test_what_stands_in_a_comment_is_the_default(name):
    line = re.search(rf"^# ({name}: .*)$", TEXT, re.MULTILINE).group(1)
    default = FIELDS[name].default
    assert yaml.safe_load(line)[name] == (list(default) if isinstance(default, tuple) else default)


def test_globs_stand_in_quotes_wherever_people_copy_them_from():
    repository = Path(__file__).parents[3]
    files = [TEMPLATE / "site.yml", *(repository / "sites").rglob("site.yml")]
    assert len(files) > 8
    for file in files:
        lines = re.findall(r"^(?:images|labels): .*$", file.read_text(), re.MULTILINE)
        assert len(lines) == 2
        assert all(re.fullmatch(r'\w+: "[^"]+"', line) for line in lines), file


def test_the_intensity_in_a_comment_is_the_default():
    lines = re.search(r"^# intensity:\n(?:#   \w.*\n)+", TEXT, re.MULTILINE).group()
    stated = yaml.safe_load(re.sub("^# ", "", lines, flags=re.MULTILINE))["intensity"]
    intensity = FIELDS["intensity"].default_factory()
    assert (stated["rule"], (stated["low"], stated["high"])) == (intensity.rule, intensity.bounds)


def test_the_template_can_be_read_as_it_is(tmp_path):
    with_data = SiteConfig.from_yaml(TEMPLATE / "site.yml", data_root=tmp_path)
    assert with_data.data_root == tmp_path
    assert not Policy.from_folder(TEMPLATE / "policy").pictures
