"""The published sizes: configs/models/SIZE.yaml from each one's configuration as released, and what it counts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.models.families.parity import FILES
from zoo.blocks import kind_of
from zoo.blocks.registry import Role
from zoo.config import _DEFAULTS, ZooConfig, load_config
from zoo.models.families import FAMILIES
from zoo.models.summary import summarize
from zoo.pattern import parse

CONFIGS = Path(__file__).parents[3] / "configs" / "models"


@dataclass(frozen=True)
class Size:
    """A size as its authors published it: `total` and `active` parameters, `note` where they say so."""

    name: str
    family: str
    fields: dict[str, Any]
    total: float
    active: float
    note: str

    def config(self) -> ZooConfig:
        """Our model of the released configuration."""
        family = FAMILIES[self.family]
        return family.model_file(family.configuration()(**self.fields))

    def text(self) -> str:
        """The model file."""
        mapping = _without_defaults(self.config().to_mapping())
        body = yaml.dump(mapping, Dumper=_Dumper, default_flow_style=None, sort_keys=False, width=118)
        return f"# {self.name}, {self.note}.\n# Written by `make parity` from the released configuration.\n{body}"

    def one_of_each(self) -> ZooConfig:
        """The shortest run of its layers with each of its blocks: as wide as they are, with few experts and tokens."""
        mapping = self.config().to_mapping()
        names = parse(mapping["pattern"])
        first, last = min(
            ((i, j) for i in range(len(names)) for j in range(i, len(names)) if set(names[i : j + 1]) == set(names)),
            key=lambda ends: ends[1] - ends[0],
        )
        mapping["pattern"] = names[first : last + 1]
        mapping["vocab_size"] = 1000
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            mapping.pop(token, None)
        if self.family == "minimax_text_01":  # which transformers has with every dimension rotated
            del mapping["blocks"]["softmax"]["mixer"]["rope"]["rotary_dim"]
        for block in [*mapping["blocks"].values(), mapping.get("defaults", {})]:
            if "num_experts" in block.get("ffn", {}):
                block["ffn"]["num_experts"] = min(block["ffn"]["num_experts"], 2 * block["ffn"]["top_k"])
        return load_config(mapping)

    def counts(self) -> tuple[int, int, str]:
        """Parameters, active ones as the authors count them, and how that is: with embedding and head or without."""
        config = self.config()
        total = summarize(config, 1).total
        matrix = config.vocab_size * config.hidden_size
        ways = {"all": 0, "without embedding": matrix}
        if not config.tie_word_embeddings:
            ways["without embedding and head"] = 2 * matrix
        best = min(ways, key=lambda way: abs(total.active_params - ways[way] - self.active))
        return total.params, total.active_params - ways[best], best


def _without_defaults(mapping: dict[str, Any]) -> dict[str, Any]:
    """A model file without what it would be without saying."""
    short = {name: value for name, value in mapping.items() if value != _DEFAULTS.get(name)}
    for block in [*short["blocks"].values(), short.get("defaults", {})]:
        for role in ("mixer", "ffn"):
            if role in block:
                block[role] = _part(role, block[role])
    return short


def _part(role: Role, part: dict[str, Any]) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(kind_of(role, part["kind"]).config_class)}
    short = {name: value for name, value in part.items() if name == "kind" or value != defaults[name]}
    if part.get("rope", 0) is None:
        short["rope"] = None  # which is no default
    if "branches" in short:
        short["branches"] = [_part("mixer", branch) for branch in short["branches"]]
    return short


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _size(name: str, family: str, entry: dict[str, Any]) -> Size:
    family, fields = entry.get("family", family), dict(entry["config"])
    if "repeat" in entry:  # a list that goes on like this for all layers
        layers = fields.get("num_hidden_layers") or FAMILIES[family].configuration()().num_hidden_layers
        once = fields[entry["repeat"]]
        fields[entry["repeat"]] = once * (layers // len(once))
    return Size(name, family, fields, float(entry["total"]), float(entry["active"]), entry["note"])


SIZES = [_size(name, family, entry) for family, file in FILES.items() for name, entry in file["published"].items()]
