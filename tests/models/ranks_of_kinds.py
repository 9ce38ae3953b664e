"""Two processes (gloo, CPU) train models of other kinds than dense ones; the machinery is tests/survival/ranks.py."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "survival"), str(ROOT / "helpers")]
import engines  # noqa: E402
import ranks  # noqa: E402
from kinds_of_models import model_of  # noqa: E402
from packing_cases import random_pairs  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from amopo_fast.models.architecture import UnsupportedModelError  # noqa: E402
from amopo_fast.models.check import prepare_model  # noqa: E402
from amopo_fast.models.choice import choice_of  # noqa: E402
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


def fsdp(folder, world, kind):
    """Loss and gradients of two rows under FSDP2, a row a rank; of experts with the routers' loss."""
    model = prepare_model(model_of(kind))
    layout = choice_of(model).layout
    if world > 1:
        model = engines.group_like_accelerate(model)
    check_real_logits(model, random_pairs(0, 1)[0], model)
    pairs = random_pairs(4, 4)
    rows = [pairs[:2], pairs[2:]]
    total = torch.zeros(())
    for row in rows if world == 1 else [rows[dist.get_rank()]]:
        routers = [] if kind == "moe" else None
        plan = build_plan(row, layout, min_node_tokens=4)
        loss = score_wrapped(model, model, plan, router_losses=routers).logp_sum.sum() + 10 * sum(routers or [])
        (loss * world).backward()  # FSDP averages gradients
        total += loss.detach()
    dist.all_reduce(total)
    gradients = {name: engines.whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": total, "gradients": gradients, "trained": sum(p.requires_grad for p in model.parameters())}


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
    "real_logits": real_logits,
}


if __name__ == "__main__":
    torch.manual_seed(0)
    ranks.main(*sys.argv[1:])
