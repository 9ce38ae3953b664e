"""`--preset`: where its values stand between a file and the command line, and that the defaults are the paper's."""

import dataclasses

import pytest

from amopo_fast.cli.options import parse_options
from amopo_fast.cli.presets import PAPER, PRESETS
from amopo_fast.data.config import DataConfig
from amopo_fast.errors import OptionError
from amopo_fast.training.config import AMoPOConfig


def parsed(*rest):
    return parse_options("train", (DataConfig, AMoPOConfig), [*rest, "--use_cpu"], presets=PRESETS)


def test_a_preset_stands_over_the_file_and_under_the_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("beta: 5\ngamma: 1\nlearning_rate: 1.0e-3\nmax_length: 512\npairs_per_step: 4\n")
    data, config, options = parsed("--config", str(path), "--preset", "paper", "--gamma", "1.5")
    assert (config.beta, config.gamma, config.learning_rate, data.max_length) == (0.8, 1.5, 3e-7, 1024)
    assert config.pairs_per_step == 4 and {"beta", "gamma", "pairs_per_step"} <= options.given


def test_the_defaults_are_the_papers():
    data, config, _ = parsed()
    config.settle_learning_rate(adapter=False)
    found = dataclasses.asdict(data) | {name: getattr(config, name) for name in PAPER if hasattr(config, name)}
    assert {name: found[name] for name in PAPER} == PAPER


def test_what_a_preset_cannot_be_combined_with_names_it():
    with pytest.raises(OptionError, match="preset paper: gamma: gamma=2.0 has no effect with objective dpo"):
        parsed("--preset", "paper", "--objective", "dpo")
    with pytest.raises(OptionError, match="invalid choice: 'pepper'"):
        parsed("--preset", "pepper")
