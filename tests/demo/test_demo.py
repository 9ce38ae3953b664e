"""The demo is honest: nothing but the preferences can be learned from its data, and the model does learn them."""

import re

import numpy as np
import pytest
import torch

from amopo_fast.data.pairs import read_pairs
from amopo_fast.demo import generate
from amopo_fast.demo.data import DIMENSIONS, HELDOUT_FILE, TRAIN_FILE
from amopo_fast.demo.run import demo_trainer


@pytest.fixture(scope="module")
def splits():
    return [read_pairs(path, dimensions=DIMENSIONS)[0] for path in (TRAIN_FILE, HELDOUT_FILE)]


def test_the_files_are_what_the_generator_writes():
    for name, text in generate.splits().items():
        assert (generate.FOLDER / name).read_text(encoding="utf-8") == text


def test_splits_are_large_enough_and_share_no_text(splits):
    train, heldout = splits
    assert len(train) >= 200 and len(heldout) >= 60
    texts = [
        {text for pair in pairs for text in (pair.messages[-1].content, pair.chosen, pair.rejected)} for pairs in splits
    ]
    assert not texts[0] & texts[1]


def test_length_does_not_mark_the_chosen_side(splits):
    for pairs in splits:
        longer = [np.sign(len(pair.chosen) - len(pair.rejected)) for pair in pairs]
        assert abs(np.mean(longer)) < 0.05


def bag_of_words(texts, vocabulary):
    bags = torch.zeros(len(texts), len(vocabulary) + 1)
    for row, text in enumerate(texts):
        for word in re.findall(r"\w+|[^\w\s]+", text.lower()):
            bags[row, vocabulary.get(word, len(vocabulary))] += 1
    return bags


def classifier_accuracy(train, heldout):
    """Held-out accuracy of logistic regression on the difference of the two responses' bags of words."""
    words = sorted({w for p in train for w in re.findall(r"\w+|[^\w\s]+", f"{p.chosen} {p.rejected}".lower())})
    vocabulary = {word: index for index, word in enumerate(words)}
    difference = [
        bag_of_words([p.chosen for p in pairs], vocabulary) - bag_of_words([p.rejected for p in pairs], vocabulary)
        for pairs in (train, heldout)
    ]
    weight = torch.zeros(len(vocabulary) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.softplus(-difference[0] @ weight).mean() + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        scores = difference[1] @ weight
    return ((scores > 0).float() + 0.5 * (scores == 0).float()).mean().item()


def test_single_words_do_not_mark_the_chosen_side(splits):
    train, heldout = splits
    assert classifier_accuracy(train, heldout) < 0.6
    assert classifier_accuracy(train, train) < 0.6


def test_the_classifier_finds_a_word_that_gives_the_side_away(splits):
    from dataclasses import replace

    marked = [[replace(p, chosen=f"Please: {p.chosen}") for p in pairs] for pairs in splits]
    assert classifier_accuracy(*marked) > 0.95


def untrained(output_dir, **options):
    trainer = demo_trainer(output_dir, 0, **options)
    trainer.args.eval_strategy = "no"
    return trainer


def held_out_accuracy(trainer):
    """The mean over dimensions."""
    return trainer.evaluate()["eval_accuracy/mean"]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_preferences_are_learned(tmp_path, one_thread):
    """By the first third of the demo. Before it the accuracy is 0.48, as the slow test shows."""
    trainer = untrained(tmp_path, max_steps=110)
    trainer.train()
    assert held_out_accuracy(trainer) >= 0.63


@pytest.mark.slow
@pytest.mark.parametrize(("shuffle_labels", "least", "most"), [(False, 0.85, 1), (True, 0.4, 0.6)])
def test_preferences_are_learned_and_shuffled_ones_are_not(tmp_path, one_thread, shuffle_labels, least, most):
    trainer = untrained(tmp_path, max_steps=-1, shuffle_labels=shuffle_labels)
    assert abs(held_out_accuracy(trainer) - 0.5) < 0.1
    trainer.train()
    assert least <= held_out_accuracy(trainer) <= most
