from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedfms.contracts.recipe import BACKBONES
from fedfms.errors import CheckpointError
from fedfms.files import file_sha256
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint, load_checkpoint
from fedfms.models.upstream import ImageEncoderViT
from rounding import assert_as_right, exactly


@pytest.fixture
def demo_state(make_recipe) -> dict[str, torch.Tensor]:
    """A state dict in SAM's own layout, of vit_demo's sizes, with random weights."""
    model = build_model(make_recipe(method="fedsam", seed=5), None)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def upstream_vit_b(tmp_path_factory):
    """A checkpoint as segment_anything itself would write it."""
    from segment_anything.build_sam import build_sam_vit_b

    torch.manual_seed(1)
    sam = build_sam_vit_b()
    for name, tensor in sam.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            nn.init.normal_(tensor, std=0.2)
    path = tmp_path_factory.mktemp("checkpoints") / "from_upstream.pth"
    torch.save(sam.state_dict(), path)
    return path, sam


def test_upstreams_state_dict_loads_strictly(make_recipe, upstream_vit_b):
    path, sam = upstream_vit_b
    model = build_model(make_recipe("vit_b", image_size=1024, method="fedsam"), path)
    assert model.state_dict().keys() == sam.state_dict().keys()
    for name, tensor in sam.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_tables_of_another_input_size_are_resampled_as_upstream_does(make_recipe, upstream_vit_b):
    """Upstream interpolates relative positions while it runs; absolute ones it cannot."""
    path, sam = upstream_vit_b
    model = build_model(make_recipe("vit_b", image_size=256), path)
    encoder: ImageEncoderViT = sam.image_encoder
    grown = encoder.pos_embed
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        try:
            encoder.pos_embed = nn.Parameter(model.image_encoder.pos_embed.clone())
            expected, exact = encoder(images), exactly(encoder, images)
        finally:
            encoder.pos_embed = grown
        assert_as_right(model.image_encoder(images), expected, exact)
    window_table = model.image_encoder.blocks[0].attn.rel_pos_h
    assert torch.equal(window_table, encoder.blocks[0].attn.rel_pos_h), "windows stay as they are"


def test_resampled_absolute_positions_keep_their_place(make_recipe, demo_state, tmp_path):
    """A table that rises along the rows still does, by the same amount from edge to edge."""
    ramp = torch.linspace(0, 1, 16).view(1, 16, 1, 1).expand(1, 16, 16, 96)
    demo_state["image_encoder.pos_embed"] = ramp.contiguous()
    save_file(demo_state, tmp_path / "ramp.safetensors")
    model = build_model(make_recipe(image_size=256), tmp_path / "ramp.safetensors")
    table = model.image_encoder.pos_embed.detach()
    expected = ((torch.arange(32) + 0.5) / 2 - 0.5) / 15  # centres of 32 cells in steps of 16
    inner = slice(4, 28)  # bicubic weights reach two cells beyond the edge
    assert torch.allclose(table[0, inner, 7, 0], expected[inner], atol=1e-3)
    assert torch.allclose(table[0, :, 0], table[0, :, 31], atol=1e-6)


def test_resampled_absolute_positions_are_interpolated_bicubically(
    make_recipe, demo_state, tmp_path
):
    """A parabola along the rows stays one; linear interpolation would cut its curve short."""
    rows = torch.arange(16.0)
    parabola = (rows**2).view(1, 16, 1, 1).expand(1, 16, 16, 96)
    demo_state["image_encoder.pos_embed"] = parabola.contiguous()
    save_file(demo_state, tmp_path / "parabola.safetensors")
    model = build_model(make_recipe(image_size=256), tmp_path / "parabola.safetensors")
    table = model.image_encoder.pos_embed.detach()[0, :, 7, 0]
    # Keys' kernel with a = -0.5 (1981) gives a quadratic back exactly
    expected = ((torch.arange(32) + 0.5) / 2 - 0.5) ** 2
    inner = slice(4, 28)
    torch.testing.assert_close(table[inner], expected[inner], atol=1e-3, rtol=0)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_one_renamed_key_is_refused_by_name(make_recipe, demo_state, tmp_path, suffix):
    demo_state["image_encoder.neck.0.wieght"] = demo_state.pop("image_encoder.neck.0.weight")
    path = tmp_path / f"renamed.{suffix}"
    (torch.save if suffix == "pth" else save_file)(demo_state, path)
    with pytest.raises(CheckpointError, match=r"image_encoder\.neck\.0\.weight") as refused:
        build_model(make_recipe(), path)
    assert refused.value.code == "checkpoint-keys"


def test_one_key_too_many_is_refused_by_name(make_recipe, demo_state, tmp_path):
    demo_state["image_encoder.extra"] = torch.zeros(1)
    save_file(demo_state, tmp_path / "extra.safetensors")
    with pytest.raises(CheckpointError, match=r"image_encoder\.extra"):
        build_model(make_recipe(), tmp_path / "extra.safetensors")


def test_a_checkpoint_of_another_backbone_is_refused(make_recipe, demo_state, tmp_path):
    demo_state["mask_decoder.mask_tokens.weight"] = torch.zeros(4, 32)
    save_file(demo_state, tmp_path / "narrow.safetensors")
    with pytest.raises(CheckpointError, match=r"mask_tokens.*\(4, 32\).*\(4, 64\)") as refused:
        build_model(make_recipe(), tmp_path / "narrow.safetensors")
    assert refused.value.code == "checkpoint-shape"


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_file_is_named_with_its_fix(demo_state, tmp_path, suffix, content):
    path = tmp_path / f"damaged.{suffix}"
    if content is None:  # cut off in the middle
        (torch.save if suffix == "pth" else save_file)(demo_state, path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged.*\n  fix: copy or download") as refused:
        load_checkpoint(path)
    assert refused.value.code == "damaged-checkpoint"


def test_a_training_checkpoint_is_no_state_dict(demo_state, tmp_path):
    torch.save({"model": demo_state, "epoch": 3}, tmp_path / "training.pth")
    with pytest.raises(CheckpointError, match="use the state dict itself"):
        load_checkpoint(tmp_path / "training.pth")


@pytest.mark.parametrize(
    ("also", "what"),
    [
        ({"epoch": np.float64(3)}, "multiarray.scalar"),
        ({"net": torch.nn.ReLU()}, "activation.ReLU"),
    ],
)
def test_what_is_no_tensor_is_named_in_one_plain_sentence(demo_state, tmp_path, also, what):
    torch.save({**demo_state, **also}, tmp_path / "training.pth")
    with pytest.raises(CheckpointError, match="tensors only") as refused:
        load_checkpoint(tmp_path / "training.pth")
    assert what in refused.value.problem
    assert refused.value.problem.isprintable() and len(refused.value.problem) < 250


@pytest.mark.parametrize("content", [b"\x80\x02}q", b"junk" * 100, b"PK\x03\x04junk"])
def test_whatever_torch_says_of_a_damaged_file_is_one_sentence(tmp_path, content):
    (tmp_path / "damaged.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="copy or download") as refused:
        load_checkpoint(tmp_path / "damaged.pth")
    assert refused.value.problem.isprintable() and ". " not in refused.value.problem


class RunsCode:
    def __reduce__(self):
        return (print, ("a checkpoint ran code",))


def test_a_pth_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"image_encoder.pos_embed": RunsCode()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="tensors only"):
        load_checkpoint(tmp_path / "evil.pth")
    assert capsys.readouterr().out == ""


def test_a_missing_checkpoint_says_where_to_get_it_and_where_to_put_it(make_recipe, tmp_path):
    with pytest.raises(CheckpointError) as missing:
        find_checkpoint(make_recipe("vit_b", image_size=1024), tmp_path)
    assert missing.value.code == "missing-checkpoint"
    assert "dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth" in missing.value.fix
    assert str(tmp_path / "sam_vit_b_01ec64.pth") in missing.value.fix
    with pytest.raises(CheckpointError, match="FEDFMS_CHECKPOINTS"):
        find_checkpoint(make_recipe("vit_b", image_size=1024), None)


def test_a_file_with_another_hash_is_refused(make_recipe, tmp_path):
    (tmp_path / "sam_vit_b_01ec64.pth").write_bytes(b"another model")
    with pytest.raises(
        CheckpointError, match=hashlib.sha256(b"another model").hexdigest()
    ) as wrong:
        find_checkpoint(make_recipe("vit_b", image_size=1024), tmp_path)
    assert wrong.value.code == "wrong-checkpoint"
    assert BACKBONES["vit_b"].sha256 in wrong.value.problem


@pytest.mark.parametrize("backbone", ["vit_b", "vit_demo"])
def test_a_checkpoint_is_found_by_its_hash_under_any_name(make_recipe, tmp_path, backbone):
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    (tmp_path / "a.pth").write_bytes(b"another model")
    ours = tmp_path / "ours.safetensors"
    ours.write_bytes(b"the model that is meant")
    recipe = make_recipe(backbone, backbone_sha256=file_sha256(ours))
    assert find_checkpoint(recipe, tmp_path) == ours


@pytest.mark.parametrize("name", ["sam_vit_b.pt", "SAM.PTH", "sam.SafeTensors"])
def test_every_ending_that_can_be_loaded_is_looked_at(make_recipe, demo_state, tmp_path, name):
    path = tmp_path / name
    (save_file if name.endswith("Tensors") else torch.save)(demo_state, path)
    recipe = make_recipe("vit_b", image_size=1024, backbone_sha256=file_sha256(path))
    assert find_checkpoint(recipe, tmp_path) == path
    assert load_checkpoint(path).keys() == demo_state.keys()
    with pytest.raises(CheckpointError, match=name):  # what lies there is another
        find_checkpoint(make_recipe("vit_b", image_size=1024), tmp_path)


def test_demo_checkpoint_comes_with_the_package(make_recipe):
    path = find_checkpoint(make_recipe(), None)
    assert path.stat().st_size < 5_000_000
    model = build_model(make_recipe(), path)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("torchvision", ["missing", "unfit", "present"])
def test_upstream_is_importable_whatever_torchvision_does(tmp_path, torchvision):
    """Run in a fresh interpreter, since an import happens once."""
    package = tmp_path / "torchvision"
    package.mkdir()
    raises = {
        "missing": "raise ModuleNotFoundError('no torchvision')",
        "unfit": "raise RuntimeError('operator torchvision::nms does not exist')",
        "present": "",
    }[torchvision]
    (package / "__init__.py").write_text(raises)
    (package / "ops").mkdir()
    (package / "ops" / "__init__.py").write_text("")
    (package / "ops" / "boxes.py").write_text("batched_nms = box_area = None")
    (package / "transforms").mkdir()
    (package / "transforms" / "__init__.py").write_text("")
    (package / "transforms" / "functional.py").write_text("resize = to_pil_image = None")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import fedfms.models.upstream, segment_anything\n"
        "print(hasattr(segment_anything, 'SamPredictor'))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(torchvision == "present")
