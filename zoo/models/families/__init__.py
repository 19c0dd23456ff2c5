"""Published architectures: each file maps one family of transformers to a model file and back, as data."""

from zoo.models.families import jamba, llama, mamba, mamba2, minimax, mixtral
from zoo.models.families.base import Family, FamilyError

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (minimax, jamba, mamba2, mamba, mixtral, llama)
}

__all__ = ["FAMILIES", "Family", "FamilyError"]
