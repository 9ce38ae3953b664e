"""Two processes (gloo, CPU) train models of other kinds than dense ones; the machinery is tests/survival/ranks.py."""

import functools
import sys
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "survival"), str(ROOT / "helpers")]
import engines  # noqa: E402
import ranks  # noqa: E402
from kinds_of_models import KINDS, model_of  # noqa: E402
from packing_cases import random_pairs  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import LlamaConfig  # noqa: E402
from transformers.integrations import HfDeepSpeedConfig  # noqa: E402

from amopo_fast.models.architecture import UnsupportedModelError  # noqa: E402
from amopo_fast.models.check import prepare_model  # noqa: E402
from amopo_fast.models.choice import choice_of  # noqa: E402
from amopo_fast.models.faster_layers import compile_layers  # noqa: E402
from amopo_fast.models.loading import add_adapter  # noqa: E402
from amopo_fast.models.real_logits import check_real_logits  # noqa: E402
from amopo_fast.models.scoring import score_wrapped  # noqa: E402
from amopo_fast.packing.plan import build_plan  # noqa: E402
from amopo_fast.training.config import AMoPOConfig  # noqa: E402
from amopo_fast.training.trainer import AMoPOTrainer  # noqa: E402


def ddp(folder, world, kind):
    """A whole run: two steps of four pairs over all ranks."""
    config = AMoPOConfig(
        output_dir=str(folder / f"{kind}-{world}"), pairs_per_step=4, num_train_epochs=1, use_cpu=True, optim="sgd",
        learning_rate=0.05, lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True, report_to="none",
    )  # fmt: skip
    model = model_of(kind)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = AMoPOTrainer(model, config, dimensions=["a", "b", "c"], train_dataset=random_pairs(4, 8))
    trainer.train()
    assert trainer.state.global_step == 2
    return {"before": before, "after": {name: p.detach().clone() for name, p in trainer.model.named_parameters()}}


def fsdp(folder, world, kind, adapted=False):
    """Loss and gradients of two rows under FSDP2, a row a rank; of experts with the routers' loss. adapted: of an
    adapter, with compiled layers that are checkpointed."""
    model = model_of(kind)
    if adapted:
        torch.manual_seed(1)
        model = add_adapter(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    prepare_model(model)
    layout = choice_of(model).layout
    if adapted:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        compile_layers(model, backend="eager")
    if world > 1:
        model = engines.group_like_accelerate(model)
    check_real_logits(model, random_pairs(0, 1)[0], model)
    pairs = random_pairs(4, 4)
    rows = [pairs[:2], pairs[2:]]
    total = torch.zeros(())
    for row in rows if world == 1 else [rows[dist.get_rank()]]:
        routers = [] if kind == "moe" and not adapted else None
        plan = build_plan(row, layout, min_node_tokens=4)
        loss = score_wrapped(model, model, plan, router_losses=routers).logp_sum.sum() + 10 * sum(routers or [])
        (loss * world).backward()  # FSDP averages gradients
        total += loss.detach()
    dist.all_reduce(total)
    gradients = {name: engines.whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": total, "gradients": gradients, "trained": sum(p.requires_grad for p in model.parameters())}


def fsdp_resumed(folder, world, kind):
    """Four steps of AdamW under FSDP2, and the last two of them from the files that Trainer's functions wrote after the
    second, by another model of the same class: all weights and moments, bit for bit."""
    from accelerate.utils import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer

    accelerator = engines.accelerator_with_fsdp2()
    plugin, saved = accelerator.state.fsdp_plugin, str(folder / f"saved-{kind}")
    rows = [random_pairs(seed, 2) for seed in range(4 * world)][dist.get_rank() :: world]

    def begin(seed):
        model = prepare_model(model_of(kind, seed))
        layout = choice_of(model).layout
        model = engines.group_like_accelerate(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-3), layout

    def steps(model, optimizer, layout, rows):
        for row in rows:
            score_wrapped(model, model, build_plan(row, layout, min_node_tokens=4)).logp_sum.sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def bits(model, optimizer):
        weights = {name: engines.whole(p).clone() for name, p in model.named_parameters()}
        names = {p: name for name, p in model.named_parameters()}
        moments = {
            f"{key} of {names[p]}": engines.whole(state[key]).clone()
            for p, state in optimizer.state.items()
            for key in ("exp_avg", "exp_avg_sq")
        }
        return weights | moments

    model, optimizer, layout = begin(0)
    steps(model, optimizer, layout, rows[:2])
    save_fsdp_model(plugin, accelerator, model, saved)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, saved)
    middle = bits(model, optimizer)
    steps(model, optimizer, layout, rows[2:])
    expected = bits(model, optimizer)
    model, optimizer, layout = begin(5)
    load_fsdp_model(plugin, accelerator, model, saved)
    load_fsdp_optimizer(plugin, accelerator, optimizer, model, saved)
    steps(model, optimizer, layout, rows[2:])
    return {"middle": middle, "expected": expected, "found": bits(model, optimizer)}


def zero(folder, world, kind, stage):
    """Two SGD steps of two rows, a row a rank, under DeepSpeed's CPU accelerator; on one rank without DeepSpeed."""
    config = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    told = HfDeepSpeedConfig(config) if world > 1 else None  # transformers keeps a weak reference
    model = prepare_model(model_of(kind))
    layout = choice_of(model).layout
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    engine = model
    if world > 1:
        import deepspeed

        deepspeed.init_distributed("gloo")
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=told.config)
    before = {name: p.detach().clone() for name, p in model_of(kind).named_parameters()}
    pairs = random_pairs(4, 4)
    rows = [pairs[:2], pairs[2:]]
    for _ in range(2):
        for row in rows if world == 1 else [rows[dist.get_rank()]]:
            routers = [] if kind == "moe" else None
            plan = build_plan(row, layout, min_node_tokens=4)
            stats = score_wrapped(engine, model, plan, router_losses=routers)
            loss = 1e-2 * stats.logp_sum.mean() + 0.1 * sum(routers or [])
            if world > 1:  # DeepSpeed averages gradients
                engine.backward(loss)
            else:
                (loss / 2).backward()
        if world > 1:
            engine.step()
        else:
            optimizer.step()
            optimizer.zero_grad()
    if stage == 3 and world > 1:
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            after = {name: p.detach().clone() for name, p in model.named_parameters()}
    else:
        after = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"before": before, "after": after}


def real_logits(folder, world):
    """A sharded model whose own forward has other logits than its miniature: every rank refuses it."""
    from test_real_logits import SMALL, Halved

    model = engines.group_like_accelerate(prepare_model(Halved(LlamaConfig(**SMALL))))
    try:
        check_real_logits(model, random_pairs(0, 1)[0], model)
        errors = [""]
    except UnsupportedModelError as error:
        errors = [str(error)]
    everyone = [None] * world
    dist.all_gather_object(everyone, errors)
    return {"errors": sum(everyone, [])}


ranks.SCENARIOS = {
    "ddp-multimodal": lambda *args: ddp(*args, "multimodal"),
    "fsdp-hybrid": lambda *args: fsdp(*args, "hybrid"),
    "fsdp-moe": lambda *args: fsdp(*args, "moe"),
    "fsdp-multimodal": lambda *args: fsdp(*args, "multimodal"),
    **{f"adapted-{kind}": functools.partial(fsdp, kind=kind, adapted=True) for kind in KINDS},
    "real_logits": real_logits,
    **{f"resumed-{kind}": functools.partial(fsdp_resumed, kind=kind) for kind in KINDS},
    **{f"zero{stage}-{kind}": functools.partial(zero, kind=kind, stage=stage) for kind in KINDS for stage in (2, 3)},
}


if __name__ == "__main__":
    torch.manual_seed(0)
    ranks.main(*sys.argv[1:])
