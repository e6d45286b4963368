"""The quickstart's clips and pictures are real files that show what their captions say."""

import tomllib

import av
from PIL import Image

from tests.tiny import TinyDataset
from wanlora.config.dataset import read_datasets
from wanlora.data.plan import plan_datasets
from wanlora.quickstart.dataset import make_tiny_dataset
from wanlora.quickstart.world import film, new_scenes


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
        *[(60, 16, "h264")] * 12,
    ]


def test_a_scene_filmed_faster_shows_the_same_at_the_same_moment(tiny_dataset: TinyDataset) -> None:
    with av.open(str(tiny_dataset.videos / "scene_05.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    expected = film(new_scenes(5, seed=1)[4], 17, 192, 128, fps=16)[16]
    assert abs(frames[30].astype(int) - expected).mean() < 3
    assert abs(frames[0].astype(int) - expected).mean() > 6


def test_every_picture_opens_and_has_its_caption(tiny_dataset: TinyDataset) -> None:
    pictures = [path for path in tiny_dataset.images.iterdir() if path.suffix in {".png", ".jpg"}]
    for picture, scene in zip(sorted(pictures), new_scenes(12, seed=2), strict=True):
        with Image.open(picture) as image:
            image.load()
        assert picture.with_suffix(".txt").read_text(encoding="utf-8") == scene.caption


def test_the_toml_names_the_folder_it_lies_in(tiny_dataset: TinyDataset) -> None:
    file = tomllib.loads(tiny_dataset.toml.read_text(encoding="utf-8"))
    tables = file["datasets"] + file["validation"]
    assert [table.get("frame_extraction") for table in tables] == [None, "head", "uniform", None, None]
    assert [table["cache_directory"] for table in tables] == [path.resolve().as_posix() for path in tiny_dataset.caches]
    assert tables[1]["video_directory"] == tiny_dataset.videos.resolve().as_posix()


def test_what_the_user_changed_stays(tiny_dataset: TinyDataset) -> None:
    caption = tiny_dataset.videos / "scene_01.txt"
    caption.write_text("another", encoding="utf-8")
    make_tiny_dataset(tiny_dataset.toml.parent)
    assert caption.read_text(encoding="utf-8") == "another"


def test_what_is_validated_is_not_trained_on(tiny_dataset: TinyDataset) -> None:
    plan = plan_datasets(read_datasets(tiny_dataset.toml))
    assert plan.validation is not None
    assert not plan.overlap
    trained, unseen = ({item.source.caption for item in part.items} for part in (plan, plan.validation))
    assert unseen - trained
