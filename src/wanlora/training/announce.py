"""What a run says before it starts: the data, the length, and everything that is not as a user might think."""

import os
from pathlib import Path

from wanlora.config.outputs import ValidationConfig
from wanlora.config.train import TrainConfig
from wanlora.data.checks import remarks
from wanlora.data.plan import DataPlan
from wanlora.data.report import report_lines
from wanlora.diffusion.corrections import notices
from wanlora.diffusion.timesteps import TimestepPlan, build_plan
from wanlora.foundation.errors import ConfigError
from wanlora.foundation.files import atomic_path
from wanlora.foundation.log import log, say_once
from wanlora.foundation.shapes import LatentShape, PixelShape
from wanlora.lora.files import warn_partial
from wanlora.training.position import last_step, steps_per_epoch
from wanlora.training.prepare import Prepared
from wanlora.training.settings import decisive_settings, differences, timestep_settings

_BARS = 20
_EXAMPLE = PixelShape(832, 480, 81)


def announce(config: TrainConfig, prepared: Prepared) -> None:
    """Log the data, the length of the run, and every notice about its settings."""
    for line in (*report_lines(prepared.plan), *remarks(prepared.plan)):
        log.info(line)
    _announce_validation(config, prepared.plan)
    for shape in prepared.plan.shapes:
        notice = prepared.timesteps.notice(LatentShape.of(shape))
        if notice:
            say_once(notice)
    for notice in notices(**timestep_settings(config.timesteps)):
        say_once(notice)
    if prepared.partial:
        warn_partial(config.saving.save_format)
    if prepared.resume:
        record = prepared.resume.record
        done = record.position
        log.info(
            f"resuming {prepared.resume.folder}: {done.epoch} epochs and {done.batch} batches done, step {done.step}"
        )
        if record.epoch_length != prepared.plan.num_batches:
            log.warning(
                f"the dataset has changed: {prepared.plan.num_batches} batches an epoch instead of "
                f"{record.epoch_length}; epoch {done.epoch + 1} begins anew"
            )
        changed = differences(record.settings, decisive_settings(config))
        if changed:
            log.warning(f"the resumed run differs from the saved one: {'; '.join(changed)}")
    log.info(f"training {config.model.task} for {run_length(config, prepared)}")


def run_length(config: TrainConfig, prepared: Prepared) -> str:
    """Epochs and steps, one told by the other."""
    run, epoch_length = config.run, prepared.plan.num_batches
    batches = run.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    each = steps_per_epoch(epoch_length, batches)
    if run.max_train_epochs is None:
        length = f"{_counted(run.max_train_steps, 'step')}, {each} an epoch ({run.max_train_steps / each:.3g} epochs)"
    else:
        total = last_step(run.max_train_epochs, prepared.start, epoch_length=epoch_length, batches_per_step=batches)
        length = f"{_counted(run.max_train_epochs, 'epoch')} of {_counted(each, 'step')}, {total} in all"
    return length + (f"; {batches} batches a step" if batches > 1 else "")


def _announce_validation(config: TrainConfig, plan: DataPlan) -> None:
    """When the validation loss is measured and what it costs; or that there is nothing to measure it on."""
    settings, default = config.validation, ValidationConfig()
    if plan.validation is None:
        for name in ("validate_every_n_steps", "validate_every_n_epochs", "validation_levels"):
            if getattr(settings, name) != getattr(default, name):
                say_once(f"--{name} changes nothing: {plan.path.name} has no [[validation]]")
        return
    samples, batches, levels = plan.validation.num_samples, plan.validation.num_batches, settings.validation_levels
    batched = "" if batches == samples else f" in {batches} batches"
    log.info(
        f"validation: {_counted(samples, 'sample')}{batched} x {_counted(levels, 'level')} = "
        f"{batches * levels} forward passes each time"
    )
    every = ((settings.validate_every_n_steps, "step"), (settings.epochs_between, "epoch"))
    times = [f"every {unit if number == 1 else _counted(number, unit)}" for number, unit in every if number]
    law = config.timesteps.timestep_sampling
    log.info(
        f"validation: before the first step, after {' and '.join(times)} and at the end; noise levels as in training, "
        f"by --timestep_sampling {law}"
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def show_timesteps(config: TrainConfig) -> None:
    """Show how often each noise level is drawn, on the console or as `<output_name>-timesteps.png`."""
    plan = build_plan(**timestep_settings(config.timesteps))
    shares = level_shares(plan, LatentShape.of(_EXAMPLE))
    log.info(f"share of draws by timestep, for clips of {_EXAMPLE} (width x height x frames):")
    widest = max(shares)
    for number, share in enumerate(shares):
        low, high = (number * 1000 // _BARS, (number + 1) * 1000 // _BARS)
        log.info(f"{low:4d} to {high:4d}  {share:6.1%}  {'#' * round(50 * share / widest)}")
    if config.run.show_timesteps == "image":
        if config.saving.output_dir is None or config.saving.output_name is None:
            raise ConfigError("--show_timesteps image needs --output_dir and --output_name, to know where to write it")
        path = config.saving.output_dir / f"{config.saving.output_name}-timesteps.png"
        draw_bars(shares, path)
        log.info(f"saved {path}")


def level_shares(plan: TimestepPlan, latent: LatentShape) -> list[float]:
    """The share of draws in each of 20 equal ranges of the noise level."""
    return [plan.share(latent, number / _BARS, (number + 1) / _BARS) for number in range(_BARS)]


def draw_bars(shares: list[float], path: Path) -> None:
    """A bar for each share, low noise on the left."""
    from PIL import Image, ImageDraw  # no other start needs them

    width, height, margin = 32, 320, 24
    picture = Image.new("RGB", (width * len(shares) + 2 * margin, height + 2 * margin), "white")
    draw = ImageDraw.Draw(picture)
    for number, share in enumerate(shares):
        left, top = margin + number * width, margin + height - round(height * share / max(shares))
        draw.rectangle((left + 2, top, left + width - 2, margin + height), fill="steelblue")
        draw.text((left, margin + height + 4), str(number * 1000 // len(shares)), fill="black")
    with atomic_path(path) as temporary:
        picture.save(temporary, format="png")
