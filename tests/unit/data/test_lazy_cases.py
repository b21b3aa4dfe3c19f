"""benchmarks/lazy_cases.py at a small size: memory does not grow with the number of volumes."""

import importlib.util
from pathlib import Path

import pytest

from fedfms.contracts.site import SiteConfig
from fedfms.data.check import check_data
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases

_FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "lazy_cases.py"
_SIZE = (128, 128, 60)


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("lazy_cases", _FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_volumes_are_whole_and_each_another(tmp_path, bench):
    file = bench.write_volumes(tmp_path / "site", 11, (24, 20, 16), 0.3)
    site = SiteConfig.from_yaml(file)
    assert [finding for finding in check_data(site) if finding.severity == "error"] == []
    cases = prepare_cases(find_cases(site), site)
    assert {case.images.shape for case in cases} == {(16, 20, 24)}
    assert len({case.record.digest for case in cases}) == 11


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["train-local", "fedmsa", "--set", "rounds=1", "--set", "local_epochs=1", "--site"],
        ["check-data"],
    ],
)
def test_memory_does_not_grow_with_the_number_of_volumes(tmp_path, bench, command):
    few = bench.write_volumes(tmp_path / "few", 2, _SIZE, 0.5)
    many = bench.write_volumes(tmp_path / "many", 24, _SIZE)
    # looked at every 50 ms, so that of a short run on a busy machine the peak can be missed
    base = max(bench.peak_of([*command, str(few)])[0] for _ in range(2))
    peak, _ = bench.peak_of([*command, str(many)])
    in_memory = 22 * 128 * 128 * 60 * 3  # bytes of what has been added, as grey levels and int16
    assert peak - base < in_memory / 2
