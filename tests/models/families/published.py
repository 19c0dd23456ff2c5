"""The published sizes: configs/models/SIZE.yaml from each one's configuration as released, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.models.families.parity import FILES
from zoo.config import _DEFAULTS, ZooConfig
from zoo.models.families import FAMILIES
from zoo.models.summary import summarize

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
        mapping = {name: value for name, value in self.config().to_mapping().items() if value != _DEFAULTS.get(name)}
        body = yaml.dump(mapping, Dumper=_Dumper, default_flow_style=None, sort_keys=False, width=118)
        return f"# {self.name}, {self.note}.\n# Written by `make parity` from the released configuration.\n{body}"

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
