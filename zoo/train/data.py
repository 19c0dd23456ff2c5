"""The LightningDataModule: packed text for training and validation, one part per rank, resumable to the batch.

How resume works. The training text is one endless stream (zoo/data/packing.py), so where a run stands is one number,
the tokens consumed. It follows from the number of batches that the trainer has *finished*, which Lightning counts and
keeps in its checkpoints, and not from what a loader has handed out; a batch that an exception interrupted is read
again. This module's own state says at which token that count started to be valid, so a run may go on with another
number of ranks or another batch size. An epoch is len(loader) batches, about once through the text; Lightning may end
it earlier (limit_train_batches), the next one goes on where it ended.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerFast

from zoo.data import DataError, PackedText, bytes_per_token, load_corpus, open_source
from zoo.data.packing import Batch
from zoo.data.sources import STDLIB


class _TrainingBatches:
    """This rank's batches from the first one on that the trainer has not finished. No prefetching: a batch takes
    microseconds, and a new sequence length holds from the very next batch."""

    def __init__(self, data: "TextData") -> None:
        self._data = data

    def __len__(self) -> int:
        return max(1, self._data.training_text.num_tokens // self._data.tokens_per_step)

    def __iter__(self) -> Iterator[Batch]:
        data = self._data
        start = data.tokens_consumed() + data.trainer.global_rank * data.tokens_per_batch
        for step in range(len(self)):
            position = start + step * data.tokens_per_step
            yield data.training_text.batch(position, position + data.tokens_per_batch, data.sequence_length)


class _ValidationBatches:
    """This rank's rows of the held-out text, in order, every token once over all ranks; the last row may be shorter.
    All ranks have the same number of rows, as sharded strategies need: a rank without a last one gets row 0 without
    labels."""

    def __init__(self, data: "TextData") -> None:
        self._data = data

    def __len__(self) -> int:
        return -(-self._data.held_out_text.num_tokens // self._data.tokens_per_step)

    def __iter__(self) -> Iterator[Batch]:
        data = self._data
        text, size = data.held_out_text, data.tokens_per_batch
        for step in range(len(self)):
            start = step * data.tokens_per_step + data.trainer.global_rank * size
            if start < text.num_tokens:
                yield text.batch(start, min(start + size, text.num_tokens), data.sequence_length)
            else:
                filler = text.batch(0, min(size, text.num_tokens), data.sequence_length)
                yield filler | {"labels": torch.full_like(filler["labels"], -100)}


class TextData(LightningDataModule):
    """Text, tokenised once into a cache and packed into rows of batch_size x sequence_length tokens.

    A batch is {"input_ids": int64 [1, tokens], "labels": int64 [1, tokens], "cu_seqlens": int32 [n + 1]}, see
    zoo.data.PackedText.batch. Reads nothing before prepare_data().

    Attributes, after setup():
        tokenizer: a transformers PreTrainedTokenizerFast.
        bytes_per_token: int64 [vocabulary], bytes of text that each token stands for; bits per byte of a text are the
            predicted tokens' nats / ln 2 / the sum of bytes_per_token over them.

    Args:
        source: a file, a folder, a glob, python-stdlib, hf:org/name?split=train&field=text, or a list of these
            (zoo/data/sources.py says how each becomes documents).
        tokenizer: bytes, bpe:N (trained on the training text), a tokenizer folder, or a Hub id.
        sequence_length: tokens per sequence, the longest of the run; nothing is carried from one to the next.
        batch_size: sequences per batch on each rank.
        validation_fraction: the part of the text, in bytes, that is held out for validation, in whole documents.
        seed: shuffles the documents; the order depends on it and the epoch alone.
        cache_dir: where the tokenised text is kept between runs.

    Raises DataError for a value out of range.
    """

    tokenizer: PreTrainedTokenizerFast
    bytes_per_token: torch.Tensor
    training_text: PackedText
    held_out_text: PackedText

    def __init__(
        self,
        source: str | list[str] = STDLIB,
        tokenizer: str = "bytes",
        sequence_length: int = 512,
        batch_size: int = 8,
        validation_fraction: float = 0.05,
        seed: int = 0,
        cache_dir: str = ".cache/data",
    ) -> None:
        super().__init__()
        if sequence_length < 2:
            raise DataError(
                f"data.sequence_length: {sequence_length} must be at least 2, one token to read and one to predict"
            )
        if batch_size < 1:
            raise DataError(f"data.batch_size: {batch_size} must be at least 1")
        if not 0 < validation_fraction < 1:
            raise DataError(
                f"data.validation_fraction: {validation_fraction} must lie between 0 and 1, for example 0.05"
            )
        if not 0 <= seed < 2**32:
            raise DataError(f"data.seed: {seed} must lie between 0 and {2**32 - 1}")
        self.source = source
        self.tokenizer_spec = tokenizer
        self.sequence_length = sequence_length
        self.tokens_per_batch = batch_size * sequence_length
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.cache_dir = cache_dir
        # The trainer's first `_batches_before` batches consumed the stream's first `_tokens_before` tokens.
        self._tokens_before = 0
        self._batches_before = 0
        self._longest = sequence_length
        self._scheduled_length: int | None = None

    def prepare_data(self) -> None:
        """Builds the token cache if there is no good one."""
        load_corpus(open_source(self.source), self.tokenizer_spec, self.cache_dir, self.validation_fraction)

    def setup(self, stage: str) -> None:
        """Opens the cache and splits it. Raises DataError if either part is shorter than one sequence."""
        source = open_source(self.source)
        self._cache = load_corpus(source, self.tokenizer_spec, self.cache_dir, self.validation_fraction)
        self.tokenizer = self._cache.tokenizer
        self.bytes_per_token = bytes_per_token(self.tokenizer)
        training, self._held_out = self._cache.split(self.validation_fraction)
        if not len(training):
            raise DataError(
                f"data.source: {source.name}: all of the corpus is one document, so none can be held out; give more "
                "files, or name the file itself (not its folder) to have it cut at blank lines"
            )
        self.training_text = PackedText(self._cache, training, self.seed, self._longest)
        self.held_out_text = PackedText(self._cache, self._held_out, None, self._longest)
        self._check_length(source.name, "training", self.training_text, "give more text")
        self._check_length(
            source.name, "held-out", self.held_out_text, "raise data.validation_fraction, give more text"
        )

    def _check_length(self, name: str, part: str, text: PackedText, remedy: str) -> None:
        if text.num_tokens < self.sequence_length:
            raise DataError(
                f"data.source: {name}: its {part} part holds {text.num_tokens} tokens, less than one sequence of "
                f"{self.sequence_length}; {remedy}, or lower data.sequence_length"
            )

    def train_dataloader(self) -> _TrainingBatches:
        # Lightning knows a resumable loader by its own state_dict; here the position is in the trainer's count instead.
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        return _TrainingBatches(self)

    def val_dataloader(self) -> _ValidationBatches:
        return _ValidationBatches(self)

    def held_out_bytes(self) -> bytes:
        """The held-out text, UTF-8, documents one after another, to compress with other tools."""
        return self._cache.text(self._held_out)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all ranks together read in one batch."""
        return self.tokens_per_batch * self.trainer.world_size

    def set_sequence_length(self, sequence_length: int) -> None:
        """From the next batch on, cuts rows into sequences of this length; a row's tokens stay as they are.

        Raises DataError if it does not divide the sequence_length constructed with, which is the longest.
        """
        if sequence_length < 2 or self._longest % sequence_length:
            raise DataError(
                f"sequence length {sequence_length} does not divide data.sequence_length ({self._longest}), the "
                "longest of the run; choose one that does"
            )
        self.sequence_length = self._scheduled_length = sequence_length

    def _batches_finished(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def tokens_consumed(self) -> int:
        """Tokens of the training stream in the batches that the trainer has finished, over all ranks."""
        return self._tokens_before + (self._batches_finished() - self._batches_before) * self.tokens_per_step

    def _order(self) -> str:
        return f"{self._cache.fingerprint} held out {self.validation_fraction} seed {self.seed}"

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens_consumed(),
            "batches": self._batches_finished(),
            "sequence_length": self._scheduled_length,
            "order": self._order(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._batches_before = state_dict["batches"]
        if state_dict["order"] == self._order():
            self._tokens_before = state_dict["tokens"]
        else:
            self._tokens_before = 0
            rank_zero_warn(
                "The checkpoint was trained on other data (source, tokenizer, validation_fraction or seed differ); "
                "training goes on with this data from its start."
            )
        if state_dict["sequence_length"] is not None:
            self.set_sequence_length(state_dict["sequence_length"])
