# ruff: noqa: E501  (a case of a table is one line)
"""The model file: what a good one means, and the one line that every mistake gets."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from zoo import yaml
from zoo.blocks import MixerConfig, kinds, register
from zoo.blocks.mamba import Mamba
from zoo.blocks.mamba2 import Mamba2
from zoo.config import FIELDS, ConfigError, ZooConfig, load_config

GOOD = """
vocab_size: 512
hidden_size: 256
defaults:
  ffn: {kind: moe, intermediate_size: 64, num_experts: 4, top_k: 2, router: {kind: softmax, aux_loss_coef: 0.01}}
blocks:
  lightning:
    mixer: {kind: lightning, num_heads: 4, head_dim: 64}
  softmax:
    mixer: {kind: attention, num_heads: 4, num_kv_heads: 2, rope: {type: default, theta: 1.0e7, rotary_dim: 32}}
  ssd:
    mixer: {kind: mamba2, state_size: 16}
    ffn: {kind: mlp, intermediate_size: 96}
  scan:
    mixer: {kind: mamba}
    ffn: {kind: none}
residual: {kind: normalized, mixer_alpha: 2.0, ffn_alpha: 2.0}
norm: {kind: rms, eps: 1.0e-5}
pattern: lightning*7 softmax
tie_word_embeddings: true
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(GOOD)
    return path


def edited(path: str, value: object) -> dict:
    """GOOD as a mapping, with the value at the dotted path replaced."""
    mapping = yaml.load_text(GOOD)
    *parents, last = path.split(".")
    inner = mapping
    for key in parents:
        inner = inner.setdefault(key, {})
    if value is REMOVE:
        del inner[last]
    else:
        inner[last] = value
    return mapping


REMOVE = object()
KNOWN = ", ".join(FIELDS)
ATTENTION = "num_heads, num_kv_heads, head_dim, rope, window, dilation, num_sinks, sink_positions, stride, random, global_token_ids, qk_norm, bias, output_gate, output_bias, scale, softcap, sink_logits, concat_embeddings"

# id, path, value, message
MIXERS = ", ".join(kind.name for kind in kinds() if kind.role == "mixer")
FIELD_MISTAKES = [
    # unknown keys at every level, with the nearest right one
    ("key-top", "vocab_sise", 1, "vocab_sise: unknown key; did you mean 'vocab_size'?"),
    ("key-top-far", "learning_rate", 1, f"learning_rate: unknown key; known: {KNOWN}"),
    ("key-block", "blocks.softmax.mixr", {}, "blocks.softmax.mixr: unknown key; did you mean 'mixer'?"),
    ("key-mixer", "blocks.softmax.mixer.num_head", 4, "blocks.softmax.mixer.num_head: unknown key; did you mean 'num_heads'?"),
    ("key-mixer-far", "blocks.softmax.mixer.zzz", 4, f"blocks.softmax.mixer.zzz: unknown key; known: {ATTENTION}"),
    ("key-rope", "blocks.softmax.mixer.rope.thetta", 1e4, "blocks.softmax.mixer.rope.thetta: unknown key; did you mean 'theta'?"),
    ("key-ffn", "blocks.ssd.ffn.num_experts", 4, "blocks.ssd.ffn.num_experts: unknown key; known: intermediate_size, activation, gated, bias, gate_scale"),
    ("key-none", "blocks.scan.ffn.width", 4, "blocks.scan.ffn.width: unknown key; remove it, there are no keys here"),
    ("key-defaults", "defaults.mlp", {}, "defaults.mlp: unknown key; known: mixer, ffn, norm, residual, shared"),
    ("key-defaults-ffn", "defaults.ffn.topk", 2, "defaults.ffn.topk: unknown key; did you mean 'top_k'?"),
    ("key-router", "defaults.ffn.router.aux_loss", 1, "defaults.ffn.router.aux_loss: unknown key; did you mean 'aux_loss_coef'?"),
    ("key-norm", "norm.epsilon", 1e-5, "norm.epsilon: unknown key; did you mean 'eps'?"),
    ("key-residual", "residual.alpha", 2.0, "residual.alpha: unknown key; did you mean 'ffn_alpha'?"),
    ("key-residual-none", "residual", {"kind": "post", "mixer_alpha": 1.0}, "residual.mixer_alpha: unknown key; remove it, there are no keys here"),
    ("key-private", "_layers", 1, f"_layers: unknown key; known: {KNOWN}"),
    ("key-transformers", "temperature", 0.5, f"temperature: unknown key; known: {KNOWN}"),
    ("key-number", "7", 1, f"7: unknown key; known: {KNOWN}"),
    ("key-lines", "a\nb", 1, f"'a\\nb': unknown key; known: {KNOWN}"),
    ("class-path", "blocks.softmax.mixer.class_path", "os.system", f"blocks.softmax.mixer.class_path: unknown key; known: {ATTENTION}"),
    ("class-path-top", "class_path", "antigravity.geohash", f"class_path: unknown key; known: {KNOWN}"),
    # types
    ("type-text", "hidden_size", "wide", "hidden_size: must be a whole number, got 'wide'"),
    ("type-quoted", "vocab_size", "512", "vocab_size: must be a whole number, got '512'; remove the quotes"),
    ("type-quoted-float", "norm.eps", "1e-5", "norm.eps: must be a number, got '1e-5'; remove the quotes"),
    ("type-float", "hidden_size", 256.0, "hidden_size: must be a whole number, got 256.0"),
    ("type-bool", "blocks.softmax.mixer.num_heads", True, "blocks.softmax.mixer.num_heads: must be a whole number, got true"),
    ("type-bool-float", "norm.eps", False, "norm.eps: must be a number, got false"),
    ("type-one", "tie_word_embeddings", 1, "tie_word_embeddings: must be true or false, got 1"),
    ("type-list", "blocks.softmax.mixer.head_dim", [64], "blocks.softmax.mixer.head_dim: must be a whole number, got [64]"),
    ("type-null", "blocks.softmax.mixer.num_heads", None, "blocks.softmax.mixer.num_heads: must be a whole number, got null"),
    ("type-blocks", "blocks", ["softmax"], "blocks: must be a mapping, got ['softmax']"),
    ("type-block", "blocks.softmax", "attention", "blocks.softmax: must be a mapping with mixer and ffn, got 'attention'"),
    ("type-mixer", "blocks.softmax.mixer", "attention", "blocks.softmax.mixer: must be a mapping with a kind, got 'attention'"),
    ("type-rope", "blocks.softmax.mixer.rope", True, "blocks.softmax.mixer.rope: must be a mapping, got true"),
    ("type-norm", "norm", "rms", "norm: must be a mapping, got 'rms'"),
    ("type-residual", "residual", "pre", "residual: must be a mapping, got 'pre'"),
    ("type-block-residual", "blocks.softmax.residual", "pre", "blocks.softmax.residual: must be a mapping such as {kind: pre}, got 'pre'"),
    ("type-defaults", "defaults", [], "defaults: must be a mapping, got []"),
    ("type-defaults-ffn", "defaults.ffn", None, "defaults.ffn: must be a mapping, got null"),
    ("type-pattern", "pattern", 8, "pattern: must be a text or a list, each entry a text, got 8"),
    ("type-pattern-entry", "pattern", ["softmax", 8], "pattern[1]: must be a text, got 8"),
    ("type-bytes", "vocab_size", b"512", "vocab_size: must be a whole number, got b'512'"),
    # ranges
    ("range-zero", "hidden_size", 0, "hidden_size: must be a whole number >= 1, got 0"),
    ("range-negative", "blocks.softmax.mixer.window", -1, "blocks.softmax.mixer.window: must be a whole number >= 1 or a mapping or a list, each entry (a whole number >= 1 or null) or null, got -1"),
    ("range-huge", "vocab_size", 2**31, "vocab_size: must be <= 2147483647, got 2147483648"),
    ("range-digits", "vocab_size", 10**5000, "vocab_size: must be <= 2147483647, got a number of thousands of digits"),
    ("range-eps", "norm.eps", 0.0, "norm.eps: must be a number > 0, got 0.0"),
    ("range-count", "blocks.softmax.mixer.num_sinks", -1, "blocks.softmax.mixer.num_sinks: must be a whole number >= 0, got -1"),
    ("range-theta", "blocks.softmax.mixer.rope.theta", 1, "blocks.softmax.mixer.rope.theta: must be a number > 1, got 1"),
    ("range-std", "initializer_range", -0.02, "initializer_range: must be a number > 0, got -0.02"),
    ("nan", "residual.mixer_alpha", math.nan, "residual.mixer_alpha: must be a finite number, got nan"),
    ("infinite", "norm.eps", math.inf, "norm.eps: must be a finite number, got inf"),
    ("infinite-int", "initializer_range", 10**400, "initializer_range: must be a finite number, got inf"),
    # fields that must fit each other
    ("fit-kv-heads", "blocks.softmax.mixer.num_kv_heads", 3, "blocks.softmax.mixer.num_kv_heads: must divide num_heads (4), got 3"),
    ("fit-head-dim", "blocks.softmax.mixer.num_heads", 6, "blocks.softmax.mixer.num_heads: must divide hidden_size (256), got 6; or give head_dim"),
    ("fit-lightning", "blocks.lightning.mixer", {"kind": "lightning", "num_heads": 7}, "blocks.lightning.mixer.num_heads: must divide hidden_size (256), got 7; or give head_dim"),
    ("fit-mamba2", "blocks.ssd.mixer.head_dim", 60, "blocks.ssd.mixer.head_dim: must divide 2 * hidden_size (512), got 60; or give num_heads"),
    ("fit-groups", "blocks.ssd.mixer.num_groups", 3, "blocks.ssd.mixer.num_groups: must divide num_heads (8), got 3"),
    ("fit-top-k", "blocks.softmax.ffn", {"top_k": 5}, "blocks.softmax.ffn.top_k: must be at most num_experts (4), got 5"),
    ("fit-sinks", "blocks.softmax.mixer.num_sinks", 4, "blocks.softmax.mixer.num_sinks: needs a window to stand outside of, got 4 without one"),
    ("fit-rotary-odd", "blocks.softmax.mixer.rope.rotary_dim", 31, "blocks.softmax.mixer.rope.rotary_dim: must be even and at most head_dim (64), got 31"),
    ("fit-rotary-large", "blocks.softmax.mixer.rope.rotary_dim", 66, "blocks.softmax.mixer.rope.rotary_dim: must be even and at most head_dim (64), got 66"),
    ("fit-rope-foreign", "blocks.softmax.mixer.rope.factor", 4.0, "blocks.softmax.mixer.rope.factor: does not belong to rope type default; remove it or change the type"),
    ("fit-rope-missing", "blocks.softmax.mixer.rope.type", "linear", "blocks.softmax.mixer.rope.factor: is missing; rope type linear needs it"),
    ("fit-rope-ramp", "blocks.softmax.mixer.rope", {"type": "llama3", "factor": 8, "original_max_position_embeddings": 8192, "low_freq_factor": 4, "high_freq_factor": 1}, "blocks.softmax.mixer.rope.low_freq_factor: must be below high_freq_factor (1.0)"),
    ("fit-eos", "eos_token_id", 512, "eos_token_id: must be below vocab_size (512), got 512"),
    ("fit-empty-block", "blocks.scan.mixer", {"kind": "none"}, "blocks.scan: has neither a mixer nor an ffn; give one of them"),
    # kinds
    ("kind-mixer", "blocks.softmax.mixer.kind", "atention", "blocks.softmax.mixer.kind: unknown mixer 'atention'; did you mean 'attention'?"),
    ("kind-mixer-is-ffn", "blocks.softmax.mixer", {"kind": "mlp"}, "blocks.softmax.mixer.kind: unknown mixer 'mlp'; did you mean 'mla'?"),
    ("kind-mixer-list", "blocks.softmax.mixer.kind", [], "blocks.softmax.mixer.kind: unknown mixer []; known: " + MIXERS),
    ("kind-ffn", "blocks.ssd.ffn.kind", "swiglu", "blocks.ssd.ffn.kind: unknown ffn 'swiglu'; known: mlp, moe, none"),
    ("kind-defaults", "defaults.ffn.kind", "moe2", "defaults.ffn.kind: unknown ffn 'moe2'; did you mean 'moe'?"),
    ("kind-residual", "residual.kind", "normalised", "residual.kind: unknown residual 'normalised'; did you mean 'normalized'?"),
    ("kind-residual-map", "residual.kind", {}, "residual.kind: unknown residual {}; known: pre, post, reordered, sandwich, normalized, parallel, serial, skip"),
    ("kind-norm", "norm.kind", "rmsnorm", "norm.kind: must be one of rms, layer, got 'rmsnorm'; did you mean 'rms'?"),
    ("kind-rope", "blocks.softmax.mixer.rope.type", "yarm", "blocks.softmax.mixer.rope.type: must be one of default, linear, yarn, llama3, longrope, got 'yarm'; did you mean 'yarn'?"),
    ("kind-activation", "blocks.ssd.ffn.activation", "swish", "blocks.ssd.ffn.activation: must be one of silu, gelu, gelu_tanh, relu2, got 'swish'"),
    ("kind-slopes", "blocks.lightning.mixer.slopes", 2, "blocks.lightning.mixer.slopes: must be one of alibi, geometric, got 2"),
    ("kind-model-type", "model_type", "llama", "model_type: must be 'zoo', got 'llama'"),
    # missing
    ("missing-vocab", "vocab_size", REMOVE, "vocab_size: is missing; give a whole number >= 1"),
    ("missing-pattern", "pattern", REMOVE, "pattern: is missing; give a text or a list, each entry a text"),
    ("missing-blocks", "blocks", REMOVE, "blocks: is missing; give a mapping"),
    ("missing-heads", "blocks.softmax.mixer.num_heads", REMOVE, "blocks.softmax.mixer.num_heads: is missing; give a whole number >= 1"),
    ("missing-kind", "blocks.softmax.mixer.kind", REMOVE, "blocks.softmax.mixer.kind: is missing; `zoo describe --kinds` lists them"),
    ("missing-default-kind", "defaults.ffn.kind", REMOVE, "defaults.ffn.kind: is missing; `zoo describe --kinds` lists them"),
    ("missing-width", "blocks.ssd.ffn.intermediate_size", REMOVE, "blocks.ssd.ffn.intermediate_size: is missing; give a whole number >= 1"),
    # what no layer uses is checked too
    ("unused-block", "blocks.scan.mixer.state_size", 0, "blocks.scan.mixer.state_size: must be a whole number >= 1, got 0"),
    ("unused-default", "defaults.mixer", {"kind": "mamba", "dt_rank": "big"}, "defaults.mixer.dt_rank: must be a whole number, got 'big'"),
    ("unused-default-norm", "defaults.norm", {"eps": -1.0}, "defaults.norm.eps: must be a number > 0, got -1.0"),
    ("unused-default-residual", "defaults.residual", {"kind": "per"}, "defaults.residual.kind: unknown residual 'per'; did you mean 'pre'?"),
    # blocks and pattern
    ("block-name", "blocks.two words", {}, "blocks.two words: is no block name; use letters, digits, _ - and ., from a letter"),
    ("block-none", "blocks", {}, "blocks: is empty; define at least one block"),
    ("pattern-unknown", "pattern", "lightning*7 sotfmax", "pattern: unknown block 'sotfmax'; did you mean 'softmax'?"),
    ("pattern-unknown-list", "pattern", ["lightning*7"], "pattern: unknown block 'lightning*7'; did you mean 'lightning'?"),
    ("pattern-repeat", "pattern", "lightning*0", "pattern: '*' needs a number from 1, got '0'\n  lightning*0\n            ^"),
    ("pattern-open", "pattern", "(lightning softmax", "pattern: this parenthesis is never closed\n  (lightning softmax\n  ^"),
    ("pattern-layers", "pattern", "softmax*10001", "pattern: more than 10000 layers\n  softmax*10001\n          ^"),
    ("pattern-list-layers", "pattern", ["softmax"] * 10_001, "pattern: 10001 layers; at most 10000 are allowed\n  [softmax, ...]\n  ^"),
    ("pattern-empty", "pattern", "", "pattern: a block name is missing before the end\n  \n  ^"),
    ("pattern-list-empty", "pattern", [], "pattern: the pattern is empty; name at least one block\n  []\n   ^"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "message"), [case[1:] for case in FIELD_MISTAKES], ids=[case[0] for case in FIELD_MISTAKES]
)
def test_mistake_in_a_field(path: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(edited(path, value))
    assert str(error.value) == message
    assert path.startswith("pattern") or "\n" not in message


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

# id, text of the file (or bytes), message after the file's name
FILE_MISTAKES = [
    ("empty", "", "must be a mapping of fields such as vocab_size and blocks, got null"),
    ("comment", "# nothing\n", "must be a mapping of fields such as vocab_size and blocks, got null"),
    ("list", "- softmax\n", "must be a mapping of fields such as vocab_size and blocks, got ['softmax']"),
    ("text", "softmax", "must be a mapping of fields such as vocab_size and blocks, got 'softmax'"),
    ("duplicate", GOOD + "vocab_size: 2\n", "line 21: key 'vocab_size' stands twice (first on line 2); remove one"),
    ("duplicate-deep", "blocks:\n  a: {kind: x, kind: y}\n", "line 2: key 'kind' stands twice (first on line 2); remove one"),
    ("tag-object", "a: !!python/object:os.system x", "line 1: 'tag:yaml.org,2002:python/object:os.system' is a tag; remove it, a file holds plain data"),
    ("tag-apply", "\na: !!python/object/apply:os.system ['echo no']", "line 2: 'tag:yaml.org,2002:python/object/apply:os.system' is a tag; remove it, a file holds plain data"),
    ("tag-own", "a: !include other.yaml", "line 1: '!include' is a tag; remove it, a file holds plain data"),
    ("tag-plain", "a: !!bool maybe", "line 1: 'tag:yaml.org,2002:bool' is a tag; remove it, a file holds plain data"),
    ("alias-bomb", BOMB, "line 1: aliases expand to more than 1000 nodes; write the values out"),
    ("alias-itself", "a: &a [*a]", "line 1: an alias contains itself; write the value out"),
    ("alias-itself-map", "a: &a\n  b: *a", "line 1: an alias contains itself; write the value out"),
    ("alias-unknown", "a: *b", "line 1, column 4: found undefined alias 'b'; this is not valid YAML"),
    ("merge-key", "a: &a {b: 1}\nc:\n  <<: *a", "line 3: merge keys (<<) are not allowed; write the fields out or use defaults"),
    ("two-documents", GOOD + "---\nvocab_size: 1\n", "line 21: a second document starts; keep one document in a file"),
    ("date", "vocab_size: 2024-01-01", "line 1: 2024-01-01 is neither a text nor a number; put quotes around it"),
    ("octal", "vocab_size: 010", "line 1: 010 is not a plain decimal number; write one"),
    ("sexagesimal", "vocab_size: 8:32", "line 1: 8:32 is not a plain decimal number; write one"),
    ("binary", "vocab_size: 0b_", "line 1: 0b_ is not a plain decimal number; write one"),
    ("digits", "vocab_size: " + "9" * 5000, f"line 1: '{'9' * 57}'... is not a plain decimal number; write one"),
    ("infinite", "norm: {eps: .inf}", "line 1: .inf is not a finite number; write one"),
    ("nan", "norm: {eps: .nan}", "line 1: .nan is not a finite number; write one"),
    ("overflow", "norm: {eps: 1e999}", "line 1: 1e999 is not a finite number; write one"),
    ("key-number", "512: 1", "line 1: key 512 is not a text; put quotes around it"),
    ("key-null", "blocks:\n  ~: {}", "line 2: key ~ is not a text; put quotes around it"),
    ("key-bool", "yes: 1", "line 1: key yes is not a text; put quotes around it"),
    ("key-list", "[a]: 1", "line 1: a key must be a name, not a list or a mapping; write a name"),
    ("depth", "\n".join(" " * level + "a:" for level in range(102)), "line 101: nests deeper than 100 levels; flatten it"),
    ("depth-flow", "[" * 3_000, "nests deeper than 100 levels; flatten it"),
    ("unclosed", "a: [1", "line 1, column 6: expected ',' or ']', but got '<stream end>'; this is not valid YAML"),
    ("tab", "a:\n\tb: 1", "line 2, column 1: found character '\\t' that cannot start any token; this is not valid YAML"),
    ("colon", "a: b: c", "line 1, column 5: mapping values are not allowed here; this is not valid YAML"),
    ("control", "a: \x07", "character 0x7 at position 3 is no text; remove it"),
    ("escape", 'a: "\\UFFFFFFFF"', "line 1: a number is out of range; this is not valid YAML"),
    ("utf-16", GOOD.encode("utf-16"), "is not UTF-8 text (byte 0); save it as UTF-8"),
    ("latin-1", "# Käfer".encode("latin-1"), "is not UTF-8 text (byte 3); save it as UTF-8"),
    ("large", "# " + "x" * 1_000_000, "is larger than 1000000 bytes; give a YAML file of a few thousand"),
    ("field", GOOD.replace("hidden_size: 256", "hidden_size: '256'"), "hidden_size: must be a whole number, got '256'; remove the quotes"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"), [case[1:] for case in FILE_MISTAKES], ids=[case[0] for case in FILE_MISTAKES]
)
def test_mistake_in_a_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value) == f"{path}: {message}"
    assert "\n" not in message


def test_mistakes_in_the_path(tmp_path: Path) -> None:
    missing, locked, loop = tmp_path / "missing.yaml", tmp_path / "locked.yaml", tmp_path / "loop.yaml"
    locked.write_text(GOOD)
    locked.chmod(0)
    loop.symlink_to(loop)
    cases = {
        str(missing): "no such file; check the path",
        str(tmp_path): "is a folder; give a YAML file",
        str(loop): "cannot be read (Too many levels of symbolic links); check its name and permissions",
        "a\0b": "cannot be read (embedded null byte); check its name and permissions",
    }
    if os.geteuid():  # root may read everything
        cases[str(locked)] = "cannot be read (Permission denied); check its name and permissions"
    for path, message in cases.items():
        with pytest.raises(ConfigError) as error:
            load_config(path)
        assert str(error.value) == f"{path}: {message}"


OVERRIDE_MISTAKES = [
    ("no-equals", "pattern", "pattern: is not an override; write field.path=value"),
    ("no-key", "=3", "=3: is not an override; write field.path=value"),
    ("empty-key", "blocks..mixer=3", "blocks..mixer=3: is not an override; write field.path=value"),
    ("into-scalar", "hidden_size.x=3", "hidden_size: has no fields to override, it is 256"),
    ("into-scalar-deep", "blocks.softmax.mixer.kind.x=3", "blocks.softmax.mixer.kind: has no fields to override, it is 'attention'"),
    ("unknown", "hiden_size=3", "hiden_size: unknown key; did you mean 'hidden_size'?"),
    ("unknown-deep", "blocks.softmax.mixer.rope.beta=3", "blocks.softmax.mixer.rope.beta: unknown key; did you mean 'theta'?"),
    ("unknown-block", "blocks.sofmax.mixer.num_heads=3", "blocks.sofmax: unknown block; did you mean 'softmax'?"),
    ("type", "blocks.softmax.mixer.num_heads=eight", "blocks.softmax.mixer.num_heads: must be a whole number, got 'eight'"),
    ("not-yaml", "hidden_size=[1", "hidden_size: must be a whole number, got '[1'"),
    ("tag", "hidden_size=!!python/object/apply:os.system [true]", "hidden_size: must be a whole number, got '!!python/object/apply:os.system [true]'"),
    ("nothing", "hidden_size=", "hidden_size: is missing; give a whole number >= 1"),
    ("pattern", "pattern=*2", "pattern: a block name is missing before '*'\n  *2\n  ^"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"), [case[1:] for case in OVERRIDE_MISTAKES], ids=[case[0] for case in OVERRIDE_MISTAKES]
)
def test_mistake_in_an_override(good: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(good, [override])
    assert str(error.value) == f"{good}: {message}"


def test_a_mapping_that_contains_itself() -> None:
    mapping: dict = edited("vocab_size", 512)
    mapping["defaults"]["ffn"] = mapping
    with pytest.raises(ConfigError, match=r"^nests too deep, or contains itself; flatten it$"):
        load_config(mapping)


def test_class_path_imports_nothing(good: Path) -> None:
    """Nor does any other name in a file."""
    for module in ("this", "antigravity"):
        sys.modules.pop(module, None)
        for path in ("class_path", "blocks.softmax.mixer.class_path", "blocks.softmax.mixer.kind"):
            with pytest.raises(ConfigError):
                load_config(edited(path, f"{module}.x"))
        assert module not in sys.modules


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


def paths_of(mapping: dict, prefix: str = "") -> list[str]:
    paths = []
    for key, value in mapping.items():
        paths.append(prefix + key)
        if isinstance(value, dict):
            paths += paths_of(value, prefix + key + ".")
    return paths


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(paths_of(edited("vocab_size", 512))) | st.sampled_from(FIELDS), value=PLAIN)
def test_garbage_is_a_config_error_or_nothing(path: str, value: object) -> None:
    try:
        load_config(edited(path, value))
    except ConfigError as error:
        assert str(error).isprintable() or path == "pattern"
        assert len(str(error)) < 1000


@settings(max_examples=200, deadline=None)
@given(PLAIN)
def test_a_whole_file_of_garbage(value: object) -> None:
    if isinstance(value, dict):
        with pytest.raises(ConfigError):
            load_config(value)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(GOOD)), st.text("[]{}:*&!'\"-,#|>\n\t %@<=.0e~a", max_size=6), st.integers(0, 20))
def test_a_mutilated_file(tmp_path_factory: pytest.TempPathFactory, start: int, inserted: str, removed: int) -> None:
    path = tmp_path_factory.getbasetemp() / "mutilated.yaml"
    path.write_text(GOOD[:start] + inserted + GOOD[start + removed :])
    try:
        load_config(path)
    except ConfigError as error:
        assert str(error).startswith(f"{path}: ")


# What a good file means.


def test_layers_are_the_pattern_written_out(good: Path) -> None:
    layers = load_config(good).layers
    assert [layer.name for layer in layers] == ["lightning"] * 7 + ["softmax"]
    assert [layer.mixer.kind for layer in layers] == ["lightning"] * 7 + ["attention"]
    assert {layer.ffn.kind for layer in layers} == {"moe"}
    softmax = layers[-1].mixer.config
    assert (softmax.num_kv_heads, softmax.head_dim, softmax.rope.rotary_dim) == (2, 64, 32)
    assert layers[-1].norm.eps == 1e-5


def test_a_list_is_the_pattern_written_out() -> None:
    text = load_config(edited("pattern", "(scan*2 softmax)*2"))
    names = load_config(edited("pattern", ["scan", "scan", "softmax"] * 2))
    assert text.layers == names.layers


def test_limits_are_inclusive() -> None:
    assert load_config(edited("pattern", "scan*10000")).num_hidden_layers == 10_000
    assert len(load_config(edited("pattern", ["scan"] * 10_000)).layers) == 10_000
    assert load_config(edited("eos_token_id", 511)).eos_token_id == 511
    assert load_config(edited("blocks.softmax.mixer.rope.rotary_dim", 64)).layers[-1].mixer.config.rope.rotary_dim == 64
    assert load_config(edited("blocks.softmax.ffn", {"top_k": 4})).layers[-1].ffn.config.top_k == 4


def ffn_of(config: ZooConfig, name: str) -> object:
    return next(layer for layer in config.layers if layer.name == name).ffn.config


def test_a_block_changes_single_fields_of_the_defaults() -> None:
    config = load_config(edited("blocks.softmax.ffn", {"top_k": 1, "router": {"z_loss_coef": 0.5}}))
    softmax, lightning = ffn_of(config, "softmax"), ffn_of(config, "lightning")
    assert (softmax.top_k, softmax.num_experts, softmax.intermediate_size) == (1, 4, 64)
    assert (softmax.router.z_loss_coef, softmax.router.aux_loss_coef) == (0.5, 0.01)
    assert (lightning.top_k, lightning.router.z_loss_coef) == (2, 0.0)


def test_another_kind_replaces_the_defaults() -> None:
    config = load_config(edited("blocks.softmax.ffn", {"kind": "mlp", "intermediate_size": 32}))
    assert ffn_of(config, "softmax").intermediate_size == 32
    with pytest.raises(ConfigError, match=r"^blocks.softmax.ffn.intermediate_size: is missing"):
        load_config(edited("blocks.softmax.ffn", {"kind": "mlp"}))


def test_the_same_kind_given_again_keeps_the_defaults() -> None:
    config = load_config(edited("blocks.softmax.ffn", {"kind": "moe", "top_k": 3}))
    assert (ffn_of(config, "softmax").top_k, ffn_of(config, "softmax").num_experts) == (3, 4)


def test_null_takes_a_default_away() -> None:
    assert load_config(edited("blocks.softmax.ffn", None)).layers[-1].ffn.kind == "none"
    default = {"kind": "attention", "num_heads": 4, "rope": {"theta": 5e5}}
    mapping = edited("defaults.mixer", default)
    mapping["blocks"]["softmax"]["mixer"] = {"rope": None}
    mapping["blocks"]["lightning"]["mixer"] = {"rope": {"rotary_dim": 16}}
    layers = load_config(mapping).layers
    assert layers[-1].mixer.config.rope is None
    assert (layers[0].mixer.config.rope.theta, layers[0].mixer.config.rope.rotary_dim) == (5e5, 16)


def test_rope_of_another_type_replaces_the_defaults() -> None:
    default = {"kind": "attention", "num_heads": 4, "rope": {"type": "linear", "factor": 4, "theta": 5e5}}
    mapping = edited("defaults.mixer", default)
    mapping["blocks"]["softmax"]["mixer"] = {"rope": {"type": "default"}}
    rope = load_config(mapping).layers[-1].mixer.config.rope
    assert (rope.type, rope.factor, rope.theta) == ("default", None, 10_000.0)


def test_a_block_has_its_own_residual_and_norm() -> None:
    mapping = edited("blocks.softmax.residual", {"kind": "sandwich"})
    mapping["blocks"]["softmax"]["norm"] = {"kind": "layer"}
    mapping["defaults"]["norm"] = {"eps": 1e-3}
    layers = load_config(mapping).layers
    assert [type(layer.residual).__name__ for layer in layers] == ["Normalized"] * 7 + ["Sandwich"]
    assert (layers[0].norm.kind, layers[0].norm.eps) == ("rms", 1e-3)
    assert (layers[-1].norm.kind, layers[-1].norm.eps) == ("layer", 1e-3)


def test_null_at_the_top_is_not_given() -> None:
    mapping = edited("norm", None) | dict.fromkeys(["residual", "defaults", "tie_word_embeddings", "initializer_range"])
    mapping["blocks"] = {"scan": mapping["blocks"]["scan"]}
    config = load_config(mapping | {"pattern": "scan"})
    assert (config.tie_word_embeddings, config.initializer_range, config.norm_config.eps) == (False, 0.02, 1e-6)
    assert type(config.layers[0].residual).__name__ == "Pre"


def test_alphas_follow_the_depth() -> None:
    mapping = edited("residual", {"kind": "normalized"}) | {"pattern": "softmax*8"}
    assert load_config(mapping).layers[0].residual.mixer_alpha == pytest.approx(2.0)


def test_overrides_at_every_depth_win(good: Path) -> None:
    overrides = [
        "hidden_size=128",
        "pattern=(scan softmax)*2",
        "residual.mixer_alpha=3",
        "norm.eps=1e-3",
        "defaults.ffn.top_k=1",
        "blocks.softmax.mixer.num_heads=8",
        "blocks.softmax.mixer.head_dim=32",
        "blocks.softmax.mixer.rope.rotary_dim=16",
        "blocks.softmax.ffn.router.z_loss_coef=0.25",
        "blocks.extra={mixer: {kind: mamba}}",
        "pattern=(scan softmax)*2 extra",
    ]
    config = load_config(good, overrides)
    softmax = config.layers[1]
    assert config.hidden_size == 128
    assert [layer.name for layer in config.layers] == ["scan", "softmax", "scan", "softmax", "extra"]
    assert (softmax.residual.mixer_alpha, softmax.residual.ffn_alpha, softmax.norm.eps) == (3.0, 2.0, 1e-3)
    assert (softmax.mixer.config.num_heads, softmax.mixer.config.head_dim) == (8, 32)
    assert (softmax.mixer.config.rope.rotary_dim, softmax.mixer.config.rope.theta) == (16, 1e7)
    assert (softmax.ffn.config.top_k, softmax.ffn.config.router.z_loss_coef) == (1, 0.25)


def test_overrides_leave_the_given_mapping_alone() -> None:
    mapping = edited("vocab_size", 512)
    before = copy.deepcopy(mapping)
    load_config(mapping, ["blocks.softmax.mixer.num_heads=8", "defaults.ffn.top_k=1"])
    assert mapping == before


def test_round_trip_through_config_json(good: Path, tmp_path: Path) -> None:
    config = load_config(good)
    config.save_pretrained(tmp_path)
    for again in (
        load_config(config.to_mapping()),
        load_config(tmp_path / "config.json"),
        AutoConfig.from_pretrained(tmp_path),
    ):
        assert isinstance(again, ZooConfig)
        assert again.to_mapping() == config.to_mapping()
        assert again.layers == config.layers
        assert again.norm_config == config.norm_config


def test_config_json_may_hold_what_transformers_writes(good: Path, tmp_path: Path) -> None:
    config = load_config(good)
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text()) | {"dtype": "bfloat16", "architectures": ["ZooForCausalLM"]}
    path.write_text(json.dumps(written))
    assert load_config(path).layers == config.layers
    path.write_text(json.dumps(written | {"hiden_size": 3}))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value) == f"{path}: hiden_size: unknown key; did you mean 'hidden_size'?"
    with pytest.raises(ConfigError, match=r"^hiden_size: unknown key; did you mean 'hidden_size'\?$"):
        AutoConfig.from_pretrained(tmp_path)


def test_unused_fields_do_not_get_lost(good: Path) -> None:
    """Whatever stands in a file stands in the mapping that is saved."""
    defaults = {"initializer_range": 0.02, "embedding_scale": 1.0, "logit_scale": 1.0}
    assert load_config(good).to_mapping() == yaml.load_text(GOOD) | defaults


def test_order_of_keys_means_nothing() -> None:
    mapping = edited("vocab_size", 512)
    keys = list(mapping)
    random.Random(0).shuffle(keys)
    assert load_config({key: mapping[key] for key in keys}).layers == load_config(mapping).layers


PLUGIN = '''
from dataclasses import dataclass
import torch
import zoo
from zoo.blocks import Mixer, MixerConfig, State
from zoo.schema import Size


@dataclass(frozen=True, kw_only=True)
class MeanConfig(MixerConfig):
    """Mean of all tokens so far.

    width  of nothing.
    """

    width: Size = 3


class Mean(Mixer):
    def __init__(self, config, model, layer_idx):
        super().__init__()

    def forward(self, x, context, state=None):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]

    def new_state(self, batch_size, device, dtype):
        return State()

    def state_bytes(self, batch, length):
        return 0

    def flops(self, batch, length):
        return 0


def register():
    zoo.register("mean", MeanConfig, Mean)
'''


def installed_plugin(folder: Path, source: str) -> dict[str, str]:
    """Lays down what `pip install` would: a module and its metadata. Returns the environment that finds them."""
    (folder / "zoo_mean.py").write_text(source)
    metadata = folder / "zoo_mean-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo-mean\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[zoo.blocks]\nmean = zoo_mean:register\n")
    return os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def test_a_plugin_adds_a_kind(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import torch, zoo
        mapping = {"vocab_size": 16, "hidden_size": 8, "pattern": "mean softmax",
                   "blocks": {"mean": {"mixer": {"kind": "mean", "width": 4}},
                              "softmax": {"mixer": {"kind": "attention", "num_heads": 2}}}}
        model = zoo.build(mapping)
        print(model.config.layers[0].mixer.config.width, tuple(model(torch.ones(1, 5, dtype=torch.long)).logits.shape))
        try:
            zoo.load_config(mapping, ["blocks.mean.mixer.width=0"])
        except zoo.ConfigError as error:
            print(error)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=installed_plugin(tmp_path, PLUGIN),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["4 (1, 5, 16)", "blocks.mean.mixer.width: must be a whole number >= 1, got 0"]


def test_a_broken_plugin_is_one_line(tmp_path: Path) -> None:
    script = "import zoo\ntry:\n    zoo.load_config('configs/models/mamba2-tiny.yaml')\nexcept zoo.ConfigError as e:\n    print(e)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=installed_plugin(tmp_path, "import no_such_package\n"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "configs/models/mamba2-tiny.yaml: blocks.mamba2.mixer.kind: the plugin zoo_mean:register cannot be loaded "
        "(No module named 'no_such_package'); fix or uninstall it\n"
    )


def test_a_kind_whose_fields_cannot_be_checked_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Config(MixerConfig):
        sizes: tuple[int, int] = (1, 2)

    with pytest.raises(TypeError, match=r"^tuple\[int, int\] cannot be checked; use int"):
        register("sizes", Config, Mamba)
    with pytest.raises(TypeError, match=r"^str must be a dataclass derived from MixerConfig or FeedForwardConfig$"):
        register("sizes", str, Mamba)
    with pytest.raises(ValueError, match=r"^mixer kind 'mamba' is taken by Mamba$"):
        register("mamba", MixerConfig, Mamba2)
    assert "sizes" not in [kind.name for kind in kinds()]


def test_structure_cannot_change_behind_the_layers(good: Path, tmp_path: Path) -> None:
    config = load_config(good)
    with pytest.raises(
        ConfigError, match=r"^pattern: cannot be changed in a built configuration; override it in load_config"
    ):
        config.pattern = [*config.to_mapping()["blocks"]][:1]
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^hidden_size: cannot be changed"):
        AutoConfig.from_pretrained(tmp_path, hidden_size=24)
    config.vocab_size = 999  # resize_token_embeddings does this
    assert config.to_mapping()["vocab_size"] == 999
    with pytest.raises(ConfigError, match=r"^logit_softcap: must be a number > 0, got -1$"):
        AutoConfig.from_pretrained(tmp_path, logit_softcap=-1)
    with pytest.raises(ConfigError, match=r"^embedding_scale: must be a number, got 'abc'$"):
        config.embedding_scale = "abc"
    assert config.embedding_scale == 1.0
