"""Documents laid end to end and cut into rows, in an order that depends on nothing but (seed, epoch).

The training text is one endless stream: epoch 0's documents in shuffled order, cut into blocks, the blocks shuffled
once more, then epoch 1's, and so on. (With documents alone shuffled, a long one would fill many batches in a row, and
training would follow it.) A position in the stream is one number, the tokens before it, so a run resumes exactly by
knowing how many tokens it has consumed, whatever the number of ranks was.

    documents  | doc 7 ..... eos | doc 2 .. eos | doc 9 .............. eos | ...
    blocks     |   0   |   1   |   2   |   3   |   4   |   5   |   6   |
    stream     |   4   |   0   |   6   |   2   | ...
    step k     | rank 0's row  | rank 1's row  |
"""

from functools import lru_cache

import numpy as np
import torch

from zoo.data.cache import TokenCache

Batch = dict[str, torch.Tensor]


class PackedText:
    """A choice of a cache's documents as one stream of tokens.

    Args:
        cache: the tokenised corpus.
        documents: int64 [n], numbers of documents in the cache.
        seed: shuffles documents and blocks anew in every epoch; None keeps their order.
        block: tokens that stay together when blocks are shuffled: the longest sequence of training.
    """

    def __init__(self, cache: TokenCache, documents: np.ndarray, seed: int | None, block: int) -> None:
        self._cache = cache
        self._documents = documents
        self._seed = seed
        self._block = block
        self.num_tokens = int(cache.lengths[documents].sum())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each document, in this epoch's order, the first token in the cache [n] and among the documents laid end
        to end [n]; of each block of the stream, its number among the documents [blocks]. int64."""
        order, blocks = self._documents, np.arange(-(-self.num_tokens // self._block))
        if self._seed is not None:
            # RandomState, because numpy promises never to change its stream of numbers; Generator's may change.
            random = np.random.RandomState([self._seed, epoch])
            order = random.permutation(order)
            whole = self.num_tokens // self._block  # a last, shorter block stays last, so that the others keep step
            blocks[:whole] = random.permutation(whole)
        lengths = self._cache.lengths[order]
        return self._cache.offsets[order], np.cumsum(lengths) - lengths, blocks

    def _read(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start to stop of one epoch, int64, and where in them documents and shuffled blocks start."""
        in_cache, in_documents, blocks = self._epoch(epoch)
        block, within = np.divmod(np.arange(start, stop), self._block)
        position = blocks[block] * self._block + within
        document = np.searchsorted(in_documents, position, side="right") - 1
        offset = position - in_documents[document]
        is_start = offset == 0
        if self._seed is not None:
            is_start |= within == 0
        return self._cache.tokens[in_cache[document] + offset].astype(np.int64), np.flatnonzero(is_start)

    def batch(self, start: int, stop: int, sequence_length: int) -> Batch:
        """Tokens start to stop of the stream as one row of sequences, each of sequence_length (the last may be
        shorter).

        Returns {"input_ids": int64 [1, stop - start], "labels": the same with -100 at the first token of every piece
        of a document (the model shifts: logits at t predict labels[t + 1]), "cu_seqlens": int32 [n + 1], where pieces
        start; a new one starts with each document and with each sequence}.
        """
        tokens, boundaries = [], [np.arange(0, stop - start, sequence_length), [stop - start]]
        position = start
        while position < stop:
            epoch, offset = divmod(position, self.num_tokens)
            length = min(stop - position, self.num_tokens - offset)
            ids, starts = self._read(epoch, offset, offset + length)
            tokens.append(ids)
            boundaries.append(starts + position - start)
            position += length
        input_ids = torch.from_numpy(np.concatenate(tokens))
        cu_seqlens = torch.from_numpy(np.unique(np.concatenate(boundaries)).astype(np.int32))
        labels = input_ids.clone()
        labels[cu_seqlens[:-1].long()] = -100
        return {"input_ids": input_ids[None], "labels": labels[None], "cu_seqlens": cu_seqlens}
