"""AMoPOTrainer: transformers.Trainer around the scoring step and the AMoPO loss."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import AutocastKwargs, DistributedType
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from amopo_fast.errors import CheckpointError, DataError, NumbersError, OptionError
from amopo_fast.models.activations import KeepLayers
from amopo_fast.models.check import prepare_model
from amopo_fast.models.choice import choice_of
from amopo_fast.models.config import ModelConfig
from amopo_fast.models.faster_layers import compile_layers
from amopo_fast.models.loading import add_adapter, load_converted
from amopo_fast.models.saving import declare_dtype, in_dtype, prepare_saving, weights_digest
from amopo_fast.models.scoring import score_wrapped
from amopo_fast.optim import choose_optimizer
from amopo_fast.packing.plan import Plan
from amopo_fast.packing.schedule import Collator, PairDataset, PairSizes, PlannedBatches
from amopo_fast.prompts.recipe import Recipe
from amopo_fast.prompts.tokenizer import load_tokenizer
from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.survival.checkpointer import AlreadyFinished, Checkpointer
from amopo_fast.survival.guard import Guard
from amopo_fast.survival.safety import write_arguments
from amopo_fast.survival.signals import EvaluationStopped, Termination
from amopo_fast.training.arguments import check_best_metric
from amopo_fast.training.best_model import LoadsTheBest
from amopo_fast.training.checks import RealLogits, check_data, given_sets, require_pairs
from amopo_fast.training.clipping import clip_step
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.epochs import Description, costs, most_micro_batches, require_one_micro_batch, schedule_of
from amopo_fast.training.head_cache import HeadCache
from amopo_fast.training.inputs import MovesWithoutWaiting
from amopo_fast.training.loading import load_for_training, streamed_weights
from amopo_fast.training.loss_scale import LossScale
from amopo_fast.training.metrics import Meter, evaluation_metrics
from amopo_fast.training.metrics_file import MetricsFile
from amopo_fast.training.model_card import write_model_card
from amopo_fast.training.objective import Batch, Objective, Outcome
from amopo_fast.training.objectives import objective_of
from amopo_fast.training.provenance import describe_run, prepare_serving
from amopo_fast.training.reference import ReferenceLogps, references_of
from amopo_fast.training.resume import continue_schedule, keep_options, options_of, use_values, values_of_groups
from amopo_fast.training.routers import RouterLoss
from amopo_kernels import SequenceStats

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


class AMoPOTrainer(MovesWithoutWaiting, LoadsTheBest, Trainer):
    """Trains a causal LM with AMoPO on tokenized pairs.

    Args:
        model: name, folder or module of a causal LM. Names load in safetensors without remote code.
        args: AMoPOConfig.
        train_dataset, eval_dataset: sequences of PairTokens (`PromptBuilder.tokenize`, `load_data`); for
            evaluation also several by name, whose metrics are named eval_NAME_....
        dimensions: the K dimensions' names, in the order of `PairTokens.prompts`.
        processing_class: the tokenizer, saved with every checkpoint; loaded from `model` if that is a name.
        recipe: how the pairs became prompts (`load_data(...).recipe`): with it every folder that is written holds
            amopo_recipe.json and a chat template that asks for the dimensions.
        peft_config: train a new adapter (LoRA) over the frozen model. A PeftModel is trained as it is.

    Raises:
        ValueError: a pair whose number of dimensions is not K, or no training pairs.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: AMoPOConfig,
        *,
        dimensions: Sequence[str],
        train_dataset: Sequence[PairTokens] | None = None,
        eval_dataset: Sequence[PairTokens] | dict[str, Sequence[PairTokens]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        recipe: Recipe | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs,
    ):
        evals = given_sets(args, model, dimensions, train_dataset, eval_dataset, kwargs)
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model)
            model = load_for_training(ModelConfig(model), args, train_dataset, adapter=peft_config is not None)
        if peft_config is not None:
            set_seed(args.seed)  # Trainer's own comes after the adapter's weights were drawn
            model = add_adapter(model, peft_config)
        rate = args.settle_learning_rate(adapter=hasattr(model, "peft_config"))
        prepare_saving(model)
        self.objective = objective_of(args, dimensions)
        base, self.recipe = weights_digest(model), recipe
        if recipe is not None:
            self.recipe = describe_run(recipe, model, base, processing_class, self.objective)
            processing_class = prepare_serving(recipe, model, processing_class)
        prepare_model(model, args.layout)
        choice = choice_of(model)
        self.streamed = streamed_weights(model, args)
        self.routers, self.head_cache = RouterLoss(args.router_aux_loss_coef, model), HeadCache(args)
        if args.compile_layers:
            compile_layers(model)
        check_best_metric(args, dimensions, [name for name, pairs in evals.items() if len(pairs)])
        check_data([train_dataset or (), *evals.values()], model, processing_class, dimensions)
        callbacks = list(callbacks or [])
        if train_dataset is not None:
            sizes = PairSizes.of(train_dataset, choice.layout)
            schedule = schedule_of(args, sizes)
            self._batches = PlannedBatches(schedule.epoch)
            args.gradient_accumulation_steps = self._batches.epoch.accumulation
            kept = self.head_cache.choose(model, train_dataset, self._batches.epoch)
            lines = filter(None, [costs(args, schedule), rate, choice.describe(sizes.share), kept])
            callbacks.insert(0, Description("\n".join(lines)))
            if kwargs.get("optimizers", (None, None))[0] is None:
                micro_batches = most_micro_batches(args, schedule) if args.optim_in_backward else 1
                kwargs.setdefault("optimizer_cls_and_kwargs", choose_optimizer(args, model, micro_batches))
        if args.keep_layers:
            callbacks.append(KeepLayers(args.keep_layers))
        self._save_dtype: torch.dtype | None = None
        self.meter = Meter(dimensions, self.objective.columns)
        self.loss_scale = LossScale(self.objective)
        self.termination = Termination()
        self.guard = Guard(self, self.termination)
        self.checkpointer = Checkpointer(
            self, {name: getattr(self, name) for name in ("meter", "guard", "routers", "head_cache")},
            self.guard.stop_requested,
            options=lambda: options_of(args, model), keep_options=lambda values: keep_options(self, values),
        )  # fmt: skip
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(args.seed, choice.layout),
            train_dataset=None if train_dataset is None else PairDataset(train_dataset),
            eval_dataset=_datasets(eval_dataset),
            processing_class=processing_class,
            compute_metrics=self._evaluation_metrics,
            # compute_loss calls it; given here, it tells Trainer that the loss is the step's mean already.
            compute_loss_func=self.objective,
            callbacks=callbacks,
            **kwargs,
        )
        if self.objective.needs_reference and not hasattr(model, "peft_config"):
            self.add_callback(ReferenceLogps(self, base, lambda plan: self._score(self.model_wrapped, plan)))
        self.add_callback(RealLogits(self))
        # In this order: when training begins, the checkpointer restores what the other two have just reset.
        for callback in (MetricsFile(args.output_dir), self.guard, self.checkpointer):
            self.add_callback(callback)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs) -> TrainOutput:
        """Trainer.train; `resume_from_checkpoint` is a folder, "last" (or True) or "auto" (see `checkpoints.resolve`).

        SIGTERM, SIGINT, SIGUSR1 and SIGHUP during training save a checkpoint and return: `self.checkpointer.stopped`
        tells, `self.termination.requested` names the signal. A second SIGINT raises KeyboardInterrupt.

        Raises:
            CheckpointError: nothing to resume from, another run's checkpoint, or one that could not be saved.
            NumbersError: a NaN or infinite loss, gradient or weight; nothing was changed by it.
        """
        began = time.time()
        require_pairs(self.train_dataset)
        folder = self.checkpointer.begin(resume_from_checkpoint)
        if self.recipe is not None:
            self.recipe = replace(self.recipe, data={**self.recipe.data, **self.checkpointer.fingerprint["data"]})
        try:
            with self.termination:
                result = super().train(resume_from_checkpoint=folder, **kwargs)
        except AlreadyFinished:
            result = self._finalize_training(None, 0, began)
        except EvaluationStopped:  # before the first step since the resume
            self.checkpointer.stopped = True
            result = TrainOutput(self.state.global_step, 0.0, {})
        except Exception as error:
            known = isinstance(error, (CheckpointError, NumbersError))
            if self.checkpointer.loading and not (known or isinstance(error, (DataError, OptionError))):
                text = " ".join(str(error).split())[:300]
                raise CheckpointError(
                    f"{folder} cannot be loaded: {type(error).__name__}: {text}. Give an older checkpoint's folder"
                ) from error
            if not known:
                where = self.checkpointer.where_to_resume()
                logger.error("training stopped after step %d. %s", self.state.global_step, where)
            raise
        finally:
            self.checkpointer.end()
        return result._replace(training_loss=self._mean_loss())

    def _mean_loss(self) -> float:
        """Mean over all steps of the run; Trainer's own covers the steps since the resume."""
        return self._total_loss_scalar / max(self.state.global_step, 1)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Trainer's; a run that was made longer continues the checkpoint's schedule."""
        new = self.lr_scheduler is None
        ends = self.checkpointer.begin_schedule(num_training_steps)
        schedule = super().create_scheduler(ends[0], optimizer)
        if new:
            continue_schedule(schedule, self.args, ends)
        return schedule

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        given = values_of_groups(self) if self.checkpointer.uses_new_options else None
        super()._load_optimizer_and_scheduler(checkpoint)
        if given is not None:
            use_values(self, *given)

    def _run_epoch(self, *, epoch: int, num_update_steps_per_epoch: int, **position) -> None:
        """Trainer's, on an epoch that is planned now: its steps may have more or fewer micro-batches than before."""
        plan = self._batches.set_epoch(epoch)
        require_one_micro_batch(self.args, epoch, plan)
        self.args.gradient_accumulation_steps = plan.accumulation
        done = self.state.global_step % num_update_steps_per_epoch
        position |= {"steps_in_epoch": len(plan.batches), "steps_trained_in_current_epoch": done * plan.accumulation}
        super()._run_epoch(epoch=epoch, num_update_steps_per_epoch=num_update_steps_per_epoch, **position)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if self.is_fsdp_enabled or not load_converted(model or self.model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def stop_between_rows(self) -> None:
        """Between two rows of what is no training, which can take longer than the time until SIGKILL.

        Raises:
            EvaluationStopped: a signal asked some rank to stop.
        """
        if self.termination.active:
            flag = torch.tensor(float(bool(self.termination.requested)), device=self.args.device)
            if self.accelerator.reduce(flag, "sum").item() if self.args.world_size > 1 else self.termination.requested:
                raise EvaluationStopped

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        random_state = torch.get_rng_state()  # an evaluation draws from it
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationStopped:
            torch.set_rng_state(random_state)
            self.checkpointer.on_evaluation_stopped(self.control)
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer.save_model; raises NumbersError, and writes nothing, if a weight is NaN or infinite."""
        self.guard.check_weights("before saving")
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial) -> None:
        self.checkpointer.save(lambda: super(AMoPOTrainer, self)._save_checkpoint(model, trial))

    def _save(self, output_dir=None, state_dict=None) -> None:
        folder = output_dir or self.args.output_dir
        if self._save_dtype is not None:
            state_dict = in_dtype(self.model.state_dict() if state_dict is None else state_dict, self._save_dtype)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_arguments(folder, self.args)  # Trainer pickles its arguments, tokens included
            if self.recipe is not None:
                self.recipe.write(folder)
            if self._save_dtype is not None and (Path(folder) / "config.json").is_file():
                declare_dtype(folder, self._save_dtype)

    def save_final(self, dtype: torch.dtype | None = None) -> None:
        """Save the trained model for from_pretrained into output_dir, whole or not at all; an adapter keeps its dtype.

        Args:
            dtype: of the file's weights; default: those that were trained.

        Raises:
            CheckpointError: it could not be written. NumbersError: a weight is NaN or infinite.
        """
        if self.is_fsdp_enabled:  # the checkpoints are sharded
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        self._save_dtype = None if hasattr(self.model, "peft_config") else dtype
        try:
            self.checkpointer.save_final(lambda folder: self.save_model(folder, _internal_call=True))
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        finally:
            self._save_dtype = None

    def create_model_card(self, *args, **kwargs) -> None:
        """README.md of output_dir: how the model is asked for a dimension, what it was trained on, metrics; without a
        recipe Trainer's own."""
        if self.recipe is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_model_card(self.args.output_dir, self.recipe, self.state, adapter=hasattr(self.model, "peft_config"))

    def _get_output_dir(self, trial) -> str:
        # Lets _save_checkpoint write to a staging folder: there is no other way to tell it where to.
        return self.checkpointer.run_dir(super()._get_output_dir(trial))

    def get_train_dataloader(self) -> DataLoader:
        """The planned micro-batches. Not prepared by accelerate: the plan already splits them over ranks."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _score(self, model: nn.Module, plan: Plan) -> SequenceStats:
        """Statistics of a row on the trainer's device; `model` is as Trainer has wrapped it."""
        # A weight is used once per pass: caching its bfloat16 copy would only keep 2 bytes per parameter alive.
        with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
            return score_wrapped(
                model,
                self.accelerator.unwrap_model(model),
                plan,
                attention_backend=self.args.attention_backend,
                router_losses=self.routers.receiver(),
                backend=self.args.kernel_backend,
                logits_cache_bytes=self.head_cache.bytes,
            )

    def _outcome(self, model: nn.Module, inputs: dict, objective: Objective, ranks: int) -> Outcome:
        """The loss's normalisers are the step's over all ranks: divided by their number, DDP's mean is undone."""
        plan = inputs["plan"]
        references = None
        if objective.needs_reference:
            references = references_of(self.accelerator.unwrap_model(model), inputs, lambda: self._score(model, plan))
        pairs, tokens = inputs["num_pairs"] / ranks, inputs["num_chosen_tokens"] / ranks
        batch = Batch(plan.num_dimensions, pairs, inputs["noise"], references, tokens, inputs["score_gaps"])
        return objective(self._score(model, plan), batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum over the micro-batch's pairs / pairs of the step over all ranks; DDP's mean over ranks is undone."""
        weight = inputs["weight"]
        result = self._outcome(model, inputs, self.objective, self.accelerator.num_processes)
        table = torch.where(weight > 0, result.table(), float("nan"))
        self.meter.add(table, inputs["plan"])
        self.loss_scale.add(table)
        pairs, ranks = weight * inputs["plan"].num_pairs, self.accelerator.num_processes
        loss = result.loss * weight + self.routers.take(pairs, inputs["num_pairs"] / ranks)
        self.guard.add(loss, table, inputs["plan"].records)
        if self._steps_in_backward() and self.accelerator.sync_gradients:
            self.guard.require_finite_loss()
        return (loss, result) if return_outputs else loss

    def _steps_in_backward(self) -> bool:
        return bool(self.args.optim_in_backward) or self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(loss, table (P, K, columns), records (P,)) of the objective without chance."""
        self.stop_between_rows()
        objective = self.objective.for_evaluation()
        with torch.no_grad():
            result = self._outcome(model, self._prepare_inputs(inputs), objective, ranks=1)
        return result.loss, result.table(), inputs["plan"].records.to(self.args.device)

    def _evaluation_metrics(self, prediction) -> dict[str, float]:
        return evaluation_metrics(prediction.predictions, self.meter.dimensions, self.meter.columns)

    def _clip_grad_norm(self, model):
        return clip_step(self, model, self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        self.guard.grad_norm = clip_step(self, model, 0.0) if grad_norm is None else grad_norm
        return self.guard.grad_norm

    def get_total_train_batch_size(self, args) -> int:
        """Pairs of an optimizer step, from which Trainer reports train_samples_per_second."""
        return args.pairs_per_step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of the micro-batches since the last line to a training line."""
        if "loss" in logs:
            # Trainer averages the loss over ranks; each rank's was multiplied by their number.
            logs = {**logs, **self.meter.read(lambda tensor: self.accelerator.reduce(tensor, "sum"))}
            logs |= self.routers.read(lambda tensor: self.accelerator.reduce(tensor, "sum"))
            logs["loss_spikes"] = self.guard.read_spikes()
            line = self.loss_scale.read(lambda tensor: self.accelerator.reduce(tensor, "sum"))
            if line and self.is_world_process_zero():
                logger.warning(line)
        if "train_loss" in logs:
            logs = {**logs, "train_loss": self._mean_loss()}
        super().log(logs, start_time)


def _datasets(pairs):
    if isinstance(pairs, dict):
        return {name: PairDataset(each) for name, each in pairs.items()}
    return None if pairs is None else PairDataset(pairs)
