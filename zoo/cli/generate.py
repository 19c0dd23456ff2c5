"""Continue a prompt with a saved model, printing the text as it comes.

DIR is a folder that train.py exported or save_pretrained wrote: config.json, safetensors, tokenizer. Temperature 0
always takes the likeliest token.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import TextIO

import torch
import transformers
from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from zoo.blocks.linear_mixer import LinearMixer
from zoo.blocks.storage import StorageError
from zoo.cli.errors import CommandError
from zoo.cli.options import Option, file_name
from zoo.config import load_config
from zoo.models.cache import ZooCache
from zoo.models.modeling import ZooForCausalLM
from zoo.models.streaming import obstacle, stream
from zoo.schema import Count, NonNegative, Share, Size

MAX_NEW_TOKENS = 200
MIN_TEMPERATURE = 1e-6  # logits divided by less may be infinite
CHARACTER = 4  # tokens that one character may take: as many as it has bytes


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=file_name, metavar="DIR", help="The folder of a saved model.")
    parser.add_argument("--prompt", type=str, required=True, help="The text to continue.")
    parser.add_argument(
        "--max-new-tokens",
        type=Option(Size | None),
        default=None,
        help="Stop after so many tokens (default: 200; with --stream-context never).",
    )
    parser.add_argument("--temperature", type=Option(NonNegative), default=0.8, help="0 takes the likeliest token.")
    parser.add_argument(
        "--top-p", type=Option(Share), default=0.95, help="Sample from the likeliest tokens of this share."
    )
    parser.add_argument("--seed", type=Option(Count | None), default=None, help="The same seed gives the same text.")
    parser.add_argument("--stream", action=ActionYesNo, default=True, help="Print as it comes, or all at the end.")
    parser.add_argument(
        "--offload",
        type=file_name,
        default=None,
        metavar="cpu|FOLDER",
        help="Keep the cache of landmark layers with top_k in CPU memory or in files, but for the landmarks.",
    )
    parser.add_argument(
        "--stream-context",
        action="store_true",
        help="Go on for ever at constant memory, through the end of the text; for windows and recurrent mixers.",
    )


def run(arguments: Namespace) -> None:
    if 0 < arguments.temperature < MIN_TEMPERATURE:
        raise CommandError(
            f"--temperature: {arguments.temperature} is too small to divide by; give 0, which takes the likeliest "
            f"token, or at least {MIN_TEMPERATURE}"
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(arguments.folder)
    check_folder(folder)
    tokenizer = load_tokenizer(folder)
    input_ids = encode(tokenizer, arguments.prompt, folder)
    model = load_model(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise CommandError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}; "
            "give the folder that the model was saved in together with its tokenizer"
        )
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
    printer = TextPrinter(tokenizer, sys.stdout)
    if arguments.stream_context:
        if arguments.offload is not None:
            raise CommandError("--offload: is for a cache that grows, which --stream-context has not; leave one out")
        stream_context(model, input_ids.to(model.device), sampling, arguments, printer)
        return
    new_tokens = arguments.max_new_tokens or MAX_NEW_TOKENS
    check_length(model, input_ids.shape[1], new_tokens)
    cache = {} if arguments.offload is None else {"past_key_values": offloaded_cache(model, arguments.offload)}
    sys.stdout.write(arguments.prompt)
    try:
        output = model.generate(
            input_ids.to(model.device),
            attention_mask=torch.ones_like(input_ids, device=model.device),
            max_new_tokens=new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            streamer=printer if arguments.stream else None,
            **cache,
            **sampling,
        )
    except StorageError as error:
        raise CommandError(f"--offload: {error}") from None
    if not arguments.stream:
        printer.put(output[:, : input_ids.shape[1]])
        printer.put(output[:, input_ids.shape[1] :])
        printer.end()


def check_length(model: PreTrainedModel, prompt: int, new: int) -> None:
    """Refuse a text that a layer is not for, as it would be refused in its midst or, on a GPU, come out wrong.

    Args:
        prompt, new: tokens.

    Raises:
        CommandError: it gets too long.
    """
    if not isinstance(model, ZooForCausalLM):
        return
    for i, layer in enumerate(model.model.layers):
        for part in layer.modules():
            if not isinstance(part, LinearMixer) or part.config.max_length is None:
                continue
            most = part.config.max_length
            limit = f"layer {i} (linear, cosformer) is for {most}"
            if model.config.stream_length(prompt) > most:
                raise CommandError(f"--prompt: has {prompt} tokens, and {limit}; give a shorter text")
            if model.config.stream_length(prompt + new - 1) > most:  # the last token is not read any more
                given = f"{new} tokens after the prompt's {prompt} are too many, as {limit}"
                raise CommandError(f"--max-new-tokens: {given}; lower it")


def offloaded_cache(model: PreTrainedModel, place: str) -> ZooCache:
    """An empty cache whose keys and values will be in CPU memory or in files.

    Raises:
        CommandError: the model has no such cache, or the folder cannot be used.
    """
    if not isinstance(model, ZooForCausalLM):
        raise CommandError("--offload: is for models of the zoo; `zoo import` makes one of this folder")
    cache = model.model.new_cache(1, model.device, model.dtype)
    try:
        kept = cache.keep_in(place)
    except StorageError as error:
        raise CommandError(f"--offload: {error}") from None
    if not kept:
        raise CommandError(
            "--offload: no layer reads a few blocks of its cache; it needs a landmark mixer with top_k, leave it out"
        )
    return cache


def stream_context(
    model: PreTrainedModel, input_ids: torch.Tensor, sampling: dict, arguments: Namespace, printer: TextPrinter
) -> None:
    """Print the text as it comes, for ever or for `max_new_tokens`, at constant memory.

    Raises:
        CommandError: the model's state grows.
    """
    if not isinstance(model, ZooForCausalLM):
        raise CommandError("--stream-context: is for models of the zoo; `zoo import` makes one of this folder")
    if (problem := obstacle(model)) is not None:
        raise CommandError(f"--stream-context: {problem}")
    if not arguments.stream:
        raise CommandError("--stream-context: prints as it comes; remove --no_stream")
    warpers = LogitsProcessorList()
    if sampling["do_sample"]:
        warpers += [TemperatureLogitsWarper(sampling["temperature"]), TopPLogitsWarper(sampling["top_p"])]

    def choose(logits: torch.Tensor) -> torch.Tensor:
        if not sampling["do_sample"]:
            return logits.argmax(-1, keepdim=True)
        scores = warpers(input_ids, logits.float())
        return torch.multinomial(scores.softmax(-1), 1)

    sys.stdout.write(arguments.prompt)
    printer.put(input_ids)
    try:
        for token in islice(stream(model, input_ids, choose), arguments.max_new_tokens):
            printer.put(token)
    except KeyboardInterrupt:  # how one without end is ended
        pass
    printer.end()


class TextPrinter(BaseStreamer):
    """Writes tokens as text as soon as their bytes are whole characters. The first call brings the prompt, which is
    not written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO) -> None:
        self.tokenizer, self.out = tokenizer, out
        self.silent = set(tokenizer.all_special_ids)
        self.tokens: list[int] = []
        self.written = 0  # tokens whose text has been written
        self.context = 0  # decoding starts here: some tokenizers join a token to the one before it
        self.prompted = False

    def put(self, value: torch.Tensor) -> None:
        """`value` is `[tokens]` or `[1, tokens]`."""
        self.tokens += [token for token in value.flatten().tolist() if token not in self.silent]
        if not self.prompted:
            self.prompted = True
            self.written = len(self.tokens)
            self.context = max(0, self.written - 8)
        else:
            self._write(self._pending(), is_last=False)

    def end(self) -> None:
        self._write(self._pending(), is_last=True)
        self.out.write("\n")
        self.out.flush()

    def _pending(self, stop: int | None = None) -> str:
        before = self._decode(self.tokens[self.context : self.written])
        return self._decode(self.tokens[self.context : stop])[len(before) :]

    def _write(self, text: str, is_last: bool) -> None:
        # A replacement character at the end stands for bytes whose character may not be complete yet.
        if text and (is_last or not text.endswith("�")):
            self._say(text)
            del self.tokens[: self.written]  # a text may have no end
            self.context, self.written = 0, len(self.tokens)
        elif len(self.tokens) - self.written > CHARACTER:
            self._give_up(text)

    def _give_up(self, text: str) -> None:
        """Write what the pending tokens certainly are, if they are no character or no text: nothing that comes may make
        them one. They are no context for later ones."""
        for last in range(len(self.tokens) - 1, self.written, -1):
            before, after = self._pending(last), self._decode(self.tokens[last:])
            if before + after == text:  # else the bytes of one character are on both sides
                break
        self._say(self._pending(last))
        del self.tokens[self.written : last]

    def _say(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check_folder(folder: Path) -> None:
    """Refuse what is no folder of a saved model with safetensors.

    Raises:
        CommandError, ConfigError: what is wrong.
    """
    if not os.path.isdir(folder):  # Path's raises for a name that is too long
        raise CommandError(f"{folder}: is not a folder; give the folder of a saved model, such as runs/NAME/export")
    config = folder / "config.json"
    if not config.is_file():
        raise CommandError(
            f"{folder}: holds no config.json; give the folder of a saved model, such as runs/NAME/export"
        )
    try:
        model_type = json.loads(config.read_bytes()).get("model_type")
    except (ValueError, AttributeError, RecursionError):
        raise CommandError(f"{config}: is not the JSON of a model; save the model again") from None
    if model_type == "zoo":
        load_config(config)  # its errors name the field
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            raise CommandError(f"{folder}: holds weights as pickle, which may run code; save them as safetensors")
        raise CommandError(f"{folder}: holds no weights (model.safetensors); save the model again")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise CommandError(f"{folder}: holds no tokenizer (tokenizer.json); save the model's tokenizer there")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what a broken file raises differs from version to version
        raise CommandError(f"{folder}: the tokenizer cannot be loaded ({one_line(error)}); save it again") from error


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, folder: Path) -> torch.Tensor:
    """`[1, tokens]`; an empty prompt is the token that starts a text."""
    try:
        tokens = tokenizer(prompt)["input_ids"]
    except (UnicodeEncodeError, TypeError):  # bytes of the command line that are no UTF-8
        raise CommandError("--prompt: is not UTF-8 text; check the terminal's encoding") from None
    if not tokens:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise CommandError(
                f"--prompt: is empty, and the tokenizer of {folder} has no token to start with; give a text"
            )
        tokens = [start]
    return torch.tensor([tokens])


def load_model(folder: Path) -> PreTrainedModel:
    """The model, in the dtype it was saved in, on the GPU if there is one."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype="auto", output_loading_info=True
        )
    except Exception as error:  # a truncated file, shapes of another model, an unknown architecture
        raise CommandError(f"{folder}: the model cannot be loaded ({one_line(error)}); save it again") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, report.get(problem) or ())):
            raise CommandError(
                f"{folder}: the weights do not belong to config.json ({problem.replace('_', ' ')}: {keys[0]}"
                f"{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}); save the model again"
            )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
