"""zoo/train/schedules.py"""

from itertools import pairwise

import pytest
import torch

from zoo.train.schedules import cosine, make_schedule, wsd

COMMON = {"total_steps": 100, "warmup_steps": 10, "final_fraction": 0.1}


def test_cosine_passes_through_its_known_points():
    values = [cosine(step, **COMMON) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == 1.0
    assert values[10] == 1.0
    assert values[55] == pytest.approx(0.55)  # half way down: the mean of 1 and 0.1
    assert values[100] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in pairwise(values[10:]))
    assert cosine(1000, **COMMON) == pytest.approx(0.1)


def test_wsd_is_flat_between_warm_up_and_decay():
    values = [wsd(step, **COMMON, decay_fraction=0.2) for step in range(101)]
    assert values[4] == pytest.approx(0.5)
    assert set(values[9:81]) == {1.0}
    assert values[85] == pytest.approx(1 - 0.9 * 0.5)  # sqrt(5 / 20) = 1/2
    assert values[100] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(values[80:]))


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_without_warm_up_the_first_step_is_at_the_peak(name):
    schedule = make_schedule(name, total_steps=50, warmup_steps=0, final_fraction=0.0, decay_fraction=0.5)
    assert schedule(0) == 1.0
    assert schedule(50) == pytest.approx(0.0, abs=1e-12)


def test_no_step_of_training_is_at_rate_zero():
    for name in ("cosine", "wsd"):
        schedule = make_schedule(name, total_steps=20, warmup_steps=5, final_fraction=0.0, decay_fraction=0.3)
        assert min(schedule(step) for step in range(20)) > 0.0


def test_drives_a_torch_scheduler():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = make_schedule("cosine", total_steps=10, warmup_steps=2, final_fraction=0.1, decay_fraction=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [2.0 * schedule(step) for step in range(10)]
