"""Every type that is accepted is estimated, and PEFT adapts it: those that failed once, and all of them as `slow`."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from amopo_fast.memory.estimate import Row, Setup, estimate  # noqa: E402
from amopo_fast.memory.parameters import parameters_of  # noqa: E402
from model_types import PACKAGES, config_of  # noqa: E402

SWEEP = json.loads((ROOT / "benchmarks" / "results" / "models.json").read_text(encoding="utf-8"))["rows"]
ACCEPTED = sorted({row["case"] for row in SWEEP if "error" in row})
# A depth that is the encoder's, a tower in the decoder, code that reads values, towers whose layers have numbers for
# names, mixers without a cache.
ONCE_FAILED = ("bart", "git", "jetmoe", "qwen3_omni_moe_thinker", "zaya")
ROW = Row(tokens=32, label_tokens=16, kv_tokens=48, sequence_tokens=16)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ONCE_FAILED else pytest.mark.slow) for name in ACCEPTED]
)
def test_an_accepted_type_is_estimated(name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason="transformers builds it with that package")
    config = config_of(name)
    whole = estimate(config, ROW, Setup())
    adapter = parameters_of(config, lora_rank=16)
    assert sum(p.numel for p in adapter if p.trained) < whole.trained <= whole.parameters
    # Every matrix of an adapter is trained: none lies where no loss of text leads to.
    assert 0 < sum(p.numel for p in adapter) - whole.parameters == sum(p.numel for p in adapter if p.trained)
    assert whole.flops > 0 and whole.parts["activations"] > 0 and whole.parts["working memory"] > 0
