"""Check a model or train file: print its layer stack, or the one line that says what is wrong."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from zoo import yaml
from zoo.cli.errors import CommandError
from zoo.cli.options import file_name
from zoo.config import Layer, ZooConfig, load_config
from zoo.models.summary import runs
from zoo.pattern import shortest_period


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", type=file_name, metavar="FILE", help="A model file or a train file.")


def run(arguments: Namespace) -> None:
    print("\n".join(stack(check_file(arguments.file))))


def check_file(path: str) -> ZooConfig:
    """The model of a model file or of a train file, everything in the file checked.

    Raises:
        ConfigError, CommandError: what is wrong.
    """
    try:
        content = yaml.load_file(Path(path))
    except yaml.YamlError as error:
        raise CommandError(f"{path}: {error}") from None
    if isinstance(content, dict) and "model" in content:
        from zoo.train.cli import check_train_file  # brings Lightning, which takes seconds
        from zoo.train.errors import UserError

        try:
            return check_train_file(path)
        except UserError as error:
            raise CommandError(str(error)) from None
    return load_config(path)


def stack(config: ZooConfig) -> list[str]:
    """The layers, bottom to top, consecutive ones of the same block on one line; a stack that repeats is shown once."""
    period = shortest_period([layer.name for layer in config.layers])
    repeats = len(config.layers) // period
    lines = [f"{len(config.layers)} layers, hidden size {config.hidden_size}, vocabulary {config.vocab_size}"]
    if repeats > 1 and period > 1:
        lines.append(f"{repeats} times these {period}:")
    shown = list(runs(config.layers[:period] if period > 1 else config.layers))
    width = max(len(run.layer.name) for run in shown)
    for run in shown:
        lines.append(f"  {span(run.first, run.last):>11}  {run.layer.name:{width}}  {parts(run.layer)}")
    return lines


def span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} - {last}"


def parts(layer: Layer) -> str:
    """`lightning + moe`, or the one that is there."""
    return " + ".join(str(part) for part in (layer.mixer, layer.ffn) if part.kind != "none")
