"""The quickstart's clips and pictures are real files that show what their captions say."""

import tomllib

import av
from PIL import Image

from tests.tiny import TinyDataset
from wanlora.quickstart.dataset import make_tiny_dataset
from wanlora.quickstart.media import SCENES


def test_clips_have_the_frames_and_rates_they_are_announced_with(tiny_dataset: TinyDataset) -> None:
    found = []
    for path in sorted(tiny_dataset.videos.glob("*.mp4")):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            found.append((sum(1 for _ in container.decode(stream)), int(stream.average_rate), stream.codec.name))
    assert found == [
        (60, 16, "h264"),
        (52, 16, "h264"),
        (45, 16, "h264"),
        (33, 16, "h264"),
        (100, 30, "h264"),
        (96, 30, "h264"),
    ]


def test_a_scene_filmed_faster_shows_the_same_at_the_same_moment(tiny_dataset: TinyDataset) -> None:
    with av.open(str(tiny_dataset.videos / "scene_05.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    expected = SCENES[4].picture(2.0, 192, 128)
    assert abs(frames[60].astype(int) - expected).mean() < 6
    assert abs(frames[0].astype(int) - expected).mean() > 12


def test_every_picture_opens_and_has_its_caption(tiny_dataset: TinyDataset) -> None:
    pictures = [path for path in tiny_dataset.images.iterdir() if path.suffix in {".png", ".jpg"}]
    assert len(pictures) == len(SCENES)
    for picture, scene in zip(sorted(pictures), SCENES, strict=True):
        with Image.open(picture) as image:
            image.load()
        assert picture.with_suffix(".txt").read_text(encoding="utf-8") == scene.caption


def test_the_toml_names_the_folder_it_lies_in(tiny_dataset: TinyDataset) -> None:
    tables = tomllib.loads(tiny_dataset.toml.read_text(encoding="utf-8"))["datasets"]
    assert [table.get("frame_extraction") for table in tables] == [None, "head", "uniform"]
    assert [table["cache_directory"] for table in tables] == [path.resolve().as_posix() for path in tiny_dataset.caches]
    assert tables[1]["video_directory"] == tiny_dataset.videos.resolve().as_posix()


def test_what_the_user_changed_stays(tiny_dataset: TinyDataset) -> None:
    caption = tiny_dataset.videos / "scene_01.txt"
    caption.write_text("another", encoding="utf-8")
    make_tiny_dataset(tiny_dataset.toml.parent)
    assert caption.read_text(encoding="utf-8") == "another"
