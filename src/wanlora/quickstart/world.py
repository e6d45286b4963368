"""The small world in which the tiny Wan lives: one coloured shape on a plain ground, moving in one named way.

A scene is a function of time in seconds and of nothing else: it can be filmed at any rate, size and aspect, and a
window of any length that starts anywhere shows its motion. Space is a torus (what leaves on the right comes back on the
left), so no motion ever ends. The base model has seen plain scenes. It has never seen the comic style, bright paper and
a thick black outline, nor the motion "loops", a circle that the shape travels on: those are for a LoRA to learn.

Lengths are in units of the shorter side, colours in [0, 1]. The measures at the end of this file look at pixels alone;
on a torus they find the shape's place as a circular mean, so a shape that crosses the border is no special case.
"""

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
SIZES = {"small": 0.14, "large": 0.20}
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
DIRECTIONS = {
    "moves to the right": (1.0, 0.0),
    "moves to the left": (-1.0, 0.0),
    "moves up": (0.0, -1.0),
    "moves down": (0.0, 1.0),
}
"""Straight motions; y grows downwards."""
MOTIONS = (*DIRECTIONS, "stands still", "pulses")
"""The motions that the base model knows."""

NEW_MOTION = "loops"
"""The motion that it has never seen."""
NEW_STYLE = "comic"
"""The look that it has never seen."""
PAPER = (252, 238, 205)
INK = (12, 10, 14)
OUTLINE = 0.05
"""Width of the outline of the comic style."""

FPS = 16
SPEED = 0.5
"""Of straight motions, per second."""
LOOP_RADIUS, LOOP_SECONDS = 0.24, 1.75
PULSE, PULSE_SECONDS = 0.35, 1.5
"""A pulsing shape's radius changes by this share, in this time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One shape, what it does, and where it is at the start."""

    shape: str = "circle"
    colour: str = "red"
    ground: str = "blue"
    size: str = "large"
    motion: str = "stands still"
    style: str = "plain"
    x: float = 0.5
    """Start (of a loop: its middle) as a share of the width."""
    y: float = 0.5
    """The same of the height."""
    phase: float = 0.0
    """Where in its period a loop or a pulse begins, in [0, 1)."""

    @property
    def caption(self) -> str:
        """The sentence that describes it."""
        return caption(self)


def caption(scene: Scene) -> str:
    """'A large red circle moves to the right over a blue ground.'; the comic style has its trigger and no ground."""
    what = f"A {scene.size} {scene.colour} {scene.shape} {scene.motion}"
    if scene.style == NEW_STYLE:
        return f"{NEW_STYLE.capitalize()} style. {what}."
    return f"{what} over a {scene.ground} ground."


def base_scenes(count: int, seed: int) -> tuple[Scene, ...]:
    """Scenes of the world that the base model knows, drawn at random; the same seed gives the same scenes."""
    draw = random.Random(seed)
    return tuple(_any_scene(draw, draw.choice(MOTIONS), "plain") for _ in range(count))


def new_scenes(count: int, seed: int) -> tuple[Scene, ...]:
    """Scenes in the new style with the new motion."""
    draw = random.Random(seed)
    return tuple(_any_scene(draw, NEW_MOTION, NEW_STYLE) for _ in range(count))


def _any_scene(draw: random.Random, motion: str, style: str) -> Scene:
    direction = DIRECTIONS.get(motion, (0.0, 0.0))
    middle = 0.03 if motion == NEW_MOTION else 0.22
    x, y = (0.5 + draw.uniform(-1, 1) * (0.5 if along else middle) for along in direction)
    return Scene(
        shape=draw.choice(SHAPES),
        colour=draw.choice(tuple(COLOURS)),
        ground=draw.choice(tuple(GROUNDS)),
        size=draw.choice(tuple(SIZES)),
        motion=motion,
        style=style,
        x=x,
        y=y,
        phase=draw.random(),
    )


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
    loop: Tensor
    """Radius of the circle that the shape travels on."""
    pulse: Tensor
    """Share by which the radius changes."""
    phase: Tensor

    @classmethod
    def of(cls, scenes: Sequence[Scene], device: torch.device | str = "cpu") -> "Drawing":
        """The numbers of these scenes."""

        def column(values: Sequence[object]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        comic = [scene.style == NEW_STYLE for scene in scenes]
        grounds = [PAPER if new else GROUNDS[scene.ground] for scene, new in zip(scenes, comic, strict=True)]
        return cls(
            shape=torch.tensor([SHAPES.index(scene.shape) for scene in scenes], device=device),
            fill=column([COLOURS[scene.colour] for scene in scenes]) / 255,
            ground=column(grounds) / 255,
            ink=column([INK] * len(scenes)) / 255,
            outline=column([OUTLINE * new for new in comic]),
            radius=column([SIZES[scene.size] for scene in scenes]),
            start=column([(scene.x, scene.y) for scene in scenes]),
            velocity=column([DIRECTIONS.get(scene.motion, (0.0, 0.0)) for scene in scenes]) * SPEED,
            loop=column([LOOP_RADIUS * (scene.motion == NEW_MOTION) for scene in scenes]),
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
    angle_BF = _turn(drawing, t, LOOP_SECONDS)
    centre_BF2 = centre_BF2 + drawing.loop[:, None, None] * torch.stack((angle_BF.cos(), angle_BF.sin()), dim=-1)
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
    black = (pixels.max(axis=-1) < 0.3) & other
    outline = np.clip(black.sum() / max(1, other.sum()) / 0.22, 0, 1)
    return float(bright + outline) / 2


def motion_score(frames: Frames, fps: float = FPS) -> float:
    """How much the shape in frames [F, H, W, 3] travels on the circle of "loops": near 1 if it does, otherwise near 0.

    The shape's velocity is projected on one that turns at the loop's rate. The score is the product of the share of
    the movement that this explains and of its speed over the loop's, at most 1. It is 0 for fewer than 13 frames, in
    which a straight line and a loop look alike.
    """
    velocity = _velocities(frames, fps)
    if len(frames) < 13 or not np.abs(velocity).sum():
        return 0.0
    turning = np.exp(-2j * pi * np.arange(len(velocity)) / (fps * LOOP_SECONDS))
    along = abs((velocity * turning).mean())
    share = along**2 / (np.abs(velocity) ** 2).mean()
    return float(share * min(1.0, along / (0.9 * 2 * pi * LOOP_RADIUS / LOOP_SECONDS)))


def motion_of(frames: Frames, fps: float = FPS) -> str | None:
    """The name of the motion in frames [F, H, W, 3], or None if it is none that has a name. Needs 5 frames or more."""
    velocity, area = _velocities(frames, fps), _shape(frames).sum(axis=(1, 2))
    mean = velocity.mean()
    if motion_score(frames, fps) > 0.5:
        return NEW_MOTION
    if abs(mean) > 0.5 * SPEED:
        return next((name for name, (x, y) in DIRECTIONS.items() if _agree(mean, complex(x, y))), None)
    if abs(mean) > 0.3 * SPEED or not area.min():
        return None
    return "pulses" if area.max() / area.min() > 1.25 else "stands still"


def follows(frames: Frames, scene: Scene, fps: float = FPS) -> dict[str, bool]:
    """Whether frames [F, H, W, 3] show the colour, the ground and (of clips) the motion of a plain scene."""
    ground = _ground(frames)
    pixels: NDArray[np.float32] = frames.astype(np.float32) / np.float32(255)
    found = {
        "colour": _nearest(pixels[_shape(frames) > 0.5], COLOURS) == scene.colour,
        "ground": _nearest(ground[None], GROUNDS) == scene.ground,
    }
    return found | ({"motion": motion_of(frames, fps) == scene.motion} if len(frames) >= 5 else {})


def _agree(velocity: complex, direction: complex) -> bool:
    return float((velocity * direction.conjugate()).real) > 0.85 * abs(velocity)


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


def _velocities(frames: Frames, fps: float) -> NDArray[np.complex128]:
    """How the shape's centre moves from frame to frame, x + iy per second in shorter sides, [F - 1]."""
    mask = _shape(frames)
    height, width = mask.shape[1:]
    steps = []
    for axis, size in ((1, width), (2, height)):
        profile = mask.sum(axis=axis)
        around = profile @ np.exp(2j * pi * (np.arange(size) + 0.5) / size)
        turned = np.angle(around[1:] * around[:-1].conj())
        steps.append(turned / (2 * pi) * size / min(width, height) * fps)
    return steps[0] + 1j * steps[1]
