"""Dataset TOMLs, JSONL files, captions and folders that are wrong: one message, exit code 2, nothing touched."""

from collections.abc import Callable

import pytest

from tests.integration.bench import (
    CACHING,
    CACHING_TEXT,
    LATENTS,
    STYLE,
    TEXTS,
    TRAIN,
    TRAINING,
    Bench,
    Case,
    check,
    parametrised,
)

Spoil = Callable[[Bench], object]


def edit(old: str, new: str) -> Spoil:
    """Replace something in the dataset file."""
    return lambda bench: bench.change("style.toml", old, new)


def toml(text: str) -> Spoil:
    """Write another dataset file."""
    return lambda bench: bench.write("style.toml", text)


def images(*lines: str) -> Spoil:
    """A dataset file with one table of pictures and these lines."""
    return toml("\n".join(('[[datasets]]\nimage_directory = "images"', 'caption_extension = ".txt"', *lines, "")))


def videos(*lines: str) -> Spoil:
    """A dataset file with one table of clips and these lines."""
    return toml("\n".join(('[[datasets]]\nvideo_directory = "videos"\nresolution = [48, 32]', *lines, "")))


def jsonl(*rows: str) -> Spoil:
    """A dataset file with one JSONL of pictures that has these rows."""

    def spoil(bench: Bench) -> None:
        bench.write("rows.jsonl", "\n".join((*rows, "")))
        bench.write(
            "style.toml",
            '[[datasets]]\nimage_jsonl_file = "rows.jsonl"\ncache_directory = "cache_rows"\nresolution = [32, 32]\n',
        )

    return spoil


def remove(name: str) -> Spoil:
    """Delete a file."""
    return lambda bench: (bench.folder / name).unlink()


def add_second_stem(bench: Bench) -> None:
    picture = bench.folder / "images" / "red.png"
    picture.with_suffix(".bmp").write_bytes(picture.read_bytes())


def use_an_empty_folder(bench: Bench) -> None:
    (bench.folder / "empty").mkdir()
    bench.change("style.toml", '"images"', '"empty"')


def make_a_folder_of_a_caption(bench: Bench) -> None:
    (bench.folder / "images" / "red.txt").unlink()
    (bench.folder / "images" / "red.txt").mkdir()


FILES = {
    "syntax error": Case(
        spoil=toml("[general]\nbatch_size 4\n"), says=("style.toml line 2", "batch_size 4", "expected '='")
    ),
    "unclosed text": Case(
        spoil=toml('[[datasets]]\nimage_directory = "images\n'), says=("style.toml line 2", 'image_directory = "images')
    ),
    "backslashes in quotes": Case(
        spoil=toml('[[datasets]]\nimage_directory = "H:\\datasets\\images"\n'),
        says=("style.toml line 2", "a backslash inside double quotes starts an escape", "forward slashes"),
    ),
    "a path with a tab in it": Case(
        spoil=toml('[[datasets]]\nimage_directory = "H:\\train"\ncaption_extension = ".txt"\n'),
        says=("style.toml line 2", "image_directory", "control character", "'single quotes' or forward slashes"),
    ),
    "the same key twice": Case(
        spoil=images("batch_size = 1", "batch_size = 2"), says=("style.toml line 5", "batch_size = 2")
    ),
    "not UTF-8": Case(
        spoil=lambda bench: (bench.folder / "style.toml").write_bytes(b"[general]\n# caf\xe9\nbatch_size = 1\n"),
        says=("style.toml", "is not UTF-8 text (byte 15)", "save it as UTF-8"),
    ),
    "not TOML at all": Case(
        flags=("--dataset_config", "style.yaml"),
        spoil=lambda bench: bench.write("style.yaml", "datasets: []\n"),
        says=("style.yaml", "must be .toml or .json"),
    ),
    "empty file": Case(spoil=toml(""), says=("style.toml", "there is no [[datasets]]", "add one for each folder")),
    "single brackets": Case(
        spoil=toml('[datasets]\nimage_directory = "images"\n'), says=("style.toml", "write [[datasets]] with double")
    ),
    "missing file": Case(
        flags=("--dataset_config", "stile.toml"),
        says=("--dataset_config: there is no stile.toml", "did you mean 'style.toml'?"),
    ),
}
KEYS = {
    "unknown key": Case(
        spoil=images("num_repeat = 3"),
        says=("style.toml line 4: [[datasets]] 1: num_repeat: unknown key", "did you mean 'num_repeats'?"),
    ),
    "key in the wrong table": Case(
        spoil=edit("enable_bucket = true", 'enable_bucket = true\nimage_directory = "images"'),
        says=("style.toml line 4: [general]: image_directory: belongs in [[datasets]]",),
    ),
    "key of clips among pictures": Case(
        spoil=images("target_frames = [1]"),
        says=("style.toml line 4: [[datasets]] 1: target_frames: is a key of video datasets", "has image_directory"),
    ),
    "wrong type": Case(
        spoil=images('batch_size = "2"'),
        says=("style.toml line 4: [[datasets]] 1: batch_size must be a whole number", "write it without quotes"),
    ),
    "switch for a number": Case(
        spoil=images("num_repeats = true"),
        says=("style.toml line 4", "num_repeats must be a whole number, got true"),
    ),
    "number for a switch": Case(
        spoil=edit("enable_bucket = true", "enable_bucket = 1"),
        says=("style.toml line 3: [general]: enable_bucket must be true or false, got 1",),
    ),
    "three numbers of resolution": Case(
        spoil=images("resolution = [32, 32, 9]"), says=("style.toml line 4", "resolution must have 2 values, got 3")
    ),
    "resolution too small": Case(
        spoil=images("resolution = [16, 32]"), says=("style.toml line 4", "resolution must be at least 32, got 16")
    ),
    "no repeats": Case(spoil=images("num_repeats = 0"), says=("style.toml line 4", "num_repeats must be at least 1")),
    "target_frames 0": Case(
        spoil=videos("target_frames = [0, 5]"), says=("style.toml line 4", "target_frames must be at least 1, got 0")
    ),
    "no target_frames": Case(
        spoil=videos('caption_extension = ".txt"', "target_frames = []"),
        says=("style.toml: [[datasets]] 1", "target_frames must name at least one length"),
    ),
    "a target_frames that is no list": Case(
        spoil=videos("target_frames = 5"), says=("style.toml line 4", "must be a list, got 5: write [5]")
    ),
    "unknown frame_extraction": Case(
        spoil=videos('frame_extraction = "unifrom"'),
        says=("style.toml line 4", "head, chunk, slide, uniform, full", "did you mean 'uniform'?"),
    ),
    "frame_stride 0": Case(
        spoil=videos('frame_extraction = "slide"', "frame_stride = 0"),
        says=("style.toml line 5", "frame_stride must be at least 1, got 0"),
    ),
    "no source": Case(
        spoil=toml('[[datasets]]\nimage_direktory = "images"\n'),
        says=("style.toml: [[datasets]] 1: has no source", "did you mean 'image_directory'?"),
    ),
    "two sources": Case(
        spoil=images('image_jsonl_file = "rows.jsonl"'), says=("give one of image_directory and image_jsonl_file",)
    ),
    "pictures and clips in one table": Case(
        spoil=images('video_directory = "videos"'),
        says=("[[datasets]] 1", "give pictures and clips a [[datasets]] each"),
    ),
    "a cache folder for two": Case(
        spoil=edit('"cache_videos"', '"./cache_images/"'),
        says=("style.toml", "[[datasets]] 1 and [[datasets]] 2 share the cache_directory", "give each its own"),
    ),
    "caption_extension without a dot": Case(
        spoil=edit('".txt"', '"txt"'), says=("style.toml", "caption_extension needs its dot")
    ),
    "control folder": Case(
        spoil=images('control_directory = "control"'), says=("style.toml line 4", "control inputs are not supported")
    ),
}
SOURCES = {
    "mistyped folder": Case(
        spoil=edit('"images"', '"imags"'),
        says=("[[datasets]] 1: image_directory imags does not exist", "check the spelling"),
    ),
    "empty folder": Case(
        spoil=use_an_empty_folder,
        says=("image_directory empty holds no image", "existing caches are left as they are"),
    ),
    "a folder of clips for pictures": Case(
        spoil=edit('image_directory = "images"', 'image_directory = "videos"'),
        says=("image_directory videos holds no image (.png,", "existing caches are left as they are"),
    ),
    "missing captions": Case(
        spoil=remove("images/red.txt"), says=("[[datasets]] 1: 1 captions are missing in images: red.txt", "write them")
    ),
    "empty caption": Case(
        spoil=lambda bench: bench.write("videos/green.txt", " \n"),
        says=("[[datasets]] 2: 1 captions in videos are empty: green.txt", "write them"),
    ),
    "caption that is not UTF-8": Case(
        spoil=lambda bench: (bench.folder / "images" / "red.txt").write_bytes(b"caf\xe9"),
        says=("images/red.txt is not UTF-8 (byte 3)", "save it as UTF-8"),
    ),
    "a folder called like a caption": Case(
        spoil=make_a_folder_of_a_caption,
        says=("images/red.txt", "cannot be read"),
    ),
    "the same stem twice": Case(
        spoil=add_second_stem,
        says=("images/red.bmp and images/red.png would share the cache files", "rename one"),
        may_appear=("cache_images/wanlora_index.json",),
    ),
    "clips shorter than every window": Case(
        spoil=edit("target_frames = [1, 5]", "target_frames = [21]"),
        says=("[[datasets]] 2", "the longest has 9 frames", "lower target_frames"),
    ),
    "JSONL that is not JSON": Case(
        spoil=jsonl('{"image_path": "images/red.png", "caption": "a"}', "{'image_path': 1}"),
        says=("rows.jsonl, line 2 is not JSON", "each line is one object"),
    ),
    "JSONL without captions and paths": Case(
        spoil=jsonl('{"image_path": "images/red.png"}', '{"caption": "a"}', "[1]"),
        says=("rows.jsonl, line 1 has no caption", "line 2 has no image_path", "line 3 is not a JSON object"),
    ),
    "JSONL of files that are not there": Case(
        spoil=jsonl('{"image_path": "images/rot.png", "caption": "a"}'),
        says=("[[datasets]] 1: 1 sources do not exist: images/rot.png", "check the paths"),
    ),
    "missing JSONL": Case(
        spoil=edit('image_directory = "images"', 'image_jsonl_file = "rows.jsonl"'),
        says=("[[datasets]] 1: image_jsonl_file rows.jsonl does not exist", "check the spelling"),
    ),
    "empty JSONL": Case(spoil=jsonl(), says=("rows.jsonl holds no rows", "existing caches are left as they are")),
}


@parametrised(FILES)
def test_a_dataset_file_that_cannot_be_read(bench: Bench, case: Case) -> None:
    check(bench, CACHING, LATENTS, case)


@parametrised(KEYS)
def test_a_dataset_file_with_a_mistake(bench: Bench, case: Case) -> None:
    check(bench, CACHING, LATENTS, case)


@parametrised(SOURCES)
def test_sources_that_are_not_as_they_should_be(bench: Bench, case: Case) -> None:
    check(bench, CACHING_TEXT, TEXTS, case)


def test_every_mistake_of_a_dataset_file_is_listed(bench: Bench) -> None:
    bench.write(
        "style.toml", STYLE.replace("resolution = [32, 32]", "resolution = [8, 32]\nrepeats = 2") + "epochs = 3\n"
    )
    printed = bench.refuses(
        CACHING, LATENTS, ("3 problems:", "1. style.toml line 8", "2. style.toml line 9", "line 16")
    )
    assert "[[datasets]] 2: epochs: unknown key" in printed


def test_every_dataset_file_and_flag_is_checked_before_the_first_is_cached(bench: Bench) -> None:
    bench.write("other.toml", STYLE.replace("target_frames", "target_frame"))
    flags = ("--dataset_config", "style.toml", "other.toml", "--vae", "vea.safetensors", "--device", "cuda:7")
    says = ("3 problems:", "did you mean 'vae.safetensors'?", "type --device cpu", "other.toml line 14")
    bench.refuses(CACHING, flags, says)


@pytest.mark.parametrize("name", ["missing captions", "mistyped folder"])
def test_training_needs_the_caches_only(bench: Bench, name: str) -> None:
    """What the caching programs refuse is no obstacle once everything is cached."""
    spoil = SOURCES[name].spoil
    assert spoil is not None
    spoil(bench)
    code, printed = bench.call(TRAINING, *TRAIN, "--dry_run")
    assert code == 0, printed


@pytest.mark.parametrize("main", [CACHING, CACHING_TEXT], ids=["latents", "text"])
def test_byte_order_marks_and_windows_line_ends_are_no_mistake(bench: Bench, main: Callable[..., int]) -> None:
    for name in ("style.toml", "images/red.txt", "videos/green.txt"):
        path = bench.folder / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    code, printed = bench.call(main, *(LATENTS if main is CACHING else TEXTS))
    assert code == 0, printed
    assert "up to date; nothing is encoded" in printed
