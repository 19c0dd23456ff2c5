"""docs/conformance.md tells of the present matrix, and the matrix of every kind there is."""

import pytest

import zoo
from tests.conformance.matrix import DOCUMENT, GAPS, INVARIANTS, Matrix
from tests.conformance.subjects import ELSEWHERE, SUBJECTS
from zoo.blocks import kinds


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: f"{kind.role}-{kind.name}")
def test_every_kind_has_a_subject(kind) -> None:
    if (kind.role, kind.name) in ELSEWHERE:
        return
    layers = [layer for mapping in SUBJECTS.values() for layer in zoo.load_config(mapping).layers]
    used = {getattr(layer, kind.role).kind for layer in layers}
    assert kind.name in used, f"add a subject with {kind.role} {kind.name} to tests/conformance/subjects.py"


def test_every_invariant_has_its_tests() -> None:
    files = {path.stem.removeprefix("test_") for path in (DOCUMENT.parents[1] / "tests/conformance").glob("test_*.py")}
    assert set(INVARIANTS) - files == {name for name, subject in GAPS if subject == "*"}


def test_the_document_is_that_of_this_matrix(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--write-conformance"):
        return  # this run writes it
    table = [line.strip("| ").split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    remedy = "run pytest tests/conformance --write-conformance"
    assert table[0] == ["subject", *INVARIANTS], remedy
    rows = {row[0]: row[1:] for row in table[2 : 2 + len(SUBJECTS)]}
    assert list(rows) == list(SUBJECTS), remedy
    for subject, cells in rows.items():
        for invariant, cell in zip(INVARIANTS, cells, strict=True):
            assert (cell == "gap") == ((invariant, subject) in GAPS or (invariant, "*") in GAPS), remedy
    assert f"\n{Matrix().pairs()[0]}\n" in DOCUMENT.read_text(), remedy
