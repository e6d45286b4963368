"""When LoRA files and states are written, what they are called, and which older ones give way.

Names are those musubi's users know: `style-000003.safetensors` after epoch 3, `style-step00001500.safetensors` after
step 1500, `style.safetensors` at the end; a state is a folder of the same name with `-state`. An older file is removed
only after a newer one has been written and read back, and only if this run (or the run it resumes) wrote it. A disk
that is full in the middle of a run does not end it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wanlora.config.outputs import SavingConfig
from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.log import log
from wanlora.training.position import Position
from wanlora.training.state import STATE_SUFFIX, remove_state

SaveModel = Callable[[Path, Position], None]
SaveState = Callable[[Path, Position, list[str]], None]


@dataclass(frozen=True, slots=True)
class Due:
    """One save that has fallen due."""

    stem: str
    kind: str
    """epoch, step or end."""
    number: int


class Checkpoints:
    """Saves a run as its flags say (main process only)."""

    def __init__(
        self,
        config: SavingConfig,
        *,
        save_model: SaveModel,
        save_state: SaveState,
        total_steps: int,
        saved: list[str] | None = None,
    ) -> None:
        assert config.output_dir is not None and config.output_name is not None
        self.config = config
        self.folder: Path = config.output_dir
        self.name: str = config.output_name
        self.save_model = save_model
        self.save_state = save_state
        self.total_steps = total_steps
        self.saved = saved if saved is not None else []
        self.last_state: tuple[Position, Path] | None = None
        """The state written last, and what it holds."""
        self.finished = False
        """The last file of the run has been written."""

    def is_due(self, position: Position, *, epoch_ended: bool) -> bool:
        """Whether something is saved at `position`."""
        return position.step >= self.total_steps or bool(self._due(position, epoch_ended))

    def when_due(self, position: Position, *, epoch_ended: bool) -> None:
        """Save what falls due at `position`: the finished run, or a file and a state on the way."""
        if position.step >= self.total_steps:
            self._write_last(position)
            return
        for due in self._due(position, epoch_ended):
            try:
                self._write(due.stem, position, with_state=self.config.save_state)
            except OSError as error:
                log.warning(f"{self.folder / due.stem} could not be saved whole ({error}); training goes on")
            else:
                self._retire(due)

    def when_stopped(self, position: Position) -> Path:
        """Save an interrupted run, state included, unless that has been done; returns the state's folder.

        After its last step it gets the names of a finished one.
        """
        if self.last_state is None or self.last_state[0] != position:
            ends = position.step >= self.total_steps
            self._write(self.name if ends else f"{self.name}-step{position.step:08d}", position, with_state=True)
            self.finished = ends
        assert self.last_state is not None
        return self.last_state[1]

    def _write_last(self, position: Position) -> None:
        """The finished run. Raises `CheckpointError` if the disk refuses the LoRA; the state is worth less."""
        try:
            self._write(self.name, position, with_state=False)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / self.name}.safetensors, the end of the run, could not be saved ({error}); free or "
                "mend the disk; --resume latest goes on from the newest whole state"
            ) from error
        self.finished = True
        if self.config.save_state or self.config.save_state_on_train_end:
            try:
                self._write_state(self.name, position)
            except OSError as error:
                log.warning(f"{self.folder / self.name}{STATE_SUFFIX} could not be saved ({error}); the LoRA is whole")

    def _due(self, position: Position, epoch_ended: bool) -> list[Due]:
        due = []
        every_steps, every_epochs = self.config.save_every_n_steps, self.config.save_every_n_epochs
        if every_steps and position.step % every_steps == 0:
            due.append(Due(f"{self.name}-step{position.step:08d}", "step", position.step))
        if epoch_ended and every_epochs and position.epoch % every_epochs == 0:
            due.append(Due(f"{self.name}-{position.epoch:06d}", "epoch", position.epoch))
        return due

    def _write(self, stem: str, position: Position, *, with_state: bool) -> None:
        path = self.folder / f"{stem}.safetensors"
        self.save_model(path, position)
        self._remember(path.name)
        if with_state:
            self._write_state(stem, position)

    def _write_state(self, stem: str, position: Position) -> None:
        folder = self.folder / f"{stem}{STATE_SUFFIX}"
        self.save_state(folder, position, [*self.saved, folder.name])
        self._remember(folder.name)
        self.last_state = position, folder
        log.info(f"saved {folder}")

    def _remember(self, name: str) -> None:
        self.saved = [*(saved for saved in self.saved if saved != name), name]

    def _retire(self, due: Due) -> None:
        """Remove what is older than the flags keep."""
        config = self.config
        if due.kind == "epoch":
            every = config.save_every_n_epochs or 1
            kept = _span(config.save_last_n_epochs, every)
            kept_states = _span(config.save_last_n_epochs_state or config.save_last_n_epochs, every)
        else:
            kept = config.save_last_n_steps
            kept_states = config.save_last_n_steps_state or config.save_last_n_steps
            kept, kept_states = (None if span is None else span + 1 for span in (kept, kept_states))
        for name in list(self.saved):
            number = self._number(name, due.kind)
            span = kept_states if name.endswith(STATE_SUFFIX) else kept
            if number is not None and span is not None and number <= due.number - span:
                self._remove(name)

    def _number(self, name: str, kind: str) -> int | None:
        """The epoch or step in a name of that kind."""
        prefix = f"{self.name}-step" if kind == "step" else f"{self.name}-"
        digits = name.removesuffix(STATE_SUFFIX).removesuffix(".safetensors").removeprefix(prefix)
        return int(digits) if name.startswith(prefix) and digits.isdigit() else None

    def _remove(self, name: str) -> None:
        """Remove a file or a state; one that another program holds open stays, and the next save tries again."""
        path = self.folder / name
        try:
            if path.is_dir():
                remove_state(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            log.warning(f"{path} could not be removed ({error}); newer files take its place all the same")
            return
        self.saved.remove(name)
        log.info(f"removed {path}: newer ones take its place")


def _span(count: int | None, every: int) -> int | None:
    """How far back the last `count` saves reach."""
    return None if count is None else count * every
