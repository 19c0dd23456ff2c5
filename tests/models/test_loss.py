"""The loss against torch's cross entropy of all logits, which training never forms."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from tests.blocks.helpers import assert_close, perturb, random_input
from tests.models.helpers import model, tokens
from zoo import build
from zoo.models import loss as loss_module
from zoo.models.loss import IGNORE_INDEX, linear_cross_entropy


def torchs_own(*arguments):
    """linear_cross_entropy as it is on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "NATIVE_DEVICES", ("cpu",))
        return linear_cross_entropy(*arguments)


IMPLEMENTATIONS = [linear_cross_entropy, torchs_own]


def problem(count, vocab, hidden=12, dtype=torch.float32, ignored=0.3):
    x = random_input(count, hidden, dtype=dtype).requires_grad_()
    weight = random_input(vocab, hidden, dtype=dtype, seed=3).requires_grad_()
    labels = tokens(1, count, vocab=vocab)[0]
    labels[torch.rand(count, generator=torch.Generator().manual_seed(1)) < ignored] = IGNORE_INDEX
    return x, weight, labels


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("count", "vocab"), [(1, 5), (37, 11), (64, 1000)])
@pytest.mark.parametrize("chunk_elements", [2**24, 3000])
def test_equals_cross_entropy(implementation, count, vocab, chunk_elements, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_elements)
    x, weight, labels = problem(count, vocab, ignored=0.3 if count > 1 else 0)
    loss = implementation(x, weight, labels)
    reference = F.cross_entropy(x @ weight.T, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert_close(loss, reference)
    # A factor in front: the gradient that arrives must be passed on.
    ours, theirs = (torch.autograd.grad(0.37 * value, [x, weight]) for value in (loss, reference))
    for gradient, expected in zip(ours, theirs, strict=True):
        assert_close(gradient, expected, "gradient")
    assert not ours[0][labels == IGNORE_INDEX].any()
    with torch.no_grad():
        assert_close(implementation(x, weight, labels), reference)


@pytest.mark.parametrize("chunk_elements", [2**24, 3000])
def test_capped_logits(chunk_elements, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_elements)
    x, weight, labels = problem(37, 1000)
    loss = linear_cross_entropy(x, weight, labels, 1.5)
    logits = 1.5 * torch.tanh(x @ weight.T / 1.5)
    reference = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    assert_close(loss, reference)
    for gradient, expected in zip(*(torch.autograd.grad(each, [x, weight]) for each in (loss, reference)), strict=True):
        assert_close(gradient, expected, "gradient")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_to_score(implementation):
    x, weight, labels = problem(7, 11)
    labels.fill_(IGNORE_INDEX)
    loss = implementation(x, weight, labels)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("count", [400, 401, 402, 403])
def test_autocast_is_near_float32(implementation, count):
    x, weight, labels = problem(count, 100)
    reference = F.cross_entropy(x @ weight.T, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    expected = torch.autograd.grad(reference, [x, weight])
    with torch.autocast("cpu", torch.bfloat16):
        loss = implementation(x, weight, labels)
    assert loss.dtype == torch.float32
    assert_close(loss, reference, tolerance=5e-4)  # a sum rounded to bfloat16 may be off by 4e-3
    for gradient, theirs in zip(torch.autograd.grad(loss, [x, weight]), expected, strict=True):
        assert gradient.dtype == torch.float32
        assert_close(gradient, theirs, "gradient", tolerance=2e-2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_multiplies_once(mode, monkeypatch):
    """A head that is a parameter has no gradient made where nobody asked for one."""
    products = []
    multiply = loss_module.matmul
    monkeypatch.setattr(loss_module, "matmul", lambda a, b: products.append(a.shape) or multiply(a, b))
    x, weight, labels = problem(37, 11)
    with mode():
        linear_cross_entropy(x, torch.nn.Parameter(weight.detach()), labels)
    assert len(products) == 1
    linear_cross_entropy(x, weight, labels)
    assert len(products) == 4


def test_a_label_below_zero_that_is_not_ignored_is_refused():
    x, weight, labels = problem(9, 11)
    labels[3] = -1
    with pytest.raises(RuntimeError, match="index"):
        linear_cross_entropy(x, weight, labels)


def test_the_factor_in_front_is_not_rounded():
    """Bfloat16 has no 1028."""
    x, weight, labels = problem(9, 11, dtype=torch.bfloat16)
    plain = torch.autograd.grad(linear_cross_entropy(x, weight, labels), [x, weight])
    scaled = torch.autograd.grad(linear_cross_entropy(x, weight, labels) * 1028, [x, weight])
    for one, other in zip(plain, scaled, strict=True):
        assert torch.equal(other, (one.float() * 1028).bfloat16())


def test_a_model_scores_the_next_token():
    net, x = model("attention"), tokens(3, 12)
    labels = x.clone()
    labels[0, :5] = IGNORE_INDEX
    labels[2] = IGNORE_INDEX
    out = net(x, labels=labels)
    reference = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(out.cross_entropy, reference)
    assert_close(out.loss, out.cross_entropy + out.aux_loss)


@pytest.mark.parametrize("pattern", ["hybrid", "attention", "recurrent"])
def test_training_has_the_loss_and_gradients_of_the_logits(pattern):
    net, x = model(pattern), tokens(2, 15)
    labels = x.masked_fill(tokens(2, 15, seed=1) < 10, IGNORE_INDEX)
    evaluated = net(x, labels=labels)
    reference = F.cross_entropy(evaluated.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    reference = reference if evaluated.aux_loss is None else reference + evaluated.aux_loss
    expected = dict(zip(dict(net.named_parameters()), torch.autograd.grad(reference, net.parameters()), strict=True))
    trained = net.train()(x, labels=labels)
    assert trained.logits is None
    assert_close(trained.loss, evaluated.loss)
    trained.loss.backward()
    for name, parameter in net.named_parameters():
        assert_close(parameter.grad, expected[name], f"gradient of {name}", tolerance=1e-4)


def test_num_items_in_batch_divides():
    net, x = model("hybrid").train(), tokens(2, 9)
    mean = net(x, labels=x)
    for items in (7, torch.tensor(7)):
        out = net(x, labels=x, num_items_in_batch=items)
        assert_close(out.cross_entropy, mean.cross_entropy * 16 / 7)
        assert_close(out.aux_loss, mean.aux_loss)


@pytest.mark.parametrize("pattern", ["hybrid", "recurrent"])
def test_labels_that_are_all_ignored(pattern):
    net, x = model(pattern).train(), tokens(2, 9)
    out = net(x, labels=torch.full_like(x, IGNORE_INDEX))
    out.loss.backward()
    assert out.cross_entropy.item() == 0 and out.loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_one_token_has_nothing_to_predict():
    out = model("hybrid").train()(tokens(2, 1), labels=tokens(2, 1))
    assert out.cross_entropy.item() == 0 and out.loss.isfinite()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_are_never_held(implementation, monkeypatch):
    """Neither as something saved for the backward pass nor as one big tensor on the way."""
    vocab, length = 20_000, 256
    monkeypatch.setattr("zoo.models.modeling.linear_cross_entropy", implementation)
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 2**20)
    small = {"kind": "mlp", "intermediate_size": 8}
    net = build({"vocab_size": vocab, "hidden_size": 8, "blocks": {"b": {"ffn": small}}, "pattern": "b"}).train()
    x, saved = tokens(1, length, vocab=vocab), []
    hooks = saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor)
    with hooks, torch.profiler.profile(profile_memory=True) as profile:
        out = net(x, labels=x)
        out.loss.backward()
    assert out.logits is None
    assert max(saved) < length * vocab / 4
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert vocab * 8 * 4 <= largest < length * vocab * 4 / 2  # the weight's gradient is there, all logits are not


def test_mixture_losses_reach_the_loss():
    """The auxiliary loss has the config's coefficients, and trains the routers."""
    moe = {"kind": "moe", "intermediate_size": 16, "num_experts": 4, "top_k": 2}

    def out(router):
        blocks = {"b": {"ffn": moe | {"router": router}}}
        net = perturb(build({"vocab_size": 41, "hidden_size": 16, "blocks": blocks, "pattern": "b*2"}))
        return net(tokens(2, 9), labels=tokens(2, 9))

    plain, aux, both = (
        out({"aux_loss_coef": a, "z_loss_coef": z}).aux_loss for a, z in [(0.0, 0.0), (0.2, 0.0), (0.2, 0.3)]
    )
    assert plain.item() == 0 and aux.item() > 0.2 and both.item() > aux.item()
    assert_close(out({"aux_loss_coef": 0.4}).aux_loss, 2 * aux)
