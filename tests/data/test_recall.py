"""The passkey task: what an example is, and that nothing gives the key away."""

import numpy as np
import pytest
import torch

from zoo.data import DataError
from zoo.data.recall import ASK, KEY, Passkey

TASK = Passkey(distance=20, key_length=3, symbols=5, room=7)


def test_an_example():
    batch = TASK.batch(0, 200)
    tokens, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
    assert tokens.shape == labels.shape == (200, TASK.length)
    befores = set()
    for row, label in zip(tokens, labels, strict=True):
        (key,), (ask,) = np.flatnonzero(row == KEY), np.flatnonzero(row == ASK)
        answers = np.flatnonzero(label != -100)
        assert list(answers) == [ask + 1, ask + 2, ask + 3]
        assert list(label[answers]) == list(row[answers]) == list(row[key + 1 : key + 4])
        # The answer is predicted one token before it stands there.
        assert list(answers - 1 - np.arange(key + 1, key + 4)) == [TASK.distance] * 3
        befores.add(key)
    assert befores == set(range(TASK.room + 1))
    assert set(tokens.flat) == {KEY, ASK} | set(range(2, TASK.vocab_size))


@pytest.mark.parametrize("distance", [3, 4])
def test_the_question_may_follow_the_key_at_once(distance):
    tokens = Passkey(distance=distance, key_length=3, room=0).batch(0, 1)["input_ids"][0].tolist()
    assert tokens[0] == KEY and tokens[distance + 1] == ASK and tokens[distance + 2 :] == tokens[1:4]


def test_an_example_depends_on_its_number_and_the_seed_alone():
    whole = TASK.batch(0, 10)
    for name, part in TASK.batch(4, 3).items():
        assert torch.equal(part, whole[name][4:7])
    assert torch.equal(whole["input_ids"], TASK.batch(0, 10)["input_ids"])
    assert len(whole["input_ids"].unique(dim=0)) == 10
    other = Passkey(distance=20, key_length=3, symbols=5, room=7, seed=1)
    assert not torch.equal(other.batch(0, 10)["input_ids"], whole["input_ids"])


def test_who_does_not_see_the_key_is_right_by_chance():
    """Each symbol of the key is as likely as any other, whatever the one before it and the token that asks."""
    count = 20_000
    batch = TASK.batch(0, count)
    answers = batch["labels"][batch["labels"] != -100].view(count, 3) - 2
    error = 5 * (TASK.chance / count) ** 0.5
    for place in range(3):
        shares = torch.bincount(answers[:, place], minlength=5) / count
        assert (shares - TASK.chance).abs().max() < error
    pairs = torch.bincount(answers[:, 0] * 5 + answers[:, 1], minlength=25) / count
    assert (pairs - TASK.chance**2).abs().max() < error / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": 3}, r"distance: 3 must be at least key_length \(4\)"),
        ({"distance": 9, "key_length": 0}, "key_length: 0 must be at least 1"),
        ({"distance": 9, "symbols": 1}, "symbols: 1 must be at least 2"),
        ({"distance": 9, "room": -1}, "room: -1 must be at least 0"),
        ({"distance": 9, "seed": -1}, "seed: -1 must be at least 0"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(DataError, match=f"^{message}$"):
        Passkey(**options)
