"""Scores against the model's own logits, intervals, and the command on models, adapters and checkpoints."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from amopo_fast.cli import main
from amopo_fast.cli.evaluate import _interval, find_models, step_of
from amopo_fast.data.pairs import DEFAULT_DIMENSIONS, read_pairs
from amopo_fast.demo.data import HELDOUT_FILE
from amopo_fast.demo.model import demo_model
from amopo_fast.demo.tokenizer import demo_tokenizer
from amopo_fast.evaluation.preferences import _histogram, per_pair, score_pairs
from amopo_fast.evaluation.summary import difference, summary
from amopo_fast.prompts.builder import PromptBuilder
from amopo_fast.training.objective import AMoPO
from amopo_kernels import sequence_stats

BETA, GAMMA = 1.5, 0.5


@pytest.fixture(scope="module")
def pairs():
    found, _ = read_pairs(HELDOUT_FILE, dimensions=DEFAULT_DIMENSIONS)
    tokens = PromptBuilder(demo_tokenizer(), DEFAULT_DIMENSIONS, max_length=256).tokenize(found[:12])[0]
    first = tokens[0]
    tokens[0] = replace(first, prompts=(first.prompts[0], None, *first.prompts[2:]))
    for pair, gap in ((tokens[1], 0.0), (tokens[2], -1.0), (tokens[3], -2.0)):
        pair.score_gaps[2] = gap
    return tokens


@pytest.fixture(scope="module")
def scores(pairs):
    return score_pairs(
        demo_model(0), pairs, dimensions=DEFAULT_DIMENSIONS, objective=AMoPO(BETA, GAMMA), tokens_per_row=900
    )


def test_a_line_a_pair_has_the_models_own_sums(pairs, scores):
    model = demo_model(0).eval()
    lines = list(per_pair(scores))
    assert [line["record"] for line in lines] == [pair.record for pair in pairs]
    assert len(lines[0]["dimensions"]) == len(DEFAULT_DIMENSIONS) - 1  # one is absent
    for pair, line in zip(pairs, lines, strict=True):
        for name, prompt in zip(DEFAULT_DIMENSIONS, pair.prompts, strict=True):
            if prompt is None:
                assert name not in line["dimensions"]
                continue
            got = line["dimensions"][name]
            for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
                with torch.no_grad():
                    rows = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
                own = float(rows.gather(1, torch.from_numpy(response)[:, None]).sum())
                assert got[f"{side}_logp"] == pytest.approx(own, rel=1e-5)
                assert got[f"{side}_tokens"] == len(response)
            mean = got["chosen_logp"] / len(pair.chosen) - got["rejected_logp"] / len(pair.rejected)
            assert got["margin"] == pytest.approx(BETA * mean - GAMMA, abs=1e-4)


def test_scores_are_those_of_separate_sequences(pairs, scores):
    model = demo_model(0).eval()
    counts = np.zeros_like(scores.probabilities)
    for p, pair in enumerate(pairs):
        mean_p = []
        for k, prompt in enumerate(pair.prompts):
            if prompt is None:
                assert np.isnan(scores.table[p, k]).all()
                continue
            logps = []
            for side, response in enumerate((pair.chosen, pair.rejected)):
                ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
                with torch.no_grad():
                    rows = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                logps.append(rows.gather(1, torch.from_numpy(response)[:, None])[:, 0])
                bins = np.minimum((logps[-1].exp().numpy() * 20).astype(int), 19)
                counts[k, side] += np.bincount(bins, minlength=20)
            chosen, rejected = (x.mean().item() for x in logps)
            row = dict(zip(AMoPO.columns, scores.table[p, k], strict=True))
            assert row["margin"] == pytest.approx(BETA * (chosen - rejected) - GAMMA, abs=1e-4)
            assert row["preference_accuracy"] == (chosen > rejected)
            gap = pair.score_gaps[k]
            right = np.nan if gap == 0 else (chosen > rejected) != (gap < 0)
            assert row["accuracy"] == right or np.isnan([row["accuracy"], right]).all()
            assert row["logp_rejected"] == pytest.approx(rejected, abs=1e-4)
            mean_p.append(sum(x.exp().mean().item() for x in logps))
        weights = np.exp(mean_p) / np.exp(mean_p).sum()
        present = [k for k, prompt in enumerate(pair.prompts) if prompt is not None]
        assert scores.column("weight")[p, present] == pytest.approx(weights, abs=1e-5)
    assert scores.lengths.tolist() == [[len(pair.chosen), len(pair.rejected)] for pair in pairs]
    assert np.abs(counts - scores.probabilities).sum() <= 2  # a probability on a bin's edge may fall either way


def test_token_probabilities_are_counted_by_dimension_and_side():
    # Two pairs, two dimensions: sequences (pair, dimension, side) of these lengths, the second dimension once absent.
    lengths = [3, 1, 2, 4, 5, 2, 0, 0]
    rng = np.random.default_rng(0)
    probability = rng.uniform(0, 1, sum(lengths)).astype(np.float32)
    probability[0] = 1.0
    logps = torch.from_numpy(np.log(probability))
    found = _histogram(sequence_stats(logps, torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)), 2)
    ends = np.cumsum(lengths)
    for sequence in range(4):
        own = [probability[ends[i] - lengths[i] : ends[i]] for i in (sequence, sequence + 4)]
        expected = np.histogram(np.concatenate(own), np.linspace(0, 1, 21))[0]
        assert found[sequence // 2, sequence % 2].tolist() == expected.tolist()


def test_summary_counts_what_the_table_holds(scores):
    found = summary(scores)
    accuracy, preference = scores.column("accuracy"), scores.column("preference_accuracy")
    for k, name in enumerate(DEFAULT_DIMENSIONS):
        entry, gaps = found["dimensions"][name], scores.score_gaps[:, k][~np.isnan(preference[:, k])]
        assert entry["pairs"] == 12 - (k == 1)
        assert entry["accuracy"]["value"] == pytest.approx(np.nanmean(accuracy[:, k]))
        assert entry["preference_accuracy"]["value"] == pytest.approx(np.nanmean(preference[:, k]))
        assert (entry["tied"], entry["reversed"]) == ((gaps == 0).sum(), (gaps < 0).sum())
        assert np.isnan(accuracy[:, k]).sum() == entry["tied"] + (k == 1)
        assert sum(entry["weight"]["counts"]) == entry["pairs"]
        bins = entry["calibration"]["bins"]
        assert sum(part["pairs"] for part in bins) == entry["pairs"] - entry["tied"]
        assert sum(part["pairs"] * part["accuracy"] for part in bins) == pytest.approx(np.nansum(accuracy[:, k]))
    assert found["dimensions"]["no_object"]["rank_correlation"]["value"] is None  # it has no scores
    assert found["dimensions"]["correctness"]["tied"] and found["dimensions"]["correctness"]["reversed"]
    assert found["mean"]["accuracy"]["value"] == pytest.approx(np.nanmean(np.nanmean(accuracy, 1)))
    groups = found["by_length"]
    assert sum(group["pairs"] for group in groups) == 12
    assert all(a["to"] < b["from"] for a, b in zip(groups, groups[1:], strict=False))
    same = np.array(found["agreement"]["same_side"])
    assert np.allclose(np.diag(same), 1) and np.allclose(same, same.T)
    assert same[0, 2] == pytest.approx((preference[:, 0] == preference[:, 2]).mean())
    json.dumps(found, allow_nan=False)


def test_difference_is_paired(pairs, scores):
    other = replace(scores, table=scores.table.copy())
    other.column("accuracy")[:3, 0] = 1 - other.column("accuracy")[:3, 0]
    expected = other.column("accuracy")[:, 0] - scores.column("accuracy")[:, 0]
    change = difference(scores, other)["no_object"]
    assert change["value"] == pytest.approx(expected.mean()) and change["value"] != 0
    assert change["low"] <= change["value"] <= change["high"]
    with pytest.raises(ValueError, match="different pairs"):
        difference(scores, score_pairs(demo_model(1), pairs[1:], dimensions=DEFAULT_DIMENSIONS))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("eval")
    run = folder / "run"
    for step, seed in ((2, 0), (10, 1)):
        demo_model(seed).save_pretrained(run / f"checkpoint-{step}")
    demo_model(1).save_pretrained(run)
    demo_tokenizer().save_pretrained(run)
    (run / "metrics.jsonl").write_text('{"step": 12, "loss": 1.0}\n')
    base = demo_model(1)
    base.name_or_path = str(run)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(run)
    adapted.save_pretrained(folder / "adapter")
    lines = HELDOUT_FILE.read_text().splitlines()[:10]
    (folder / "heldout.jsonl").write_text("\n".join(lines))
    return folder


def test_all_checkpoints_of_a_run(run_folder, capsys):
    run = run_folder / "run"
    assert [step_of(name) for name in find_models(str(run), True)] == [2, 10, 12]
    data = str(run_folder / "heldout.jsonl")
    assert main(["eval", str(run), "--checkpoints", "--eval_data", data, f"{data},name=again"]) == 0
    assert "±" in capsys.readouterr().out
    found = json.loads((run / "eval.json").read_text())
    assert list(found) == ["heldout", "again"] and [m["step"] for m in found["again"].values()] == [2, 10, 12]
    last = list(found["again"].values())
    assert last[1]["dimensions"] == last[2]["dimensions"] and last[2]["difference"]["mean"]["value"] is not None
    assert "Accuracy over training" in (run / "eval-again.html").read_text()


def test_the_table_has_no_interval_of_a_few_pairs():
    assert _interval({"value": 0.5, "low": None, "high": None}) == "50.0"
    assert _interval({"value": 0.5, "low": 0.1, "high": 0.8}) == "50.0 ±40.0"


def test_an_adapter_is_evaluated_on_its_base_model(run_folder, tmp_path, capsys):
    models = [str(run_folder / "run"), str(run_folder / "adapter")]
    data = str(run_folder / "heldout.jsonl")
    assert main(["eval", *models, "--eval_data", data, "--output_dir", str(tmp_path), "--json"]) == 0
    found = list(json.loads((tmp_path / "eval.json").read_text())["eval"].values())
    assert json.loads(capsys.readouterr().out)["eval"]
    assert found[0]["mean"]["margin"]["value"] != found[1]["mean"]["margin"]["value"]
    assert "<svg" in (tmp_path / "eval.html").read_text()


@pytest.mark.parametrize(
    ("code", "options", "message"),
    [
        (1, ["nowhere/at-all-/x/y"], "cannot be loaded"),
        (1, ["./nowhere"], "no folder of a model"),
        (1, ["EMPTY"], "holds no model"),
        (2, ["RUN"], "eval_data is missing"),
        (1, ["RUN", "--eval_data", "none.json"], "none.json"),
        (2, ["RUN", "--eval_data", "DATA", "--beta", "0"], "beta=0.0 must be positive"),
        (1, ["RUN", "--eval_data", "DATA", "--dimensions", "speed"], "no record has a score 'speed'"),
    ],
)
def test_bad_evaluations_end_with_a_sentence(run_folder, tmp_path, capsys, code, options, message):
    names = {"RUN": str(run_folder / "run"), "DATA": str(run_folder / "heldout.jsonl"), "EMPTY": str(tmp_path)}
    assert main(["eval", *(names.get(option, option) for option in options)]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
