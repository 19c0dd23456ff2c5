"""Every family's models, in and out: the same logits, loss and gradients, and the same tensors bit for bit."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import zoo
from tests.models.families.measure import training
from tests.models.families.parity import CASES, CONFIGS, close, ids, theirs
from zoo.config import load_config
from zoo.models.families import FAMILIES, FamilyError, base
from zoo.models.families.checkpoint import read_config
from zoo.models.families.convert import family_of, saved_tensors, whole

RELEASED = Path(__file__).parent / "released"


def test_every_family_is_tried():
    # minimax_text_01 is not in transformers, and has a file of its own.
    assert set(CONFIGS) == set(FAMILIES) - {"minimax_text_01"} and all(
        len(configs) >= 3 for configs in CONFIGS.values()
    )


@pytest.mark.parametrize(("family", "index"), CASES)
def test_the_same_logits(family, index):
    net = theirs(family, index)
    ours, tokens = zoo.from_hf(net), ids(net)
    assert close(ours(tokens).logits, net(tokens, use_cache=False).logits)


@pytest.mark.parametrize(("family", "index"), CASES)
def test_left_padded_rows_are_as_each_row_alone(family, index):
    """Against transformers' row alone: its own padded batches are wrong for some families."""
    net = theirs(family, index)
    ours, tokens = zoo.from_hf(net), ids(net)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    padded = tokens.where(mask.bool(), 0)
    logits = ours(padded, attention_mask=mask).logits
    assert close(logits[0, 5:], net(tokens[:1, 5:], use_cache=False).logits[0])
    assert close(logits[1], net(tokens[1:], use_cache=False).logits[0])


@pytest.mark.parametrize(("family", "index"), CASES)
def test_the_same_greedy_continuation_with_and_without_cache(family, index):
    net = theirs(family, index)
    ours, tokens = zoo.from_hf(net), ids(net, 1, 9)
    expected = tokens
    with torch.no_grad():
        for _ in range(8):  # without its cache, which some families cannot use
            expected = torch.cat([expected, net(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        for use_cache in (True, False):
            assert torch.equal(ours.generate(tokens, use_cache=use_cache, **arguments), expected)


@pytest.mark.parametrize(("family", "index"), CASES)
def test_the_same_loss_and_gradients(family, index):
    net = theirs(family, index)
    ours, exact = training(net, zoo.from_hf(net)), training(net, zoo.from_hf(net).double())
    assert ours["loss"] <= 1e-5
    # In float64 only transformers' own rounding is left.
    assert exact["gradients"] <= 1e-4 and ours["gradients"] <= 3e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "index"), CASES)
def test_out_again_bit_for_bit(family, index, dtype):
    net = theirs(family, index, dtype)
    back = zoo.to_hf(zoo.from_hf(net), family)
    assert type(back) is type(net) and back.training == net.training
    before, after = net.state_dict(), back.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    read = FAMILIES[family].model_file
    assert read(back.config).to_mapping() == read(net.config).to_mapping()


@pytest.mark.parametrize(
    "family",
    [
        "mamba",
        "mamba2",
        "jamba",
        "bamba",
        "granitemoehybrid",
        "nemotron_h",
        "falcon_h1",
        "zamba2",
        "bailing_hybrid",
        "qwen3_next",
        "olmo_hybrid",
        "kimi_linear",
    ],
)
def test_rates_that_are_finer_than_the_rest_stay_so(family):
    """A checkpoint in bfloat16 whose A_log is float32, as some are released."""
    net = theirs(family, 0, torch.bfloat16)
    rates = [(name, parameter) for name, parameter in net.named_parameters() if name.endswith("A_log")]
    for _, parameter in rates:
        parameter.data = parameter.float() + 1e-4 * torch.rand_like(parameter, dtype=torch.float32)
    after = zoo.to_hf(zoo.from_hf(net)).state_dict()
    assert rates
    for name, parameter in net.state_dict().items():
        assert after[name].dtype == parameter.dtype and torch.equal(after[name], parameter), name


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_folder_reads_as_its_model(family, shard, tmp_path):
    net = theirs(family, 0)
    net.save_pretrained(tmp_path, max_shard_size=shard)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "20KB")
    ours, direct = zoo.from_hf(tmp_path), zoo.from_hf(net)
    assert ours.config.to_mapping() == direct.config.to_mapping()
    assert all(parameter.requires_grad for parameter in ours.parameters())
    for (name, one), (_, other) in zip(ours.state_dict().items(), direct.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_a_config_of_another_family_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtrol"}))
    with pytest.raises(FamilyError, match=r"config.json: unknown model_type 'mixtrol'; .*mixtral"):
        zoo.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "llama: hidden_act is 'gelu'; supported is 'silu'"),
        ("llama", {"attention_dropout": 0.1}, "llama: attention_dropout is 0.1"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
        ("mixtral", {"router_jitter_noise": 0.1}, "mixtral: router_jitter_noise is 0.1"),
        ("mamba", {"hidden_act": "gelu"}, "mamba: hidden_act is 'gelu'"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "qwen3_moe: hidden_act is 'gelu'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "deepseek_v3: scoring_func is 'softmax'; supported is 'sigmoid'"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "deepseek_v3: num_key_value_heads is 2; supported is 4"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "deepseek_v3: quantization_config is "),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "gpt_oss: quantization_config is "),
        ("bamba", {"z_loss_coefficient": 1e-4}, "bamba: z_loss_coefficient is 0.0001; supported is 0.0 or null"),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'; supported is"),
        ("granitemoehybrid", {"normalization_function": "layernorm"}, "normalization_function is 'layernorm'"),
        ("nemotron_h", {"attention_bias": True}, "nemotron_h: attention_bias is true; supported is"),
        ("nemotron_h", {"mlp_bias": True}, "nemotron_h: mlp_bias is true, which is not supported beside layers of exp"),
        ("nemotron_h", {"n_shared_experts": 2}, "nemotron_h: n_shared_experts is 2; supported is 1"),
        ("nemotron_h", {"tie_word_embeddings": True}, "nemotron_h: tie_word_embeddings is true; supported is false"),
        ("nemotron_h", {"rms_norm_eps": 0.5}, "nemotron_h: rms_norm_eps is 0.5; supported is "),
        ("zamba2", {"tie_word_embeddings": False}, "zamba2: tie_word_embeddings is false; supported is true"),
        ("zamba2", {"use_shared_mlp_adapter": False}, "zamba2: use_shared_mlp_adapter is false; supported is true"),
        ("mamba", {"rms_norm": False}, "mamba: rms_norm is false; supported is true"),
        ("mamba", {"d_inner": 24}, "mamba: d_inner is 24; supported is 48"),
        ("mamba", {"ssm_cfg": {"d_state": 8}}, r"mamba: ssm_cfg is \{'d_state': 8\}; supported is \{\}"),
        ("mamba2", {"rms_norm": False}, "mamba2: rms_norm is false; supported is true"),
        ("jamba", {"mamba_inner_layernorms": False}, "jamba: mamba_inner_layernorms is false; supported is true"),
        (
            "recurrent_gemma",
            {"embeddings_scale_by_sqrt_dim": False},
            "embeddings_scale_by_sqrt_dim is false; supported",
        ),
        ("recurrent_gemma", {"_block_types": ["attention"]}, r"_block_types is \['attention'\]; supported is "),
        ("minimax", {"postnorm": False}, "minimax: postnorm is false; supported is true"),
        ("minimax", {"shared_intermediate_size": 8}, "minimax: shared_intermediate_size is 8; supported is 0"),
        ("minimax", {"attn_type_list": [1, 1, 1]}, r"attn_type_list is \[1, 1, 1\]; supported is \[0, 1, 0\]"),
        ("phi3", {"partial_rotary_factor": 0.3}, "phi3: partial_rotary_factor is 0.3; supported is "),
        ("llama", {"rope_interleaved": True}, "llama: rope_interleaved is true, which is not supported"),
        ("qwen2", {"attention_bias": True}, "qwen2: attention_bias is true, which is not supported"),
        ("mistral", {"mlp_bias": True}, "mistral: mlp_bias is true, which is not supported"),
        ("mistral", {"use_sliding_window": True}, "mistral: use_sliding_window is true, which is not supported"),
        ("mixtral", {"resid_dropout": 0.1}, "mixtral: resid_dropout is 0.1, which is not supported"),
        ("llama", {"something": False}, "llama: something is false, which is not supported"),
        ("mamba2", {"intermediate_size": 24}, "mamba2: intermediate_size is 24; supported is 48"),
        ("falcon_h1", {"projectors_bias": True}, "falcon_h1: projectors_bias is true; supported is false"),
        ("falcon_h1", {"ssm_multipliers": [1.0] * 4}, "multipliers: must be five numbers"),
        ("qwen3_next", {"use_sliding_window": True}, "qwen3_next: use_sliding_window is true; supported is false"),
        ("olmo_hybrid", {"linear_use_gate": False}, "olmo_hybrid: linear_use_gate is false, which is not supported"),
        (
            "kimi_linear",
            {"linear_attn_config": {"gate_lower_bound": -5.0}},
            "linear_attn_config.gate_lower_bound is -5.0",
        ),
        ("kimi_linear", {"tie_word_embeddings": True}, "kimi_linear: tie_word_embeddings is true; supported is false"),
        ("llama", {"something_new": 3}, "llama: something_new is 3, which is not supported"),
        ("llama", {"sliding_window": 4}, "llama: sliding_window is 4, which is not supported"),
        ("mistral", {"attention_bias": True}, "mistral: attention_bias is true, which is not supported"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types has sliding_attention, but sliding_window"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types has 'chunked_attention'; supported is"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true; supported is false"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; supported is 'gelu_pytorch_tanh'"),
        ("phi3", {"resid_pdrop": 0.1}, "phi3: resid_pdrop is 0.1; supported is 0"),
        ("phi3", {"lm_head_bias": True}, "phi3: lm_head_bias is true; supported is false"),
        ("qwen2", {"use_mrope": True}, "qwen2: use_mrope is true; supported is false"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 5, "sliding_window": 4}, "use_sliding_window is false"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5; supported is 1",
        ),
    ],
)
def test_an_option_that_ours_lacks_is_refused(family, change, message):
    net = theirs(family, 0)
    for name, value in change.items():
        setattr(net.config, name, value)
    with pytest.raises(FamilyError, match=message):
        zoo.from_hf(net)


@pytest.mark.parametrize(
    ("family", "beside"),
    [
        ("gemma2", {"hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 4096, "cache_implementation": "hybrid"}),
        ("qwen2", {"use_mrope": False, "max_window_layers": 24}),
        ("phi3", {"attention_bias": False, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}}),
        ("phi3", {"mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1}),
        ("smollm3", {"max_window_layers": 28, "pretraining_tp": 2}),
        ("llama", {"use_sliding_window": False, "resid_dropout": 0.0, "max_sequence_length": 2048}),
        ("llama", {"unsloth_version": "2024.9", "neftune_noise_alpha": 5.0, "tie_encoder_decoder": False}),
        ("llama", {"_attn_implementation_autoset": True, "_flash_attn_2_enabled": True, "unsloth_fixed": True}),
        ("mistral", {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False}),
        ("mixtral", {"attention_bias": False, "mlp_bias": None, "rope_interleaved": False}),
        ("qwen2", {"attention_bias": False, "mlp_bias": False}),
        ("lfm2", {"attention_bias": False}),
        ("jamba", {"mamba_inner_layernorms": True, "n_ctx": 262144, "calc_logits_for_entire_prompt": False}),
        ("zamba2", {"use_shared_mlp_adapter": True}),
        ("nemotron_h", {"num_query_groups": 8, "rms_norm_eps": 1e-5}),
        ("minimax", {"attn_type_list": [0, 1, 0]}),
    ],
)
def test_what_released_configurations_hold_beside(family, beside, tmp_path):
    theirs(family, 0).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | beside | {"rope_scaling": None}))
    assert zoo.from_hf(tmp_path).config.to_mapping() == zoo.from_hf(theirs(family, 0)).config.to_mapping()


@pytest.mark.parametrize("name", sorted(file.stem for file in RELEASED.glob("*.json")))
def test_a_released_configuration_is_read(name, tmp_path):
    """Fields and values as in config.json on the Hub; every one is understood, and the model can be written again."""
    shutil.copy(RELEASED / f"{name}.json", tmp_path / "config.json")
    config = read_config(tmp_path / "config.json")
    model = FAMILIES[config.model_type].model_file(config)
    assert model.vocab_size == config.vocab_size and model.num_hidden_layers == config.num_hidden_layers
    found, _ = family_of(model)
    assert found.model_type == ("minimax_text_01" if name == "minimax-text-01-hf" else config.model_type)


def test_what_released_configurations_say_that_transformers_ignores():
    """Half of each head is turned, as in training; the model is then one of the release."""
    net = theirs("minimax", 0)
    net.config.rotary_dim = 4
    ours = zoo.from_hf(net)
    assert ours.config.layers[1].mixer.config.rope.rotary_dim == 4
    assert family_of(ours.config)[0].model_type == "minimax_text_01"
    notes = FAMILIES["minimax"].notes(ours.config)
    assert "softmax layers rotate 4 of 10 dimensions, as released; transformers' minimax rotates all of them" in notes


def test_blocks_that_are_not_shared():
    """Without tied embeddings transformers gives each depth of Zamba2 a block of its own, which ours would not read."""
    net = theirs("zamba2", 1)  # one hybrid layer alone
    assert net.config.tie_word_embeddings is False and zoo.from_hf(net).config.tie_word_embeddings is False
    ours = zoo.from_hf(theirs("zamba2", 0)).config.to_mapping() | {"tie_word_embeddings": False}
    with pytest.raises(FamilyError, match="is no zamba2: zamba2: tie_word_embeddings is false; supported is true"):
        zoo.to_hf(zoo.build(ours), "zamba2")


@pytest.mark.parametrize(("family", "blocks"), [("nemotron_h", 1), ("zamba2", 2)])
def test_the_import_says_that_step_sizes_are_bounded(family, blocks):
    """And the overrides that it names take the bound away, of every block that has one."""
    model = FAMILIES[family].model_file(theirs(family, 0).config)
    (note,) = FAMILIES[family].notes(model)
    assert note.startswith(f"step sizes are at least {theirs(family, 0).config.time_step_min}, as transformers has it")
    overrides = re.findall(r"--override (\S+)", note)
    assert len(overrides) == blocks
    free = load_config(model.to_mapping(), overrides)
    assert FAMILIES[family].notes(free) == ()
    assert all(layer.mixer.config.dt_min == 0 for layer in free.layers if layer.mixer.kind == "mamba2")


# Fields that say nothing of a forward pass; `num_hidden_layers`, where the list of layers says it; and MiniMax's
# `rotary_dim`, which transformers ignores.
ASIDE = {"initializer_range", "max_position_embeddings", "model_max_length", "output_router_logits",
         "router_aux_loss_coef", "bos_token_id", "eos_token_id", "pad_token_id", "num_hidden_layers",
         "rotary_dim"}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
def test_every_field_that_is_read_is_tried(family, monkeypatch):
    """In one of the small configurations it is not what it is by default, or reading it could not be told from not."""
    tried, asked, fixed = set(), set(), set()

    class Watched(base.Fields):
        def only(self, name, *allowed):
            fixed.add(name)  # has one value, or is refused
            return super().only(name, *allowed)

        def finish(self):
            asked.update(self.read)
            tried.update(name for name in self.read if self.values.get(name) != self.defaults.get(name))
            super().finish()

    monkeypatch.setattr(base, "Fields", Watched)
    for index in range(len(CONFIGS[family])):
        FAMILIES[family].model_file(theirs(family, index).config)
    assert asked - tried - fixed <= ASIDE


def saved(tmp_path):
    theirs("mixtral", 0).save_pretrained(tmp_path)
    return tmp_path / "model.safetensors"


def test_tensors_that_are_missing_left_over_or_of_another_shape(tmp_path):
    file = saved(tmp_path)
    tensors = load_file(file)
    name = next(iter(tensors))
    for change, message in (
        ({name: None}, f"missing tensors: {name}"),
        ({"model.layers.0.extra": torch.zeros(3)}, "tensors that nothing here reads: model.layers.0.extra"),
        ({"model.norm.weight": torch.zeros(5)}, r"model.norm.weight: is \[5\], the configuration says \[32\]"),
    ):
        changed = {key: value for key, value in (tensors | change).items() if value is not None}
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(FamilyError, match=message):
            zoo.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("family", "further", "unknown"),
    [
        ("deepseek_v3", "model.layers.3.eh_proj.weight", "model.layers.2.eh_proj.weight"),
        ("qwen3_next", "mtp.fc.weight", "model.mtp.fc.weight"),
        ("nemotron_h", "mtp.layers.0.norm.weight", "model.mtp.layers.0.norm.weight"),
    ],
)
def test_layers_for_the_prediction_of_further_tokens_are_left_out(family, further, unknown, tmp_path):
    net = theirs(family, 0)
    net.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {further: torch.zeros(3)}, file, metadata={"format": "pt"})
    assert close(zoo.from_hf(tmp_path)(ids(net)).logits, net(ids(net)).logits)
    save_file(tensors | {unknown: torch.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.raises(FamilyError, match=rf"nothing here reads: {unknown}"):
        zoo.from_hf(tmp_path)


def test_broken_folders(tmp_path):
    file = saved(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FamilyError, match=r"model.safetensors: cannot be read"):
        zoo.from_hf(tmp_path)
    file.unlink()
    with pytest.raises(FamilyError, match=r"has neither model.safetensors nor model.safetensors.index.json$"):
        zoo.from_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FamilyError, match=r"pytorch_model.bin is a pickle and is not read"):
        zoo.from_hf(tmp_path)
    for text in ("{", "{}", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(FamilyError, match=r"index.json: is no index of shards"):
            zoo.from_hf(tmp_path)
    with pytest.raises(FamilyError, match=r"has no config.json"):
        zoo.from_hf(tmp_path / "nowhere")


def test_a_model_that_no_family_has():
    config = {"vocab_size": 40, "hidden_size": 16, "pattern": "a b", "blocks": {
        "a": {"mixer": {"kind": "lightning", "num_heads": 2}},
        "b": {"mixer": {"kind": "mamba"}},
    }}  # fmt: skip
    with pytest.raises(FamilyError, match="no family of transformers has this model; of the nearest, it is no "):
        zoo.to_hf(zoo.build(config))


def test_why_no_family_has_a_model_is_one_line():
    """Though some configurations of transformers answer in several, with no ValueError: heads that do not divide."""
    mixer = {"kind": "attention", "num_heads": 3, "head_dim": 6}
    block = {"mixer": mixer, "ffn": {"kind": "mlp", "intermediate_size": 8, "gated": False}}
    config = {"vocab_size": 40, "hidden_size": 32, "pattern": "b", "blocks": {"b": block}}
    with pytest.raises(FamilyError, match=r"is no llama: Class validation error .* is not a multiple") as error:
        zoo.to_hf(zoo.build(config))
    assert "\n" not in str(error.value)


def test_a_model_that_several_families_have():
    """The plainest is taken unless another is asked for; one that has it not says why."""
    ours = zoo.from_hf(theirs("mistral", 1))  # no window
    assert type(zoo.to_hf(ours)) is transformers.LlamaForCausalLM
    assert type(zoo.to_hf(ours, "mistral")) is transformers.MistralForCausalLM
    assert type(zoo.to_hf(zoo.from_hf(theirs("mistral", 0)))) is transformers.MistralForCausalLM
    with pytest.raises(FamilyError, match=r"is no qwen2: layers.0.mixer.config.bias is false, there true"):
        zoo.to_hf(ours, "qwen2")
    with pytest.raises(FamilyError, match=r"family: unknown model_type 'mistrall'; did you mean 'mistral'"):
        zoo.to_hf(ours, "mistrall")


def test_ours_becomes_theirs():
    """A model that was never theirs."""
    block = {"mixer": {"kind": "mamba2", "head_dim": 8}}
    config = {"vocab_size": 40, "hidden_size": 16, "pattern": "m*2", "blocks": {"m": block}}
    ours = zoo.build(config).eval()
    net = zoo.to_hf(ours)
    assert type(net) is transformers.Mamba2ForCausalLM
    tokens = ids(net)
    assert close(ours(tokens).logits, net(tokens, use_cache=False).logits)


@pytest.mark.parametrize(
    ("family", "index", "config"),
    [
        ("mamba", 0, {"d_model": 24, "n_layer": 2, "vocab_size": 33, "ssm_cfg": {"d_state": 6, "dt_rank": 5},
                      "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": False}),
        ("mamba2", 1, {"d_model": 20, "d_intermediate": 0, "n_layer": 3, "vocab_size": 41, "attn_layer_idx": [],
                       "ssm_cfg": {"layer": "Mamba2", "d_state": 7, "headdim": 20, "ngroups": 1, "expand": 3,
                                   "d_conv": 3, "bias": True, "conv_bias": False},
                       "pad_vocab_size_multiple": 43, "tie_embeddings": True}),
    ],
)  # fmt: skip
def test_the_layout_of_mamba_ssm(family, index, config, tmp_path):
    """Its own config.json, and the embedding by its own name."""
    net = theirs(family, index) if family == "mamba2" else _padded_to(40, theirs(family, index))
    tensors = {name.replace("embeddings.", "embedding."): tensor for name, tensor in net.state_dict().items()}
    if config["tie_embeddings"]:
        tensors.pop("lm_head.weight", None)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, tokens = zoo.from_hf(tmp_path), ids(net)
    assert close(ours(tokens).logits, net(tokens, use_cache=False).logits)
    for change, message in (({"rms_norm": False}, "rms_norm is false; supported is true"),
                            ({"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]; supported is \[\]"),
                            ({"something": 1}, "something is 1, which is not supported")):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(FamilyError, match=message):
            zoo.from_hf(tmp_path)


def _padded_to(vocab_size, net):
    net.resize_token_embeddings(vocab_size)
    return net


def test_a_reader_that_leaves_tensors_out_or_brings_others_is_caught():
    """Whatever goes wrong on the way, memory that nobody wrote is never a model."""
    model = zoo.from_hf(theirs("llama", 0))
    given = list(saved_tensors(model).items())
    assert list(whole(model, iter(given))) == given
    name, tensor = given[3]
    with pytest.raises(FamilyError, match=f"nothing gave {name}"):
        list(whole(model, iter(given[:3] + given[4:])))
    for wrong in ((name, tensor[:-1]), ("model.more", tensor), given[2]):
        with pytest.raises(FamilyError, match="has no place in the model"):
            list(whole(model, iter([*given[:3], wrong])))
