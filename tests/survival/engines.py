"""Scenarios of ranks.py that call FSDP2 and DeepSpeed themselves: scoring, checkpoints, what is reduced at once."""

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from small_run import small_model, small_pairs
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from amopo_fast.models.check import prepare_model
from amopo_fast.models.scoring import score_wrapped
from amopo_fast.packing.schedule import Collator, PairDataset, PairSizes, Schedule
from amopo_fast.training.checks import in_the_root_unit
from amopo_fast.training.clipping import clip_gradients
from amopo_fast.training.objective import AMoPO, Batch
from amopo_kernels import linear_logps
from amopo_kernels.errors import ShardedTensorError


def accelerator_with_fsdp2():
    """Accelerator refuses FSDP without an accelerator device, so the plugin is put into its state by hand."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        cpu_ram_efficient_loading=False, state_dict_type="SHARDED_STATE_DICT",
    )  # fmt: skip
    return accelerator


def group_like_accelerate(model):
    """accelerate's own FSDP2 wrapping."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator_with_fsdp2(), model)


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
    losses, gradients, norms = [], [], []
    for batch in step_batches(small_pairs(12), world, rank, 3):
        optimizer.zero_grad()
        loss, total = objective(model, model, batch, world)
        loss.backward()
        losses.append(total)
        gradients.append({name: whole(p.grad) for name, p in model.named_parameters()})
        norms.append(clip_gradients(model.parameters(), 0.1))
        optimizer.step()
    first, *others = model.parameters()
    before = [whole(p.grad) for p in others]
    (first.grad.to_local() if world > 1 else first.grad)[0] = float("nan")
    norm_of_bad = clip_gradients(model.parameters(), 1e-3)
    left_alone = all(torch.equal(whole(p.grad), old) for p, old in zip(others, before, strict=True))
    if world > 1:
        weights, states = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder / f"sharded-{world}-{tied}")
    return {
        "losses": torch.stack(losses),
        "gradients": gradients,
        "norms": torch.stack(norms),
        "norm_of_bad": norm_of_bad,
        "left_alone": left_alone,
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


VOCABULARY = 101  # a prime: no number of ranks divides it


def fsdp_units(folder, world, *, own_head=False):
    """Sizes in elements of what a backward pass reduces in one piece, beside those of the matrices of the vocabulary;
    with `own_head` the model's own forward computes the logits, in several slices of the label rows."""
    from amopo_fast.models import head
    from amopo_fast.models.choice import choice_of

    model = prepare_model(small_model(attention_dropout=0.0, vocab_size=VOCABULARY, tie_word_embeddings=False))
    if own_head:
        model.amopo_choice = replace(choice_of(model), head=None)
        head.OWN_HEAD_ROWS = 7
    if world > 1:
        model = group_like_accelerate(model)
    # torch < 2.13 has the second alone
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    sizes, reduce_scatter = [], getattr(dist, name)

    def recorded(*args, **kwargs):
        sizes.append(kwargs["input"].numel())
        return reduce_scatter(*args, **kwargs)

    setattr(dist, name, recorded)  # the process is a fork that ends with its scenario
    loss, total = objective(model, model, step_batches(small_pairs(12), world, dist.get_rank(), 1)[0], world)
    loss.backward()
    return {
        "loss": total,
        "reduced": sizes,
        "in_the_root_unit": in_the_root_unit(model),
        "hidden": model.config.hidden_size,
        "gradients": {name: whole(p.grad) for name, p in model.named_parameters()},
    }


def fsdp_own_head(folder, world):
    return fsdp_units(folder, world, own_head=True)


def fsdp_goes_on(folder, world):
    """Four steps, and two of them from the files that Trainer's functions wrote after the second; the final file."""
    from accelerate.utils import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer

    accelerator = accelerator_with_fsdp2()
    plugin, saved = accelerator.state.fsdp_plugin, str(folder / "goes-on")
    batches = step_batches(small_pairs(14), world, dist.get_rank(), 4)

    def begin(seed):
        model = small_model(seed, attention_dropout=0.0, vocab_size=VOCABULARY, tie_word_embeddings=False)
        model = group_like_accelerate(prepare_model(model))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def steps(model, optimizer, batches):
        for batch in batches:
            objective(model, model, batch, world)[0].backward()
            optimizer.step()
            optimizer.zero_grad()

    def bits(model, optimizer):
        states = [optimizer.state[p] for p in model.parameters()]
        moments = (state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))
        return [whole(tensor).clone() for tensor in (*model.parameters(), *moments)]

    model, optimizer = begin(0)
    steps(model, optimizer, batches[:2])
    save_fsdp_model(plugin, accelerator, model, saved)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, saved)
    steps(model, optimizer, batches[2:])
    expected = bits(model, optimizer)
    model, optimizer = begin(5)
    load_fsdp_model(plugin, accelerator, model, saved)
    load_fsdp_optimizer(plugin, accelerator, optimizer, model, saved)
    steps(model, optimizer, batches[2:])
    final = accelerator.get_state_dict(model)
    whole_weights = {name: whole(p) for name, p in model.named_parameters()}
    return {"expected": expected, "found": bits(model, optimizer), "final": final, "weights": whole_weights}


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
    return {"error": error, "in_the_root_unit": in_the_root_unit(model)}


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
