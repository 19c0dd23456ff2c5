"""Documents laid end to end and cut into rows, in an order that depends on nothing but (seed, epoch).

The training text is one endless stream: epoch 0's documents in shuffled order, then epoch 1's in another, and so on. A
position in it is one number, the tokens before it, so a run resumes exactly by knowing how many tokens it has consumed,
whatever the number of ranks was.

    stream   | doc 7 ..... eos | doc 2 .. eos | doc 9 .............. eos | doc 7 ...
    step k   |  rank 0's row   |  rank 1's row   |
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
        seed: shuffles the documents anew in every epoch; None keeps their order.
    """

    def __init__(self, cache: TokenCache, documents: np.ndarray, seed: int | None) -> None:
        self._cache = cache
        self._documents = documents
        self._seed = seed
        self.num_tokens = int(cache.lengths[documents].sum())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(first token in the cache of each document [n], first token in this epoch's stream [n + 1]), int64."""
        order = self._documents
        if self._seed is not None:
            # RandomState, because numpy promises never to change its stream of numbers; Generator's may change.
            order = np.random.RandomState([self._seed, epoch]).permutation(order)
        return self._cache.offsets[order], np.concatenate([[0], np.cumsum(self._cache.lengths[order])])

    def _read(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start to stop of one epoch, int64, and where in them documents start."""
        in_cache, in_stream = self._epoch(epoch)
        first, last = np.searchsorted(in_stream, [start, stop - 1], side="right") - 1
        starts = in_stream[first : last + 1]
        pieces = np.diff(np.clip(in_stream[first : last + 2], start, stop))
        index = np.arange(start, stop) + np.repeat(in_cache[first : last + 1] - starts, pieces)
        return self._cache.tokens[index].astype(np.int64), starts[starts >= start] - start

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
