"""Dataset files: what they mean, and what is said of their mistakes."""

import json
from collections.abc import Callable
from pathlib import Path, PureWindowsPath

import pytest

from wanlora.config.dataset import ImageDatasetConfig, VideoDatasetConfig, comparable_path, read_datasets
from wanlora.foundation.errors import ConfigError

Write = Callable[[str, str], Path]

REFERENCE = """
[general]
caption_extension = ".txt"
enable_bucket = true
bucket_no_upscale = true

[[datasets]]
image_directory = "H:/datasets/style/images/768x768"
cache_directory = "H:/datasets/style/images/768x768/cache"
resolution = [768, 768]
batch_size = 1
num_repeats = 1

[[datasets]]
video_directory = "H:/datasets/style/videos/1920x1040"
cache_directory = "H:/datasets/style/videos/1920x1040/cache_1"
resolution = [768, 416]
batch_size = 1
num_repeats = 1
frame_extraction = "head"
target_frames = [1, 21]

[[datasets]]
video_directory = "H:/datasets/style/videos/1920x1040"
cache_directory = "H:/datasets/style/videos/1920x1040/cache_2"
resolution = [384, 208]
batch_size = 1
num_repeats = 1
frame_extraction = "uniform"
target_frames = [45]
frame_sample = 2
"""


def video(write: Write, lines: str, head: str = "") -> VideoDatasetConfig:
    """The one video dataset of a file with `lines` in it."""
    path = write("style.toml", f'{head}[[datasets]]\nvideo_directory = "clips"\ncaption_extension = ".txt"\n{lines}\n')
    (dataset,) = read_datasets(path).datasets
    assert isinstance(dataset, VideoDatasetConfig)
    return dataset


def refusal(write: Write, text: str, name: str = "style.toml") -> str:
    with pytest.raises(ConfigError) as caught:
        read_datasets(write(name, text))
    return str(caught.value)


def bad_video(write: Write, lines: str) -> str:
    return refusal(write, f'[[datasets]]\nvideo_directory = "clips"\n{lines}\n')


def test_the_reference_file_reads_word_for_word(write: Write, said: list[str]) -> None:
    config = read_datasets(write("style.toml", REFERENCE))
    images, heads, uniform = config.datasets
    assert isinstance(images, ImageDatasetConfig)
    assert isinstance(heads, VideoDatasetConfig) and isinstance(uniform, VideoDatasetConfig)
    assert images.image_directory == Path("H:/datasets/style/images/768x768")
    assert all(dataset.enable_bucket and dataset.bucket_no_upscale for dataset in config.datasets)
    assert heads.resolution == (768, 416) and heads.target_frames == (1, 21) and heads.frame_extraction == "head"
    assert uniform.target_frames == (45,) and uniform.frame_sample == 2 and uniform.frame_extraction == "uniform"
    assert uniform.cache_directory == Path("H:/datasets/style/videos/1920x1040/cache_2")
    assert uniform.where == "style.toml: [[datasets]] 3"
    assert said == []


def test_byte_order_mark_crlf_unicode_and_blanks_are_fine(write: Write) -> None:
    text = "\ufeff" + REFERENCE.replace("style/videos", "Stil äöü 映画").replace("\n", "\r\n")
    datasets = read_datasets(write("style.toml", text)).datasets
    assert datasets[1].source == Path("H:/datasets/Stil äöü 映画/1920x1040")


def test_backslashes_in_single_quotes_stay_as_they_are(write: Write) -> None:
    (dataset,) = read_datasets(write("a.toml", "[[datasets]]\nimage_directory = 'H:\\train\\new'")).datasets
    assert PureWindowsPath(str(dataset.source)).parts == ("H:\\", "train", "new")


def test_the_same_file_as_json(write: Write) -> None:
    text = json.dumps({"general": {"batch_size": 2}, "datasets": [{"image_directory": "a", "resolution": 512}]})
    (dataset,) = read_datasets(write("style.json", text)).datasets
    assert dataset.batch_size == 2 and dataset.resolution == (512, 512)


def test_a_table_wins_over_general(write: Write) -> None:
    assert video(write, "batch_size = 3", head="[general]\nbatch_size = 2\nnum_repeats = 4\n").batch_size == 3
    assert video(write, "batch_size = 3", head="[general]\nnum_repeats = 4\n").num_repeats == 4


def test_the_cache_lies_in_the_source_folder_unless_said(write: Write) -> None:
    assert video(write, "").cache_directory == Path("clips")


def test_a_jsonl_file_needs_a_cache_directory(write: Write) -> None:
    text = '[[datasets]]\nvideo_jsonl_file = "a.jsonl"\n'
    assert refusal(write, text) == "style.toml: [[datasets]] 1: video_jsonl_file needs a cache_directory"
    (dataset,) = read_datasets(write("style.toml", text + 'cache_directory = "c"')).datasets
    assert dataset.source == Path("a.jsonl")


def test_no_caption_extension_means_txt_and_is_said_once(write: Write, said: list[str]) -> None:
    text = "".join(f'[[datasets]]\nimage_directory = "{name}"\n' for name in "abc")
    assert {dataset.caption_extension for dataset in read_datasets(write("s.toml", text)).datasets} == {".txt"}
    assert said == ["s.toml: no caption_extension given; captions are read from .txt files"]


def test_a_caption_extension_needs_its_dot(write: Write) -> None:
    assert "needs its dot, got 'txt'" in bad_video(write, 'caption_extension = "txt"')


def test_frames_per_second_may_be_whole(write: Write) -> None:
    assert video(write, "source_fps = 30").source_fps == 30.0
    assert video(write, 'target_fps = "keep"').target_fps == "keep"
    assert video(write, "target_fps = 24").target_fps == 24.0


def test_target_frames_become_4k_plus_1_and_it_is_said(write: Write, said: list[str]) -> None:
    assert video(write, "target_frames = [46, 5, 45]").target_frames == (5, 45)
    change = "target_frames [46, 5, 45] becomes [5, 45]: lengths are 4k + 1, each once, rising"
    assert said == [f"style.toml: [[datasets]] 1: {change}"]


def test_the_default_single_frame_is_said(write: Write, said: list[str]) -> None:
    assert video(write, "").target_frames == (1,)
    assert said == ["style.toml: [[datasets]] 1: no target_frames given; one frame of each clip is used"]


def test_uniform_with_one_window_is_head(write: Write, said: list[str]) -> None:
    dataset = video(write, 'target_frames = [5]\nframe_extraction = "uniform"')
    assert dataset.frame_extraction == "head"
    assert "'uniform' with one frame_sample is the same as 'head'" in said[0]


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ("target_frames = [5]\nframe_stride = 2", "frame_stride"),
        ("target_frames = [5]\nframe_sample = 2", "frame_sample"),
        ('target_frames = [5]\nframe_extraction = "chunk"\nmax_frames = 9', "max_frames"),
        ('frame_extraction = "full"\ntarget_frames = [5]', "target_frames"),
    ],
)
def test_keys_that_the_extraction_does_not_read_are_named(write: Write, said: list[str], lines: str, key: str) -> None:
    video(write, lines)
    assert len(said) == 1 and f"{key} changes nothing with frame_extraction = " in said[0]


def test_a_fixed_size_is_floored_to_16_and_it_is_said(write: Write, said: list[str]) -> None:
    assert video(write, "resolution = [500, 300]\ntarget_frames = [5]").resolution == (496, 288)
    assert said == ["style.toml: [[datasets]] 1: resolution 500x300 becomes 496x288: sides must be multiples of 16"]


def test_with_buckets_the_resolution_is_an_area_and_stays(write: Write, said: list[str]) -> None:
    assert video(write, "resolution = 500\nenable_bucket = true\ntarget_frames = [5]").resolution == (500, 500)
    assert said == []


def test_no_upscale_without_buckets_is_named(write: Write, said: list[str]) -> None:
    video(write, "bucket_no_upscale = true\ntarget_frames = [5]")
    assert said == ["style.toml: [[datasets]] 1: bucket_no_upscale changes nothing without enable_bucket = true"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("num_repeats = 0", "num_repeats must be at least 1, got 0"),
        ("batch_size = true", "batch_size must be a whole number, got true"),
        ('batch_size = "2"', "batch_size must be a whole number, got the text '2': write it without quotes"),
        ("batch_size = 2.0", "batch_size must be a whole number, got 2.0: write 2"),
        ("enable_bucket = 1", "enable_bucket must be true or false, got 1"),
        ('enable_bucket = "true"', "enable_bucket must be true or false, got the text 'true'"),
        ("resolution = 16", "resolution must be at least 32, got 16"),
        ("resolution = [768]", "resolution must have 2 values, got 1"),
        ("resolution = [768, 416, 1]", "resolution must have 2 values, got 3"),
        ('resolution = "768x416"', "resolution must be a list, got '768x416'"),
        ("target_frames = 21", "target_frames must be a list, got 21: write [21]"),
        ("target_frames = [0]", "target_frames must be at least 1, got 0"),
        ("target_frames = []", "target_frames must name at least one length"),
        ("frame_stride = 0", "frame_stride must be at least 1, got 0"),
        ("frame_sample = 0", "frame_sample must be at least 1, got 0"),
        ("max_frames = 0", "max_frames must be at least 1, got 0"),
        ('frame_extraction = "heads"', "got 'heads' (did you mean 'head'?)"),
        ("frame_extraction = 1", "frame_extraction must be one of head, chunk, slide, uniform, full, got 1"),
        ("source_fps = 0", "source_fps must be above 0, got 0"),
        ("source_fps = true", "source_fps must be a number, got true"),
        ("source_fps = inf", "source_fps must be a finite number, got inf"),
        ('target_fps = "kept"', "target_fps must be a number or one of keep, got the text 'kept'"),
        ("cache_directory = 5", "cache_directory must be a text in quotes, got 5"),
        ('cache_directory = ""', "cache_directory must be a path, got an empty text"),
        ('control_directory = "x"', "control_directory: control inputs are not supported"),
        ("fp_1f_target_index = 1", "fp_1f_target_index: one-frame (image editing) training is not supported"),
    ],
)
def test_a_bad_value_is_refused_with_its_place(write: Write, lines: str, message: str) -> None:
    error = bad_video(write, lines)
    assert message in error
    assert error.startswith("style.toml line 3: [[datasets]] 1: ") or "target_frames must name" in error


def test_keys_of_other_models_that_change_nothing_are_said(write: Write, said: list[str]) -> None:
    video(write, "fp_latent_window_size = 9\ntarget_frames = [5]")
    expected = "fp_latent_window_size: belongs to other models and changes nothing for Wan"
    assert said == [f"style.toml line 4: [[datasets]] 1: {expected}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[datasets]]\nvideo_directory = "a"\ntarget_frame = [1]', "unknown key (did you mean 'target_frames'?)"),
        (
            '[[datasets]]\nimage_directory = "a"\ntarget_frame = [1]',
            "unknown key (did you mean 'target_frames', a key of video datasets?)",
        ),
        (
            '[[datasets]]\nimage_directory = "a"\ntarget_frames = [1]',
            "target_frames: is a key of video datasets, and this table has image_directory",
        ),
        ('[general]\ncache_directory = "a"', "cache_directory: belongs in [[datasets]], not in [general]"),
        ("[general]\nenable_buckets = true", "unknown key (did you mean 'enable_bucket'?)"),
        ("[general]\nframe_strides = 2", "unknown key (did you mean 'frame_stride', a key of video datasets?)"),
        ("[general]\nxyzzy = true", "style.toml line 2: [general]: xyzzy: unknown key"),
        ("resolution = 512", "style.toml line 1: resolution: belongs in [general] or [[datasets]]"),
        ('video_directory = "a"', "style.toml line 1: video_directory: belongs in [[datasets]]"),
        ("[dataset]\na = 1", "dataset: unknown (did you mean 'datasets'?)"),
        ('[datasets]\nvideo_directory = "a"', "write [[datasets]] with double brackets"),
        ("[[general]]\nbatch_size = 1", "write [general] with single brackets"),
        ("datasets = 5", "datasets must be tables, each under [[datasets]]"),
        ("datasets = []", "there is no [[datasets]]"),
        ("", "there is no [[datasets]]"),
        (
            '[[datasets]]\nvideo_directory = "a"\nvideo_jsonl_file = "b"',
            "give one of video_directory and video_jsonl_file, not both",
        ),
        (
            '[[datasets]]\nvideo_directory = "a"\nimage_directory = "b"',
            "has image_directory and video_directory; give pictures and clips a [[datasets]] each",
        ),
        ("[[datasets]]\nresolution = 0", "line 2: [[datasets]] 1: resolution must be at least 32"),
        ("[[datasets]]\nresolution = 512", "has no source; give one of image_directory, image_jsonl_file, "),
        ('[[datasets]]\nvideo_dir = "a"', "video_dir: unknown key (did you mean 'video_directory'?)"),
    ],
)
def test_a_key_out_of_place_is_told_where_it_belongs(write: Write, text: str, message: str) -> None:
    assert message in refusal(write, text)


def test_everything_wrong_with_a_file_is_reported_at_once(write: Write) -> None:
    error = refusal(
        write,
        '[general]\nnum_repeats = 0\n[[datasets]]\nimage_directory = "a"\nfoo = 1\n'
        '[[datasets]]\nvideo_directory = "b"\nbatch_size = 0\ntarget_frames = "x"\n',
    )
    assert error.startswith("4 problems:")
    for place in ("line 2: [general]", "line 5: [[datasets]] 1: foo", "line 8: [[datasets]] 2", "line 9: [[datasets]]"):
        assert place in error


@pytest.mark.parametrize(
    ("first", "second"),
    [("cache", "cache/"), ("cache", "./x/../cache"), ("H:/a/cache", r"h:\A\Cache\\"), (r"a\cache", r"A\b\..\cache")],
)
def test_two_spellings_of_one_cache_directory_collide(write: Write, first: str, second: str) -> None:
    table = "[[datasets]]\nimage_directory = '{}'\ncache_directory = '{}'\n"
    error = refusal(write, table.format("p", first) + table.format("q", second))
    assert "[[datasets]] 1 and [[datasets]] 2 share the cache_directory" in error


def test_different_cache_directories_differ() -> None:
    folders = ["cache", "cache2", "H:/cache", "G:/cache", r"H:\cache2"]
    assert len({comparable_path(folder) for folder in folders}) == len(folders)


def test_tables_that_share_a_folder_need_caches_of_their_own(write: Write) -> None:
    table = '[[datasets]]\nvideo_directory = "clips"\n'
    assert "share the cache_directory clips; give each its own" in refusal(write, table * 2)


VALIDATION = """
[general]
caption_extension = ".txt"
batch_size = 2
num_repeats = 3

[[datasets]]
image_directory = "images"

[[validation]]
video_directory = "unseen"
resolution = 256
target_frames = [21]

[[validation]]
image_directory = "unseen images"
batch_size = 1
"""


def test_validation_tables_are_read_like_datasets_and_kept_apart(write: Write, said: list[str]) -> None:
    config = read_datasets(write("style.toml", VALIDATION))
    assert [dataset.where for dataset in config.datasets] == ["style.toml: [[datasets]] 1"]
    clips, images = config.validation
    assert isinstance(clips, VideoDatasetConfig) and isinstance(images, ImageDatasetConfig)
    assert (clips.where, images.where) == ("style.toml: [[validation]] 1", "style.toml: [[validation]] 2")
    assert (clips.resolution, clips.target_frames, clips.caption_extension) == ((256, 256), (21,), ".txt")
    assert (clips.batch_size, images.batch_size) == (2, 1)
    assert (clips.num_repeats, images.num_repeats, config.datasets[0].num_repeats) == (1, 1, 3)
    assert said == []


def test_a_file_without_validation_has_none(write: Write) -> None:
    assert read_datasets(write("style.toml", REFERENCE)).validation == ()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('[[validation]]\nvideo_dir = "b"', "style.toml line 4: [[validation]] 1: video_dir: unknown key"),
        (
            '[[validation]]\nvideo_directory = "b"\nnum_repeats = 2',
            "style.toml line 5: [[validation]] 1: num_repeats has no meaning here: every sample is measured once",
        ),
        (
            '[[validation]]\nvideo_directory = "b"\nimage_directory = "c"',
            "[[validation]] 1: has image_directory and video_directory; give pictures and clips a [[validation]] each",
        ),
        (
            '[[validation]]\nimage_directory = "a"',
            "style.toml: [[datasets]] 1 and [[validation]] 1 share the cache_directory a; give each its own",
        ),
        ('[validation]\nvideo_directory = "b"', "write [[validation]] with double brackets"),
        ('[[validations]]\nvideo_directory = "b"', "validations: unknown (did you mean 'validation'?)"),
    ],
)
def test_a_mistake_in_a_validation_table_is_named(write: Write, table: str, message: str) -> None:
    assert message in refusal(write, f'[[datasets]]\nimage_directory = "a"\n{table}\n')


def test_validation_alone_trains_nothing(write: Write) -> None:
    assert "there is no [[datasets]]" in refusal(write, '[[validation]]\nimage_directory = "a"\n')


@pytest.mark.parametrize("lengths", [(4,), (5, 1), (5, 5), ()])
def test_a_config_made_by_hand_holds_lengths_the_model_has(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="4k \\+ 1"):
        VideoDatasetConfig(where="x", cache_directory=Path("c"), video_directory=Path("v"), target_frames=lengths)


def test_a_config_made_by_hand_has_one_source() -> None:
    with pytest.raises(ConfigError, match="give one of image_directory and image_jsonl_file, not none"):
        ImageDatasetConfig(where="x", cache_directory=Path("c"))
    made = ImageDatasetConfig(where="x", cache_directory=Path("c"), image_jsonl_file=Path("a.jsonl"))
    assert made.source == Path("a.jsonl")
