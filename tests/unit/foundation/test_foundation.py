"""Values, errors, files and randomness."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from wanlora.foundation.errors import ConfigError, DataError, Problems, UserError, did_you_mean, few
from wanlora.foundation.files import atomic_path, fingerprint, is_portable_name, write_json
from wanlora.foundation.random import Streams
from wanlora.foundation.ranks import Rank
from wanlora.foundation.registry import Registry
from wanlora.foundation.shapes import LatentShape, PixelShape, floor_to_latent_frames


def test_problems_are_raised_together_and_once_each() -> None:
    problems = Problems()
    problems.add("first")
    problems.add("first")
    with problems.collect():
        raise DataError("second")
    with pytest.raises(ConfigError, match=r"2 problems:\n  1\. first\n  2\. second"):
        problems.raise_all()


def test_no_problem_raises_nothing() -> None:
    Problems().raise_all()


def test_collect_lets_faults_of_the_program_pass() -> None:
    with pytest.raises(ZeroDivisionError), Problems().collect():
        _ = 1 / 0


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    assert did_you_mean("target_frame", ["target_frames", "resolution"]) == " (did you mean 'target_frames'?)"
    assert did_you_mean("zzz", ["target_frames"]) == ""


def test_a_long_list_of_names_is_cut() -> None:
    assert few(["a", "b"]) == "a, b"
    assert few(["a", "b", "c"], shown=2) == "a, b, …"


@pytest.mark.parametrize(("frames", "kept"), [(1, 1), (4, 1), (5, 5), (45, 45), (48, 45), (81, 81)])
def test_frames_are_floored_to_whole_latent_frames(frames: int, kept: int) -> None:
    assert floor_to_latent_frames(frames) == kept


def test_latent_shapes_and_pixels_are_inverse() -> None:
    pixels = PixelShape(768, 416, 21)
    latent = LatentShape.of(pixels)
    assert latent == LatentShape(6, 52, 96)
    assert latent.num_tokens == 7488
    assert latent.pixels() == pixels


def test_streams_are_functions_of_seed_name_and_position() -> None:
    streams = Streams(2025)
    first = torch.rand(4, generator=streams.generator("noise", 3, 17))
    assert torch.equal(first, torch.rand(4, generator=Streams(2025).generator("noise", 3, 17)))
    others = [streams.seed("noise", 17, 3), streams.seed("order", 3, 17), Streams(2026).seed("noise", 3, 17)]
    assert streams.seed("noise", 3, 17) not in others


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_as_open_to_others_as_any_new_file(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    with atomic_path(tmp_path / "ours") as temporary:
        temporary.write_text("whole")
        temporary.chmod(0o600)  # as the writer of safetensors leaves its files
    assert (tmp_path / "ours").stat().st_mode == usual.stat().st_mode


def test_a_fingerprint_sees_a_change_at_either_end(tmp_path: Path) -> None:
    path = tmp_path / "clip.bin"
    content = bytearray(3 << 20)
    path.write_bytes(content)
    before = fingerprint(path).digest
    content[-1] = 1
    path.write_bytes(content)
    assert fingerprint(path).digest != before
    assert fingerprint(path).size == 3 << 20


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("a_0384x0208_wan.safetensors", True),
        ("a:b.txt", False),
        ("nul.txt", False),
        ("COM1", False),
        ("x.", False),
        ("", False),
    ],
)
def test_names_are_checked_for_windows(name: str, legal: bool) -> None:
    assert is_portable_name(name) is legal


def test_a_registry_answers_an_unknown_name_with_the_nearest() -> None:
    registry: Registry[int] = Registry("sampler")
    registry.register("shift", "moved")(3)
    assert registry.get("moved") == 3
    with pytest.raises(UserError, match="did you mean 'shift'"):
        registry.get("shiftt")


def test_ranks_share_work_without_gaps() -> None:
    assert [list(Rank(index, 2).share([1, 2, 3])) for index in range(2)] == [[1, 3], [2]]


def test_lists_of_problems_become_one_list() -> None:
    inner, outer = Problems(), Problems()
    inner.add("first")
    inner.add("second")
    outer.add("zeroth")
    with outer.collect():
        inner.raise_all(DataError)
    with pytest.raises(ConfigError) as caught:
        outer.raise_all(ConfigError)
    assert caught.value.parts == ("zeroth", "first", "second")
    assert str(pickle.loads(pickle.dumps(caught.value))) == "3 problems:\n  1. zeroth\n  2. first\n  3. second"
