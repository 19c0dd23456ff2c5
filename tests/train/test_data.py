import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from zoo.data import DataError
from zoo.train.data import TextData

WORDS = ["the", "of", "a", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with", "his"]


class Recorder(L.LightningModule):
    """Trains one number and writes down each batch that was trained on: a digest, and the number after it."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.fail_at = fail_at
        self.seen, self.validated = [], []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)

    def training_step(self, batch, batch_idx):
        if self.fail_at is not None and self.trainer.fit_loop.total_batch_idx == self.fail_at:
            raise RuntimeError("stopped on purpose")
        return self.weight * batch["input_ids"].double().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        ids, pieces = batch["input_ids"][0].tolist(), batch["cu_seqlens"].tolist()
        self.seen.append((hash(tuple(ids)), tuple(pieces), self.weight.item(), len(ids)))

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)


def write_text(folder: Path, count: int = 60) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        words = " ".join(WORDS[(i * i + j * (i + 1)) % len(WORDS)] for j in range(20 + i * 7 % 60))
        (folder / f"{i:02}.txt").write_text(f"{i}: {words}\n")
    return folder


def make(folder: Path, **options) -> TextData:
    defaults = {
        "source": str(folder / "text"),
        "cache_dir": str(folder / "cache"),
        "sequence_length": 64,
        "batch_size": 4,
    }
    return TextData(**defaults | options)


def fit(folder: Path, data: TextData, module: Recorder, resume=None, callbacks=(), **options) -> Recorder:
    defaults = {"devices": 1, "max_steps": -1, "limit_val_batches": 0, "max_epochs": 3}
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        default_root_dir=folder, callbacks=list(callbacks), **defaults | options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)
    return module


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.fixture
def folder(tmp_path):
    write_text(tmp_path / "text")
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 17, "max_epochs": 4},
        {"max_epochs": None, "max_steps": 120},
        {"limit_val_batches": 1.0, "val_check_interval": 7},
    ],
    ids=["epochs", "accumulate", "limited", "steps", "validation"],
)
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(folder, options):
    whole = fit(folder, make(folder), Recorder(), callbacks=[every_step(folder)], **options)
    steps = len(list((folder / "checkpoints").iterdir()))
    batches = len(whole.seen)
    assert batches > 60 and len({seen[0] for seen in whole.seen}) == batches
    per_step = options.get("accumulate_grad_batches", 1)
    epoch_end = len(whole.seen) // 3 // per_step  # for the first case: the last step of the first epoch
    for step in [1, epoch_end - 1, epoch_end, epoch_end + 1, steps - 3]:
        checkpoint = folder / "checkpoints" / f"step={step}.ckpt"
        consumed = torch.load(checkpoint, weights_only=True)["TextData"]["batches"]
        resumed = fit(folder, make(folder), Recorder(), resume=checkpoint, **options)
        assert resumed.seen == whole.seen[consumed:], step


def test_a_batch_that_failed_is_read_again(folder):
    whole = fit(folder, make(folder), Recorder())
    saved = folder / "failed.ckpt"

    class SaveOnError(Callback):
        def on_exception(self, trainer, module, exception):
            trainer.save_checkpoint(saved)

    broken = Recorder(fail_at=33)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(folder, make(folder), broken, callbacks=[SaveOnError()])
    assert broken.seen == whole.seen[:33]
    assert fit(folder, make(folder), Recorder(), resume=saved).seen == whole.seen[33:]


class Lengths(Callback):
    """Like callbacks/sequence_length.py: from step 10 on 16 tokens, from step 30 on 32."""

    def on_train_batch_end(self, trainer, module, *args):
        length = {10: 16, 30: 32}.get(trainer.global_step)
        if length:
            trainer.datamodule.set_sequence_length(length)


def test_a_new_sequence_length_holds_from_the_next_batch_and_survives_resume(folder):
    whole = fit(folder, make(folder), Recorder(), callbacks=[Lengths(), every_step(folder)])
    plain = fit(folder, make(folder), Recorder())
    for i, (seen, reference) in enumerate(zip(whole.seen, plain.seen, strict=True)):
        length = 64 if i < 10 else 16 if i < 30 else 32
        assert (seen[0], seen[3]) == (reference[0], 256)  # the same tokens, as many of them
        assert set(range(0, 257, length)) <= set(seen[1])
        assert (seen[1] == reference[1]) == (i < 10)
    for step in [9, 10, 11, 29, 30, 50]:
        checkpoint = folder / "checkpoints" / f"step={step}.ckpt"
        resumed = fit(folder, make(folder), Recorder(), resume=checkpoint, callbacks=[Lengths()])
        assert resumed.seen == whole.seen[step:]
    with pytest.raises(DataError, match=r"does not divide data\.sequence_length \(64\)"):
        make(folder).set_sequence_length(96)


def test_resume_with_another_batch_size_goes_on_at_the_same_token(folder):
    fit(folder, make(folder), Recorder(), callbacks=[every_step(folder)], max_epochs=1)
    data = make(folder, batch_size=2)
    resumed = fit(folder, data, Recorder(), resume=folder / "checkpoints" / "step=10.ckpt")
    first = data.training_text.batch(10 * 256, 10 * 256 + 128, 64)["input_ids"][0]
    assert resumed.seen[0][0] == hash(tuple(first.tolist()))


def test_resume_with_other_data_says_so_and_starts_them(folder):
    fit(folder, make(folder), Recorder(), callbacks=[every_step(folder)], max_epochs=1)
    with pytest.warns(UserWarning, match="trained on other data"):
        resumed = fit(folder, make(folder, seed=1), Recorder(), resume=folder / "checkpoints" / "step=10.ckpt")
    assert resumed.seen[0][0] == fit(folder, make(folder, seed=1), Recorder(), max_epochs=1).seen[0][0]


def test_validation_reads_every_held_out_token_once(folder):
    data = make(folder, validation_fraction=0.25)
    module = Recorder()
    L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False).validate(
        module, data, verbose=False
    )
    ids = torch.cat([batch["input_ids"][0] for batch in module.validated])
    assert bytes(ids[ids != data.tokenizer.eos_token_id].tolist()) == data.held_out_bytes()
    assert len(ids) == data.held_out_text.num_tokens and len(ids) % 256 != 0
    assert data.bytes_per_token[ids].sum() == len(data.held_out_bytes())
    _, held_out = data._cache.split(0.25)
    texts = [path.read_bytes() for path in sorted((folder / "text").iterdir())]
    assert data.held_out_bytes() == b"".join(texts[i] for i in held_out)


TWO_RANKS = """
import sys
from pathlib import Path
import torch
from tests.train.test_data import Recorder, every_step, fit, make
folder = Path(sys.argv[1])
torch.set_num_threads(1)
options = dict(devices=2, strategy="ddp", accumulate_grad_batches=2, max_epochs=2, limit_val_batches=1.0)
records = []
for resume, callbacks in [(None, [every_step(folder)]), (folder / "checkpoints" / "step=5.ckpt", [])]:
    data = make(folder, validation_fraction=0.25)
    module = fit(folder, data, Recorder(), resume=resume, callbacks=callbacks, **options)
    held_out = [(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in module.validated]
    records.append((module.seen, held_out[-len(data.val_dataloader()):]))
torch.save(records, folder / f"rank{module.global_rank}.pt")
"""


def test_two_ranks_share_the_data_and_resume(folder):
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(root)])}
    (folder / "run.py").write_text(TWO_RANKS)
    subprocess.run([sys.executable, folder / "run.py", folder], check=True, timeout=300, env=environment)
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    data = make(folder, validation_fraction=0.25)
    data.prepare_data()
    data.setup("fit")
    for rank, ((whole, held_out), (resumed, _)) in enumerate(ranks):
        assert resumed == whole[10:]  # five steps of two batches
        for i, (digest, _, _, length) in enumerate(whole):
            assert length == 256
            start = (2 * i + rank) * 256
            expected = data.training_text.batch(start, start + 256, 64)["input_ids"][0].tolist()
            assert digest == hash(tuple(expected))
        assert [seen[2] for seen in whole] == [seen[2] for seen in ranks[0][0][0]]
        assert len(held_out) == len(ranks[0][0][1])

    rows = [row for pair in zip(ranks[0][0][1], ranks[1][0][1], strict=True) for row in pair]
    text = data.held_out_text.batch(0, data.held_out_text.num_tokens, 64)
    with_labels = [row for row in rows if any(label != -100 for label in row[1])]
    assert [token for row in with_labels for token in row[0]] == text["input_ids"][0].tolist()
    assert [label for row in with_labels for label in row[1]] == text["labels"][0].tolist()
    assert len(rows) - len(with_labels) == 1  # the last step had text for one rank only


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sequence_length": 1}, "data.sequence_length: 1"),
        ({"batch_size": 0}, "data.batch_size: 0"),
        ({"validation_fraction": 0.0}, "data.validation_fraction: 0.0"),
        ({"validation_fraction": 1.0}, "data.validation_fraction: 1.0"),
        ({"seed": -1}, "data.seed: -1"),
        ({"source": "/nowhere/a.txt"}, "/nowhere/a.txt"),
        ({"sequence_length": 100_000}, "training part holds"),
        ({"sequence_length": 2000}, "held-out part holds"),
    ],
)
def test_mistakes_are_one_line(folder, options, expected):
    with pytest.raises(DataError) as caught:
        data = make(folder, **options)
        data.prepare_data()
        data.setup("fit")
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_one_document_cannot_be_split(folder):
    write_text(folder / "one", count=1)
    data = make(folder, source=str(folder / "one"), sequence_length=8)
    data.prepare_data()
    with pytest.raises(DataError, match="all of the corpus is one document"):
        data.setup("fit")


def test_the_constructor_reads_nothing():
    TextData(source="/nowhere", tokenizer="/nowhere", cache_dir="/proc/nowhere")
