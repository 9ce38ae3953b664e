"""Numbers that go wrong stop the run before the weights change, and leave what is needed to look at the step."""

import errno
import json
import os

import pytest
import torch
from small_run import small_pairs, small_trainer
from transformers import TrainerCallback

from amopo_fast.errors import NumbersError
from amopo_fast.survival import guard
from amopo_fast.survival.checkpoints import complete_checkpoints


class BeforeStep(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


def weights(run):
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def break_weight(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")


def break_unused_weight(model):
    """A row of the embeddings that no token of the step uses: neither loss nor gradient shows it."""
    with torch.no_grad():
        model.model.embed_tokens.weight[96, 0] = float("inf")


def break_gradient(model, value=float("inf")):
    parameter = model.model.layers[0].mlp.up_proj.weight

    def hook(grad):
        handle.remove()
        grad = grad.clone()
        grad[0, 0] = value
        return grad

    handle = parameter.register_hook(hook)


def break_hidden_gradient(model):
    """What comes down from layer 1 is NaN: so are the gradients of all that lies below."""

    def hook(module, grad_input, grad_output):
        handle.remove()
        return tuple(each * float("nan") for each in grad_input)

    handle = model.model.layers[1].mlp.gate_proj.register_full_backward_hook(hook)


@pytest.mark.parametrize(
    "action, reason, named",
    [
        (break_weight, "the loss is not finite", "model.layers.1.mlp.up_proj.weight"),
        (break_unused_weight, "a weight is not finite", "model.embed_tokens.weight"),
        (break_gradient, "the gradient is not finite", "model.layers.0.mlp.up_proj.weight"),
    ],
)
@pytest.mark.parametrize("hidden_by_filter", [False, True])
def test_a_bad_number_stops_before_the_weights_change(tmp_path, action, reason, named, hidden_by_filter):
    before = {}

    def act(model):
        action(model)
        before.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})

    pairs = [p for p in small_pairs(40) if not any(96 in part for part in (*p.prompts, p.chosen, p.rejected))]
    calls = [BeforeStep(3, act)]
    run = small_trainer(tmp_path, pairs=pairs[:14], callbacks=calls)
    run.args.logging_nan_inf_filter = hidden_by_filter  # as an option it is refused
    with pytest.raises(NumbersError) as caught:
        run.train()
    report_file = tmp_path / "failed-step-4.json"
    message = str(caught.value)
    assert message.startswith(f"step 4: {reason} ({named}") and str(report_file) in message
    assert f"The last complete checkpoint is {tmp_path / 'checkpoint-2'}" in message
    after = weights(run)
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
    report = json.loads(report_file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report["reason"] == reason and report["step"] == 4
    assert named in report["weights"] + report["gradients"]
    assert len(report["records"]) == 2  # the short last step of an epoch of 14 pairs
    for pair in report["pairs"]:
        assert set(pair["dimensions"]) == {"first", "second"}
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [2]


NAN = float("nan")


@pytest.mark.parametrize("norm", [0.01, 0.0])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_of_all_gradients_the_bad_one_is_named(tmp_path, norm, value):
    """Scaling by a norm that is NaN, or infinite, would have made the others so too."""
    calls = [BeforeStep(0, lambda model: break_gradient(model, value))]
    run = small_trainer(tmp_path, callbacks=calls, save_strategy="no", max_grad_norm=norm)
    bad = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(NumbersError, match=rf"^step 1: the gradient is not finite \({bad}\)\. The weights were not"):
        run.train()
    assert json.loads((tmp_path / "failed-step-1.json").read_text())["gradients"] == [bad]


def test_of_many_bad_gradients_those_next_to_the_loss_come_first(tmp_path):
    run = small_trainer(tmp_path, callbacks=[BeforeStep(0, break_hidden_gradient)], save_strategy="no")
    with pytest.raises(NumbersError, match=r"not finite \(model.layers.1.post_attention_layernorm.weight, .*, \.\.\."):
        run.train()
    named = json.loads((tmp_path / "failed-step-1.json").read_text())["gradients"]
    assert named[-1] == "model.embed_tokens.weight" and not {"lm_head.weight", "model.norm.weight"} & set(named)
    assert not any("layers.1.mlp" in name for name in named)


def test_a_bad_weight_is_found_before_the_first_step(tmp_path):
    run = small_trainer(tmp_path)
    break_weight(run.model)
    with pytest.raises(NumbersError, match="a weight is not finite before training begins .model.layers.1.mlp.up_proj"):
        run.train()


def test_weights_that_went_bad_in_a_step_are_not_saved(tmp_path):
    class Break(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                break_weight(model)

    run = small_trainer(tmp_path, callbacks=[Break()])
    with pytest.raises(NumbersError, match="a weight is not finite before saving"):
        run.train()
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [2]


def test_a_bad_loss_is_found_before_a_backward_pass_that_steps(tmp_path):
    before = {}

    def act(model):
        break_weight(model)
        before.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})

    run = small_trainer(tmp_path, callbacks=[BeforeStep(3, act)], optim_in_backward="adamw", pairs_per_step=1,
                        tokens_per_micro_batch=10**6)  # fmt: skip
    with pytest.raises(NumbersError, match="step 4: the loss is not finite .*were not changed"):
        run.train()
    after = weights(run)
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


def test_loss_spikes_are_flagged_with_their_records_and_survive_a_resume(tmp_path, caplog):
    def options():
        return {"num_train_epochs": 8, "learning_rate": 1e-5, "eval_strategy": "no", "save_steps": 25,
                "logging_steps": 1}  # fmt: skip

    def spike(model):
        with torch.no_grad():
            model.lm_head.weight.mul_(400)

    def heal(model):
        with torch.no_grad():
            model.lm_head.weight.div_(400)

    calls = [BeforeStep(22, spike), BeforeStep(23, heal)]
    small_trainer(tmp_path, callbacks=calls, **options()).train()
    lines = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [23]
    assert lines[0]["loss"] > lines[0]["median"] and len(lines[0]["records"]) == 4
    assert "step 23: the loss" in caplog.text
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if line.get("loss_spikes")] == [23]
    small_trainer(tmp_path, **options()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-25"))
    assert [json.loads(line)["step"] for line in (tmp_path / "spikes.jsonl").read_text().splitlines()] == [23]


def test_a_full_disk_costs_a_spike_its_line_and_not_the_run(tmp_path, caplog, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = small_trainer(tmp_path, save_strategy="no", eval_strategy="no", max_steps=1)
    run.train()
    monkeypatch.setattr(guard.durable, "append", full)
    for loss in [1.0] * guard.MIN_STEPS + [50.0]:
        run.guard._watch(loss, run.args, run.state)
    said = [record.getMessage() for record in caplog.records if "far above its median" in record.getMessage()]
    records = sorted(run.guard._micro_batches[0][2].tolist())
    assert len(said) == 1 and f"{tmp_path / 'spikes.jsonl'} cannot be written: No space left on device; free" in said[0]
    assert records and all(str(record) in said[0] for record in records)
    assert run.guard.read_spikes() == 1


def test_a_resume_keeps_the_whole_lines_of_spikes_up_to_its_step(tmp_path, caplog, monkeypatch):
    path = tmp_path / "spikes.jsonl"
    lines = ['{"step": 3}', '{"step": 9}', "[1]}", '{"loss": 1.0}', '{"step": null}', '{"step": 4}', '{"step": 1']
    path.write_text("\n".join(lines))
    guard._forget_spikes_after(4, path)
    assert path.read_text() == '{"step": 3}\n{"step": 4}\n'

    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(guard.durable, "write_text", full)
    guard._forget_spikes_after(3, path)
    assert f"{path} cannot be written (No space left on device)" in caplog.text
    guard._forget_spikes_after(0, path)
    assert not path.exists()


def test_a_step_that_begins_with_bad_weights_names_the_step_that_made_them(tmp_path):
    """A rate that blows the weights up in step 2, which is not saved: step 3 finds them and did not change them."""
    run = small_trainer(tmp_path, save_strategy="no", eval_strategy="no")

    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                break_weight(model)

    run.add_callback(Overflow())
    with pytest.raises(NumbersError, match="^step 3: the loss is not finite .model.layers.1.mlp.up_proj") as caught:
        run.train()
    assert "finite before the update of step 2; this step did not change them" in str(caught.value)


@pytest.fixture
def few_pairs(tmp_path, monkeypatch):
    """The demo's data, cut to a few."""
    from amopo_fast.demo.data import TRAIN_FILE

    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(TRAIN_FILE.read_text().splitlines()[:24]))
    for name in ("TRAIN_FILE", "HELDOUT_FILE"):
        monkeypatch.setattr(f"amopo_fast.demo.run.{name}", path)
    return str(path)


def test_show_prints_the_failed_step_and_its_records(tmp_path, few_pairs, capsys):
    from amopo_fast.cli import main
    from amopo_fast.demo.data import DIMENSIONS
    from amopo_fast.demo.run import demo_trainer

    run = demo_trainer(tmp_path, seed=0, max_steps=3)
    run.add_callback(BeforeStep(1, break_weight))
    with pytest.raises(NumbersError):
        run.train()
    report = json.loads((tmp_path / "failed-step-2.json").read_text())
    options = ["--dimensions", *DIMENSIONS, "--failed_step", str(tmp_path / "failed-step-2.json")]
    assert main(["show", few_pairs, *options]) == 0
    output = capsys.readouterr().out
    assert "step 2: the loss is not finite" in output and "model.layers.1.mlp.up_proj.weight" in output
    for record in report["records"]:
        assert f"record {record}" in output
    assert main(["show", few_pairs, "--failed_step", str(tmp_path / "metrics.jsonl")]) == 1
    assert "is no report of a failed step" in capsys.readouterr().err


def test_the_command_line_ends_with_4_on_a_bad_number(tmp_path, monkeypatch, capsys):
    from amopo_fast.cli import main, train

    def fail(arguments):
        raise NumbersError("step 7: the loss is not finite")

    monkeypatch.setattr(train, "run", fail)
    assert main(["train"]) == 4
    assert capsys.readouterr().err == "amopo-fast train: error: step 7: the loss is not finite\n"


def test_the_guard_waits_for_the_device_once_a_step(tmp_path):
    """`tolist` of the reduced numbers is the one read; every other would be an `item`, which torch dispatches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    reads, shapes = Reads(), []
    run = small_trainer(tmp_path, save_strategy="no", eval_strategy="no")
    for name in ("add", "on_pre_optimizer_step"):
        original = getattr(run.guard, name)

        def watched(*args, original=original, **kwargs):
            with reads:
                return original(*args, **kwargs)

        setattr(run.guard, name, watched)
    reduce = run.accelerator.reduce
    run.accelerator.reduce = lambda tensor, *args: shapes.append(tuple(tensor.shape)) or reduce(tensor, *args)
    run.train()
    assert shapes.count((4,)) == 8 and reads.count == 0


def test_with_the_step_in_backward_the_weights_after_a_bad_gradient_are_as_they_were(tmp_path):
    """Gradients come from the head down: those above layer 0 have stepped, the report names them."""
    before = {}

    def act(model):
        break_gradient(model)
        before.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})

    run = small_trainer(tmp_path, callbacks=[BeforeStep(3, act)], optim_in_backward="adamw", pairs_per_step=1,
                        tokens_per_micro_batch=10**6)  # fmt: skip
    with pytest.raises(NumbersError) as caught:
        run.train()
    message, bad = str(caught.value), "model.layers.0.mlp.up_proj.weight"
    assert message.startswith(f"step 4: the gradient is not finite ({bad}). ")
    after = weights(run)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert "lm_head.weight" in changed and bad not in changed and "model.embed_tokens.weight" not in changed
    assert f"{len(changed)} weights, whose gradients came before, were changed by it (lm_head.weight, " in message
    assert "that one and those after it were not. " in message
    assert f"The last complete checkpoint is {tmp_path / 'checkpoint-2'}" in message
    report = json.loads((tmp_path / "failed-step-4.json").read_text())
    assert set(report["changed_weights"]) == set(changed) and report["gradients"] == [bad]
    assert all(weight.isfinite().all() for weight in after.values())


@pytest.mark.parametrize("rate, step", [(1e38, 1), (1e38, 3)])
def test_the_step_that_broke_the_weights_is_named(tmp_path, rate, step):
    """Not the one after it: `step` is what the message, the file's name and the report say."""

    def act(model):
        run.optimizer.param_groups[0]["lr"] = rate

    run = small_trainer(tmp_path, callbacks=[BeforeStep(step - 1, act)], max_grad_norm=0.0, save_steps=1,
                        lr_scheduler_type="constant", warmup_steps=0)  # fmt: skip

    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == step - 1:
                with torch.no_grad():
                    model.lm_head.weight.mul_(rate)

    run.add_callback(Overflow())
    with pytest.raises(NumbersError, match=f"step {step}: a weight is not finite before saving .lm_head.*Nothing was"):
        run.train()
    report = json.loads((tmp_path / f"failed-step-{step}.json").read_text())
    assert report["step"] == step and len(report["records"]) == 4
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == list(range(1, step))


def test_a_last_step_that_breaks_the_weights_is_not_saved_as_the_model(tmp_path):
    run = small_trainer(tmp_path, max_steps=2, save_strategy="no", eval_strategy="no")
    run.train()
    break_weight(run.model)
    for save in (run.save_final, run.save_model):
        with pytest.raises(NumbersError, match="step 2: a weight is not finite before saving .model.layers.1.mlp.up"):
            save()
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "config.json").exists()


def test_show_reads_every_report_that_the_guard_writes(tmp_path, few_pairs, capsys):
    from amopo_fast.cli import main
    from amopo_fast.demo.data import DIMENSIONS
    from amopo_fast.demo.run import demo_trainer

    def reports():
        untrained = demo_trainer(tmp_path / "begin", seed=0, max_steps=2)
        break_weight(untrained.model)
        yield untrained.train
        yield untrained.save_model
        for number, (action, options) in enumerate(
            [(break_gradient, {}), (break_unused_weight, {}), (break_weight, {"objective": "simpo"}),
             (break_gradient, {"optim_in_backward": "adamw", "tokens_per_micro_batch": 10**6}),
             (break_weight, {"objective": "sft"})]
        ):  # fmt: skip
            calls = [BeforeStep(1, action)]
            run = small_trainer(tmp_path / str(number), callbacks=calls, save_strategy="no", **options)
            yield run.train

    for number, fail in enumerate(reports()):
        with pytest.raises(NumbersError):
            fail()
        report = max(tmp_path.rglob("failed-step-*.json"), key=lambda path: path.stat().st_mtime_ns)
        content = json.loads(report.read_text())
        options = ["--dimensions", *DIMENSIONS, "--failed_step", str(report)]
        assert main(["show", few_pairs, *options]) == 0, capsys.readouterr().err
        output = capsys.readouterr().out
        assert f"step {content['step']}: {content['reason']}" in output, number
        assert all(f"record {record}" in output for record in content["records"])
