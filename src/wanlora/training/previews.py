"""Sample prompts drawn while training: at the start, every so many steps or epochs.

A preview borrows the model and gives everything back as it was: train mode, random generators, attention kernel,
memory. One that fails is reported and training goes on. Several processes share the prompts out among them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from wanlora.config.outputs import PreviewConfig
from wanlora.foundation.garbage import return_memory
from wanlora.foundation.log import log
from wanlora.generation.pipeline import decode_frames, sample_latents
from wanlora.generation.requests import PreviewRequest
from wanlora.generation.writing import preview_path, write_frames
from wanlora.memory.fitting import FittedVAE
from wanlora.training.build import Trainee
from wanlora.training.engine import Engine
from wanlora.training.optimizers import set_mode
from wanlora.training.position import Position


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewMaterials:
    """What previews need besides the model."""

    requests: Sequence[PreviewRequest]
    texts: Mapping[str, Tensor]
    """Embedding [T, D] of every prompt and negative prompt, on the CPU."""
    vae: FittedVAE | None
    """On the CPU; None if there are no prompts."""


class Previews:
    """Draws the prompts when they are due."""

    def __init__(
        self,
        config: PreviewConfig,
        materials: PreviewMaterials,
        trainee: Trainee,
        optimizer: Optimizer,
        engine: Engine,
        *,
        output_dir: Path,
        output_name: str,
        kernel: str,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        """`make_room` is called before any is drawn."""
        self.config = config
        self.materials = materials
        self.trainee = trainee
        self.optimizer = optimizer
        self.engine = engine
        self.output_dir = output_dir
        self.output_name = output_name
        self.kernel = kernel
        self.make_room = make_room

    def at_first(self, position: Position) -> None:
        """Before the first step, if asked for; not when a run is resumed."""
        if self.config.sample_at_first and position.step == 0:
            self._draw_all(step=0)

    def is_due(self, position: Position, *, epoch_ended: bool) -> bool:
        """Whether prompts are drawn after the step that led to `position`."""
        every_steps = self.config.sample_every_n_steps
        return self._ends_span(position, epoch_ended) or bool(every_steps and position.step % every_steps == 0)

    def when_due(self, position: Position, *, epoch_ended: bool) -> None:
        """After a step: once, also when a step and an epoch fall due together."""
        if self._ends_span(position, epoch_ended):
            self._draw_all(epoch=position.epoch)
        elif self.is_due(position, epoch_ended=epoch_ended):
            self._draw_all(step=position.step)

    def _ends_span(self, position: Position, epoch_ended: bool) -> bool:
        """Whether so many epochs have ended that previews are due."""
        every_epochs = self.config.sample_every_n_epochs
        return bool(epoch_ended and every_epochs and position.epoch % every_epochs == 0)

    def _draw_all(self, *, step: int | None = None, epoch: int | None = None) -> None:
        indexes = range(len(self.materials.requests))
        if not indexes:
            return
        with self._borrowed():
            for index in self.engine.rank.share(indexes):
                try:
                    path = self._draw(index, step, epoch)
                except Exception as error:  # whatever it is, a picture is not worth a run
                    log.warning(f"preview {index + 1} failed and is left out; training goes on: {error}")
                    self._forget_failed_pass()
                else:
                    log.info(f"preview {index + 1}: {path}")
        self.engine.wait()

    def _draw(self, index: int, step: int | None, epoch: int | None) -> Path:
        request, vae, device = self.materials.requests[index], self.materials.vae, self.engine.device
        assert vae is not None
        negative = None if request.negative_prompt is None else self.materials.texts[request.negative_prompt]
        with tqdm(total=request.steps, desc=f"preview {index + 1}", leave=False) as bar:
            latents = sample_latents(
                self.trainee.model,
                self.materials.texts[request.prompt],
                negative,
                latent=request.latent,
                steps=request.steps,
                shift=request.shift,
                guidance=request.guidance,
                seed=request.seed,
                device=device,
                solver=self.config.sample_solver,
                progress=lambda done, total: _advance(bar),
            )
        vae.to(device)
        try:
            frames = decode_frames(vae, latents)
        finally:
            vae.to("cpu")
        path = preview_path(
            self.output_dir,
            self.output_name,
            index=index,
            seed=request.seed,
            when=datetime.now(),
            num_frames=len(frames),
            step=step,
            epoch=epoch,
        )
        write_frames(path, frames, fps=request.fps, recipe=request.recipe)
        return path

    @contextmanager
    def _borrowed(self) -> Iterator[None]:
        """The model as previews use it; afterwards as it was, and the card's spare memory returned."""
        model, kernel = self.trainee.model, self.trainee.model.attention
        set_mode(self.optimizer, training=False)
        model.attention = self.kernel
        self.make_room()
        try:
            yield
        finally:
            model.attention = kernel
            set_mode(self.optimizer, training=True)
            return_memory(self.engine.device)

    def _forget_failed_pass(self) -> None:
        if self.trainee.stream is not None:
            self.trainee.stream.reset()


def _advance(bar: "tqdm[Any]") -> None:
    bar.update()
