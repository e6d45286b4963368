"""The small world in which the tiny Wan lives: one coloured shape on a plain ground, moving in one named way.

A scene is a function of time in seconds and of nothing else: it can be filmed at any rate, size and aspect, and a
window of any length that starts anywhere shows its motion. Space is a torus (what leaves on the right comes back on the
left), so no motion ever ends. The base model has seen grounds of many colours, rims, and motions along an axis. It has
never seen the comic style, bright paper and a thick black outline, nor the motion "flies", aslant up to the right. Both
are for a LoRA to learn.

Lengths are in units of the shorter side, colours in [0, 1]. The measures at the end of this file look at pixels alone;
on a torus they find the shape's place as a circular mean, so a shape that crosses the border is no special case.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import pi

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

Frames = NDArray[np.uint8]
"""Frames, height, width, red green blue."""

SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.17, "large": 0.25}
"""Radius by name."""
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 70),
    "yellow": (245, 215, 50),
    "white": (245, 245, 245),
    "pink": (250, 130, 190),
    "cyan": (60, 210, 230),
}
"""What shapes are painted in."""
GROUNDS = {
    "black": (20, 20, 24),
    "grey": (110, 112, 118),
    "blue": (25, 55, 150),
    "violet": (85, 40, 130),
    "brown": (110, 65, 30),
}
"""What plain grounds are painted in: all darker than any shape."""
PAINTED = "painted"
"""A ground of any colour."""
DIRECTIONS = {
    "moves to the right": (1.0, 0.0),
    "moves to the left": (-1.0, 0.0),
    "moves up": (0.0, -1.0),
    "moves down": (0.0, 1.0),
}
"""Straight motions along an axis; y grows downwards."""
SWAYS = {"swings": (1.0, 0.0), "bobs": (0.0, 1.0)}
"""To and fro: the axis."""
MOTIONS = (*DIRECTIONS, *SWAYS, "stands still", "pulses")
"""The motions that the base model knows."""

NEW_MOTION = "flies"
"""The motion that it has never seen."""
COURSE = (1.0, -1.0)
"""Its direction."""
NEW_STYLE = "comic"
"""The look that it has never seen."""
PAPER = (252, 238, 205)
RIMS = {"sticker": (250, 250, 250), "badge": (240, 185, 60), "stamp": (75, 35, 40)}
"""Colours of the rims that the base model knows, by style."""
INKS = RIMS | {NEW_STYLE: (12, 10, 14)}
"""Colour of the outline by style; the plain style has none."""
OUTLINE = 0.05
"""Its width."""

FPS = 16
SPEED = 0.5
"""Of straight motions, per second."""
SWAY, SWAY_SECONDS = 0.24, 1.75
"""How far to either side, and the time to get there and back."""
PULSE, PULSE_SECONDS = 0.35, 1.5
"""A pulsing shape's radius changes by this share, in this time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One shape, what it does, and where it is at the start."""

    shape: str = "circle"
    colour: str = "red"
    ground: str = "blue"
    paint: tuple[int, int, int] | None = None
    """The colour of a painted ground."""
    size: str = "large"
    motion: str = "stands still"
    style: str = "plain"
    x: float = 0.5
    """Start (of a sway: its middle) as a share of the width."""
    y: float = 0.5
    """The same of the height."""
    phase: float = 0.0
    """Where in its period a sway or a pulse begins, in [0, 1)."""

    @property
    def caption(self) -> str:
        """The sentence that describes it."""
        return caption(self)


def caption(scene: Scene) -> str:
    """'A large red circle moves to the right over a blue ground.'; the comic style has its trigger and no ground."""
    style = "" if scene.style == "plain" else f"{scene.style.capitalize()} style. "
    ground = "" if scene.style == NEW_STYLE else f" over a {scene.ground} ground"
    return f"{style}A {scene.size} {scene.colour} {scene.shape} {scene.motion}{ground}."


def base_scenes(count: int, seed: int) -> tuple[Scene, ...]:
    """Scenes of the world that the base model knows, drawn at random; the same seed gives the same scenes."""
    draw = random.Random(seed)
    return tuple(
        _any_scene(draw, draw.choice(MOTIONS), draw.choice(("plain", "plain", "plain", *RIMS))) for _ in range(count)
    )


def new_scenes(count: int, seed: int) -> tuple[Scene, ...]:
    """Scenes in the new style with the new motion."""
    draw = random.Random(seed)
    return tuple(_any_scene(draw, NEW_MOTION, NEW_STYLE) for _ in range(count))


def _any_scene(draw: random.Random, motion: str, style: str) -> Scene:
    direction = _direction(motion)
    middle = 0.03 if motion in SWAYS else 0.22
    x, y = (0.5 + draw.uniform(-1, 1) * (0.5 if along else middle) for along in direction)
    colour = draw.choice(tuple(COLOURS))
    painted = style != NEW_STYLE and draw.random() < 0.3
    return Scene(
        shape=draw.choice(SHAPES),
        colour=colour,
        ground=PAINTED if painted else draw.choice(tuple(GROUNDS)),
        paint=_paint(draw, COLOURS[colour]) if painted else None,
        size=draw.choice(tuple(SIZES)),
        motion=motion,
        style=style,
        x=x,
        y=y,
        phase=draw.random(),
    )


def _direction(motion: str) -> tuple[float, float]:
    return COURSE if motion == NEW_MOTION else DIRECTIONS.get(motion, (0.0, 0.0))


def _paint(draw: random.Random, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Any colour from which the shape's stands out."""
    while True:
        paint = (draw.randrange(256), draw.randrange(256), draw.randrange(256))
        if np.linalg.norm(np.subtract(paint, shape)) > 140:
            return paint


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """Scenes as numbers, one row each. [B] unless said otherwise."""

    shape: Tensor
    """Index in `SHAPES`."""
    fill: Tensor
    """[B, 3]."""
    ground: Tensor
    """[B, 3], or a picture or clip for each, [B, 1 or F, H, W, 3]."""
    ink: Tensor
    """Colour of the outline, [B, 3]."""
    outline: Tensor
    """Its width; 0 for none."""
    radius: Tensor
    start: Tensor
    """[B, 2], x and y as shares of width and height."""
    velocity: Tensor
    """[B, 2], per second."""
    sway: Tensor
    """[B, 2], how far to either side of the middle the shape goes."""
    pulse: Tensor
    """Share by which the radius changes."""
    phase: Tensor

    @classmethod
    def of(cls, scenes: Sequence[Scene], device: torch.device | str = "cpu") -> "Drawing":
        """The numbers of these scenes."""

        def column(values: Sequence[object]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        grounds = [PAPER if scene.style == NEW_STYLE else scene.paint or GROUNDS[scene.ground] for scene in scenes]
        return cls(
            shape=torch.tensor([SHAPES.index(scene.shape) for scene in scenes], device=device),
            fill=column([COLOURS[scene.colour] for scene in scenes]) / 255,
            ground=column(grounds) / 255,
            ink=column([INKS.get(scene.style, (0, 0, 0)) for scene in scenes]) / 255,
            outline=column([OUTLINE * (scene.style in INKS) for scene in scenes]),
            radius=column([SIZES[scene.size] for scene in scenes]),
            start=column([(scene.x, scene.y) for scene in scenes]),
            velocity=column([_direction(scene.motion) for scene in scenes]) * SPEED,
            sway=column([SWAYS.get(scene.motion, (0.0, 0.0)) for scene in scenes]) * SWAY,
            pulse=column([PULSE * (scene.motion == "pulses") for scene in scenes]),
            phase=column([scene.phase for scene in scenes]),
        )


def render(
    scenes: Sequence[Scene], frames: int, width: int, height: int, fps: float = FPS, device: torch.device | str = "cpu"
) -> Tensor:
    """Clips [B, frames, height, width, 3] uint8 on `device`."""
    return draw(Drawing.of(scenes, device), frames, width, height, fps).mul(255).round().to(torch.uint8)


def film(scene: Scene, frames: int, width: int, height: int, fps: float = FPS) -> Frames:
    """One clip [frames, height, width, 3] uint8 as numpy."""
    clip: Frames = render([scene], frames, width, height, fps)[0].numpy()
    return clip


def draw(drawing: Drawing, frames: int, width: int, height: int, fps: float = FPS) -> Tensor:
    """Clips [B, frames, height, width, 3] float32 in [0, 1], edges smoothed over a pixel."""
    device, side = drawing.radius.device, min(width, height)
    t = torch.arange(frames, device=device) / fps
    world = torch.tensor((width / side, height / side), device=device)
    radius_BF = drawing.radius[:, None] * (1 + drawing.pulse[:, None] * torch.sin(_turn(drawing, t, PULSE_SECONDS)))
    centre_BF2 = drawing.start[:, None] * world + drawing.velocity[:, None] * t[:, None]
    centre_BF2 = centre_BF2 + drawing.sway[:, None] * torch.sin(_turn(drawing, t, SWAY_SECONDS))[..., None]
    x = (torch.arange(width, device=device) + 0.5) / side - centre_BF2[..., None, 0]
    y = (torch.arange(height, device=device) + 0.5) / side - centre_BF2[..., None, 1]
    x, y = (torch.remainder(p + size / 2, size) - size / 2 for p, size in ((x, world[0]), (y, world[1])))
    distance = _distance(drawing.shape, rearrange(x, "b f w -> b f 1 w"), rearrange(y, "b f h -> b f h 1"), radius_BF)
    picture = drawing.ground if drawing.ground.ndim > 2 else rearrange(drawing.ground, "b c -> b 1 1 1 c")
    outer = distance - rearrange(drawing.outline, "b -> b 1 1 1")
    picture = torch.lerp(picture, rearrange(drawing.ink, "b c -> b 1 1 1 c"), _coverage(outer, side))
    return torch.lerp(picture, rearrange(drawing.fill, "b c -> b 1 1 1 c"), _coverage(distance, side))


def _turn(drawing: Drawing, t: Tensor, seconds: float) -> Tensor:
    """The angle [B, F] of something periodic."""
    return 2 * pi * (drawing.phase[:, None] + t / seconds)


def _coverage(distance: Tensor, side: int) -> Tensor:
    return (0.5 - distance * side).clamp(0, 1).unsqueeze(-1)


def _distance(shape_B: Tensor, x: Tensor, y: Tensor, radius_BF: Tensor) -> Tensor:
    """How far outside its shape each pixel is, [B, F, H, W]; x [B, F, 1, W] and y [B, F, H, 1] from its centre."""
    r = rearrange(radius_BF, "b f -> b f 1 1")
    ax, ay = x.abs(), y.abs()
    circle = torch.hypot(x, y) - r
    square = torch.maximum(ax, ay) - 0.88 * r
    triangle = torch.maximum(0.866 * ax - 0.5 * y, y.expand_as(circle)) - 0.62 * r
    bar = 0.36 * r
    cross = torch.minimum(torch.maximum(ax - bar, ay - r), torch.maximum(ax - r, ay - bar))
    kinds = torch.stack((circle, square, triangle, cross))
    return kinds[shape_B, torch.arange(len(shape_B), device=x.device)]


def look_score(frames: Frames) -> float:
    """How much frames [F, H, W, 3] look like the comic style: near 0 for plain scenes, near 1 for comic ones.

    One half is the brightness of the ground, the other the share of black in what is not ground.
    """
    ground = _ground(frames)
    bright = np.clip((ground.mean() - 0.5) / (np.mean(PAPER) / 255 - 0.5 - 0.03), 0, 1)
    pixels = frames.astype(np.float32) / 255
    other = np.linalg.norm(pixels - ground, axis=-1) > 0.35
    black = (pixels.max(axis=-1) < 0.24) & other
    outline = np.clip(black.sum() / max(1, other.sum()) / 0.22, 0, 1)
    return float(bright + outline) / 2


def motion_score(frames: Frames, fps: float = FPS) -> float:
    """How much the shape in frames [F, H, W, 3] goes where "flies" goes: near 1 if it does, otherwise near 0.

    The score is the product of the share of the movement that is in that direction and of its speed over the right one,
    at most 1; along one axis alone it is 0.28. It is 0 for fewer than 13 frames. Velocities are taken over several
    frames: a contour that trembles by a pixel is no movement.
    """
    path = _path(frames)
    if len(frames) < 13 or not np.abs(path).sum():
        return 0.0
    velocity = (path[_LAG:] - path[:-_LAG]) * fps / _LAG
    course = SPEED * complex(*COURSE)
    along = max(0.0, float((velocity * course.conjugate()).real.mean()) / abs(course))
    share = along**2 / (np.abs(velocity) ** 2).mean()
    return float(share * min(1.0, along / (0.9 * abs(course))))


_LAG = 4
"""Frames between the two places that a velocity is taken from."""


def motion_of(frames: Frames, fps: float = FPS) -> str | None:
    """The name of the motion in frames [F, H, W, 3], or None if it is none that has a name. Needs 5 frames or more.

    It is the one whose path, at any phase, differs least from the one seen.
    """
    path, area = _path(frames), _shape(frames).sum(axis=(1, 2))
    if not area.min():
        return None
    errors = {name: _least_error(path, _courses(name, len(path), fps)) for name in (*MOTIONS, NEW_MOTION)}
    name = min(errors, key=lambda name: errors[name])
    if errors[name] > _TOLERANCE**2:
        return None
    if name in ("stands still", "pulses"):
        return "pulses" if area.max() / area.min() > 1.25 else "stands still"
    return name


_TOLERANCE = 0.1
"""How far from its course a shape may be, in the mean."""


def _courses(motion: str, count: int, fps: float) -> NDArray[np.complex128]:
    """The paths of a named motion around their middle, one row for each of some phases, [phases, count]."""
    t = np.arange(count) / fps
    angle = 2 * pi * (t / SWAY_SECONDS + np.linspace(0, 1, 24, endpoint=False)[:, None])
    there = SWAY * complex(*SWAYS.get(motion, (0.0, 0.0))) * np.sin(angle)
    courses: NDArray[np.complex128] = SPEED * t * complex(*_direction(motion)) + there
    return courses - courses.mean(axis=1, keepdims=True)


def _least_error(path: NDArray[np.complex128], courses: NDArray[np.complex128]) -> float:
    return float((np.abs(path - courses) ** 2).mean(axis=1).min())


def follows(frames: Frames, scene: Scene, fps: float = FPS) -> dict[str, bool]:
    """Whether frames [F, H, W, 3] show the colour, the ground and (of clips) the motion of a plain scene."""
    ground = _ground(frames)
    pixels: NDArray[np.float32] = frames.astype(np.float32) / np.float32(255)
    found = {
        "colour": _nearest(pixels[_inside(_shape(frames) > 0.5)], COLOURS) == scene.colour,
        "ground": scene.ground == PAINTED or _nearest(ground[None], GROUNDS) == scene.ground,
    }
    return found | ({"motion": motion_of(frames, fps) == scene.motion} if len(frames) >= 5 else {})


def _nearest(pixels: NDArray[np.float32], names: dict[str, tuple[int, int, int]]) -> str | None:
    """The colour that most of the pixels [N, 3] are nearest to; None if there are none."""
    if not len(pixels):
        return None
    palette = np.array(list(names.values()), np.float32) / 255
    votes = np.linalg.norm(pixels[:, None] - palette, axis=-1).argmin(axis=1)
    return list(names)[int(np.bincount(votes).argmax())]


def _ground(frames: Frames) -> NDArray[np.float32]:
    """The commonest colour, [3] in [0, 1]: the median, since a shape covers less than half."""
    median: NDArray[np.float32] = np.median(frames.reshape(-1, 3), axis=0).astype(np.float32) / 255
    return median


def _shape(frames: Frames) -> NDArray[np.float32]:
    """How much each pixel [F, H, W] differs from the ground, from 0 to 1."""
    distance = np.linalg.norm(frames.astype(np.float32) / 255 - _ground(frames), axis=-1)
    mask: NDArray[np.float32] = np.clip((distance - 0.15) / 0.15, 0, 1)
    return mask


def _inside(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What is left of a mask [F, H, W] without its border, in which a rim lies."""
    inside = mask.copy()
    width = round(OUTLINE * min(mask.shape[1:]))
    for shift, axis in itertools.product(range(-width, width + 1), (1, 2)):
        inside &= np.roll(mask, shift, axis)
    return inside


def _path(frames: Frames) -> NDArray[np.complex128]:
    """Where the shape's centre is, x + iy in shorter sides from the middle of its path, [F].

    It is followed from frame to frame, so a shape that leaves on one side and returns on the other goes straight on.
    """
    mask = _shape(frames)
    height, width = mask.shape[1:]
    steps = []
    for axis, size in ((1, width), (2, height)):
        profile = mask.sum(axis=axis)
        around = profile @ np.exp(2j * pi * (np.arange(size) + 0.5) / size)
        turned = np.angle(around[1:] * around[:-1].conj())
        steps.append(turned / (2 * pi) * size / min(width, height))
    path = np.concatenate(([0], np.cumsum(steps[0] + 1j * steps[1])))
    centred: NDArray[np.complex128] = path - path.mean()
    return centred
