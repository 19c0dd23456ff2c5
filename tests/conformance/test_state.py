from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.conformance.conftest import Measure
from tests.conformance.runs import build, chunked, forward, inputs
from zoo.models import ZooCache, ZooModel

PROMPT, REST = 21, 12  # beyond the windows


class Run:
    """A batch of three whose prompts are in the cache, one of them left-padded; `after` is how each row goes on."""

    def __init__(self, subject: str) -> None:
        self.model: ZooModel = build(subject)
        self.x = inputs(3, PROMPT + REST)
        self.mask = torch.ones(3, PROMPT + REST, dtype=torch.bool)
        self.mask[1, :8] = False
        self.cache = self.prompted()
        self.after = forward(self.model, self.x, attention_mask=self.mask)[:, PROMPT:]

    def prompted(self) -> ZooCache:
        cache = self.model.new_cache(3, self.x.device, self.x.dtype)
        chunked(self.model, self.x[:, :PROMPT], [PROMPT], cache, self.mask[:, :PROMPT])
        return cache

    def go_on(self, cache: ZooCache, rows: Tensor) -> Tensor:
        """The rest of `rows`, from `cache`."""
        return chunked(self.model, self.x[rows, PROMPT:], [5] + [1] * (REST - 5), cache)

    def states(self, cache: ZooCache) -> list:
        return [state for state in cache.layers if state is not None]


@pytest.fixture
def run(subject: str):
    with torch.no_grad():
        yield Run(subject)


ROWS = torch.arange(3)
# What the cache is asked to do, and the rows it then holds.
REARRANGE = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
}


@pytest.mark.parametrize("name", REARRANGE)
def test_rows_go_on_where_they_were(run: Run, name: str, measure: Measure) -> None:
    rearrange, rows = REARRANGE[name]
    rearrange(run.cache)
    measure(name, run.go_on(run.cache, torch.tensor(rows)), run.after[rows], 1e-9)


def test_rearranged_again_while_decoding(run: Run, measure: Measure) -> None:
    """Beam search: the rows change after every token."""
    steps = [torch.tensor(order) for order in ([1, 2, 0], [2, 2, 1], [0, 1, 1])]
    rows = ROWS
    for t, order in enumerate(steps):
        run.cache.reorder_cache(order)
        rows = rows[order]
        out = forward(run.model, run.x[rows, PROMPT + t, None], past_key_values=run.cache)
        measure(f"token {t}", out[:, 0], run.after[rows, t], 1e-9)


def test_offload(run: Run, measure: Measure) -> None:
    for state in run.states(run.cache):
        state.offload()
        assert {tensor.device.type for tensor in state.tensors.values()} == {"cpu"}
    measure("offload", run.go_on(run.cache, ROWS), run.after, 1e-9)


def test_kept_elsewhere(run: Run, tmp_path: Path, measure: Measure) -> None:
    """The same bits, with most of the state in CPU memory or in files; of most mixers, nothing is kept there."""
    expected = run.go_on(run.prompted(), ROWS)
    for place in ("cpu", tmp_path):
        cache = run.model.new_cache(3, run.x.device, run.x.dtype)
        cache.keep_in(place)
        chunked(run.model, run.x[:, :PROMPT], [PROMPT], cache, run.mask[:, :PROMPT])
        measure(f"in {place}", run.go_on(cache, ROWS), expected, 0.0)


def save(run: Run, path: Path) -> list[Path]:
    files = []
    for i, state in enumerate(run.states(run.cache)):
        files.append(path / f"{i}.safetensors")
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.tensors.items()}, files[-1])
    return files


def loaded(run: Run, saved: list[dict[str, Tensor]]) -> ZooCache:
    cache = run.model.new_cache(3, run.x.device, run.x.dtype)
    for state, tensors in zip(run.states(cache), saved, strict=True):
        state.load(tensors)
    cache.advance(run.mask[:, :PROMPT].sum(1), PROMPT)
    return cache


def test_save_and_load(run: Run, tmp_path: Path, measure: Measure) -> None:
    saved = [safetensors.torch.load_file(file) for file in save(run, tmp_path)]
    measure("loaded", run.go_on(loaded(run, saved), ROWS), run.after, 1e-9)


def test_two_states_loaded_from_one_dict_do_not_disturb_each_other(run: Run, measure: Measure) -> None:
    """Nor do they disturb the state it came from."""
    saved = [dict(state.tensors) for state in run.states(run.cache)]
    first, second = loaded(run, saved), loaded(run, saved)
    order = torch.tensor([1, 1, 2])
    first.reorder_cache(order)
    other = inputs(3, REST, seed=9)
    chunked(run.model, other, [1] * REST, first)
    measure("second", run.go_on(second, ROWS), run.after, 1e-9)
    measure("origin", run.go_on(run.cache, ROWS), run.after, 1e-9)
    measure("third", run.go_on(loaded(run, saved), ROWS), run.after, 1e-9)


def test_reset(run: Run, measure: Measure) -> None:
    run.cache.reset()
    assert run.cache.get_seq_length() == 0
    chunked(run.model, run.x[:, :PROMPT], [PROMPT], run.cache, run.mask[:, :PROMPT])
    measure("after a reset", run.go_on(run.cache, ROWS), run.after, 1e-9)


def test_reset_after_a_change_of_batch(run: Run, measure: Measure) -> None:
    run.cache.batch_repeat_interleave(2)
    run.cache.reset()
    x = torch.cat([run.x, run.x])
    measure("after a reset", chunked(run.model, x, [PROMPT, REST], run.cache)[:1], forward(run.model, run.x)[:1], 1e-9)
