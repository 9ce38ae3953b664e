"""The trainer: equal under any split into micro-batches, and repeatable. Kills and resumes: tests/survival."""

import pytest
from run_training import pairs, trainer


def losses(run):
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def test_same_losses_twice_and_with_one_or_several_micro_batches(tmp_path):
    runs = {}
    for name, budget in (("first", 10**6), ("again", 10**6), ("split", 60)):
        run = trainer(tmp_path / name, budget)
        # Adam divides by the gradient's size, so that float32's rounding would grow from step to step.
        run.model.double()
        for module in run.model.modules():  # dropout masks depend on how rows are packed
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        run.train()
        runs[name] = run
    assert runs["first"].args.gradient_accumulation_steps == 1
    assert runs["split"].args.gradient_accumulation_steps >= 4
    assert losses(runs["first"]) == losses(runs["again"])
    assert losses(runs["split"]) == pytest.approx(losses(runs["first"]), rel=1e-6)


def test_gradients_are_equal_under_any_split(tmp_path):
    gradients = []
    for budget in (10**6, 150, 60):
        run = trainer(tmp_path / str(budget), budget, max_grad_norm=0.0)
        for module in run.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        accumulation = run.args.gradient_accumulation_steps
        batches = iter(run.get_train_dataloader())
        for _ in range(accumulation):
            run.compute_loss(run.model, next(batches)).backward()
        gradients.append({name: p.grad.clone() for name, p in run.model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert (other[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_wrong_number_of_dimensions_names_the_record(tmp_path):
    from amopo_fast.training.config import AMoPOConfig
    from amopo_fast.training.trainer import AMoPOTrainer

    model = trainer(tmp_path / "a").model
    with pytest.raises(ValueError, match="record 0 has 2 dimensions, the trainer 3"):
        AMoPOTrainer(model, AMoPOConfig(output_dir=str(tmp_path), use_cpu=True), dimensions=["a", "b", "c"],
                     train_dataset=list(pairs(3)))  # fmt: skip
