"""The pixels of samples: one pass over a source for all that is wanted of it."""

from collections.abc import Iterator, Sequence

from wanlora.data.decoding import FrameRequest, decode
from wanlora.data.images import read_image
from wanlora.data.items import Item
from wanlora.data.resize import Clip, resize_to_cover


def read_items(items: Sequence[Item]) -> Iterator[tuple[Item, Clip]]:
    """Each of `items` with its pixels, uint8, frames x height x width x RGB, as they become complete.

    All items are of one source, which was measured when planning; it is opened once. Raises `DataError`.
    """
    source, info = items[0].source, items[0].info
    if source.kind == "image":
        picture = read_image(source.path)
        for item in items:
            yield item, resize_to_cover(picture, item.pixels.width, item.pixels.height)[None]
        return
    assert info is not None
    requests = [
        FrameRequest(indexes=item.indexes, width=item.pixels.width, height=item.pixels.height) for item in items
    ]
    for position, clip in decode(source.path, requests, info):
        yield items[position], clip
