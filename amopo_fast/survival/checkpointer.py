"""Saving and resuming around transformers.Trainer's loop: what it leaves out, so that a resumed run is the same run.

Trainer restores weights, optimizer, scheduler and RNG. This adds the sums since the last log line, the order of saving
and evaluating at the end of an epoch, signals, and the refusal of a checkpoint of another model or other data.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import transformers
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import TrainerCallback

from amopo_fast.errors import CheckpointError, NumbersError
from amopo_fast.survival import checkpoints
from amopo_fast.survival.best import best_beside
from amopo_fast.survival.fingerprint import changed_options, differences, run_fingerprint
from amopo_fast.survival.lock import OutputLock, require_lock
from amopo_fast.survival.manifest import STATE_FILE, read_marker

logger = logging.getLogger(__name__)


class AlreadyFinished(Exception):
    """The checkpoint is the end of the run: there is no step left to train."""


class Beginning(NamedTuple):
    """What a run begins with: its fingerprint, the checkpoint it goes on from and the best one, the options in which it
    differs from that, and where the parts of that one's schedule end."""

    fingerprint: dict
    checkpoint: Path | None = None
    best: Path | None = None
    changed: dict[str, tuple] = {}
    schedule: list[int] = []


class Stateful(Protocol):
    """Part of a run that a checkpoint holds per rank: tensors and plain Python values."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    def combine_states(self, states: list[dict], rank: int) -> dict:
        """The state of `rank` when the run goes on with another number of ranks than the one that saved `states`."""
        ...


class Checkpointer(TrainerCallback):
    """Owns the checkpoints of an AMoPOTrainer.

    Args:
        trainer: read when training begins, so it may be half built here.
        parts: per-rank state to save and restore by name, e.g. {"meter": trainer.meter}.
        stop_requested: whether a signal asked to stop, agreed over the ranks.
        options: those of the run, as `run_fingerprint` wants them; keep_options: sets some of them to other values.
    """

    def __init__(
        self,
        trainer,
        parts: dict[str, Stateful],
        stop_requested: Callable[[], bool],
        options: Callable[[], dict],
        keep_options: Callable[[dict], None],
    ):
        self.trainer, self.parts, self.stop_requested = trainer, parts, stop_requested
        self.options, self.keep_options = options, keep_options
        self.uses_new_options = False  # of a resume, in the place of the checkpoint's
        self._schedule: list[int] = []  # steps where the parts of the learning rate's schedule end
        self.stopped = False
        self._staging: str | None = None
        self._resumed: Path | None = None
        self._best: Path | None = None  # the best checkpoint when a run goes on
        self.loading: Path | None = None  # the checkpoint of a resume, until its first step begins
        self.fingerprint: dict = {}  # of the run, once it begins
        self._evaluation_due = False
        self._save_due = False
        self._lock: OutputLock | None = None

    def begin_schedule(self, steps: int) -> list[int]:
        """Steps at which the parts of the schedule end, in a run of `steps`: a longer run than the checkpoint's follows
        its schedule to the end, then one of its own; a shorter one stops on it."""
        if not self._schedule or steps > self._schedule[-1]:
            self._schedule = [*self._schedule, steps]
        return self._schedule

    def run_dir(self, usual: str) -> str:
        """Where Trainer writes checkpoint-N: the staging folder while `save` runs."""
        return self._staging or usual

    def begin(self, resume: str | Path | bool | None) -> str | None:
        """Lock output_dir until `end`, choose and check the checkpoint that `Trainer.train` loads; the same answer, or
        error, on every rank.

        Raises:
            CheckpointError: another run uses output_dir, nothing to resume, or the checkpoint belongs to another model,
                other data or other options.
        """
        outcome: list = [None]
        if self.trainer.is_world_process_zero():
            self._lock = OutputLock(self.trainer.args.output_dir)
            try:
                self._lock.__enter__()
                outcome[0] = self._choose(resume)
            except CheckpointError as error:
                outcome[0] = error
        if self.trainer.args.world_size > 1:
            broadcast_object_list(outcome)
        try:
            if isinstance(outcome[0], CheckpointError):
                raise outcome[0]
            self.fingerprint, self._resumed, self._best, changed, self._schedule = outcome[0]
            self._settle(changed)
        except CheckpointError:
            self.end()
            raise
        self.stopped = self._save_due = self._evaluation_due = False
        self.loading = self._resumed
        return None if self._resumed is None else str(self._resumed)

    def end(self) -> None:
        """Give output_dir free."""
        if self._lock is not None:
            self._lock.__exit__()
            self._lock = None

    def _choose(self, resume: str | Path | bool | None) -> Beginning:
        trainer, args = self.trainer, self.trainer.args
        folder = checkpoints.resolve(args.output_dir, resume)
        fingerprint = run_fingerprint(
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.train_dataset.pairs,
            dimensions=trainer.meter.dimensions,
            seed=args.seed,
            pairs_per_step=args.pairs_per_step,
            recipe=trainer.recipe,
            options=self.options(),
        )
        if folder is None:
            return Beginning(fingerprint)
        marker = read_marker(folder)
        if marker["model_only"]:
            raise CheckpointError(
                f"{folder} holds no optimizer: it was saved with save_only_model. Start a new run with "
                f"--model_name_or_path {folder}"
            )
        changed = differences(marker["fingerprint"], fingerprint)
        if changed:
            raise CheckpointError(
                f"{folder} belongs to another run: {'; '.join(changed)}. Resume with the model, data and options "
                "it was saved with, or start a new run in another output_dir"
            )
        options = changed_options(marker["fingerprint"], fingerprint)
        if options and not args.on_changed_option:
            raise CheckpointError(
                f"{folder} was saved with other options: {_words(options)}. Give them as they were, or say which hold: "
                "--on_changed_option keep (the checkpoint's) or use (those given now)"
            )
        best = best_beside(folder, args.metric_for_best_model) if args.load_best_model_at_end else None
        return Beginning(fingerprint, folder, best, options, marker.get("schedule", []))

    def _settle(self, changed: dict[str, tuple]) -> None:
        """Let the checkpoint's options hold, or the run's."""
        keeps = self.trainer.args.on_changed_option == "keep"
        self.uses_new_options = bool(changed) and not keeps
        if self.uses_new_options:
            self._schedule = []
        if changed:
            logger.warning("going on with %s: %s", "the checkpoint's options" if keeps else "other options than before",
                           _words(changed))  # fmt: skip
            if keeps:
                self.keep_options({name: before for name, (before, _) in changed.items()})
                self.fingerprint["options"] |= {name: before for name, (before, _) in changed.items()}

    def on_train_begin(self, args, state, control, **kwargs):
        if self._resumed is not None and args.load_best_model_at_end:
            state.best_model_checkpoint = self._best and str(self._best)
            if self._best is None:
                state.best_metric = state.best_global_step = None
        if args.should_save:
            # The checkpoint that the run goes on from is the newest now, which no rotation deletes.
            checkpoints.supersede(Path(args.output_dir), state.global_step, self.fingerprint)
        self.clear_up()
        if self._resumed is not None:
            self._load_state(self._resumed)
            if state.global_step >= state.max_steps:
                self._evaluate_if_due()
            # Trainer's loop looks at max_steps after a step only.
            if state.global_step >= state.max_steps and not float(state.epoch).is_integer():
                raise AlreadyFinished

    def on_step_begin(self, args, state, control, **kwargs):
        self.loading = None
        # Not when training begins: Trainer restores the random state later, and an evaluation draws from it.
        self._evaluate_if_due()

    def _evaluate_if_due(self) -> None:
        if self._evaluation_due:
            self._evaluation_due = False
            if self.trainer._determine_best_metric(self.trainer._evaluate(None, None), None):
                self.trainer.state.best_model_checkpoint = str(self._resumed)

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop_requested():
            # The time until SIGKILL is short: save now, evaluate after the resume.
            self._evaluation_due |= control.should_evaluate
            control.should_evaluate = False
            control.should_save = control.should_training_stop = self.stopped = True
        # Where an epoch or the run ends, Trainer calls on_epoch_end next and evaluates there. A save before that
        # evaluation would lose its line on a resume.
        if control.should_save and (control.should_training_stop or float(state.epoch).is_integer()):
            control.should_save, self._save_due = False, True

    def on_evaluation_stopped(self, control) -> None:
        """Save now what was trained; the evaluation is made again after the resume."""
        self._evaluation_due = True
        control.should_evaluate = self._save_due = False
        control.should_save = control.should_training_stop = self.stopped = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:
            ended = float(state.epoch).is_integer()
            self._evaluation_due |= control.should_evaluate and ended
            control.should_evaluate = False
            control.should_log = control.should_log and ended
        if self._save_due:
            control.should_save, self._save_due = True, False

    def save(self, write: Callable[[], None]) -> None:
        """Run `write`, which lets Trainer write checkpoint-N below `run_dir`, and publish what it wrote.

        Raises:
            CheckpointError: it could not be written; complete checkpoints are as they were.
        """
        trainer, args, state = self.trainer, self.trainer.args, self.trainer.state
        output_dir, name = Path(args.output_dir), f"checkpoint-{state.global_step}"
        if args.should_save:
            checkpoints.clear_staging(output_dir)
        trainer.accelerator.wait_for_everyone()
        self._staging = str(output_dir / checkpoints.STAGING)
        staged = Path(self._staging) / name
        try:
            write()
            torch.save(self._state(), staged / STATE_FILE.format(rank=args.process_index))
            trainer.accelerator.wait_for_everyone()
            best = state.best_global_step == state.global_step
            if best:  # Trainer has named the staging folder, on every rank
                state.best_model_checkpoint = str(output_dir / name)
            if args.should_save:
                require_lock(output_dir)
                if best:
                    state.save_to_json(str(staged / "trainer_state.json"))
                checkpoints.publish(
                    staged, output_dir / name,
                    step=state.global_step, fingerprint=self.fingerprint, schedule=self._schedule,
                    world_size=args.world_size, model_only=args.save_only_model,
                    versions={"torch": torch.__version__, "transformers": transformers.__version__},
                )  # fmt: skip
            self.clear_up()
        except NumbersError:
            raise
        except Exception as error:
            if args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            raise self._not_saved(name, error) from error
        finally:
            self._staging = None
        trainer.accelerator.wait_for_everyone()

    def clear_up(self) -> None:
        """On rank 0, delete what saves and kills leave and the checkpoints beyond save_total_limit: after a save, and
        where a run begins and ends, since a kill may come before it. The newest one is whole if that fails."""
        args, best = self.trainer.args, self.trainer.state.best_model_checkpoint
        if not args.should_save:
            return
        try:
            checkpoints.clear_staging(Path(args.output_dir))
            checkpoints.rotate(Path(args.output_dir), args.save_total_limit, best)
        except OSError as error:
            logger.warning("%s cannot be deleted (%s): training goes on, and the next save tries again; look at its "
                           "permissions and disk", error.filename or "an old checkpoint", error.strerror)  # fmt: skip

    def save_final(self, write: Callable[[str], None]) -> None:
        """Run `write(folder)`, which writes the trained model, and move it to output_dir: a model there is whole.

        Raises:
            CheckpointError: it could not be written; checkpoints are as they were.
        """
        trainer, args = self.trainer, self.trainer.args
        output_dir = Path(args.output_dir)
        staged = output_dir / checkpoints.STAGING / "model"
        if args.should_save:
            checkpoints.clear_staging(output_dir)
        trainer.accelerator.wait_for_everyone()
        try:
            write(str(staged))
            trainer.accelerator.wait_for_everyone()
            if args.should_save:
                checkpoints.publish_model(staged, output_dir)
        except NumbersError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            if args.should_save:
                shutil.rmtree(staged.parent, ignore_errors=True)
            raise self._not_saved("the trained model", error) from error
        trainer.accelerator.wait_for_everyone()

    def _not_saved(self, what: str, error: Exception) -> CheckpointError:
        output_dir = Path(self.trainer.args.output_dir)
        reason = _reason(error, output_dir)
        return CheckpointError(f"{what} could not be saved in {output_dir}: {reason}. {self.where_to_resume()}")

    def where_to_resume(self) -> str:
        """One sentence for the end of a message about a run that stopped."""
        complete = checkpoints.complete_checkpoints(self.trainer.args.output_dir)
        if not complete:
            return "There is no complete checkpoint yet"
        return f"The last complete checkpoint is {complete[-1].path}: go on with --resume_from_checkpoint last"

    def _state(self) -> dict:
        trainer = self.trainer
        return {
            "loss_since_log": trainer._tr_loss.detach().cpu(),
            "last_logged_step": trainer._globalstep_last_logged,
            "loss_total": trainer._total_loss_scalar,
            "evaluation_due": self._evaluation_due,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }

    def _load_state(self, folder: Path) -> None:
        trainer, rank = self.trainer, self.trainer.args.process_index
        saved_ranks = read_marker(folder)["world_size"]

        def load(number: int) -> dict:
            return torch.load(folder / STATE_FILE.format(rank=number), map_location="cpu", weights_only=True)

        if saved_ranks == trainer.args.world_size:
            state = load(rank)
        else:
            states = [load(number) for number in range(saved_ranks)]
            state = states[0]
            # Trainer logs the mean over ranks of this sum.
            state["loss_since_log"] = torch.stack([one["loss_since_log"] for one in states]).mean()
            for name, part in self.parts.items():
                state["parts"][name] = part.combine_states([one["parts"][name] for one in states], rank)
        trainer._tr_loss += state["loss_since_log"].to(trainer._tr_loss.device)
        trainer._globalstep_last_logged = state["last_logged_step"]
        trainer._total_loss_scalar = state["loss_total"]
        self._evaluation_due = state["evaluation_due"]
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])


def _words(changed: dict[str, tuple]) -> str:
    return "; ".join(f"{name} was {before}, is {now}" for name, (before, now) in changed.items())


def _reason(error: BaseException, folder: Path) -> str:
    """What went wrong; a full disk in words, since safetensors and torch.save report it in words of their own."""
    if isinstance(error, CheckpointError):
        return str(error)
    free = shutil.disk_usage(folder).free
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    # torch.save reports a short write as "unexpected pos" or "file write failed", without the cause.
    if full or free < 2**20:
        return f"no space left on the device ({free / 2**20:.1f} MiB free); free some, or lower save_total_limit"
    return f"{type(error).__name__}: {error}"
