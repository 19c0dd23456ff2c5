"""Runs every invariant on every subject and gathers what was measured, from xdist's workers too."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from torch import Tensor

from tests.conformance.matrix import DOCUMENT, INVARIANTS, PAIR, Matrix, reason
from tests.conformance.subjects import PAIRS, SUBJECTS
from tests.ops.helpers import relative_error

_matrix = Matrix()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-conformance", action="store_true", help="write docs/conformance.md from this run")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "subject" in metafunc.fixturenames:
        invariant = _invariant(metafunc.module.__name__)
        metafunc.parametrize("subject", [name for name in SUBJECTS if reason(invariant, name) is None])
    if PAIR in metafunc.fixturenames:
        metafunc.parametrize(PAIR, list(PAIRS))


def _invariant(module: str) -> str:
    """tests/conformance/test_causal.py tests `causal`."""
    return module.rpartition("test_")[2].removesuffix(".py")


class Measure:
    """Asserts that two results agree, and keeps the relative error for the matrix."""

    def __init__(self) -> None:
        self.measured: list[tuple[float, float]] = []

    def __call__(self, what: str, out: Tensor | None, ref: Tensor, bound: float) -> None:
        error = relative_error(out, ref)
        assert error <= bound, f"{what}: relative error {error:.1e} is above {bound:.0e}"
        self.measured.append((error, bound))

    def gradients(self, what: str, out: dict[str, Tensor | None], ref: dict[str, Tensor | None], bound: float) -> None:
        """Gradients by name. A reference without any is a mistake: a parameter that does nothing."""
        assert out.keys() == ref.keys()
        for name, gradient in ref.items():
            assert gradient is not None and gradient.count_nonzero(), f"{what}: {name} has no gradient"
            self(f"{what}: gradient of {name}", out[name], gradient, bound)


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Iterable[Measure]:
    measure = Measure()
    yield measure
    request.node.user_properties.append(("measured", measure.measured))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    params = item.callspec.params if hasattr(item, "callspec") else {}
    subject, invariant = params.get("subject", params.get(PAIR)), _invariant(item.module.__name__)
    if subject and invariant in (*INVARIANTS, PAIR):
        report.user_properties.append(("cell", (invariant, subject)))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    properties = dict(report.user_properties)  # with xdist this runs again in the controller, where it counts
    if "cell" in properties:
        _matrix.add(*properties["cell"], report.passed, properties.get("measured", []))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--write-conformance") and not hasattr(session.config, "workerinput"):
        problems = _matrix.problems()
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise pytest.UsageError(f"{DOCUMENT} is left as it was: {problems[0]}{more}")
        _matrix.write()
