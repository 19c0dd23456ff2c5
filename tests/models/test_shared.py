"""Blocks with one set of weights at several depths: the same numbers as where each depth has a copy of its own."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import zoo
from tests.conformance.subjects import SUBJECTS
from tests.ops.helpers import relative_error
from zoo import ConfigError, load_config
from zoo.blocks import SequenceContext, kinds
from zoo.models.decoder import SharedLayer

ATTENTION = {"kind": "attention", "num_heads": 2, "head_dim": 6, "output_gate": True, "bias": True}
MLP = {"kind": "mlp", "intermediate_size": 12, "bias": True}
MIXERS = {
    "hierarchical": {
        "kind": "hierarchical",
        "num_heads": 2,
        "window": 4,
        "compress_block": 4,
        "compress_stride": 2,
        "select_block": 4,
        "top_n": 3,
    },
    "infini": {"kind": "infini", "num_heads": 2, "segment": 4},
    "linear": {"kind": "linear", "num_heads": 2},
    "compressive": {"kind": "compressive", "num_heads": 2, "window": 2, "slots": 1},
    "linformer": {"kind": "linformer", "num_heads": 2, "block": 4, "slots": 2},
    "retention": {"kind": "retention", "num_heads": 2},
    "attention": ATTENTION,
    "attention_without_gate": {"kind": "attention", "num_heads": 2, "head_dim": 6},
    "lightning": {"kind": "lightning", "num_heads": 2, "slopes": "geometric"},
    "mamba": {"kind": "mamba", "state_size": 3, "bias": True},
    "mamba2": {"kind": "mamba2", "head_dim": 4, "state_size": 3},
    "rglru": {"kind": "rglru", "num_heads": 2},
    "short_conv": {"kind": "short_conv", "bias": True},
}
FFNS = {"gated": MLP, "plain": {**MLP, "gated": False, "activation": "gelu"}}
PAIRS = [(mixer, "gated") for mixer in MIXERS] + [("attention", "plain")]


def config(shared, mixer=ATTENTION, ffn=MLP, uses=3, **fields):
    block = {"mixer": mixer, "ffn": ffn, "shared": shared}
    return {"vocab_size": 31, "hidden_size": 8, "blocks": {"b": block}, "pattern": f"b*{uses}"} | fields


def perturbed(config, seed=0):
    torch.manual_seed(seed)
    model = zoo.build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.double()


def copied(model, mapping):
    """The model with a copy of every shared weight at each depth, the additions merged into it."""
    alone = zoo.build(mapping).double()
    with torch.no_grad():
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            alone.get_parameter(name).copy_(model.get_parameter(name))
        for layer, own in zip(model.model.layers, alone.model.layers, strict=True):
            weights = {name: tensor.clone() for name, tensor in model.model.shared[0].named_parameters()}
            for role, adapters in layer.adapters.items():
                for first, adapter in adapters.items():
                    group = next(group for group in getattr(layer, role).adapted if first in group)
                    for name, up in zip(group if len(adapter.rows) > 1 else [first],
                                        adapter.up.split(adapter.rows), strict=True):  # fmt: skip
                        weights[f"{role}.{name}.weight"] += up @ adapter.down
            if layer.out_proj is not None:
                weights["ffn.down_proj.weight"] = layer.out_proj.weight @ weights["ffn.down_proj.weight"]
                weights["ffn.down_proj.bias"] = layer.out_proj.weight @ weights["ffn.down_proj.bias"]
            assert set(weights) == set(dict(own.named_parameters()))
            for name, tensor in weights.items():
                own.get_parameter(name).copy_(tensor)
    return alone


def pair(mixer="attention", ffn="gated", **shared):
    model = perturbed(config(shared or True, MIXERS[mixer], FFNS[ffn]))
    return model, copied(model, config(None, MIXERS[mixer], FFNS[ffn]))


@pytest.mark.parametrize(("mixer", "ffn"), PAIRS)
def test_equals_copies_with_the_additions_merged(mixer, ffn):
    if mixer == "lightning":  # its decays are those of the depth where the block is first used
        model, alone = pair(mixer, ffn, mixer_adapter=3, ffn_adapter=2)
        for layer in alone.model.layers:
            layer.mixer.log_decay.copy_(alone.model.layers[0].mixer.log_decay)
    else:
        model, alone = pair(mixer, ffn, mixer_adapter=3, ffn_adapter=2, out_proj=True)
    tokens = torch.randint(31, (2, 11))
    assert relative_error(model(tokens).logits, alone(tokens).logits) < 1e-6  # lightning's decays are float32


def test_every_kind_that_says_it_can_be_added_to_is_tried():
    # Copies are no such comparison where the model has a tensor for the mixer, or its features are drawn by depth.
    named = {kind.name for kind in kinds() if getattr(kind.module_class, "adapted", ())} - {"landmark", "performer"}
    assert named == {entry["kind"] for entry in (*MIXERS.values(), *FFNS.values())}


def test_gradients_add_up_over_the_uses():
    model, alone = pair()
    tokens = torch.randint(31, (2, 11))
    model(tokens, labels=tokens).loss.backward()
    alone(tokens, labels=tokens).loss.backward()
    for name, parameter in model.model.shared[0].named_parameters():
        expected = sum(layer.get_parameter(name).grad for layer in alone.model.layers)
        assert relative_error(parameter.grad, expected) < 1e-6, name


def test_weights_are_there_once(tmp_path):
    model, alone = pair(mixer_adapter=3)
    block = sum(p.numel() for p in alone.model.layers[0].parameters())
    adapters = sum(p.numel() for p in model.model.layers[0].parameters())
    assert adapters == 3 * (4 * 8 + 4 * 12)  # rank times what goes in and comes out, of q, k, v and the gate
    assert alone.num_params() - model.num_params() == 2 * block - 3 * adapters
    model = model.float()
    model.save_pretrained(tmp_path)
    back = zoo.ZooForCausalLM.from_pretrained(tmp_path)
    assert sorted(dict(back.named_parameters())) == sorted(dict(model.named_parameters()))
    tokens = torch.randint(31, (2, 11))
    assert torch.equal(back(tokens).logits, model.eval()(tokens).logits)
    assert isinstance(back.model.layers[1], SharedLayer)
    assert back.model.layers[0].mixer is back.model.layers[2].mixer is back.model.shared[0].mixer


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("subject", ["zamba", "shared"])
def test_gradient_checkpointing_changes_nothing(subject, reentrant):
    model = perturbed(SUBJECTS[subject]).train()
    tokens = torch.randint(61, (2, 9))

    def gradients():
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients()
    assert all(gradient is not None and gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        assert relative_error(checkpointed[name], gradient) < 1e-12, name


def test_sharding_each_block_and_layer_by_itself(tmp_path):
    """FSDP2 gathers a shared block's weights at each use and adds up its gradients."""
    model = perturbed(SUBJECTS["zamba"]).float()
    sharded = zoo.build(SUBJECTS["zamba"])
    sharded.load_state_dict(model.state_dict())
    tokens = torch.randint(61, (2, 9))
    model(tokens, labels=tokens).loss.backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in (*sharded.model.shared, *sharded.model.layers, sharded):
            fully_shard(module, mesh=mesh)
        sharded(tokens, labels=tokens).loss.backward()
        for name, parameter in sharded.named_parameters():
            expected = model.get_parameter(name).grad
            assert relative_error(parameter.grad.full_tensor(), expected) < 1e-5, name
    finally:
        dist.destroy_process_group()


def test_the_embeddings_and_the_skipped_stream_are_the_right_ones():
    """Token by token through the equations of Zamba: the shared block reads what the first layer was given, and its
    output reaches the mixer above alone."""
    model = perturbed(SUBJECTS["zamba"])
    net = model.model
    tokens = torch.randint(61, (1, 7))
    e = x = net.embed_tokens(tokens)
    context, block = SequenceContext.of(x), net.shared[0]
    for layer in net.layers:
        if isinstance(layer, SharedLayer):
            h = block.mixer_norm(torch.cat([x, e], -1))
            q, k, v = (
                h @ (getattr(block.mixer, f"{n}_proj").weight
                     + layer.adapters["mixer"][f"{n}_proj"].up @ layer.adapters["mixer"][f"{n}_proj"].down).T
                for n in "qkv"
            )  # fmt: skip
            q, k = block.mixer.rotary(*(t.unflatten(-1, (4, 16)) for t in (q, k)), context.position_ids)
            out = zoo.ops.softmax_attention(q, k, v.unflatten(-1, (4, 16))).flatten(-2) @ block.mixer.o_proj.weight.T
            adapter = layer.adapters["ffn"]["gate_proj"]
            h = block.ffn_norm(out)
            plain = torch.cat([block.ffn.gate_proj.weight, block.ffn.up_proj.weight])
            gate, up = (h @ (plain + adapter.up @ adapter.down).T).chunk(2, -1)
            added = (torch.nn.functional.silu(gate) * up) @ block.ffn.down_proj.weight.T @ layer.out_proj.weight.T
        else:
            above = layer.residual.needs_earlier
            x = x + layer.mixer(layer.mixer_norm(x + added if above else x), context)
    assert relative_error(model(tokens).logits, model.lm_head(net.norm(x))) < 1e-7


def test_adapters_start_as_no_change():
    torch.manual_seed(0)
    with_adapters = zoo.build(config({"mixer_adapter": 2, "ffn_adapter": 2}))
    plain = zoo.build(config(True))
    plain.load_state_dict({k: v for k, v in with_adapters.state_dict().items() if "adapters" not in k})
    tokens = torch.randint(31, (2, 5))
    assert torch.equal(with_adapters(tokens).logits, plain(tokens).logits)


def test_a_shared_mixture_is_active_once():
    moe = {"kind": "moe", "intermediate_size": 6, "num_experts": 4, "top_k": 1}
    model = zoo.build(config(True, ffn=moe))
    idle = 3 * 3 * 6 * 8  # three experts
    assert model.num_params() - model.num_active_params() == idle


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"shared": 3}, r"blocks.b.shared: must be true or a mapping such as {mixer_adapter: 128}, got 3"),
        ({"shared": {"mixer_adaptor": 3}}, r"blocks.b.shared.mixer_adaptor: unknown key; did you mean 'mixer_adapter'"),
        (
            {"shared": {"mixer_adapter": 0}},
            r"blocks.b.shared.mixer_adapter: must be a whole number >= 1, got 0",
        ),
        ({"shared": {"ffn_adapter": 2}, "ffn": None}, r"shared.ffn_adapter: none has no projections that take one"),
        (
            {"shared": {"ffn_adapter": 2}, "ffn": {"kind": "moe", "intermediate_size": 6, "num_experts": 2}},
            r"blocks.b.shared.ffn_adapter: moe has no projections that take one, got 2; remove it",
        ),
        ({"residual": {"kind": "skip"}}, r"pattern: begins with 'b', whose residual needs a layer below"),
        (
            {"mixer": {"kind": "parallel", "branches": [{**ATTENTION, "concat_embeddings": True}]}},
            r"blocks.b.mixer.branches\[0\].concat_embeddings: a branch reads the stream alone; remove it",
        ),
    ],
)
def test_mistakes_are_named(block, message):
    mapping = config(None)
    mapping["blocks"]["b"] |= block
    with pytest.raises(ConfigError, match=message):
        load_config(mapping)


def test_defaults_may_share_every_block():
    mapping = config(None, defaults={"shared": True})
    mapping["blocks"]["b"].pop("shared")
    assert load_config(mapping).layers[0].shared is not None
    with pytest.raises(ConfigError, match=r"defaults\.shared: must be true or a mapping"):
        load_config(mapping | {"defaults": {"shared": "yes"}})
