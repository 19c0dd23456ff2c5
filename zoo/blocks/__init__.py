"""Mixers and feed-forwards, one file each, found by the name under `kind:` in a model file."""

from zoo.blocks.attention import Attention, AttentionConfig
from zoo.blocks.base import FeedForward, FeedForwardConfig, Mixer, MixerConfig, RouterStatistics
from zoo.blocks.compressive import Compressive, CompressiveConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.fla import Fla, FlaConfig
from zoo.blocks.gated_delta import GatedDelta, GatedDeltaConfig
from zoo.blocks.hierarchical import Hierarchical, HierarchicalConfig
from zoo.blocks.infini import Infini, InfiniConfig
from zoo.blocks.kda import KDA, KDAConfig
from zoo.blocks.landmark import Landmark, LandmarkConfig
from zoo.blocks.lightning import Lightning, LightningConfig
from zoo.blocks.linear_mixer import LinearConfig, LinearMixer
from zoo.blocks.linformer import Linformer, LinformerConfig
from zoo.blocks.mamba import Mamba, MambaConfig
from zoo.blocks.mamba2 import Mamba2, Mamba2Config
from zoo.blocks.mla import MLA, MLAConfig
from zoo.blocks.mlp import MLP, MLPConfig
from zoo.blocks.moe import MoE, MoEConfig
from zoo.blocks.none import NoFeedForwardConfig, NoMixerConfig
from zoo.blocks.parallel import Parallel, ParallelConfig
from zoo.blocks.performer import Performer, PerformerConfig
from zoo.blocks.registry import Kind, kind_of, kinds, register
from zoo.blocks.retention import Retention, RetentionConfig
from zoo.blocks.rglru import RGLRU, RGLRUConfig
from zoo.blocks.short_conv import ShortConv, ShortConvConfig
from zoo.blocks.state import KeyValueState, State

__all__ = [
    "FeedForward",
    "FeedForwardConfig",
    "KeyValueState",
    "Kind",
    "Mixer",
    "MixerConfig",
    "RouterStatistics",
    "SequenceContext",
    "State",
    "kind_of",
    "kinds",
    "register",
]

register("attention", AttentionConfig, Attention)
register("compressive", CompressiveConfig, Compressive)
register("fla", FlaConfig, Fla)
register("gated_delta", GatedDeltaConfig, GatedDelta)
register("hierarchical", HierarchicalConfig, Hierarchical)
register("infini", InfiniConfig, Infini)
register("kda", KDAConfig, KDA)
register("landmark", LandmarkConfig, Landmark)
register("lightning", LightningConfig, Lightning)
register("linear", LinearConfig, LinearMixer)
register("linformer", LinformerConfig, Linformer)
register("mamba", MambaConfig, Mamba)
register("mamba2", Mamba2Config, Mamba2)
register("mla", MLAConfig, MLA)
register("mlp", MLPConfig, MLP)
register("moe", MoEConfig, MoE)
register("none", NoMixerConfig, Mixer)  # type: ignore[type-abstract]  # nothing builds it
register("parallel", ParallelConfig, Parallel)
register("none", NoFeedForwardConfig, FeedForward)  # type: ignore[type-abstract]
register("performer", PerformerConfig, Performer)
register("retention", RetentionConfig, Retention)
register("rglru", RGLRUConfig, RGLRU)
register("short_conv", ShortConvConfig, ShortConv)
