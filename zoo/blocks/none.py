"""`kind: none`: a block without a mixer, or without a feed-forward. The block then has no norm for it either."""

from __future__ import annotations

from dataclasses import dataclass

from zoo.blocks.base import FeedForwardConfig, MixerConfig


@dataclass(frozen=True, kw_only=True)
class NoMixerConfig(MixerConfig):
    """No mixer: the block is a feed-forward alone."""


@dataclass(frozen=True, kw_only=True)
class NoFeedForwardConfig(FeedForwardConfig):
    """No feed-forward: the block is a mixer alone."""
