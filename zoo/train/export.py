"""The folder that a finished run leaves: `AutoModelForCausalLM.from_pretrained(folder)` loads it after `import zoo`."""

import os
import shutil
from pathlib import Path

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zoo.train.errors import RunError


def export_run(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train_yaml: str) -> None:
    """Writes model (safetensors), config.json, tokenizer, model.yaml and train.yaml to `folder`, whole or not at all.

    Raises:
        RunError: the disk is full or not writable; what stood at `folder` still stands.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    previous = folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        mapping = yaml.safe_dump(model.config.to_mapping(), sort_keys=False)
        (temporary / "model.yaml").write_text(mapping, encoding="utf-8")
        (temporary / "train.yaml").write_text(train_yaml, encoding="utf-8")
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            os.replace(folder, previous)
        os.replace(temporary, folder)
        shutil.rmtree(previous, ignore_errors=True)
    except Exception as error:  # safetensors reports a full disk with its own exception type
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"{folder}: export not written: {str(error).splitlines()[0]}; the checkpoint is unharmed"
        ) from error
