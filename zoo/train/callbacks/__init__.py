"""What happens around the training steps, one file each; zoo/train/cli.py puts them together."""

from zoo.train.callbacks.checkpoint import SafeCheckpointIO, SaveLast
from zoo.train.callbacks.finite import StopWhenNotFinite
from zoo.train.callbacks.progress import Progress
from zoo.train.callbacks.samples import Samples
from zoo.train.callbacks.sequence_length import SequenceLength
from zoo.train.callbacks.throughput import Throughput

__all__ = ["Progress", "SafeCheckpointIO", "Samples", "SaveLast", "SequenceLength", "StopWhenNotFinite", "Throughput"]
