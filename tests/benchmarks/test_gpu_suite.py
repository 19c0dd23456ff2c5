"""The GPU's suite, at tiny sizes on a CPU."""

import json
import sys
import time

import pytest
import torch

import zoo
from benchmarks import gpu_checks, gpu_suite, machine, ops
from benchmarks.gpu_checks import Mode, check
from benchmarks.inputs import Case
from benchmarks.rows import Options, Task

OPTIONS = Options("cpu", ("bfloat16",), quick=True)
CASES = [
    Case("linear_attention", "per head", 2, 16),
    Case("linear_attention", "per token", 2, 16),
    Case("selective_scan", None, 1, 16),
    Case("causal_conv1d", None, 1, 16),
    Case("gated_rms_norm", "norm first", 1, 16),
]


def test_the_whole_suite(tmp_path, capfd):
    """A check in segments, the checks of a case, the rows of an op; figures, report and table."""
    match = "gated_rms_norm gate first|gated_rms_norm 32 bfloat16 1 x 1 "
    gpu_suite.main(["--tiny", "--out", str(tmp_path), "--match", match, "--only", "checks,ops"])
    results = machine.read(machine.path("cpu", tmp_path))
    assert [row["shape"]["variant"] for row in results["ops"]] == ["gate first", "norm first"]
    assert results["peaks"]["bfloat16"] > 0
    report = json.loads(machine.path("cpu", tmp_path / "checks").read_text())
    assert len(report["checks"]) == 4 and all(each["passed"] for each in report["checks"]), report["checks"]
    assert not report["failed"] and not report["left_out"] and report["seconds"].keys() == {"checks", "ops"}
    assert "4 checks right, 0 not" in capfd.readouterr().out


def test_goals_and_contexts(tmp_path, capfd):
    """The goals' rows are in the report, with a line each; those of long contexts are figures as others."""
    match = "hierarchical beside|window beside|window bfloat16 next"
    gpu_suite.main(["--tiny", "--out", str(tmp_path), "--match", match, "--only", "goals,context"])
    results = machine.read(machine.path("cpu", tmp_path))
    assert [row["what"] for row in results["context"]] == ["window"]
    report = json.loads(machine.path("cpu", tmp_path / "checks").read_text())
    assert [row["what"] for row in report["goals"]] == ["hierarchical", "window"] and not report["failed"]
    said = capfd.readouterr().out
    assert "times as fast as sdpa, 4 asked for: " in said
    assert "window at 160 tokens, forward+backward: not compared with flex" in said  # which needs a GPU
    assert "per token: " in said


def test_the_sections_are_all_there():
    assert gpu_suite.SHARES.keys() == {"checks", *gpu_suite.PLANS}
    assert sum(gpu_suite.SHARES.values()) == pytest.approx(1)
    cuda = Options("cuda", ("bfloat16",))
    planned = {section: {task.what for task in plan(cuda)} for section, plan in gpu_suite.PLANS.items()}
    assert planned["goals"] == {"hierarchical", "landmark", "window"} < planned["context"]


class Askew(torch.autograd.Function):
    """The identity, with a gradient that is 1% off."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


@pytest.fixture
def kernels(monkeypatch):
    """Stands for the kernels: the torch backend in float32, with these functions applied to tensors of these names."""
    changes = {}

    def on_backend(name, op, fixed, **tensors):
        if name == "triton":
            tensors = {key: changes.get(key, torch.clone)(t) for key, t in tensors.items()}
        outputs = ops.on_backend("torch", op, fixed, **tensors)
        if name == "triton" and "out" in changes:
            outputs = (
                (changes["out"](outputs[0]), outputs[1]) if isinstance(outputs, tuple) else changes["out"](outputs)
            )
        return outputs

    monkeypatch.setattr(gpu_checks, "on_backend", on_backend)
    return changes


@pytest.mark.parametrize("case", CASES, ids=gpu_checks.named)
@pytest.mark.parametrize("length", [50, 20, 1])
def test_a_check_covers_outputs_and_gradients_in_segments(case, length, kernels):
    result = check(case, Mode("float32", 2, length), OPTIONS)
    tensors, _ = gpu_checks.make_inputs(case, Mode("float32", 2, length), OPTIONS)
    state = {"state"} if case.op in gpu_checks.STATEFUL else set()
    assert result["errors"].keys() == {"out"} | state | {f"d {name}" for name in tensors}
    assert result["passed"] and max(result["errors"].values()) < 1e-5, result


@pytest.mark.parametrize("case", CASES[:-1], ids=gpu_checks.named)
def test_a_check_of_documents(case, kernels):
    result = check(case, Mode("float32", 1, 50, packed=True), OPTIONS)
    assert result["passed"] and "d initial_state" in result["errors"], result


def one_wrong(y):
    """The last token of the last row is 1% off."""
    y = y.clone()
    y[-1, -1] *= 1.01
    return y


@pytest.mark.parametrize("case", CASES, ids=gpu_checks.named)
def test_a_check_finds_one_wrong_token(case, kernels):
    kernels["out"] = one_wrong
    result = check(case, Mode("float32", 1, 50, gradients=False), OPTIONS)
    assert not result["passed"] and result["errors"].keys() <= {"out", "state"}
    assert result["errors"]["out"] > 1e-3 and result["errors"].get("state", 0) < 1e-5


@pytest.mark.parametrize("case", CASES, ids=gpu_checks.named)
def test_a_check_finds_a_wrong_gradient(case, kernels):
    """Of each input alone."""
    for name in gpu_checks.make_inputs(case, Mode("float32", 2, 50), OPTIONS)[0]:
        kernels.clear()
        kernels[name] = Askew.apply
        result = check(case, Mode("float32", 2, 50), OPTIONS)
        assert [key for key, error in result["errors"].items() if error > 1e-3] == [f"d {name}"]
        assert not result["passed"]


def test_a_check_finds_what_changes_from_run_to_run(kernels):
    kernels["out"] = lambda y: y * (1 + 1e-6 * torch.rand(1, generator=generator))
    generator = torch.Generator()
    result = check(CASES[-1], Mode("float32", 1, 50, gradients=False), OPTIONS)
    assert max(result["errors"].values()) < 1e-5 and not result["repeatable"] and not result["passed"]


def test_a_check_of_choices(kernels):
    """Of 1,300 tokens, the last of which choose 16 among 21 blocks."""
    case, mode = Case("select_blocks", None, 2, 16), Mode("float32", 1, 1300)
    assert gpu_checks.named(case) in gpu_checks.jobs(OPTIONS)
    assert gpu_checks.choices(case, mode, OPTIONS)["passed"]
    kernels["out"] = lambda chosen: torch.where(torch.arange(1300)[:, None, None] == 1299, chosen - 1, chosen)
    result = gpu_checks.choices(case, mode._replace(batch=2), OPTIONS)
    assert result["errors"] == {"rows": pytest.approx(1 / 1300)}
    kernels["out"] = lambda chosen: chosen - 1
    assert not gpu_checks.choices(case, mode, OPTIONS)["passed"]


@pytest.mark.parametrize("worst", [float("nan"), float("inf")])
def test_nothing_that_is_not_finite_passes(worst, kernels):
    kernels["out"] = lambda y: torch.full_like(y, worst)
    result = check(CASES[-1], Mode("float32", 1, 50, gradients=False), OPTIONS)
    assert result["errors"]["out"] == 1e9 and not result["passed"]


def test_processes_side_by_side():
    """One that prints, one that crashes after a result, one that never ends; the largest begins first."""
    say = 'print(\'{"check": "a", "passed": true}\', flush=True);'
    commands = {
        "says": say,
        "crashes": f"{say} import os; os.abort()",
        "raises": "raise RuntimeError('no luck')",
        "hangs": f"{say} import time; time.sleep(60)",
        "too large": say,
    }
    commands = {name: [sys.executable, "-c", code] for name, code in commands.items()}
    gigabytes = dict.fromkeys(commands, 1) | {"too large": 119, "hangs": 120}
    found = dict(gpu_suite.in_processes(commands, gigabytes, 120, time.time() + 3))
    right = {"check": "a", "passed": True}
    assert found.keys() == commands.keys()
    assert found["hangs"] == [right, {"check": "hangs", "failed": ["it took too long"]}]
    assert found["too large"] == [{"check": "too large", "failed": ["there was no time"]}]
    gigabytes["hangs"] = 1
    found = dict(gpu_suite.in_processes(commands, gigabytes, 120, time.time() + 3))
    assert found["says"] == found["too large"] == [right]
    assert found["crashes"][0] == right and "failed" in found["crashes"][1]
    assert found["raises"][0]["failed"][-1] == "RuntimeError: no luck"


def test_rows_that_fail(tmp_path, monkeypatch):
    """A failure is noted and the rest goes on; an error of CUDA ends the process, and its row is not tried again."""
    calls = []

    def row(what):
        calls.append(what)
        if what == "broken":
            raise ValueError("no\nsuch thing")
        if what == "fatal":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        figures = {"what": what, "pass": "forward", "dtype": "bfloat16", "shape": {"length": 1}}
        return figures | {"candidates": {"torch": {"ms": 1.0, "min_ms": 1.0}}}

    names = ("broken", "fatal", "fine")
    tasks = [Task(name, name, lambda name=name: row(name)) for name in names]
    monkeypatch.setitem(gpu_suite.PLANS, "ops", lambda options: tasks)
    report = gpu_suite.Report(tmp_path, "cpu")
    report.start("cpu")
    report.write(peaks={})
    with pytest.raises(SystemExit) as caught:
        gpu_suite.measure("ops", "", time.time() + 9, tmp_path, OPTIONS)
    assert caught.value.code == 1
    gpu_suite.measure("ops", "", time.time() + 9, tmp_path, OPTIONS)
    assert calls == list(names)
    tasks.append(Task("late", "late", lambda: row("late")))
    gpu_suite.measure("ops", "", time.time() - 1, tmp_path, OPTIONS)
    content = gpu_suite.Report(tmp_path, "cpu").content
    assert content["left_out"] == ["ops 3: late"] and len(content["tried"]) == 3
    assert content["failed"]["ops 0: broken"] == "ValueError: no"
    assert [each["what"] for each in machine.read(machine.path("cpu", tmp_path))["ops"]] == ["fine"]


@pytest.mark.parametrize(("name", "billions"), [("minimax-1b", 1.0), ("jamba-1b", 1.2), ("transformer-1b", 1.0)])
def test_models_of_a_billion_parameters(name, billions):
    model = zoo.build(gpu_suite.billion()[name], device="meta")
    assert model.num_params() == pytest.approx(1e9 * billions, rel=0.06)


@pytest.mark.parametrize("name", gpu_suite.billion())
def test_a_small_one_trains_and_decodes(name):
    row = gpu_suite.train(name, OPTIONS)
    assert row["shape"] == {"batch": 4, "length": 16} and row["floor"]["flops"] > 0
    row = gpu_suite.decode(name, 40, OPTIONS)
    model = gpu_suite.build(name, "cpu", torch.bfloat16, True)
    tokens = 40 + 2 * gpu_suite.NEW  # one call before the timed one
    assert row["cache_bytes"] == model.state_bytes(1, tokens)


def test_training_takes_the_largest_batch_that_fits(monkeypatch):
    sizes = []

    def step(model, ids, dtype):
        sizes.append((len(ids), model.is_gradient_checkpointing))
        if len(ids) > 1 or not model.is_gradient_checkpointing:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu_suite, "step", step)
    row = gpu_suite.train("transformer-1b", OPTIONS)
    assert list(dict.fromkeys(sizes)) == [(4, False), (2, False), (1, False), (1, True)]
    assert row["shape"]["batch"] == 1 and row["checkpointing"]


def test_what_matters_most_is_measured_first():
    tasks = gpu_suite.plan_ops(Options("cuda", ("bfloat16",)))
    assert len(tasks) == len(ops.plan(Options("cuda", ("bfloat16",))))
    assert all(" x 8192 forward+backward" in task.label for task in tasks[:10])
    assert tasks[0].what == "linear_attention" and tasks[-1].what == "softmax_attention"


CRASHES = """
import os, sys
from pathlib import Path
from benchmarks.gpu_suite import Report
report = Report(Path(sys.argv[1]), "cpu")
tried = report.content["tried"]
if len(tried) < 2:
    report.write(tried=[*tried, f"row {len(tried)}"])
    os.abort() if len(tried) == 0 else __import__("time").sleep(60)
"""


def test_a_section_goes_on_after_a_crash_and_not_after_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "SLACK", 0)
    gpu_suite.Report(tmp_path, "cpu").start("cpu")
    command = [sys.executable, "-c", CRASHES, str(tmp_path)]
    gpu_suite.in_own_process(command, "ops", time.time() + 20, tmp_path, "cpu")
    failed = gpu_suite.Report(tmp_path, "cpu").content["failed"]
    assert failed["row 0"] == "its process ended with -6" and failed["row 1"] == "it took too long"
    gpu_suite.Report(tmp_path, "cpu").start("cpu")
    gpu_suite.in_own_process([sys.executable, "-c", "raise SystemExit(3)"], "ops", time.time() + 20, tmp_path, "cpu")
    assert gpu_suite.Report(tmp_path, "cpu").content["failed"] == {"ops": "its process ended with 3"}
