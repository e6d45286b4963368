"""A whole training run, from checked settings to the last file."""

import os
import secrets

import torch
from torch.optim import Optimizer

from wanlora.config.train import TrainConfig
from wanlora.data.loader import make_loader
from wanlora.data.order import BatchSpec, epoch_batches
from wanlora.diffusion.weighting import LOSS_WEIGHTINGS
from wanlora.foundation.bytecode import missing_bytecode
from wanlora.foundation.driver import starting_card
from wanlora.foundation.dtypes import parse_dtype
from wanlora.foundation.errors import MemoryPlanError
from wanlora.foundation.laps import start
from wanlora.foundation.log import log
from wanlora.foundation.random import Streams
from wanlora.memory.compile import abandon_compiling
from wanlora.memory.fitting import FittedVAE
from wanlora.memory.limit import CardLimit, limit_card
from wanlora.memory.marks import marks_for
from wanlora.memory.measure import MemorySettings, explain_out_of_memory, is_out_of_memory, memory_figures
from wanlora.models.wan.vae import load_vae
from wanlora.quantization.fast_linear import fast_layers
from wanlora.training.after_step import AfterStep
from wanlora.training.ahead import steps_ahead
from wanlora.training.announce import announce, show_timesteps
from wanlora.training.build import Trainee, build_trainee, keep_transposed
from wanlora.training.checkpoints import Checkpoints
from wanlora.training.conditioning import encode_texts
from wanlora.training.engine import Engine, set_backends
from wanlora.training.flat import FlatGroups
from wanlora.training.forecast import Forecast, PeakForecast, TimeForecast, sizes_of_epoch
from wanlora.training.fp8_check import check_fp8_maths, sample_batches
from wanlora.training.graphs import choose_replays
from wanlora.training.guard import MemoryGuard, describe
from wanlora.training.interrupts import Interrupts
from wanlora.training.loop import Feed, Trainer
from wanlora.training.metrics import Metrics, StepLog
from wanlora.training.objective import FlowObjective, Noise
from wanlora.training.optimizers import ParameterGroups, set_mode, state_bytes
from wanlora.training.pace import Pace
from wanlora.training.plan import make_outlook
from wanlora.training.planning import card_to_start, log_plan, present_target, settle
from wanlora.training.position import last_step, steps_per_epoch
from wanlora.training.prepare import Prepared, prepare
from wanlora.training.previews import PreviewMaterials, Previews
from wanlora.training.rates import ForeignRates, PureRates, Rates
from wanlora.training.record import FileRecord
from wanlora.training.saver import Saver, refuse_state_by_matrix, restore
from wanlora.training.schedules import Factor, build_schedule
from wanlora.training.settings import all_settings
from wanlora.training.state import load_state
from wanlora.training.step import TrainingStep
from wanlora.training.trackers import Trackers, run_folder, wanted_trackers
from wanlora.training.trial import Trial
from wanlora.training.validation import Validation, ValidationSet


def train(config: TrainConfig) -> None:
    """Check, build, train, save. Raises a `UserError` for everything that the user can mend."""
    if config.run.show_timesteps is not None:
        show_timesteps(config)
        return
    start.begin()
    start.lap("imports")
    with starting_card(card_to_start(config)):
        prepared = prepare(config)
    announce(config, prepared)
    with start.part("card"):
        target = present_target(config)
    config, prepared = settle(config, prepared, target)
    if config.run.dry_run:
        log_plan(config, prepared, target)
        log.info("dry run: everything is in order; nothing was loaded or written")
        return
    folder = run_folder(config.logging)
    start.lap("checks")
    engine = Engine.start(config.run, log_with=wanted_trackers(config.logging), logging_dir=folder)
    try:
        Run(config, prepared, engine).train()
    finally:
        engine.close()


class Run:
    """One run on one process: its parts are made in order, then the trainer takes over."""

    def __init__(self, config: TrainConfig, prepared: Prepared, engine: Engine) -> None:
        self.config = config
        self.prepared = prepared
        self.engine = engine
        self.resumed = prepared.resume.record if prepared.resume else None
        self.position = prepared.start
        self.seed = self._choose_seed()
        self.streams = Streams(self.seed)
        self.epoch_length = prepared.plan.num_batches
        self.batches_per_step = config.run.gradient_accumulation_steps * engine.rank.count
        self.steps_per_epoch = steps_per_epoch(self.epoch_length, self.batches_per_step)
        self.total_steps = self._count_steps()
        self.guard = MemoryGuard(engine.device)

    def train(self) -> None:
        """Build everything and train to the last step."""
        if self.position.step >= self.total_steps:
            log.info(f"nothing to do: {self.position.step} of {self.total_steps} steps are done")
            return
        set_backends(self.config.run)
        memory = self.config.memory
        card = limit_card(self.engine.device, reserve=memory.vram_reserve, at_most=memory.vram_limit)
        start.lap("device")
        try:
            trainer = self._build(card)
            log.info(f"steps {self.position.step + 1} to {self.total_steps}, seed {self.seed}, on {self.engine.device}")
            log.info(start.finish())
            if compiled := missing_bytecode(torch):
                log.warning(compiled)
            trainer.train()
        except KeyboardInterrupt:
            abandon_compiling()
            raise
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryPlanError(self._explain()) from error

    def _build(self, card: CardLimit | None) -> Trainer:
        """Everything in its order; what has to be on the card only for a while comes first."""
        state = load_state(self.prepared.resume.folder) if self.prepared.resume else None
        if state and self.prepared.optimizer.treats_numbers_alone:
            refuse_state_by_matrix(state)
        start.lap("state")
        materials = self._preview_materials()
        start.lap("prompts and VAE")
        trainee = build_trainee(
            self.config, self.prepared, self.engine.device, self.streams, quiet=not self.engine.rank.is_main, card=card
        )
        self.guard = self._guard(trainee)
        step = self._step(trainee, self.guard)
        if state:
            restore(state, trainee.network, step, self.config.optimizer.kwargs)
        set_mode(step.optimizer, training=True)
        start.lap("optimizer")
        if fast_layers(trainee.model):
            batches = sample_batches(self.prepared.plan, self._order(0))
            check_fp8_maths(trainee, step.objective, batches, self.engine)
            start.lap("fp8 check")
            self.guard.transposed = keep_transposed(self.config.memory, trainee.model)
            start.lap("transposed weights")
        trainer = self._trainer(trainee, step, materials)
        start.lap("logs and loader")
        return trainer

    def _count_steps(self) -> int:
        epochs = self.config.run.max_train_epochs
        if epochs is None:
            return self.config.run.max_train_steps
        return last_step(epochs, self.position, epoch_length=self.epoch_length, batches_per_step=self.batches_per_step)

    def _choose_seed(self) -> int:
        """The state's, the user's, or a drawn one that all processes share."""
        asked = self.config.run.seed
        if self.resumed:
            kept = self.resumed.seed
            if asked not in (None, kept):
                log.warning(f"--seed {asked}: the resumed run keeps its own seed, {kept}")
            return kept
        return int(self.engine.from_main(secrets.randbelow(2**31) if asked is None else asked))

    def _preview_materials(self) -> PreviewMaterials:
        """Encode the prompts and read the VAE before the transformer takes the memory."""
        requests, model = self.prepared.requests, self.config.model
        if not requests:
            return PreviewMaterials(requests=(), texts={}, vae=None)
        texts = [text for request in requests for text in request.texts]
        main = self.engine.rank.is_main
        encoded = self.engine.from_main(encode_texts(texts, model, self.engine.device) if main else None)
        assert model.vae is not None
        dtype = parse_dtype(model.vae_dtype or "float32")
        vae = load_vae(model.vae, device=torch.device("cpu"), dtype=dtype, cache_on_cpu=model.vae_cache_cpu)
        # A seed that the prompt leaves open was drawn by each process for itself; the main process' holds for all.
        fitted = FittedVAE(vae, tiling=model.vae_tiling)
        return PreviewMaterials(requests=self.engine.from_main(requests), texts=encoded, vae=fitted)

    def _guard(self, trainee: Trainee) -> MemoryGuard:
        return MemoryGuard(
            self.engine.device,
            keeping=trainee.keeping,
            recompute=trainee.recompute,
            stream=trainee.stream,
            by_size=self.prepared.swapped,
            retry=self.config.memory.on_oom == "retry",
        )

    def _step(self, trainee: Trainee, guard: MemoryGuard) -> TrainingStep:
        config, device = self.config, self.engine.device
        noise = Noise(self.streams, self.prepared.timesteps, self._batch_sizes)
        weight = LOSS_WEIGHTINGS.get(config.timesteps.weighting_scheme)
        groups = self._groups(trainee)
        narrow = trainee.network, trainee.dtype
        flat = FlatGroups(groups, *narrow) if self.prepared.optimizer.treats_numbers_alone else None
        optimizer = self.prepared.optimizer.build(flat.groups if flat else groups)
        guard.spare = replays = choose_replays(config, trainee, flat, device)
        return TrainingStep(
            objective=FlowObjective(trainee.model, noise, weight, device),
            parameters=flat.vectors if flat else trainee.network.parameters(),
            flat=flat,
            optimizer=optimizer,
            rates=self._rates(optimizer),
            engine=self.engine,
            streams=self.streams,
            max_grad_norm=config.optimizer.max_grad_norm,
            scaler=torch.amp.GradScaler(device.type) if trainee.dtype is torch.float16 else None,
            guard=guard,
            replays=replays,
        )

    def _groups(self, trainee: Trainee) -> ParameterGroups:
        ratio = self.config.network.args.loraplus_lr_ratio
        groups = trainee.network.groups(self.config.optimizer.learning_rate, ratio)
        if self.prepared.optimizer.arguments["lr"] is None:  # the optimizer finds its own
            groups = [{**group, "lr": None} for group in groups]
        return groups

    def _rates(self, optimizer: Optimizer) -> Rates:
        schedule = self.config.schedule
        if schedule.lr_scheduler_type is not None:
            return ForeignRates(optimizer, schedule.lr_scheduler_type, schedule.kwargs)
        factor, step = self._factor(self.total_steps), self.position.step
        if self.resumed:
            before = self._factor(self.resumed.total_steps)(step)
            if factor(step) != before:
                log.info(
                    f"the run now ends at step {self.total_steps} instead of {self.resumed.total_steps}: the learning "
                    f"rate goes on at {factor(step):.3g} of its base instead of {before:.3g}"
                )
        return PureRates(optimizer, factor)

    def _factor(self, total: int) -> Factor:
        """The learning rate's schedule over `total` steps."""
        return build_schedule(
            self.config.schedule,
            total=total,
            base_rate=self.config.optimizer.learning_rate,
            constant_rate=self.prepared.optimizer.constant_rate,
        )

    def _trainer(self, trainee: Trainee, step: TrainingStep, materials: PreviewMaterials) -> Trainer:
        saving, main = self.config.saving, self.engine.rank.is_main
        assert saving.output_dir is not None and saving.output_name is not None
        steps_file = saving.output_dir / f"{saving.output_name}-steps.jsonl"
        metrics = Metrics(
            position=self.position,
            total_steps=self.total_steps,
            window=self.steps_per_epoch,
            tracker=Trackers(self.engine, self.config.logging, all_settings(self.config)),
            log=StepLog(steps_file, first_step=self.position.step) if main else None,
            losses=self.resumed.losses if self.resumed else [],
        )
        validation = self._validation(trainee, step, metrics)
        previews = Previews(
            self.config.previews,
            materials,
            trainee,
            step.optimizer,
            self.engine,
            output_dir=saving.output_dir,
            output_name=saving.output_name,
            kernel=self.config.attention.preview_kernel,
            make_room=step.make_room,
        )
        return Trainer(
            feed=self._feed(),
            step=step,
            after_step=AfterStep(trainee.network, self.config.network.scale_weight_norms),
            pace=Pace(trainee.keeping.meter, marks_for(self.engine.device)),
            forecasts=self._forecasts(trainee) if main else (),
            trial=self._trial(step),
            metrics=metrics,
            validation=validation,
            previews=previews,
            checkpoints=self._checkpoints(trainee, step, metrics, validation) if main else None,
            interrupts=Interrupts(self.engine),
            position=self.position,
            total_steps=self.total_steps,
            ahead=steps_ahead(self.config, self.engine),
        )

    def _forecasts(self, trainee: Trainee) -> list[Forecast]:
        """What was foretold of this run's steps."""
        sizes = sizes_of_epoch(self.prepared.plan)
        forecasts: list[Forecast] = [TimeForecast(sizes)]
        if trainee.keeping.meter is not None:
            target = present_target(self.config)
            outlook = make_outlook(self.config, self.prepared, target, dtype=trainee.dtype)
            forecasts.append(PeakForecast(outlook, sizes))
        return forecasts

    def _validation(self, trainee: Trainee, step: TrainingStep, metrics: Metrics) -> Validation:
        plan, config = self.prepared.plan.validation, self.config.validation
        samples = None
        if plan is not None:
            weighting = self.config.timesteps.weighting_scheme
            samples = ValidationSet(plan, self.prepared.timesteps, weighting, num_levels=config.validation_levels)
        return Validation(
            config,
            samples,
            objective=step.objective,
            network=trainee.network,
            stream=trainee.stream,
            optimizer=step.optimizer,
            engine=self.engine,
            metrics=metrics,
            standing=self.resumed.validation if self.resumed else None,
            make_room=step.make_room,
        )

    def _feed(self) -> Feed:
        run = self.config.run
        loader = make_loader(
            self.prepared.plan,
            num_workers=min(run.max_data_loader_n_workers, os.cpu_count() or 1),
            persistent=run.persistent_data_loader_workers,
            pin_memory=self.engine.device.type == "cuda",
        )
        return Feed(self._order, loader.use, self.engine.rank, self.batches_per_step)

    def _order(self, epoch: int) -> tuple[BatchSpec, ...]:
        return epoch_batches(self.prepared.plan, self.streams, epoch)

    def _batch_sizes(self, epoch: int) -> list[int]:
        return [len(batch.indexes) for batch in self._order(epoch)]

    def _checkpoints(
        self, trainee: Trainee, step: TrainingStep, metrics: Metrics, validation: Validation
    ) -> Checkpoints:
        describe = FileRecord(
            self.config,
            self.prepared,
            seed=self.seed,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            num_parameters=trainee.network.num_parameters,
        )
        saver = Saver(
            self.config,
            network=trainee.network,
            step=step,
            metrics=metrics,
            validation=validation,
            describe=describe,
            seed=self.seed,
            epoch_length=self.epoch_length,
            total_steps=self.total_steps,
        )
        return Checkpoints(
            self.config.saving,
            save_model=saver.save_model,
            save_state=saver.save_state,
            total_steps=self.total_steps,
            saved=self._saved_before(),
        )

    def _saved_before(self) -> list[str]:
        """What the resumed run has written into this folder; files of the same names elsewhere are not its own."""
        resume, here = self.prepared.resume, self.config.saving.output_dir
        assert here is not None
        return list(resume.record.saved) if resume and resume.folder.resolve().parent == here.resolve() else []

    def _trial(self, step: TrainingStep) -> Trial | None:
        asked = self.config.memory.trial_step
        if asked is False or (asked is None and self.engine.device.type != "cuda"):
            return None
        return Trial(self.prepared.plan, step, state_bytes=state_bytes(self.prepared.optimizer))

    def _explain(self) -> str:
        """What did not fit, and which setting to change."""
        memory, guard = self.config.memory, self.guard
        settings = MemorySettings(
            gradient_checkpointing=memory.gradient_checkpointing,
            offload=memory.gradient_checkpointing_cpu_offload,
            fp8=memory.fp8_mode is not None,
            blocks_to_swap=memory.num_swapped,
            num_blocks=self.prepared.transformer.sizes.num_layers,
            num_kept=guard.kept.blocks,
            attention_kept=guard.kept.attention,
            retried=memory.on_oom == "retry",
            transposed=guard.transposed.are_kept,
            limited=memory.vram_limit is not None,
        )
        figures = guard.figures or memory_figures(self.engine.device)
        return explain_out_of_memory(figures, settings, bucket=describe(guard.working), clips=guard.working.names)
