"""Names, contents and freshness of cache files."""

import os
from pathlib import Path, PureWindowsPath

import pytest
import torch
from safetensors.torch import save_file

from wanlora.data.cache_files import (
    LatentName,
    LatentStamp,
    latent_is_fresh,
    source_fingerprint,
    text_is_fresh,
    text_name,
)
from wanlora.data.cache_tensors import read_latents, read_text, write_latents, write_text
from wanlora.data.sources import cache_stem
from wanlora.data.windows import Window
from wanlora.foundation.errors import DataError
from wanlora.foundation.files import is_portable_name
from wanlora.foundation.shapes import PixelShape
from wanlora.foundation.tensor_files import open_tensors

CLIP = LatentStamp(
    pixels=PixelShape(384, 208, 45),
    original=(1920, 1040),
    window=Window(0, 45),
    vae="v1",
    vae_dtype="float32",
    dtype="bfloat16",
)
PICTURE = LatentStamp(
    pixels=PixelShape(768, 416), original=(1920, 1040), vae="v1", vae_dtype="float32", dtype="bfloat16"
)


def latents(stamp: LatentStamp) -> torch.Tensor:
    shape = stamp.latents
    return torch.randn(16, shape.frames, shape.height, shape.width, dtype=torch.bfloat16)


def changed(stamp: LatentStamp, **fields: object) -> LatentStamp:
    values = {name: getattr(stamp, name) for name in stamp.__dataclass_fields__}
    return LatentStamp(**{**values, **fields})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "0001.mp4"
    path.write_bytes(b"a clip")
    return path


@pytest.fixture
def cached(tmp_path: Path, source: Path) -> Path:
    path = tmp_path / "0001_00000-045_0384x0208_wan.safetensors"
    write_latents(path, latents(CLIP), CLIP, source_fingerprint(source))
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (LatentName("0001", (384, 208), Window(0, 45)), "0001_00000-045_0384x0208_wan.safetensors"),
        (LatentName("a_b", (1920, 1040)), "a_b_1920x1040_wan.safetensors"),
        (LatentName("x_00001-002", (64, 48), Window(12, 5)), "x_00001-002_00012-005_0064x0048_wan.safetensors"),
        (LatentName("x_0064x0048", (64, 48)), "x_0064x0048_0064x0048_wan.safetensors"),
        (LatentName("x", (64, 48), Window(123456, 1001)), "x_123456-1001_0064x0048_wan.safetensors"),
    ],
)
def test_names_are_those_of_existing_caches_and_read_back(name: LatentName, text: str) -> None:
    assert str(name) == text
    assert LatentName.parse(text) == name
    assert is_portable_name(text)


@pytest.mark.parametrize("name", ["a_wan_te.safetensors", "a_wan.safetensors", "a_0064x0048_hv.safetensors", "a.png"])
def test_other_names_are_no_latent_caches(name: str) -> None:
    assert LatentName.parse(name) is None


@pytest.mark.parametrize("path", [r"H:\sets\style\0001.v2.mp4", "H:/sets/style/0001.v2.mp4", r"\\nas\sets\0001.v2.mp4"])
def test_windows_paths_give_the_same_names(path: str) -> None:
    stem = cache_stem(PureWindowsPath(path))
    assert stem == "0001.v2"
    assert text_name(stem) == "0001.v2_wan_te.safetensors"
    assert str(LatentName(stem, (64, 48))) == "0001.v2_0064x0048_wan.safetensors"


def test_a_reserved_windows_name_becomes_legal_with_our_suffix() -> None:
    assert is_portable_name(text_name("con"))


def test_latents_come_back_under_the_known_key_and_metadata(cached: Path) -> None:
    assert read_latents(cached).shape == (16, 12, 26, 48)
    with open_tensors(cached) as file:
        assert file.names == ("latents_12x26x48_bfloat16",)
        known = {key: value for key, value in file.metadata.items() if not key.startswith("wanlora_")}
    assert known == {
        "architecture": "wan",
        "format_version": "1.0.1",
        "width": "384",
        "height": "208",
        "frame_count": "45",
    }


def test_a_pictures_metadata_hold_its_original_size(tmp_path: Path, source: Path) -> None:
    write_latents(tmp_path / "p.safetensors", latents(PICTURE), PICTURE, source_fingerprint(source))
    with open_tensors(tmp_path / "p.safetensors") as file:
        assert (file.metadata["width"], file.metadata["height"]) == ("1920", "1040")
        assert "frame_count" not in file.metadata


def test_text_comes_back_at_its_length(tmp_path: Path) -> None:
    path = tmp_path / text_name("0001")
    text_TD = torch.randn(7, 16, dtype=torch.bfloat16)
    write_text(path, text_TD, caption="Ein Büro", t5="umt5")
    assert torch.equal(read_text(path), text_TD)
    with open_tensors(path) as file:
        assert file.names == ("varlen_t5_bfloat16",)
        assert file.metadata["caption1"] == "Ein Büro"


def test_an_unchanged_cache_is_fresh(cached: Path, source: Path) -> None:
    assert latent_is_fresh(cached, CLIP, source) is None


def test_a_copied_source_is_fresh_and_an_edited_one_is_not(cached: Path, source: Path) -> None:
    os.utime(source, ns=(1, 1))
    assert latent_is_fresh(cached, CLIP, source) is None
    source.write_bytes(b"b clip")
    assert latent_is_fresh(cached, CLIP, source) == "is older than 0001.mp4, which has changed"


def test_a_missing_cache_says_so(tmp_path: Path) -> None:
    assert latent_is_fresh(tmp_path / "none.safetensors", CLIP) == "is missing"
    assert text_is_fresh(tmp_path / "none.safetensors") == "is missing"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"pixels": PixelShape(512, 288, 45)}, "was cached for 384x208, the dataset now asks for 512x288"),
        ({"pixels": PixelShape(384, 208, 21)}, "was cached for 384x208 and 45 frames"),
        ({"vae": "v2"}, "was made with another VAE"),
        ({"vae_dtype": "bfloat16"}, "was made with another --vae_dtype"),
        ({"dtype": "float16"}, "is stored as bfloat16, not float16"),
        ({"resampling": "30 to 16 fps"}, "holds frames chosen by another frame rate"),
    ],
)
def test_a_stale_cache_says_why(cached: Path, fields: dict[str, object], reason: str) -> None:
    found = latent_is_fresh(cached, changed(CLIP, **fields))
    assert found is not None and found.startswith(reason)
    assert latent_is_fresh(cached, changed(CLIP, vae=None, vae_dtype=None, dtype=None, resampling=None)) is None


def test_a_cut_off_cache_is_stale_and_reading_it_names_it(cached: Path) -> None:
    cached.write_bytes(cached.read_bytes()[:-100])
    found = latent_is_fresh(cached, CLIP)
    assert found is not None and found.startswith("cannot be read")
    with pytest.raises(DataError, match="0001_00000-045"):
        read_latents(cached)


def musubi_cache(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata={"architecture": "wan", "format_version": "1.0.1", **metadata})
    return path


def test_a_musubi_cache_is_read_and_fresh_when_its_shape_fits(tmp_path: Path, source: Path) -> None:
    tensors = {
        "latents_12x26x48_bfloat16": latents(CLIP),
        "latents_image_12x26x48_bfloat16": torch.zeros(20, 12, 26, 48),
        "clip_bfloat16": torch.zeros(257, 8, dtype=torch.float16),
    }
    path = musubi_cache(tmp_path / "a_wan.safetensors", tensors, width="384", height="208", frame_count="45")
    assert torch.equal(read_latents(path), tensors["latents_12x26x48_bfloat16"])
    assert latent_is_fresh(path, CLIP, source) is None
    assert latent_is_fresh(path, changed(CLIP, pixels=PixelShape(512, 288, 45)), source) is not None


def test_a_musubi_text_cache_is_read_and_compared_by_its_caption(tmp_path: Path) -> None:
    path = musubi_cache(tmp_path / "a_wan_te.safetensors", {"varlen_t5_bfloat16": torch.ones(5, 8)}, caption1="a cat ")
    assert read_text(path).shape == (5, 8)
    assert text_is_fresh(path, caption="a cat", t5="umt5") is None
    assert text_is_fresh(path, caption="a dog") == "belongs to another caption than the one that stands there now"


def test_a_text_cache_of_another_encoder_is_stale(tmp_path: Path) -> None:
    write_text(tmp_path / "a.safetensors", torch.ones(5, 8), caption="x", t5="umt5 bf16")
    assert text_is_fresh(tmp_path / "a.safetensors", caption="x", t5="umt5 fp8") == "was made with another text encoder"


def test_a_cache_of_another_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a_wan.safetensors"
    save_file({"latents_12x26x48_bfloat16": latents(CLIP)}, path, metadata={"architecture": "hunyuan_video"})
    assert latent_is_fresh(path, CLIP) == "belongs to another model (hunyuan_video)"


def test_a_file_without_latents_is_stale(tmp_path: Path) -> None:
    path = musubi_cache(tmp_path / "a_wan.safetensors", {"other": torch.ones(1)})
    assert "holds no latents" in str(latent_is_fresh(path, CLIP))
    assert "holds no text" in str(text_is_fresh(path))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_and_named(tmp_path: Path, source: Path, bad: float) -> None:
    broken = latents(CLIP)
    broken[0, 0, 0, 0] = bad
    with pytest.raises(DataError, match="not finite"):
        write_latents(tmp_path / "a_wan.safetensors", broken, CLIP, source_fingerprint(source))
    assert not (tmp_path / "a_wan.safetensors").exists()
    musubi_cache(tmp_path / "b_wan.safetensors", {"latents_12x26x48_bfloat16": broken})
    with pytest.raises(DataError, match=r"b_wan\.safetensors holds values that are not finite"):
        read_latents(tmp_path / "b_wan.safetensors")
    with pytest.raises(DataError, match="not finite"):
        write_text(tmp_path / "t.safetensors", torch.full((2, 2), bad), caption="x", t5="t5")


def test_latents_of_another_shape_are_not_written(tmp_path: Path, source: Path) -> None:
    with pytest.raises(DataError, match="do not fit"):
        write_latents(tmp_path / "a.safetensors", latents(PICTURE), CLIP, source_fingerprint(source))


def test_a_folder_of_frames_has_a_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    (folder / "1.png").write_bytes(b"one")
    before = source_fingerprint(folder)
    assert before == source_fingerprint(folder)
    (folder / "2.png").write_bytes(b"two")
    assert source_fingerprint(folder).digest != before.digest
