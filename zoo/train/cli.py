"""train.py: Lightning's command line with this project's loggers, callbacks and error messages.

    python train.py fit --config configs/train/minimax-tiny.yaml
    python train.py fit --config configs/train/jamba-tiny.yaml --model.config.pattern "(mamba*3 softmax)*2"
    python train.py fit --config configs/train/minimax-tiny.yaml --ckpt_path last
    python train.py validate --config runs/minimax-tiny/config.yaml --ckpt_path runs/minimax-tiny/checkpoints/last.ckpt

A training file holds the sections model, data and trainer, and optionally checkpoint, samples and sequence_length. A
run lives in trainer.default_root_dir, by default runs/NAME of the first --config file (runs/NAME-2 and so on if that
holds a run):

    config.yaml        the whole configuration, resolved; give it to --config to repeat the run
    metrics.csv        every logged number; the same for TensorBoard beside it
    samples.jsonl      what the model wrote along the way
    checkpoints/       last.ckpt
    export/            the trained model for AutoModelForCausalLM, with tokenizer, model.yaml and train.yaml
    report.html        how it went

Exit status: 0; 1 if a run that had started had to stop; 2 if the request was wrong. Both come with one line on stderr.
"""

import difflib
import importlib.util
import itertools
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import zoo
import zoo.yaml
from zoo.config import ConfigError
from zoo.data import DataError
from zoo.train.callbacks import (
    Progress,
    SafeCheckpointIO,
    Samples,
    SaveLast,
    SequenceLength,
    StopWhenNotFinite,
    Throughput,
)
from zoo.train.callbacks.checkpoint import checkpoint_path, load_checkpoint
from zoo.train.data import TextData
from zoo.train.errors import RunError, UserError
from zoo.train.export import export_run
from zoo.train.logger import CsvLog
from zoo.train.memory import keep_freed_memory
from zoo.train.module import ZooModule, check_architecture
from zoo.train.report import write_report

MODEL_FIELD = "--model.config."
CONFIG_FILE = "config.yaml"

PLAIN_WORDS = (
    (r'^Parser key "(.+?)": ', r"\1: "),
    (r"^unrecognized arguments: -*([^ =]+).*", r"\1: unknown option"),
    (r"^Subcommand '\w+' does not accept option '(.+?)'.*", r"\1: unknown option"),
    (r"(?:a )?typing\.Literal(\[.*?\])", r"one of \1"),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"\. Got value", ", got"),
)

TRAINER_DEFAULTS = {
    "max_epochs": -1,  # the length of a run is max_steps
    "check_val_every_n_epoch": None,  # validation is counted in batches, not in passes over the corpus
    "val_check_interval": 200,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the data module gives each rank its part
}


class _ParserError(Exception):
    """What jsonargparse has to say, as one line."""


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise _ParserError(message) from ex


def split_model_overrides(argv: Sequence[str]) -> list[str]:
    """Turns every `--model.config.a.b VALUE` or `--model.config.a.b=VALUE` into an entry of `--model.overrides`.

    jsonargparse would put the key "a.b" into the mapping, unchecked; zoo.load_config knows each field's type.
    """
    kept: list[str] = []
    overrides: list[str] = []
    rest = iter(argv)
    for argument in rest:
        if not argument.startswith(MODEL_FIELD):
            kept.append(argument)
            continue
        field, equals, value = argument.removeprefix(MODEL_FIELD).partition("=")
        if not equals:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                raise UserError(f"{argument}: a value is missing; write {argument} VALUE")
            value = following
        overrides.append(f"{field}={value}")
    return [*kept, f"--model.overrides+={json.dumps(overrides)}"] if overrides else kept


class ZooCLI(LightningCLI):
    """LightningCLI with the model file resolved before anything is built, and a fixed set of loggers and callbacks."""

    def __init__(self, argv: Sequence[str]) -> None:
        super().__init__(
            ZooModule,
            TextData,
            args=split_model_overrides(argv),
            parser_class=_Parser,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            save_config_callback=None,  # before_fit writes config.yaml, resolved
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:
        try:
            super().parse_arguments(parser, args)
        except _ParserError as error:
            raise _ParserError(self._in_plain_words(str(error))) from error

    def _in_plain_words(self, message: str) -> str:
        """jsonargparse's message without Python's type names, and with the nearest option for an unknown one."""
        message = " ".join(message.split())
        for pattern, replacement in PLAIN_WORDS:
            message = re.sub(pattern, replacement, message)
        if unknown := re.match(r"(\S+): unknown option", message):
            known = [
                option[2:] for action in self._subcommand_parsers["fit"]._actions for option in action.option_strings
            ]
            close = difflib.get_close_matches(unknown[1], known, n=1)
            message += f"; did you mean {close[0]}?" if close else "; --help lists them all"
        return message

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        # weights_only: checkpoints are always read that way (callbacks/checkpoint.py)
        return {name: LightningCLI.subcommands()[name] | {"weights_only"} for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(SaveLast, "checkpoint", required=False)
        parser.add_lightning_class_args(Samples, "samples", required=False)
        parser.add_lightning_class_args(SequenceLength, "sequence_length", required=False)
        parser.add_argument(
            "--wandb", type=str | None, default=None, help="Log to this Weights & Biases project as well."
        )

    def _parse_ckpt_path(self) -> None:
        """Nothing: our checkpoints hold no hyper-parameters that could beat the command line."""

    def before_instantiate_classes(self) -> None:
        """Settles what the later parts rely on: the whole model mapping, the run folder, a checkpoint that fits."""
        self._resolve_model()
        config = self.config[self.subcommand]
        if config.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise UserError(
                f"trainer.accelerator: {config.trainer.accelerator} was asked for but this machine has no usable CUDA "
                f"GPU; write --trainer.accelerator cpu"
            )
        if config.wandb and importlib.util.find_spec("wandb") is None:
            raise UserError("--wandb: the package wandb is not installed; pip install wandb, or leave --wandb out")
        config.trainer.default_root_dir = str(self._run_folder())
        if config.ckpt_path:
            if config.ckpt_path == "last":
                config.ckpt_path = str(checkpoint_path(config.trainer.default_root_dir))
            check_architecture(config.model.config, load_checkpoint(config.ckpt_path), config.ckpt_path)

    def _resolve_model(self) -> None:
        """Puts the whole model mapping in the place of file and overrides; checks what a file alone can get wrong."""
        config = self.config[self.subcommand]
        config.model.config = zoo.load_config(config.model.config, config.model.overrides or ()).to_mapping()
        config.model.overrides = None
        if self.subcommand == "fit" and config.trainer.max_steps < 1:
            raise UserError(f"trainer.max_steps: {config.trainer.max_steps} is not a length of a run; give 1 or more")

    def _run_folder(self) -> Path:
        """The folder asked for, or runs/NAME: with `last` the newest that holds a run, else the first free one."""
        config = self.config[self.subcommand]
        if config.trainer.default_root_dir is not None:
            folder = Path(config.trainer.default_root_dir)
            if self.subcommand == "fit" and not config.ckpt_path and checkpoint_path(folder).exists():
                raise UserError(
                    f"trainer.default_root_dir: {folder} holds a run already; go on with it by --ckpt_path last, or "
                    f"name another folder"
                )
            return folder
        files = [str(path) for path in config.get("config") or []]
        file = Path(files[0]) if files else Path("run")
        base = Path("runs") / (file.resolve().parent.name if file.name == CONFIG_FILE else file.stem)
        folder, number = base, 1
        while checkpoint_path(folder).exists():
            previous, number = folder, number + 1
            folder = base.with_name(f"{base.name}-{number}")
        return previous if config.ckpt_path == "last" and number > 1 else folder

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        folder = Path(config["default_root_dir"])
        is_fit = self.subcommand == "fit"
        own = [StopWhenNotFinite(), Throughput()]
        if config["enable_progress_bar"] is not False and is_fit:
            own.append(Progress())
        plugins = config["plugins"] or []
        config |= {
            "logger": self._loggers(folder) if is_fit and config["logger"] is None else config["logger"] or False,
            "plugins": [SafeCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])],
            "enable_progress_bar": config["enable_progress_bar"] is not False,
        }
        try:
            return super()._instantiate_trainer(config, callbacks + own)
        except ValueError as error:  # Lightning's word for a strategy, accelerator or precision that it does not know
            raise UserError(f"trainer: {error}") from error

    def _loggers(self, folder: Path) -> list[Logger]:
        config = self.config[self.subcommand]
        first_step = load_checkpoint(config.ckpt_path)["global_step"] if config.ckpt_path else None
        loggers: list[Logger] = [
            CsvLog(folder),
            TensorBoardLogger(folder, name=None, version="tensorboard", purge_step=first_step),
        ]
        if config.wandb:
            loggers.append(WandbLogger(project=config.wandb, name=folder.name, save_dir=folder))
        return loggers

    @rank_zero_only
    def before_fit(self) -> None:
        folder = Path(self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{CONFIG_FILE}.tmp"
        temporary.write_text(self._config_yaml(), encoding="utf-8")
        os.replace(temporary, folder / CONFIG_FILE)
        _say(f"run folder: {folder}")

    def _config_yaml(self) -> str:
        """The run's whole configuration, its own folder and checkpoint left out so that it starts a new run."""
        config = self.config[self.subcommand].clone()
        config.ckpt_path = None
        config.trainer.default_root_dir = None
        dumped = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=True))
        dumped.pop("config", None)
        return yaml.safe_dump(dumped, sort_keys=False, allow_unicode=True)

    @rank_zero_only
    def after_fit(self) -> None:
        folder = Path(self.trainer.default_root_dir)
        export_run(folder / "export", self.model.model, self.datamodule.tokenizer, self._config_yaml())
        _say(f"model:  {folder / 'export'}")
        held_out = self.datamodule.held_out_bytes()
        _say(f"report: {write_report(folder, self.model.config, self.model.model.num_params(), held_out)}")


class _CheckOnly(ZooCLI):
    """Parses a training file for `fit` and makes what is cheap to make, so that every number is checked; trains
    nothing, writes nothing, reads no data."""

    def before_instantiate_classes(self) -> None:
        self._resolve_model()

    def instantiate_classes(self) -> None:
        self.parser.instantiate_classes(self.config)

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def check_train_file(path: str) -> zoo.ZooConfig:
    """The model of a training file, everything in the file checked.

    Raises:
        UserError: the file, the field, the value and the remedy.
    """
    _quieten()
    arguments = ["fit", "--config", path]
    try:
        check_config_files(arguments)
        cli = _CheckOnly(arguments)
    except (_ParserError, ConfigError, DataError, UserError, MisconfigurationException) as error:
        line = " ".join(str(error).split())
        raise UserError(line if line.startswith(f"{path}: ") else f"{path}: {line}") from error
    return zoo.load_config(cli.config.fit.model.config)


def check_config_files(argv: Sequence[str]) -> None:
    """Reads every --config file once with the project's own loader, whose errors name the file and the line.

    Raises:
        UserError: a file is missing or no plain YAML.
    """
    for option, value in itertools.zip_longest(argv, argv[1:]):
        name, equals, attached = option.partition("=")
        if name in ("--config", "-c") and (equals or value):
            path = Path(attached if equals else value)
            try:
                zoo.yaml.load_file(path)
            except zoo.yaml.YamlError as error:
                raise UserError(f"{path}: {error}") from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _quieten() -> None:
    """Hides what Lightning and torch tell to developers; errors and our own lines stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # "Writing model shards"
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for module in (r"lightning\.", r"torch\.", r"jsonargparse"):
        warnings.filterwarnings("ignore", module=module)


def _fail(error: BaseException, status: int) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the ranks of a machine end for the same reason; one says so
        # A pattern's error points at the place with a caret below it; every other message is one line.
        text = str(error) if isinstance(error, ConfigError) else " ".join(str(error).split())
        _say(f"error: {text}")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs train.py with `argv` (default: sys.argv) and returns the exit status."""
    _quieten()
    keep_freed_memory()
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        check_config_files(arguments)
        ZooCLI(arguments)
    except RunError as error:
        return _fail(error, 1)
    except (_ParserError, ConfigError, DataError, UserError, MisconfigurationException) as error:
        return _fail(error, 2)
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(RunError(f"{error.filename}: {error.strerror}"), 1)
    except RuntimeError as error:
        if rank_zero_only.rank == 0 or "closed by peer" not in str(error):
            raise
        return 1  # the rank that failed has said why
    return 0
