"""The recall study, in a form that takes seconds."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import recall, recall_report
from benchmarks.recall import Study

SMALL = Study(
    window=4, farthest=16, distances=(16, 32), keys=128, key_length=1, symbols=8, hidden_size=32, num_heads=2,
    steps=100, tokens=1024, learning_rate=0.02, warmup_steps=10,
)  # fmt: skip
# To see what is written.
TINY = replace(SMALL, steps=1, keys=2, tokens=64)


@pytest.mark.parametrize("name", ["landmark", "hierarchical", "infini"])
def test_a_mixer_learns_to_recall_from_beyond_its_window(name):
    result = recall.run(SMALL, name, 0)
    assert {way: curve[0]["keys"] > 0.95 for way, curve in result["recall"].items()} == dict.fromkeys(
        ["forward", "cache"] if name == "landmark" else ["forward"], True
    )
    if name == "infini":
        history = result["history"]
        assert history["step"] == list(range(recall.EVERY, SMALL.steps + 1, recall.EVERY))
        assert all(abs(gate - 0.5) > 0.01 for gate in history["gates"][-1])


def test_the_control_does_not():
    """Of 128 keys with 8 symbols an eighth is right, and with luck (4.5 standard deviations) a quarter."""
    assert SMALL.reach < min(SMALL.distances)
    result = recall.run(SMALL, "window", 0)
    assert all(each["keys"] < 0.25 for each in result["recall"]["forward"])


def test_only_the_mixer_of_the_top_layer_differs():
    models = {name: Study().model(name) for name in Study().mixers}
    for model in models.values():
        model["blocks"].pop("far")
        assert model == models["window"]


def test_distances_grow_to_the_farthest():
    random = np.random.RandomState(0)
    study = Study()
    first = [recall.distance_at(study, 0, random) for _ in range(500)]
    last = [recall.distance_at(study, study.steps - 1, random) for _ in range(500)]
    assert min(first) == min(last) == study.key_length
    assert max(first) == study.window and 0.9 * study.farthest < max(last) <= study.farthest


def test_a_run_is_repeated_where_it_is_another(tmp_path):
    run = "infini delta", 0
    assert recall.read(tmp_path, TINY, *run) is None
    recall.run_all(TINY, [run], tmp_path)
    file = recall.path(tmp_path, *run)
    written = file.read_text()
    assert recall.read_all(tmp_path, TINY) == [json.loads(written)]
    assert recall.read(tmp_path, replace(TINY, tokens=65), *run) is None
    file.write_text(written.replace('"update": "delta"', '"update": "linear"'))
    assert recall.read(tmp_path, TINY, *run) is None
    file.write_text(marked := written + " ")
    recall.run_all(TINY, [run], tmp_path)
    assert file.read_text() == marked


@pytest.fixture
def results():
    """Two seeds of what a study would write."""

    def one(name, seed, shares):
        curve = [{"distance": d, "symbols": x, "keys": x / 2} for d, x in zip((16, 32), shares, strict=True)]
        found = recall.given(SMALL, name, seed) | {"cpu_seconds": {"all": 240}, "recall": {"forward": curve}}
        found["history"] = {"step": [1, 2], "loss": [2.0, 1.0]}
        if name == "infini":
            found["history"]["gates"] = [[0.5, 0.5], [0.61, 0.38]]
        return json.loads(json.dumps(found))

    infini = [one("infini", seed, shares) for seed, shares in enumerate([(1.0, 0.75), (0.9, 0.25)])]
    landmark = one("landmark", 0, (1.0, 0.995))
    landmark["recall"]["cache"] = [{"distance": d, "symbols": 0.8, "keys": 0.7} for d in (16, 32)]
    return [landmark, *infini]


def test_the_page_has_every_figure(results):
    page = recall_report.page(results)
    assert "about 6 minutes on two CPU cores" in page and "(12.5%)" in page and "see 9 tokens back" in page
    assert "| infini | 2 | 95.0% | 50.0% |" in page and "| infini | 2 | 47.5% (45.0%) | 25.0% (12.5%) |" in page
    assert "| landmark, top_k 2 | 1 | 80.0% | 80.0% |" in page
    assert "| infini | 1 | 0.61 | 0.38 |" in page


def test_without_infini_the_page_has_no_gates(results, tmp_path):
    assert "gates" not in recall_report.page(results[:1])
    assert recall_report.write(results[:1], tmp_path).with_suffix(".png").stat().st_size > 10_000


def test_the_committed_page_is_of_the_committed_results():
    """Which are all of the study as it is now."""
    results = recall.read_all(recall.RESULTS, Study())
    assert len(results) == len(list(recall.RESULTS.glob("*.json")))
    assert (recall_report.DOCS / recall_report.FILE).read_text() == recall_report.page(results)
