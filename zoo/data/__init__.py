"""Text for language models: sources, tokenizers, the token cache, packed batches. Imports no Lightning."""

from zoo.data.cache import TokenCache, load_corpus
from zoo.data.errors import DataError
from zoo.data.packing import PackedText
from zoo.data.sources import open_source
from zoo.data.tokenizer import bytes_per_token, load_tokenizer

__all__ = ["DataError", "PackedText", "TokenCache", "bytes_per_token", "load_corpus", "load_tokenizer", "open_source"]
