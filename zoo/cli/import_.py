"""Read a transformers checkpoint: write the model in SRC, of any supported family, as one of ours to DST.

--replace gives layers another mixer, which takes over what it can of the old one's projections, so that a model can be
trained on as a hybrid: "softmax@1,3,5=lightning" (layers from 0), "softmax@8-15={kind: mamba2, state_size: 64}".
"""

from __future__ import annotations

import sys
from typing import Any

import transformers
from jsonargparse import ArgumentParser, Namespace

from zoo.cli.check import stack
from zoo.cli.errors import CommandError
from zoo.cli.options import byte_size, file_name
from zoo.hub.folders import SHARD_BYTES, Converted, Format, convert
from zoo.models.families.base import FamilyError


def add_arguments(parser: ArgumentParser) -> None:
    add_folders(parser)
    parser.add_argument("--replace", action="append", default=[], metavar="WHAT@LAYERS=MIXER",
                        help="Give layers another mixer; may be given several times.")  # fmt: skip
    parser.add_argument("--override", action="append", default=[], metavar="FIELD=VALUE",
                        help="Change a field of the model file that results, such as "
                        "blocks.softmax.mixer.rope.rotary_dim=64.")  # fmt: skip


def add_folders(parser: ArgumentParser) -> None:
    """What import and export share."""
    parser.add_argument("source", type=file_name, metavar="SRC", help="A folder with config.json and safetensors.")
    parser.add_argument("target", type=file_name, metavar="DST", help="The folder to write; it must not exist.")
    parser.add_argument("--shard-size", type=byte_size, default=SHARD_BYTES,
                        help="Size of a file of weights, such as 5GB.")  # fmt: skip


def run(arguments: Namespace) -> None:
    report(converted(arguments, "zoo", overrides=arguments.override, replace=arguments.replace), arguments.target)


def converted(arguments: Namespace, format: Format, **more: Any) -> Converted:
    transformers.logging.set_verbosity_error()
    try:
        return convert(
            arguments.source,
            arguments.target,
            format,
            shard_bytes=arguments.shard_size,
            progress=sys.stderr.isatty(),
            **more,
        )
    except FamilyError as error:
        raise CommandError(str(error)) from None


def report(result: Converted, target: str) -> None:
    print("\n".join(stack(result.config)))
    for note in result.notes:
        print(f"note: {note}")
    print(f"{target}: {result.source} as {result.target}, {result.bytes / 1e9:.3g} GB")
