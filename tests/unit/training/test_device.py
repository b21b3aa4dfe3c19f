from __future__ import annotations

import pytest
import torch
from little import little_recipe, little_site

from fedfms.errors import ConfigError
from fedfms.training.device import is_out_of_memory, slices_at_once, torch_device, use_threads


def test_the_processor_where_the_site_says_so_or_has_nothing_else():
    assert torch_device(little_site(device="cpu")) == torch.device("cpu")
    if not torch.cuda.is_available():
        assert torch_device(little_site(device="auto")) == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:99"])
def test_a_site_that_names_a_gpu_never_computes_without_it(device):
    if device == "cuda" and torch.cuda.is_available():
        assert torch_device(little_site(device=device)).type == "cuda"
        return
    with pytest.raises(ConfigError, match=r"in site\.yml|cuda:0 to") as caught:
        torch_device(little_site(device=device))
    assert caught.value.code == "no-gpu"


def test_threads_are_the_sites_matter():
    before = torch.get_num_threads()
    try:
        use_threads(little_site(threads=1))
        assert torch.get_num_threads() == 1
        use_threads(little_site(threads=None))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("image_size", "micro_batch", "device", "expected"),
    [
        (256, None, "cpu", 4),
        (256, 2, "cpu", 2),
        (256, 9, "cpu", 4),  # never more than a batch
        (512, None, "cpu", 4),
        (1024, None, "cpu", 1),
        (1024, 3, "cpu", 3),  # the site has the last word
        (1024, None, "cuda", 4),
    ],
)
def test_how_many_slices_are_in_memory_at_once(image_size, micro_batch, device, expected):
    recipe = little_recipe(image_size=image_size, batch_size=4)
    site = little_site(micro_batch=micro_batch)
    assert slices_at_once(recipe, site, torch.device(device)) == expected


def test_what_running_out_of_memory_looks_like():
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**60, dtype=torch.uint8)  # the CPU allocator's own words
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("not enough memory"))
