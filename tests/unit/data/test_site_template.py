"""The template explains every variable of site.yml, with its true default."""

import dataclasses
import re

import pytest
import yaml

from fedfms.config import Policy, SiteConfig
from fedfms.provisioning.render import TEMPLATES

TEMPLATE = TEMPLATES / "site"
TEXT = (TEMPLATE / "site.yml").read_text()
FIELDS = {field.name: field for field in dataclasses.fields(SiteConfig)}


def test_every_variable_is_explained_and_no_other():
    keys = set(re.findall(r"^(?:# )?([a-z_]+):(?: |$)", TEXT, re.MULTILINE))
    kinds = {"nifti", "image", "npy", "dicom", "gray", "rgb", "neighbours"}  # explained values
    assert keys - kinds == set(FIELDS)


@pytest.mark.parametrize(
    "name",
    [
        "background",
        "overlap",
        "plane",
        "channels",
        "keep_empty_every",
        "validation_fraction",
        "validation_seed",
        "device",
        "workers",
        "min_cases",
        "stall_seconds",
    ],
)
def test_what_stands_in_a_comment_is_the_default(name):
    line = re.search(rf"^# ({name}: .*)$", TEXT, re.MULTILINE).group(1)
    default = FIELDS[name].default
    assert yaml.safe_load(line)[name] == (list(default) if isinstance(default, tuple) else default)


def test_the_intensity_in_a_comment_is_the_default():
    lines = re.search(r"^# intensity:\n(?:#   \w.*\n)+", TEXT, re.MULTILINE).group()
    stated = yaml.safe_load(re.sub("^# ", "", lines, flags=re.MULTILINE))["intensity"]
    intensity = FIELDS["intensity"].default_factory()
    assert (stated["rule"], (stated["low"], stated["high"])) == (intensity.rule, intensity.bounds)


def test_the_template_can_be_read_as_it_is(tmp_path):
    with_data = SiteConfig.from_yaml(TEMPLATE / "site.yml", data_root=tmp_path)
    assert with_data.data_root == tmp_path
    assert not Policy.from_folder(TEMPLATE / "policy").pictures
