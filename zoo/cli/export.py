"""Write a model of ours as its family's transformers checkpoint (native), or in our own format (zoo).

A native folder is what transformers, vLLM and others load for that family; a model that no family has is refused, with
what stands in the way. zoo writes the files anew, in shards of --shard-size.
"""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from zoo.cli import import_
from zoo.cli.options import Option
from zoo.hub.folders import Format


def add_arguments(parser: ArgumentParser) -> None:
    import_.add_folders(parser)
    parser.add_argument("--format", type=Option(Format), default="native", help="Whose format to write.")
    parser.add_argument("--family", type=str, default=None,
                        help="As which family, where several have such a model.")  # fmt: skip


def run(arguments: Namespace) -> None:
    import_.report(import_.converted(arguments, arguments.format, family=arguments.family), arguments.target)
