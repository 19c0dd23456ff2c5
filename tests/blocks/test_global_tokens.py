"""Global tokens against one softmax over all keys with a mask, and what a model makes of token ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import zoo
from tests.blocks.helpers import assert_close, build_part, model_config, perturb, random_input
from zoo.blocks import SequenceContext
from zoo.models.landmarks import LandmarkToken
from zoo.models.streaming import obstacle

LENGTH, WINDOW = 31, 4
MIXER = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "rope": None, "window": WINDOW}


def build(**fields) -> torch.nn.Module:
    mixer = perturb(build_part(model_config(hidden_size=16, mixer=MIXER | {"global_token_ids": [3, 5]} | fields)))
    return mixer.double()


def ids(batch: int) -> Tensor:
    """Some global tokens, side by side and alone, at the very start and beyond many windows."""
    token_ids = torch.zeros(batch, LENGTH, dtype=torch.long)
    token_ids[:, [0, 2, 3, 11, 29]] = torch.tensor([3, 5, 5, 3, 5])
    token_ids[-1] = token_ids[-1].roll(7)
    return token_ids


def with_a_mask(mixer: torch.nn.Module, x: Tensor, visible: Tensor) -> Tensor:
    """The mixer's output with a softmax over the `visible` `[batch, queries, keys]`."""
    q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    k, v = (each.repeat_interleave(2, 1) for each in (k, v))
    logits = (q @ k.mT / 2).masked_fill(~visible[:, None], -torch.inf)
    if mixer.sinks is not None:
        logits = torch.cat([logits, mixer.sinks.weight[:, None, None].expand(*logits.shape[:3], 1)], -1)
    weights = logits.softmax(-1)[..., : x.shape[1]]
    return mixer.o_proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fields", [{}, {"num_sinks": 3}, {"sink_logits": True, "num_sinks": 1}], ids=str)
def test_equals_one_softmax(fields: dict) -> None:
    mixer, token_ids = build(**fields), ids(2)
    is_global = (token_ids == 3) | (token_ids == 5)
    t = torch.arange(LENGTH)
    distance = t[:, None] - t
    visible = (distance < WINDOW) | (t < mixer.config.num_sinks) | is_global[:, None]
    results = []
    for run in (
        lambda x: mixer(x, SequenceContext.of(x, token_ids=token_ids)),
        lambda x: with_a_mask(mixer, x, visible & (distance >= 0)),
    ):
        x = random_input(2, LENGTH, 16, dtype=torch.float64).requires_grad_()
        y = run(x)
        results.append((y, *torch.autograd.grad((y * random_input(*y.shape, seed=3)).sum(), [x, *mixer.parameters()])))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


def test_global_tokens_are_those_of_the_document() -> None:
    mixer, token_ids, x = build(num_sinks=2), ids(1), random_input(1, LENGTH, 16, dtype=torch.float64)
    bounds = torch.tensor([0, 3, 3, 13, LENGTH], dtype=torch.int32)
    packed = mixer(x, SequenceContext.of(x, cu_seqlens=bounds, token_ids=token_ids))
    for a, b in ((0, 3), (3, 13), (13, LENGTH)):
        alone = mixer(x[:, a:b], SequenceContext.of(x[:, a:b], token_ids=token_ids[:, a:b]))
        assert_close(packed[:, a:b], alone)


def test_the_state_keeps_them_alone() -> None:
    mixer, token_ids, x = build(num_sinks=1), ids(2), random_input(2, LENGTH, 16, dtype=torch.float64)
    state = mixer.new_state(2, x.device, x.dtype)
    parts = zip(x.split([7, 20, 1, 1, 1, 1], 1), token_ids.split([7, 20, 1, 1, 1, 1], 1), strict=True)
    with torch.no_grad():
        chunks = [mixer(part, SequenceContext.of(part, token_ids=each), state) for part, each in parts]
    assert_close(torch.cat(chunks, 1), mixer(x, SequenceContext.of(x, token_ids=token_ids)))
    # The sink at 0 is none of them; of the second row, 29 came to stand at 5.
    assert state.global_tokens["places"].tolist() == [[2, 3, 11, 29, 2**62], [5, 7, 9, 10, 18]]
    kept = 5 * (2 * 2 * 4 * 8 + 8)
    assert state.nbytes() == mixer.double().state_bytes(2, LENGTH) + 2 * kept


def model_mapping(**fields) -> dict:
    block = {"mixer": MIXER | {"global_token_ids": [3]}}
    return {"vocab_size": 8, "hidden_size": 16, "pattern": "b*2", "blocks": {"b": block}} | fields


def test_a_model_needs_the_ids() -> None:
    model = zoo.build(model_mapping()).eval()
    tokens = torch.tensor([[3, 1, 2, 4, 5, 6, 7, 0, 1, 2]])
    changed = torch.tensor([[2, 1, 2, 4, 5, 6, 7, 0, 1, 2]])
    logits, other = model(tokens).logits, model(changed).logits
    assert (logits[:, -1] - other[:, -1]).norm() > 0, "two windows reach back to token 3 alone"
    embeddings = model.model.embed_tokens(tokens)
    assert torch.equal(model(input_ids=tokens, inputs_embeds=embeddings).logits, logits)
    with pytest.raises(ValueError, match="global_token_ids needs the ids of the tokens; give input_ids"):
        model(inputs_embeds=embeddings)
    generated = model.generate(tokens, max_new_tokens=9, do_sample=False)
    for t in range(tokens.shape[1], generated.shape[1]):
        assert generated[0, t] == model(generated[:, :t]).logits[0, -1].argmax()
    mixer, x = build(), random_input(1, 9, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs the ids of the tokens; give input_ids"):
        mixer(x, SequenceContext.of(x))
    assert obstacle(model) == (
        "layer 0 keeps the global tokens of the whole text; it needs num_sinks in place of global_token_ids"
    )


def test_a_landmark_is_no_token() -> None:
    tokens = torch.tensor([[3, 3, 3, 1, 3]])
    x = torch.zeros(1, 5, 4)
    _, context, _ = LandmarkToken(4, 2, 0.1).put_in(x, SequenceContext.of(x, token_ids=tokens), None)
    assert context.token_ids.tolist() == [[3, 3, -1, 3, 1, -1, 3]]
    with pytest.raises(ValueError, match=r"token_ids must be \[1, 5\], got \[1, 4\]"):
        SequenceContext.of(x, token_ids=tokens[:, :4])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": None}, "global_token_ids: needs a window to stand outside of; give window too"),
        ({"dilation": 2}, "global_token_ids: does not go with dilation; remove one of them"),
        ({"stride": 4}, "global_token_ids: does not go with stride; remove one of them"),
        ({"random": {"blocks": 1}}, "global_token_ids: does not go with random; remove one of them"),
        ({"softcap": 3.0}, "global_token_ids: does not go with softcap; remove one of them"),
        ({"global_token_ids": []}, "global_token_ids: is empty; name a token or remove it"),
        ({"global_token_ids": [1, 8]}, "global_token_ids[1]: must be below vocab_size (8), got 8"),
        ({"global_token_ids": [-1]}, "global_token_ids[0]: must be a whole number >= 0, got -1"),
        (
            {"num_sinks": 1, "sink_positions": "cache", "rope": {}},
            "sink_positions: cache needs num_sinks, one window without dilation, and no stride, random or "
            "global_token_ids; change these or remove it",
        ),
    ],
)
def test_mistakes(fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        build(**fields)
    assert str(raised.value) == f"blocks.b.mixer.{message}"


def test_parallel_passes_the_ids_on() -> None:
    branches = [MIXER | {"global_token_ids": [3]}, {"kind": "short_conv"}]
    model = zoo.build(model_mapping(blocks={"b": {"mixer": {"kind": "parallel", "branches": branches}}}))
    assert model.model.reads_token_ids
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 16))
