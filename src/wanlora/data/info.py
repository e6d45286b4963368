"""What measuring a picture or clip has found."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What planning needs to know of a clip."""

    width: int
    """Pixels, as shown, after rotation."""
    height: int
    times: tuple[float, ...]
    """When each frame is shown, in seconds after the first, ascending."""
    rate: float
    """Average frames a second."""

    @property
    def num_frames(self) -> int:
        """How many frames a player shows."""
        return len(self.times)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    @property
    def duration(self) -> float:
        """Seconds, the last frame included."""
        return self.times[-1] + 1 / self.rate
