"""--debug_mode: what would be cached, to look at, instead of caching it.

Each sample is shown exactly as the VAE would get it: cut, resampled, resized and cropped.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from wanlora.data.items import Item
from wanlora.data.media import read_items
from wanlora.data.resize import Clip, Picture, resize_to_cover
from wanlora.foundation.errors import DataError, Problems
from wanlora.foundation.log import log
from wanlora.generation.writing import write_image, write_video

Mode = Literal["image", "console", "video"]
FOLDER = "debug"
"""Where pictures and clips are written, below each cache folder."""
_UPPER_HALF = "▀"


def show(items: Sequence[Item], mode: Mode, *, width: int = 80, limit: int | None = None) -> None:
    """Write or draw the first `limit` samples. Raises `DataError` at the end for sources that cannot be read."""
    shown = list(items)[:limit]
    problems = Problems()
    folders: dict[Path, int] = {}
    for item, clip in _decoded(shown, problems):
        log.info(f'{item.name}: {item.pixels} of {item.source.path}, "{item.source.caption}"')
        if mode == "console":
            for line in drawn(clip[0], width):
                print(line)
            continue
        path = item.latent_path.parent / FOLDER / item.latent_path.stem
        if mode == "image" or len(clip) == 1:
            write_image(path.with_name(path.name + ".png"), clip[0])
        else:
            write_video(path.with_name(path.name + ".mp4"), clip)
        folders[path.parent] = folders.get(path.parent, 0) + 1
    for folder, count in folders.items():
        log.info(f"{count} files to look at are in {folder}; nothing was cached")
    problems.raise_all(DataError)


def drawn(picture: Picture, width: int) -> Iterator[str]:
    """A picture as lines of coloured half blocks, two rows of pixels in each line of `width` characters."""
    height = max(1, round(picture.shape[0] * width / picture.shape[1] / 2)) * 2
    small = resize_to_cover(picture, width, height)
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{x};{y};{z}m{_UPPER_HALF}"
            for (r, g, b), (x, y, z) in zip(upper, lower, strict=True)
        )
        yield "".join(cells) + "\x1b[0m"


def _decoded(items: Sequence[Item], problems: Problems) -> Iterator[tuple[Item, Clip]]:
    grouped: dict[Path, list[Item]] = {}
    for item in items:
        grouped.setdefault(item.source.path.resolve(), []).append(item)
    for group in grouped.values():
        with problems.collect():
            yield from read_items(group)
