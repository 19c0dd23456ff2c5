"""The columns of the matrix, and docs/conformance.md, which a run writes from what it measured."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.conformance.subjects import ELSEWHERE, PAIRS, SUBJECTS, new_layers

DOCUMENT = Path(__file__).parents[2] / "docs" / "conformance.md"

INVARIANTS = {
    "causal": "changing token t changes no output before t, and does change those from t on",
    "decode": "prefill in chunks of any sizes, then one token at a time == one full forward",
    "padding": "a padded batch (left, right, between, in chunks) == each row alone, outputs and gradients; "
    "padding gets no gradient",
    "packing": "packed documents == each document alone, outputs and gradients",
    "parallel": "context-parallel over 2 and 4 ranks == one rank",
    "backend": "each backend == the float64 reference, outputs and all gradients: float64 within 1e-9, float32 "
    "within the bound",
    "gradcheck": "the float64 reference passes torch.autograd.gradcheck, for the input and every parameter",
    "length": "length 1, primes, chunk - 1, chunk, chunk + 1, several chunks == the reference",
    "precision": "every mixer in bfloat16 == in float32 over 16,384 tokens; rates, decays and recurrent states are "
    "float32",
    "compile": "torch.compile(fullgraph=True) of every layer == eager, forward and backward",
    "meta": "built on meta and materialised == built directly; parameters, FLOPs and state bytes == counted",
    "state": "reorder, repeat, select, offload, save and load, fork and reset change nothing",
}

PAIR = "pair"  # what one kind of mixer may break for another: a table of its own

# What of a layer can change the outcome of checks that take long; a layer that brings none of it anew is not run again.
PARTS = {
    "precision": lambda layer: (layer.mixer,) if layer.mixer.kind != "none" else (),
    "compile": lambda layer: (layer.mixer, layer.ffn, layer.residual, layer.norm, layer.shared),
}

# Cells that are not run, each with its reason: (invariant, subject or "*").
GAPS = {
    ("parallel", "*"): "context parallelism (zoo/parallel) is not built yet",
    (
        "precision",
        "landmark-retrieval",
    ): "16,384 tokens have more blocks than its top_k, so that a state reads less than "
    "a full forward by design; bfloat16 is in tests/blocks/test_landmark.py",
    **{
        ("compile", subject): "its mixers, feed-forwards, norms and residual are all in rows above"
        for subject in SUBJECTS
        if not new_layers(subject, PARTS["compile"])
    },
}

# What a filled cell does not cover.
LIMITS = (
    *(f"no row has the {role} `{kind}`: {why}." for (role, kind), why in ELSEWHERE.items()),
    "backend: on the CPU: `torch`, and `triton` interpreted, in float32 and one layer, for the subjects of one kind of "
    "mixer, but for the delta rule, which has no kernels, and hierarchical attention, whose kernels have tests of "
    "their own. `library` needs a GPU (benchmarks/gpu_suite.py).",
    "compile: aot_eager for every subject and inductor for one, without packed documents (the ops compile with them, "
    "but for infini_attention, which reads their bounds on the CPU).",
    "precision: a mixer is run once over the 16,384 tokens; a row with ok has the mixers of rows above.",
    "decode, length: of attention-longrope within its original context of 512 tokens; a cache that crosses it is "
    "refused, and generate() makes it anew (tests/models/test_longrope.py). precision runs beyond it.",
    "padding: garbage at padding is finite (up to 1e4). NaN there would reach attention's masked keys as 0 * NaN.",
)


@dataclass
class Cell:
    """The worst relative error a cell measured, and the widest bound it was held to."""

    error: float = 0.0
    bound: float = 0.0
    passed: bool = True

    def add(self, error: float, bound: float) -> None:
        self.error, self.bound = max(self.error, error), max(self.bound, bound)


@dataclass
class Matrix:
    """The results of a run."""

    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)

    def add(self, invariant: str, subject: str, passed: bool, measured: list[tuple[float, float]]) -> None:
        cell = self.cells.setdefault((invariant, subject), Cell())
        cell.passed = cell.passed and passed
        for error, bound in measured:
            cell.add(error, bound)

    def problems(self) -> list[str]:
        """Why this run cannot be written down: cells that failed, or did not run and have no reason."""
        problems = []
        for subject in SUBJECTS:
            for invariant in INVARIANTS:
                cell = self.cells.get((invariant, subject))
                if cell is None and reason(invariant, subject) is None:
                    problems.append(f"{invariant} of {subject} did not run")
                elif cell is not None and not cell.passed:
                    problems.append(f"{invariant} of {subject} failed")
        for pair in PAIRS:
            cell = self.cells.get((PAIR, pair))
            if cell is None or not cell.passed:
                problems.append(f"{pair} {'did not run' if cell is None else 'failed'}")
        return problems

    def write(self) -> None:
        """Write the document, to a temporary name first."""
        temporary = DOCUMENT.with_suffix(".tmp")
        DOCUMENT.parent.mkdir(exist_ok=True)
        with temporary.open("w") as file:
            file.write(self.markdown())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(DOCUMENT)

    def markdown(self) -> str:
        names = list(INVARIANTS)
        lines = [
            "# Conformance",
            "",
            f"Written by `pytest tests/conformance --write-conformance` on the CPU with torch "
            f"{torch.__version__.split('+')[0]}; do not edit. The subjects are in tests/conformance/subjects.py, the "
            "invariants in DESIGN, section 4.",
            "",
            "A number is the worst relative error ||out - ref|| / ||ref|| that the cell measured, rounded up to a "
            "power of ten; 0 is equal to the last bit. ok is a check that has no number.",
            "",
            _row("subject", *names),
            _row(*["---"] * (len(names) + 1)),
            *(_row(subject, *(self._text(name, subject) for name in names)) for subject in SUBJECTS),
            "",
            _row("invariant", "says", "bound"),
            _row("---", "---", "---"),
            *(_row(name, text, self._bound(name)) for name, text in INVARIANTS.items()),
            "",
            "## Pairs",
            "",
            "Every kind of mixer beside every other, in one stack `a b a` (the row is the first): causal; odd chunks, "
            "then tokens, with the rows in another order; a padded batch, whole and in chunks; packed documents, with "
            "gradients; each layer by itself. The worst relative error. A kind goes through the settings of its rows "
            "from partner to partner.",
            "",
            *self.pairs(),
            "",
            "## Gaps",
            "",
            *(
                f"- {name}, {'every subject' if subject == '*' else subject}: {why}."
                for (name, subject), why in GAPS.items()
            ),
            *(f"- {limit}" for limit in LIMITS),
        ]
        return "\n".join(lines) + "\n"

    def pairs(self) -> list[str]:
        """The lines of the table, a row for each kind and a column for each partner after it."""
        kinds = list(dict.fromkeys(kind for pair in PAIRS for kind in pair.split(" + ")))
        lines = [_row(PAIR, *kinds[1:]), _row(*["---"] * len(kinds))]
        for a in kinds[:-1]:
            pairs = [f"{a} + {b}" for b in kinds[1:]]
            lines.append(_row(a, *(self._text(PAIR, pair) if pair in PAIRS else "" for pair in pairs)))
        return lines

    def _text(self, invariant: str, subject: str) -> str:
        cell = self.cells.get((invariant, subject))
        if cell is None:
            return "gap"
        return _power(cell.error) if cell.bound else "ok"

    def _bound(self, invariant: str) -> str:
        bounds = {cell.bound for (name, _), cell in self.cells.items() if name == invariant and cell.bound}
        return f"{max(bounds):.0e}" if bounds else ""


def reason(invariant: str, subject: str) -> str | None:
    """Why a cell is not run; None if it should be."""
    return GAPS.get((invariant, subject)) or GAPS.get((invariant, "*"))


def _power(error: float) -> str:
    return f"1e{math.ceil(math.log10(error))}" if error else "0"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
