"""Runs scenarios in groups of processes (gloo, CPU), in order: `ranks.py FOLDER SCENARIO:WORLD[,WORLD] ...`.

Processes are forked from one that has imported torch. Rank 0 of each group leaves what its scenario returns in
FOLDER/SCENARIO-WORLD.pt.
"""

import os
import shutil
import signal
import socket
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from engines import (
    fsdp,
    fsdp_goes_on,
    fsdp_loaded,
    fsdp_own_head,
    fsdp_tied,
    fsdp_units,
    head_not_gathered,
    zero2,
    zero3,
)  # fmt: skip
from layouts import chosen_once
from safetensors.torch import load_file
from small_run import small_model, small_trainer
from transformers import TrainerCallback

from amopo_fast.models import check
from amopo_fast.survival.checkpoints import complete_checkpoints

SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0,
       "eval_strategy": "epoch", "logging_steps": 1}  # fmt: skip


class Watch(TrainerCallback):
    """Gradients of the first step, and every step's records over all ranks."""

    def __init__(self):
        self.gradients, self.records = {}, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters()}
        own = [
            record
            for _, table, records in self.trainer.guard._micro_batches
            for record, rows in zip(records.tolist(), table, strict=True)
            if not rows.isnan().all()  # a filler of a short last step
        ]
        self.records.append(sorted(sum(self.trainer.guard._gathered(own), [])))


def train(folder, resume=None, **options):
    watch = Watch()
    trainer = small_trainer(folder, model=small_model(attention_dropout=0.0), callbacks=[watch], **{**SGD, **options})
    watch.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    return {
        "log": trainer.state.log_history,
        "gradients": watch.gradients,
        "records": watch.records,
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
    }


def ddp(folder, world):
    return train(folder / f"ddp-run-{world}", save_strategy="no")


def ddp_resumed(folder, world):
    """From the checkpoint that `ddp_saved` left after three steps, on another number of ranks."""
    return train(folder / "saved", resume="last", save_strategy="no", logging_steps=4)


def ddp_saved(folder, world):
    """Three steps, so that the log window of four is cut, of a run of eight."""
    run = small_trainer(
        folder / "saved", model=small_model(attention_dropout=0.0), **{**SGD, "save_steps": 3, "logging_steps": 4}
    )
    run.args.max_steps = 3
    run.train()
    if not run.args.process_index:
        shutil.copytree(folder / "saved", folder / "chain")
    return {}


def ddp_goes_on(folder, world):
    """From the checkpoint that `ddp_saved` left on two ranks to step 6, as a requeued job that is stopped again."""
    run = small_trainer(
        folder / "chain", model=small_model(attention_dropout=0.0), **{**SGD, "save_steps": 6, "logging_steps": 4}
    )
    run.add_callback(StopAt(6))
    run.train(resume_from_checkpoint="last")
    return {"complete": [checkpoint.step for checkpoint in complete_checkpoints(folder / "chain")]}


def ddp_ends(folder, world):
    """The rest of it, on a third number of ranks."""
    return train(folder / "chain", resume="last", save_strategy="no", logging_steps=4)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def ddp_bad_loss(folder, world):
    """A NaN that only the last rank computes stops every rank, in the same step."""
    model = small_model(attention_dropout=0.0)
    trainer = small_trainer(folder / f"bad-{world}", model=model, save_strategy="no", **SGD)
    original = trainer.objective

    def objective(stats, batch):
        result = original(stats, batch)
        if trainer.state.global_step == 2 and trainer.args.process_index == world - 1:
            result = replace(result, loss=result.loss * float("nan"))
        return result

    objective.needs_reference = False
    trainer.objective = objective
    try:
        trainer.train()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "step": trainer.state.global_step}
    return {"error": "", "step": trainer.state.global_step}


class SigtermAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def ddp_sigterm(folder, world):
    """Only the last rank receives SIGTERM; all save and stop after the same step."""
    callbacks = [SigtermAt(2)] if int(os.environ["RANK"]) == world - 1 else []
    options = {**SGD, "save_steps": 100}
    model = small_model(attention_dropout=0.0)
    trainer = small_trainer(folder / "sigterm", model=model, callbacks=callbacks, **options)
    trainer.train()
    complete = [checkpoint.step for checkpoint in complete_checkpoints(folder / "sigterm")]
    return {"stopped": trainer.checkpointer.stopped, "step": trainer.state.global_step, "complete": complete}


def ddp_best(folder, world):
    """Stopped at an evaluation, by the last rank, or not, and at the end with the best model: the one of that
    evaluation."""
    options = {**SGD, "max_steps": 4, "save_steps": 2, "save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 2,
               "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 3e-3}  # fmt: skip
    loaded = []
    for name, stopped in (("not_stopped", False), ("best", True), ("best", False)):
        callbacks = [SigtermAt(1)] if stopped and int(os.environ["RANK"]) == world - 1 else []
        model = small_model(attention_dropout=0.0)
        trainer = small_trainer(folder / name, model=model, callbacks=callbacks, **options)
        trainer.train(resume_from_checkpoint="auto")
        if not stopped:
            best = load_file(folder / name / f"checkpoint-{trainer.state.best_global_step}" / "model.safetensors")
            everyone, own = [None] * world, dict(trainer.model.named_parameters())
            dist.all_gather_object(everyone, all(torch.equal(own[name], tensor) for name, tensor in best.items()))
            loaded += everyone
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    return {"losses": losses, "best": trainer.state.best_global_step, "loaded": loaded}


class KilledAt(SigtermAt):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def ddp_killed(folder, world):
    """The last rank is killed in its fourth step, a checkpoint after the third; the others wait for it in vain."""
    callbacks = [KilledAt(3)] if int(os.environ["RANK"]) == world - 1 else []
    model = small_model(attention_dropout=0.0)
    trainer = small_trainer(folder / "killed", model=model, callbacks=callbacks, **{**SGD, "save_steps": 3})
    trainer.train()


SCENARIOS = {
    f.__name__: f
    for f in (ddp, ddp_saved, ddp_resumed, ddp_goes_on, ddp_ends, ddp_bad_loss, ddp_sigterm, ddp_best, ddp_killed, fsdp,
              fsdp_tied, fsdp_loaded, fsdp_units, fsdp_own_head, fsdp_goes_on, head_not_gathered, zero2, zero3)
}  # fmt: skip


def one_rank(folder, scenario, world, rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    if world == 1 and scenario.startswith("ddp"):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    elif not scenario.startswith("ddp"):
        dist.init_process_group("gloo")
    result = SCENARIOS[scenario](folder, world)
    if rank == 0:
        torch.save(result, folder / f"{scenario}-{world}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def group(folder, scenario, world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        process = os.fork()
        if not process:
            status = 1
            try:
                one_rank(folder, scenario, world, rank, port)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                sys.stdout.flush()
                os._exit(status)
        processes.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def main(folder, *scenarios):
    torch.set_num_threads(1)
    check.choose_layout = chosen_once
    chosen_once(small_model(attention_dropout=0.0))  # the model of nearly all, before they are forked
    for item in scenarios:
        scenario, worlds = item.split(":")
        for world in map(int, worlds.split(",")):
            codes = group(Path(folder), scenario, world)
            if any(codes):
                sys.exit(f"{scenario} on {world} ranks: exit codes {codes}")


if __name__ == "__main__":
    main(*sys.argv[1:])
