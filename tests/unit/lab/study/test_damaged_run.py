"""A run whose files were damaged, before `fedfms verify`."""

from __future__ import annotations

import pytest
from run_writer import StudyFolder

from fedfms_lab.study.verify import verify_run


@pytest.mark.parametrize(
    "manifest",
    [None, "site,colour\na,b\n", "site,colour\n", "", "\0\xff"],
    ids=["missing", "other", "no-row", "empty", "nonsense"],
)
def test_files_that_cannot_be_read_are_problems_of_their_check_and_the_others_go_on(
    tmp_path, manifest
):
    study = StudyFolder(
        methods=("fedsam",), regimes=("central",), holdouts=(None,), seeds=(0,), rounds=2, cases=3
    )
    (run,) = (study.write(tmp_path / "study") / "runs").iterdir()
    if manifest is not None:
        (run / "manifest.csv").write_text(manifest, encoding="latin1")
    checks = {check.what: check.problems for check in verify_run(run, [])}
    (data,) = [problems for name, problems in checks.items() if "images, labels" in name]
    assert len(data) == 1
    assert "cannot be used" in data[0]
    assert checks["run.json as it was written"] == ()
