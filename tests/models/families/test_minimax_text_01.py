"""The released MiniMax-Text-01, whose code is not in transformers: where it is as transformers' minimax, and where
not."""

import json

import pytest
import torch
from transformers.models.minimax import modeling_minimax

import zoo
from tests.models.families.parity import CONFIGS, close, ids, theirs
from zoo.hub.folders import convert
from zoo.models.families import FAMILIES, FamilyError
from zoo.models.families.minimax_text_01 import MiniMaxText01Config


def released(net, folder, **changes):
    """transformers' model saved with the configuration of the release."""
    config = net.config
    net.save_pretrained(folder)
    fields = {
        "model_type": "minimax_text_01",
        "architectures": ["MiniMaxText01ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_minimax_text_01.MiniMaxText01Config"},
        "attn_type_list": [int(each == "full_attention") for each in config.layer_types],
        "layernorm_linear_attention_alpha": config.linear_attn_alpha_factor,
        "layernorm_linear_attention_beta": config.linear_attn_beta_factor,
        "layernorm_full_attention_alpha": config.full_attn_alpha_factor,
        "layernorm_full_attention_beta": config.full_attn_beta_factor,
        "layernorm_mlp_alpha": config.mlp_alpha_factor,
        "layernorm_mlp_beta": config.mlp_beta_factor,
        "postnorm": True,
        "rope_theta": config.rope_parameters["rope_theta"],
        "rotary_dim": config.head_dim,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
    }
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
            "num_key_value_heads", "num_local_experts", "num_experts_per_tok", "rms_norm_eps", "tie_word_embeddings",
            "sliding_window", "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "dtype")  # fmt: skip
    fields |= {name: getattr(config, name) for name in same if name != "dtype"} | {"torch_dtype": "float32"} | changes
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("index", range(2))
def test_as_transformers_where_everything_is_rotated(index, tmp_path):
    net = theirs("minimax", index)
    ours, tokens = zoo.from_hf(released(net, tmp_path / "theirs")), ids(net)
    assert close(ours(tokens).logits, net(tokens, use_cache=False).logits)


def test_half_of_each_head_is_rotated(monkeypatch, tmp_path):
    """Against transformers' model with the rotation replaced by one of the first dimensions alone."""
    net = theirs("minimax", 0)
    half = net.config.head_dim // 2 // 2 * 2
    whole = modeling_minimax.apply_rotary_pos_emb

    def partial(q, k, cos, sin, unsqueeze_dim=1):
        angles = torch.arange(cos.shape[1])[:, None] * net.config.rope_parameters["rope_theta"] ** (
            -torch.arange(0, half, 2) / half
        )
        cos, sin = (f(torch.cat([angles, angles], -1))[None] for f in (torch.cos, torch.sin))
        turned = whole(q[..., :half], k[..., :half], cos, sin, unsqueeze_dim)
        return tuple(torch.cat([a, b[..., half:]], -1) for a, b in zip(turned, (q, k), strict=True))

    ours, tokens = zoo.from_hf(released(net, tmp_path / "theirs", rotary_dim=half)), ids(net)
    assert not close(ours(tokens).logits, net(tokens, use_cache=False).logits, 1e-3)
    monkeypatch.setattr(modeling_minimax, "apply_rotary_pos_emb", partial)
    assert close(ours(tokens).logits, net(tokens, use_cache=False).logits)


def test_decays_of_three_heads_are_alibis(tmp_path):
    """For three heads ALiBi takes those of two, and the first of four; transformers' formula says otherwise."""
    net = theirs("minimax", 2)
    assert CONFIGS["minimax"][2]["num_attention_heads"] == 3
    released_decays = -zoo.from_hf(released(net, tmp_path / "theirs")).model.layers[0].mixer.log_decay
    depth = 1 + 1e-5
    assert close(released_decays, torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]) * depth, 1e-6)
    transformers_decays = -zoo.from_hf(net).model.layers[0].mixer.log_decay
    assert close(transformers_decays, torch.tensor([2 ** (-8 * (h + 1) / 3) for h in range(3)]) * depth, 1e-6)
    override = ["blocks.lightning.mixer.slopes=alibi"]
    assert torch.equal(-zoo.from_hf(net, overrides=override).model.layers[0].mixer.log_decay, released_decays)


def test_out_again(tmp_path):
    """A model of this style with part of each head rotated goes out as the release, tensors and configuration."""
    net = theirs("minimax", 0)
    folder = released(net, tmp_path / "theirs", rotary_dim=4)
    assert convert(folder, tmp_path / "ours", "zoo").notes[0].startswith("softmax layers rotate 4 of 10 dimensions")
    result = convert(tmp_path / "ours", tmp_path / "back", "native")
    assert result.target == "minimax_text_01" and "put the code that was released with it" in result.notes[0]
    saved = json.loads((tmp_path / "back" / "config.json").read_text())
    assert saved["architectures"] == ["MiniMaxText01ForCausalLM"] and saved["rotary_dim"] == 4
    read = FAMILIES["minimax_text_01"].model_file
    one, other = (MiniMaxText01Config.from_json_file(tmp_path / name / "config.json") for name in ("theirs", "back"))
    assert read(one).to_mapping() == read(other).to_mapping()
    before, after = zoo.from_hf(folder).state_dict(), zoo.from_hf(tmp_path / "back").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(FamilyError, match="it is a minimax_text_01, which is not in transformers; `zoo export` writes"):
        zoo.to_hf(zoo.from_hf(folder))


def test_the_import_of_transformers_says_what_it_took(tmp_path):
    theirs("minimax", 2).save_pretrained(tmp_path / "theirs")
    notes = convert(tmp_path / "theirs", tmp_path / "ours", "zoo").notes
    assert "states are float32" in notes[0] and "slopes=alibi" in notes[1]
    theirs("minimax", 0).save_pretrained(tmp_path / "whole")
    notes = convert(tmp_path / "whole", tmp_path / "ours1", "zoo").notes
    assert "rotate all 10 dimensions, as transformers does" in notes[1] and "rotary_dim=4" in notes[1]
    override = ["blocks.softmax.mixer.rope.rotary_dim=4"]
    assert (
        "rotate 4 of 10 dimensions, as released"
        in convert(tmp_path / "whole", tmp_path / "ours2", "zoo", overrides=override).notes[1]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"postnorm": False}, "minimax_text_01: postnorm is false; supported is true"),
        ({"shared_intermediate_size": 64}, "shared_intermediate_size is 64; supported is 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is "),
    ],
)
def test_what_is_refused(change, message, tmp_path):
    with pytest.raises(FamilyError, match=message):
        zoo.from_hf(released(theirs("minimax", 0), tmp_path / "theirs", **change))
