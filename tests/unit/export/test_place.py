"""An export is there whole or not at all, and takes nobody's place unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedfms.errors import ConfigError
from fedfms.export.place import require_room, whole_or_nothing
from fedfms.export.run import export_model


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model.onnx", "bundle"])
def test_what_is_there_stays(tmp_path, name):
    (tmp_path / name).write_text("mine")
    format = {"pth": "sam", "safetensors": "fedfms", "onnx": "onnx", "bundle": "bundle"}
    with pytest.raises(ConfigError, match="is there already") as error:
        # refused before the model, which does not exist, is looked for
        export_model(tmp_path / "nowhere", tmp_path / name, format[name.rpartition(".")[2]])
    assert "--overwrite" in error.value.fix
    assert (tmp_path / name).read_text() == "mine"


def test_the_note_beside_a_sam_file_counts_too(tmp_path, results):
    (tmp_path / "model.pth.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"model\.pth\.md is there already"):
        export_model(results(method="fedsam"), tmp_path / "model.pth", "sam")
    export_model(results("again", method="fedsam"), tmp_path / "model.pth", "sam", overwrite=True)
    assert (tmp_path / "model.pth.md").read_text().startswith("# model.pth")


def test_overwrite_replaces_an_earlier_export_wholly(tmp_path, results):
    source = results()
    export_model(source, tmp_path / "bundle", "bundle")
    (tmp_path / "bundle" / "models" / "left-over").write_text("old")
    before = tree(tmp_path)
    export_model(source, tmp_path / "bundle", "bundle", overwrite=True)
    assert before - tree(tmp_path) == {"bundle/models/left-over"}
    assert tree(tmp_path) < before


def test_overwrite_removes_nothing_but_exports(tmp_path, results):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("mine")
    with pytest.raises(ConfigError, match="does not replace it"):
        export_model(results(), tmp_path / "photos", "bundle", overwrite=True)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ConfigError, match="not a plain file"):
        export_model(results("again"), tmp_path / "folder.onnx", "onnx", overwrite=True)
    assert (tmp_path / "photos" / "one.jpg").read_text() == "mine"
    (tmp_path / "linked.pth").symlink_to(tmp_path / "photos" / "one.jpg")
    with pytest.raises(ConfigError, match="does not replace it"):
        export_model(results("third"), tmp_path / "linked.pth", "sam", overwrite=True)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_leaves_the_old_export_and_nothing_half_written(tmp_path, failure):
    output = tmp_path / "model.onnx"
    output.write_text("old")
    expected = ConfigError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as error, whole_or_nothing(output, folder=False) as part:
        (part / "model.onnx").write_text("half")
        raise failure
    if expected is ConfigError:
        assert "No space left" in error.value.problem
        assert "df -h" in error.value.fix
    assert tree(tmp_path) == {"model.onnx"}
    assert output.read_text() == "old"


def test_a_folder_takes_its_place_whatever_its_name_and_comes_back_when_that_fails(tmp_path):
    output = tmp_path / "LICENSE"  # also the name of a file in it
    for text in ("first", "second"):
        with whole_or_nothing(output, folder=True) as part:
            (part / "LICENSE").write_text(text)
        assert tree(tmp_path) == {"LICENSE", "LICENSE/LICENSE"}
    with pytest.raises(ConfigError), whole_or_nothing(output, folder=True) as part:
        part.rename(tmp_path / "taken-away")  # so that it cannot be renamed to its place
    assert (output / "LICENSE").read_text() == "second"
    assert tree(tmp_path) == {"LICENSE", "LICENSE/LICENSE", "taken-away"}


def test_a_place_that_cannot_be_written_is_named(tmp_path, results):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="cannot be written"):
        export_model(results(), tmp_path / "file" / "model.safetensors", "fedfms")


def test_too_little_room_is_said_before_anything_is_written(tmp_path):
    require_room(tmp_path / "new" / "model.pth", 1)
    with pytest.raises(ConfigError, match="the export needs 1000000") as error:
        require_room(tmp_path / "new" / "model.pth", 10**15)
    assert "another disk" in error.value.fix
    assert tree(tmp_path) == set()
