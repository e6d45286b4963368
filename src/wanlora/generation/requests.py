"""What exactly is to be sampled: a user's prompt with every gap filled.

Gaps are filled with what the model's authors sample with: shift, guidance, negative prompt. A seed is chosen where none
is given, once, so that the previews of a run can be compared; it stands in their file names.
"""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from wanlora.config.prompts import SamplePrompt
from wanlora.foundation.shapes import LatentShape, PixelShape
from wanlora.models.wan.negative import NEGATIVE_PROMPT
from wanlora.models.wan.spec import WanSpec

_SEEDS = 2**32


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewRequest:
    """One picture or clip to sample."""

    prompt: str
    """What to show."""
    negative_prompt: str | None
    """What to stay away from; None where guidance is off."""
    pixels: PixelShape
    """Size of the result."""
    seed: int
    """Seed of the noise."""
    steps: int
    """Sampling steps."""
    shift: float
    """Shift of the sampling grid towards noise."""
    guidance: float
    """Weight of classifier-free guidance; 1 is off."""
    fps: int
    """Frames per second of the clip."""
    where: str
    """Where the prompt stands, for messages."""

    @property
    def latent(self) -> LatentShape:
        """Size of the latents."""
        return LatentShape.of(self.pixels)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts to encode before sampling."""
        return (self.prompt,) if self.negative_prompt is None else (self.prompt, self.negative_prompt)

    @property
    def recipe(self) -> str:
        """The prompt line that gives this very result again (no line can ask for an empty negative prompt)."""
        pixels = self.pixels
        line = f"{self.prompt} --w {pixels.width} --h {pixels.height} --f {pixels.frames} --d {self.seed}"
        line += f" --s {self.steps} --fs {self.shift:g} --l {self.guidance:g}"
        return line if self.negative_prompt is None else f"{line} --n {self.negative_prompt}"


def resolve(prompt: SamplePrompt, spec: WanSpec) -> PreviewRequest:
    """The request that `prompt` makes of the task `spec`."""
    guidance = spec.guidance if prompt.cfg_scale is None else prompt.cfg_scale
    negative = NEGATIVE_PROMPT if prompt.negative_prompt is None else prompt.negative_prompt
    return PreviewRequest(
        prompt=prompt.prompt,
        negative_prompt=None if guidance == 1.0 else negative,
        pixels=PixelShape(prompt.width, prompt.height, prompt.frame_count),
        seed=secrets.randbelow(_SEEDS) if prompt.seed is None else prompt.seed,
        steps=prompt.sample_steps,
        shift=spec.shift if prompt.discrete_flow_shift is None else prompt.discrete_flow_shift,
        guidance=guidance,
        fps=spec.fps,
        where=prompt.where,
    )


def resolve_all(prompts: Iterable[SamplePrompt], spec: WanSpec) -> tuple[PreviewRequest, ...]:
    """`resolve` for each prompt, in their order."""
    return tuple(resolve(prompt, spec) for prompt in prompts)
