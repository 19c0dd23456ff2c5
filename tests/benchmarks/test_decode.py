"""Both ways of decoding, on both sides, give the same tokens, and as many as they say."""

import pytest
import torch

import zoo
from benchmarks import models
from benchmarks.decode import FAMILIES, generate, loop, measure
from benchmarks.rows import Options


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_loop_continues_as_generate_does(name):
    torch.manual_seed(0)
    family = models.families(32)[name]
    ids = torch.randint(1, models.VOCAB, (1, 8))
    for model in (zoo.build(family.ours).eval(), family.theirs().eval()):
        call = loop(model, ids, 4)
        once, twice = call(), call()  # the cache behind the prompt must not move on
        whole = generate(model, ids, 5)
        assert whole.shape == (1, 13)
        model.generation_config.eos_token_id = whole[0, 9].item()
        assert torch.equal(generate(model, ids, 5), whole), "it must not stop before its time"
        assert once.tolist() == twice.tolist() == whole[:, 9:].tolist()


def test_a_row_counts_weights_and_state_once_per_token():
    row = measure("llama", "bfloat16", "loop", Options(quick=True))
    model = zoo.build(models.families(32)["llama"].ours)
    prompt, new = row["shape"]["length"], row["shape"]["new"]
    keys_and_values = 2 * 8 * 2 * 8 * (prompt + new) * 2  # of 8 layers, 2 heads of 8, in bfloat16
    each = row["floor"]["bytes"] / new - 2 * model.num_params()
    assert keys_and_values <= each < 1.1 * keys_and_values
    assert row["candidates"].keys() == {"zoo", "transformers"}
