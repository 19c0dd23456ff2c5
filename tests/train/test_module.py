"""zoo/train/module.py: the loss over tokens and ranks, bits per byte, and checkpoints of other models."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

import zoo
from tests.train.helpers import MODEL
from zoo.train.errors import UserError
from zoo.train.module import ZooModule, check_architecture, count_predicted, first_difference


def batch_of(ids: list[int], ignored: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([ids])
    labels = input_ids.clone()
    labels[:, list(ignored)] = -100
    return {"input_ids": input_ids, "labels": labels, "cu_seqlens": torch.tensor([0, len(ids)], dtype=torch.int32)}


class Ranks:
    """A strategy of two ranks: this one, and one with `other_tokens` predicted tokens."""

    def __init__(self, other_tokens: int):
        self.other_tokens = other_tokens

    def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        return tensor + self.other_tokens if reduce_op == "sum" else tensor


def module_on(strategy, world_size: int) -> ZooModule:
    torch.manual_seed(0)
    module = ZooModule(MODEL)
    module.configure_model()
    module._trainer = SimpleNamespace(strategy=strategy, world_size=world_size)
    module.log = lambda *_, **__: None
    module.optimizers = lambda: SimpleNamespace(param_groups=[{"lr": 0.0}])
    return module


def test_ranks_with_unequal_token_counts_average_over_tokens():
    """Two ranks' gradients, averaged as DDP does, equal one process's gradient of the mean over all tokens."""
    short, long = batch_of(list(range(5))), batch_of(list(range(40, 72)), ignored=(7,))
    tokens = [int(count_predicted(batch["labels"])) for batch in (short, long)]
    assert tokens == [4, 30]
    gradients = []
    for batch, other in ((short, tokens[1]), (long, tokens[0])):
        module = module_on(Ranks(other), 2)
        output = module.training_step(batch, 0)
        output["loss"].backward()
        gradients.append(module.model.lm_head.weight.grad)
    averaged = (gradients[0] + gradients[1]) / 2

    module = module_on(None, 1)
    sums = sum(module.model(**batch, num_items_in_batch=1).cross_entropy for batch in (short, long))
    (sums / sum(tokens)).backward()
    reference = module.model.lm_head.weight.grad
    assert (averaged - reference).norm() / reference.norm() < 1e-5


class Text(LightningDataModule):
    """Two batches to train and to validate on; every token stands for `width` bytes."""

    def __init__(self, width: int = 1, tokenizer_size: int = 258):
        super().__init__()
        self.batches = [batch_of(list(range(50))), batch_of(list(range(60, 90)), ignored=(0, 3, 4))]
        self.bytes_per_token = torch.full((tokenizer_size,), width)
        self.bytes_per_token[70:] = 0  # as end-of-text tokens have
        self.tokenizer = [None] * tokenizer_size

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self):
        return DataLoader(self.batches, batch_size=None)


def trainer_for(tmp_path, **options) -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0, **options,
    )  # fmt: skip


def test_bits_per_byte_over_the_whole_held_out_text(tmp_path):
    module, data = ZooModule(MODEL), Text(width=3)
    results = trainer_for(tmp_path).validate(module, data, verbose=False)[0]
    nats, num_bytes, tokens = 0.0, 0, 0
    with torch.no_grad():
        for batch in data.batches:
            logits = module.model(batch["input_ids"]).logits[0, :-1]
            for position, target in enumerate(batch["labels"][0, 1:].tolist()):
                if target != -100:
                    nats -= torch.log_softmax(logits[position], -1)[target].item()
                    num_bytes += 3 if target < 70 else 0
                    tokens += 1
    assert tokens == 49 + 27
    assert results["val/loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert results["val/bpb"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_a_vocabulary_below_the_tokenizers_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size: 320 is smaller than the tokenizer's 400 tokens; .* 448"):
        trainer_for(tmp_path, max_steps=1).fit(ZooModule(MODEL), Text(tokenizer_size=400))


def test_the_architecture_travels_in_the_checkpoint_and_is_compared(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=2)
    trainer.fit(ZooModule(MODEL), Text())
    path = tmp_path / "some.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["zoo_config"] == zoo.load_config(MODEL).to_mapping()
    assert "hyper_parameters" not in checkpoint

    other = copy.deepcopy(MODEL)
    other["blocks"]["softmax"]["mixer"]["num_heads"] = 4
    with pytest.raises(UserError, match=r"some.ckpt: .*blocks.softmax.mixer.num_heads is 2 in the checkpoint and 4 in"):
        trainer_for(tmp_path, max_steps=3).fit(ZooModule(other), Text(), ckpt_path=path)


def test_a_checkpoint_from_before_a_field_had_its_default():
    mapping = zoo.load_config(MODEL).to_mapping()
    older = {name: value for name, value in mapping.items() if name not in ("embedding_scale", "logit_scale")}
    assert set(older) < set(mapping)
    check_architecture(mapping, {"zoo_config": older}, "x.ckpt")
    with pytest.raises(UserError, match=r"embedding_scale is 1.0 in the checkpoint and 2.0 in"):
        check_architecture(mapping | {"embedding_scale": 2.0}, {"zoo_config": older}, "x.ckpt")
    with pytest.raises(UserError, match=r"gone is 3 in the checkpoint and \(absent\) in"):  # one that is no more
        check_architecture(mapping, {"zoo_config": older | {"embedding_scale": 1.0, "logit_scale": 1.0, "gone": 3}}, "")


def test_first_difference():
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 2}}) is None
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ("a.c", 2, 3)
    assert first_difference({"a": 1}, {"a": 1, "d": 5}) == ("d", "(absent)", 5)
    assert first_difference({"a": {"b": 1}}, {"a": None}) == ("a", {"b": 1}, None)


def test_a_foreign_checkpoint_is_refused():
    with pytest.raises(UserError, match=r"x.ckpt: not a checkpoint of train.py"):
        check_architecture(MODEL, {"state_dict": {}}, "x.ckpt")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("learning_rate", 0.0), ("weight_decay", -0.1), ("betas", (0.9, 1.0)), ("momentum", 1.0), ("warmup_steps", -1),
        ("decay_fraction", 0.0), ("final_fraction", 1.5),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_named(option, value):
    with pytest.raises(UserError, match=rf"^model.{option}: .*out of range"):
        ZooModule(MODEL, **{option: value})


def test_random_numbers_depend_on_the_batch_alone(tmp_path):
    drawn = []

    class Drawing(ZooModule):
        def training_step(self, batch, batch_idx):
            drawn.append(torch.rand(()).item())
            return super().training_step(batch, batch_idx)

    for _ in range(2):
        torch.rand(len(drawn) + 1)  # another history
        trainer_for(tmp_path, max_steps=2, max_epochs=-1).fit(Drawing(MODEL), Text())
    assert drawn[0] == drawn[2] != drawn[1] == drawn[3]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_correction_biases_follow_the_loads_of_a_step(accumulate):
    """Of all its batches."""
    rate = 0.01
    router = {"kind": "sigmoid", "correction_bias": True, "correction_rate": rate}
    config = copy.deepcopy(MODEL)
    config["blocks"]["lightning"]["ffn"]["router"] = router
    torch.manual_seed(0)
    module = ZooModule(config)
    module.configure_model()
    text, model = Text(), copy.deepcopy(module.model).train()
    load = sum(model(**batch).expert_loads[0] for batch in text.batches[:accumulate])
    expected = rate * (load.mean() - load).sign()
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_steps=1, accumulate_grad_batches=accumulate, **options).fit(module, text)
    bias = module.model.model.layers[0].ffn.router.correction_bias
    assert torch.allclose(bias, expected) and expected.any()
    assert model.eval()(**text.batches[0]).expert_loads is None


def test_layers_that_share_a_router_move_it_once():
    block = copy.deepcopy(MODEL["blocks"]["lightning"]) | {"shared": True}
    block["ffn"]["router"] = {"kind": "sigmoid", "correction_bias": True, "correction_rate": 0.5}
    model = zoo.build(MODEL | {"blocks": {"lightning": block}, "pattern": "lightning*2"})
    model.correct_routers([torch.tensor([5.0, 1, 3, 3]), torch.tensor([2.0, 4, 3, 3])])
    assert model.model.layers[0].ffn.router.correction_bias.tolist() == [-0.5, 0.5, 0, 0]
