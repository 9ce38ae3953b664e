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
import torch.distributed.checkpoint as dcp
from small_run import small_model, small_pairs, small_trainer
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from amopo_fast.models.check import prepare_model
from amopo_fast.models.scoring import score_wrapped
from amopo_fast.packing.schedule import Collator, PairDataset, PairSizes, Schedule
from amopo_fast.survival.checkpoints import complete_checkpoints
from amopo_fast.training.objective import AMoPO, Batch
from amopo_kernels import linear_logps
from amopo_kernels.errors import ShardedTensorError

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


def group_like_accelerate(model):
    """accelerate's own FSDP2 wrapping. Its Accelerator refuses FSDP without an accelerator device, so the plugin is
    put into its state by hand."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    return fsdp2_prepare_model(accelerator, model)


def step_batches(pairs, world, rank, steps):
    schedule = Schedule(PairSizes.of(pairs), 4, 10**6, seed=0, world_size=world, rank=rank)
    dataset, collate = PairDataset(pairs), Collator(0)
    return [collate([dataset[batch]]) for batch in schedule.epoch(0).batches[:steps]]


def objective(wrapped, model, batch, world):
    """(loss to differentiate, loss of the whole step): as the trainer scales it for engines that average gradients."""
    stats = score_wrapped(wrapped, model, batch["plan"])
    result = AMoPO()(stats, Batch(2, batch["num_pairs"] / world, batch["noise"]))
    loss = result.loss * batch["weight"]
    total = loss.detach().clone()
    dist.all_reduce(total)
    return loss, total / world


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def fsdp(folder, world, *, tied=False):
    """Three optimizer steps of AdamW under FSDP2, then a sharded checkpoint."""
    rank = dist.get_rank()
    model = prepare_model(small_model(attention_dropout=0.0, tie_word_embeddings=tied))
    if world > 1:
        model = group_like_accelerate(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, gradients = [], []
    for batch in step_batches(small_pairs(12), world, rank, 3):
        optimizer.zero_grad()
        loss, total = objective(model, model, batch, world)
        loss.backward()
        losses.append(total)
        gradients.append({name: whole(p.grad) for name, p in model.named_parameters()})
        optimizer.step()
    if world > 1:
        weights, states = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder / f"sharded-{world}-{tied}")
    return {
        "losses": torch.stack(losses),
        "gradients": gradients,
        "weights": {name: whole(p) for name, p in model.named_parameters()},
        "moments": [whole(optimizer.state[p]["exp_avg_sq"]) for p in model.parameters()],
        "sharded": isinstance(next(model.parameters()), DTensor),
    }


def fsdp_tied(folder, world):
    return fsdp(folder, world, tied=True)


def fsdp_loaded(folder, world):
    """The checkpoint that two ranks saved, on `world` ranks, and one more step."""
    model = prepare_model(small_model(seed=5, attention_dropout=0.0))
    if world > 1:
        model = group_like_accelerate(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states}
    dcp.load(state, checkpoint_id=folder / "sharded-2-False")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loaded = {name: whole(p).clone() for name, p in model.named_parameters()}
    moments = [whole(optimizer.state[p]["exp_avg_sq"]).clone() for p in model.parameters()]
    return {"weights": loaded, "moments": moments}


def head_not_gathered(folder, world):
    """What `score` does with a head that is sharded, outside of the wrapped forward and inside."""
    from torch.distributed.fsdp import fully_shard

    batch = step_batches(small_pairs(12), 1, 0, 1)[0]
    model = prepare_model(small_model(attention_dropout=0.0))
    fully_shard(model.lm_head)
    try:
        linear_logps(torch.randn(3, 16), model.lm_head.weight, torch.tensor([1, 2, 3]))
        error = ""
    except ShardedTensorError as caught:
        error = str(caught)
    original = model.lm_head.forward
    score_wrapped(model, model, batch["plan"])
    assert model.lm_head.forward == original
    return {"error": error}


def zero(folder, world, stage=None):
    """Three SGD steps under DeepSpeed's CPU accelerator; without a stage, or on one rank, without DeepSpeed."""
    rank = dist.get_rank()
    model = prepare_model(small_model(attention_dropout=0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    if world > 1:
        import deepspeed

        deepspeed.init_distributed("gloo")
        config = {
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
            "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for batch in step_batches(small_pairs(12), world, rank, 3):
        loss, total = objective(engine if world > 1 else model, model, batch, world)
        losses.append(total)
        if world > 1:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if stage == 3 and world > 1:
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    else:
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"losses": torch.stack(losses), "weights": weights}


def zero2(folder, world):
    return zero(folder, world, 2)


def zero3(folder, world):
    return zero(folder, world, 3)


SCENARIOS = {
    f.__name__: f
    for f in (ddp, ddp_saved, ddp_resumed, ddp_goes_on, ddp_ends, ddp_bad_loss, ddp_sigterm, fsdp, fsdp_tied,
              fsdp_loaded, head_not_gathered, zero2, zero3)
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
    for item in scenarios:
        scenario, worlds = item.split(":")
        for world in map(int, worlds.split(",")):
            codes = group(Path(folder), scenario, world)
            if any(codes):
                sys.exit(f"{scenario} on {world} ranks: exit codes {codes}")


if __name__ == "__main__":
    main(*sys.argv[1:])
