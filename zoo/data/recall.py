"""Synthetic recall: a passkey in random noise, asked for a chosen distance later.

    noise ...  KEY k_1 .. k_n  noise ...  ASK k_1 .. k_n  noise ...

A mark announces the key, another asks for it. Noise and key are drawn from the same symbols, so that nothing but the
mark tells them apart, and nothing but the key itself tells what to answer: who cannot see it is right about a symbol
with probability 1 / symbols.
"""

from dataclasses import dataclass

import numpy as np
import torch

from zoo.data.errors import DataError
from zoo.data.packing import Batch

KEY, ASK = 0, 1  # marks; the symbols are the numbers after them


@dataclass(frozen=True, kw_only=True)
class Passkey:
    """Examples that are numbered, each the same whichever others are read with it.

    distance    how far before the token that must predict it each symbol of the key stands.
    key_length  symbols of a key.
    symbols     how many there are.
    room        tokens of noise around all this, split at random, so that keys stand anywhere in a block or segment.
    seed        another seed, other examples.

    Raises DataError for a number out of range.
    """

    distance: int
    key_length: int = 4
    symbols: int = 62
    room: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("key_length", 1), ("symbols", 2), ("room", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise DataError(f"{name}: {getattr(self, name)} must be at least {least}")
        if self.distance < self.key_length:
            raise DataError(f"distance: {self.distance} must be at least key_length ({self.key_length})")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @property
    def length(self) -> int:
        """Tokens of an example."""
        return self.room + 2 + self.distance + self.key_length

    @property
    def chance(self) -> float:
        """The probability of one right symbol for who does not see the key."""
        return 1 / self.symbols

    def batch(self, start: int, count: int) -> Batch:
        """Examples start to start + count.

        Returns {"input_ids": int64 [count, length], "labels": the same at the answers, elsewhere -100 (the model
        shifts: logits at t predict labels[t + 1])}.
        """
        # Philox is a function of a counter, four numbers for each: an example has its own stretch of it. Raw numbers,
        # because numpy promises never to change those.
        counters = -(-(self.length + 1) // 4)
        random = np.random.Philox(key=self.seed).advance(start * counters).random_raw(count * 4 * counters)
        random = random.reshape(count, -1)[:, : self.length + 1]
        tokens = (random[:, 1:] % self.symbols + 2).astype(np.int64)
        before = (random[:, :1] % (self.room + 1)).astype(np.int64)
        rows, inside = np.arange(count)[:, None], np.arange(self.key_length)
        key, answer = before + 1 + inside, before + 2 + self.distance + inside
        tokens[rows, before], tokens[rows, answer[:, :1] - 1] = KEY, ASK
        tokens[rows, answer] = tokens[rows, key]
        labels = np.full_like(tokens, -100)
        labels[rows, answer] = tokens[rows, key]
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
