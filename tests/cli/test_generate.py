from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import zoo
from tests.cli.helpers import ENVIRONMENT, MODEL, ZOO, fails, save_model
from zoo.cli import main
from zoo.cli.generate import TextPrinter
from zoo.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_model(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def generated(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["generate", str(folder), "--prompt", "def f", "--max-new-tokens", "40", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def greedy_text(model: zoo.ZooForCausalLM, prompt: str, num_tokens: int) -> str:
    """The likeliest continuation, by the model alone: whole forward passes, no cache, no generate()."""
    tokenizer = load_tokenizer("bytes")
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    start = tokens.shape[1]
    with torch.no_grad():
        for _ in range(num_tokens):
            token = model(tokens).logits[:, -1].argmax(-1, keepdim=True)
            if token.item() == tokenizer.eos_token_id:
                break
            tokens = torch.cat([tokens, token], 1)
    return prompt + tokenizer.decode(tokens[0, start:], skip_special_tokens=True) + "\n"


def test_temperature_0_takes_the_likeliest_token(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generated(saved, capsys, "--temperature", "0") == greedy_text(save_model(tmp_path), "def f", 40)


def test_streamed_or_not_the_text_is_the_same(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--temperature", "0"], ["--seed", "3"]):
        assert generated(saved, capsys, *options, "--stream") == generated(saved, capsys, *options, "--no_stream")


def test_seeds(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (generated(saved, capsys, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_a_tiny_top_p_is_greedy(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = generated(saved, capsys, "--temperature", "0")
    assert generated(saved, capsys, "--top-p", "0.0001", "--temperature", "2") == greedy
    assert generated(saved, capsys, "--top-p", "1", "--temperature", "2", "--seed", "0") != greedy


def test_an_empty_prompt_starts_a_text(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(saved), "--prompt", "", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().err == ""


def test_text_in_a_real_process(saved: Path) -> None:
    command = [*ZOO, "generate", str(saved), "--prompt", "é", "--max-new-tokens", "5", "--temperature", "0"]
    done = subprocess.run(command, capture_output=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().startswith("é")


WINDOWED = {
    "lightning": {"mixer": {"kind": "lightning", "num_heads": 2}},
    "softmax": {"mixer": {"kind": "attention", "num_heads": 2, "window": 16, "num_sinks": 2}},
}


def test_stream_context(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within the window it is the text of generate(), then it goes on; a state that grows is refused."""
    save_model(tmp_path, blocks=WINDOWED)
    short = ["generate", str(tmp_path), "--prompt", "def", "--max-new-tokens", "9", "--temperature", "0"]
    assert main(short) == 0
    text = capsys.readouterr().out.rstrip("\n")
    assert main([*short[:5], "60", *short[6:], "--stream-context"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(text)
    for seed in ("1", "1"):
        assert main([*short[:4], "--max-new-tokens", "30", "--seed", seed, "--stream-context"]) == 0
    first = capsys.readouterr().out
    assert first[: len(first) // 2] == first[len(first) // 2 :]
    refused = fails(["generate", str(saved), "--prompt", "x", "--stream-context"], capsys)
    assert refused == (
        "--stream-context: the state of layer 2 (attention) grows with the text; it needs a window or a recurrent "
        "mixer there"
    )
    refused = fails([*short, "--stream-context", "--no_stream"], capsys)
    assert refused == "--stream-context: prints as it comes; remove --no_stream"


def test_the_printer_forgets_what_it_has_written() -> None:
    printer = TextPrinter(load_tokenizer("bytes"), io.StringIO())
    printer.put(torch.tensor([[65]]))
    for _ in range(1000):
        printer.put(torch.tensor([66]))
    assert len(printer.tokens) < 20 and printer.out.getvalue() == "B" * 1000


@pytest.mark.parametrize(
    ("token", "text"),
    [(0x80, "\N{REPLACEMENT CHARACTER}" * 2000), (0xFF, "\N{REPLACEMENT CHARACTER}" * 2000), (256, "")],
)
def test_the_printer_keeps_little_where_no_text_comes(token: int, text: str) -> None:
    printer = TextPrinter(load_tokenizer("bytes"), io.StringIO())
    printer.put(torch.tensor([[65]]))
    for step in range(2000):
        printer.put(torch.tensor([token]))
        assert len(printer.tokens) < 20
        assert len(printer.out.getvalue()) >= min(len(text), step - 4)
    printer.put(torch.tensor([66]))
    printer.end()
    assert printer.out.getvalue() == f"{text}B\n"


def test_tokens_that_the_tokenizer_does_not_call_special_and_that_have_no_text() -> None:
    backend = Tokenizer(models.WordLevel({"▁one": 0, "": 1, "▁two": 2}, unk_token="▁one"))
    backend.decoder = decoders.Metaspace()
    printer = TextPrinter(PreTrainedTokenizerFast(tokenizer_object=backend), io.StringIO())
    printer.put(torch.tensor([[0]]))
    for _ in range(2000):
        printer.put(torch.tensor([1]))
        assert len(printer.tokens) < 20
    printer.put(torch.tensor([2]))
    assert printer.out.getvalue() == " two"


def test_characters_amid_bytes_that_are_none() -> None:
    """Piece by piece it is what the bytes are at once, whatever they are."""
    generator = torch.Generator().manual_seed(0)
    some = torch.tensor([0x41, 0x80, 0x9F, 0x98, 0xE4, 0xB8, 0xAD, 0xF0, 0xFF, 0xC3])
    for _ in range(50):
        data = bytes(some[torch.randint(len(some), (60,), generator=generator)].tolist()) + "中😀".encode()
        assert "".join(streamed(data)) == data.decode(errors="replace")


class Writes(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def write(self, text: str) -> int:
        self.parts.append(text)
        return len(text)


def streamed(data: bytes) -> list[str]:
    """What is written, piece by piece, when the model says these bytes."""
    out = Writes()
    printer = TextPrinter(load_tokenizer("bytes"), out)
    printer.put(torch.tensor([[195, 169, 65]]))  # the prompt
    for byte in data:
        printer.put(torch.tensor([byte]))
    printer.end()
    return out.parts[:-1]


def test_no_half_character_is_written() -> None:
    text = "naïve – 中文 😀 e\u0301 x"
    parts = streamed(text.encode())
    assert parts == list(text)  # every character as soon as it is whole


LANDMARK = {
    "blocks": {
        "landmark": {"mixer": {"kind": "landmark", "num_heads": 2, "block_size": 3, "top_k": 2}},
        "lightning": {"mixer": {"kind": "lightning", "num_heads": 2}},
    },
    "pattern": "landmark lightning landmark",
}


@pytest.mark.parametrize("options", [("--temperature", "0"), ("--seed", "3")])
def test_a_cache_kept_elsewhere_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    model, kept = tmp_path / "model", tmp_path / "kept"
    kept.mkdir()
    save_model(model, **LANDMARK)
    expected = generated(model, capsys, *options)
    for place in ("cpu", str(kept)):
        assert generated(model, capsys, *options, "--offload", place) == expected
    assert not list(kept.iterdir())


def test_a_cache_that_cannot_be_kept_elsewhere(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(saved), "--prompt", "x", "--offload"]
    assert fails([*command, "cpu"], capsys).startswith("--offload: no layer reads a few blocks of its cache; it needs")
    assert fails([*command, "cpu", "--stream-context"], capsys).startswith("--offload: is for a cache that grows")
    save_model(tmp_path, **LANDMARK)
    command[1], missing = str(tmp_path), tmp_path / "missing"
    assert fails([*command, str(missing)], capsys) == (
        f"--offload: {missing}: cannot keep 1 bytes of the cache (No such file or directory); give `cpu`, or a folder "
        "that can be written to and has room"
    )


def test_a_folder_whose_name_torch_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path, **LANDMARK)
    kept = tmp_path / "kept\udcff"
    kept.mkdir()
    message = fails(["generate", str(tmp_path), "--prompt", "x", "--offload", str(kept)], capsys)
    assert message.startswith(f"--offload: {tmp_path}/kept\\udcff: cannot keep 1 bytes of the cache (")
    assert not list(kept.iterdir())


COSFORMER = {"kind": "linear", "num_heads": 2, "feature_map": "cosformer", "max_length": 20}


def test_a_text_that_gets_longer_than_a_layer_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside = {"kind": "parallel", "branches": [{"kind": "lightning", "num_heads": 2}, COSFORMER]}
    for mixer in (COSFORMER, beside):
        save_model(tmp_path, blocks={"b": {"mixer": mixer}}, pattern="b")
        command = ["generate", str(tmp_path), "--temperature", "0", "--prompt"]
        assert main([*command, "12345", "--max-new-tokens", "16"]) == 0  # the last is not read
        assert capsys.readouterr().err == ""
        assert fails([*command, "12345", "--max-new-tokens", "17"], capsys) == (
            "--max-new-tokens: 17 tokens after the prompt's 5 are too many, as layer 0 (linear, cosformer) is for 20; "
            "lower it"
        )
        assert fails([*command, "12345"], capsys).startswith("--max-new-tokens: 200 tokens after the prompt's 5 are")
        assert fails([*command, "x" * 21, "--max-new-tokens", "1"], capsys) == (
            "--prompt: has 21 tokens, and layer 0 (linear, cosformer) is for 20; give a shorter text"
        )


def test_the_lowest_temperature(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = generated(saved, capsys, "--temperature", "0")
    assert generated(saved, capsys, "--temperature", "1e-6") == greedy


def test_a_disk_that_fills_while_generating(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, **LANDMARK)
    take = os.posix_fallocate

    def fill(file: int, start: int, size: int) -> None:
        if size > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        take(file, start, size)

    monkeypatch.setattr(os, "posix_fallocate", fill)
    assert main(["generate", str(tmp_path), "--prompt", "x", "--offload", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "x" and err.count("\n") == 1
    assert f"--offload: {tmp_path}: cannot keep " in err and "No space left on device" in err


def test_bytes_that_are_no_text_come_out_as_replacements() -> None:
    assert "".join(streamed(b"ab\xff\xfecd")) == "ab��cd"
    assert "".join(streamed(b"ab\xe4\xb8")) == "ab�"


def test_words_of_a_tokenizer_that_drops_the_first_space() -> None:
    backend = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "three": 2}, unk_token="three"))
    backend.decoder = decoders.Metaspace()
    out = Writes()
    printer = TextPrinter(PreTrainedTokenizerFast(tokenizer_object=backend), out)
    for tokens in ([0], [1], [2], [0], [1]):
        printer.put(torch.tensor(tokens))
    printer.end()
    assert "".join(out.parts) == " twothree one two\n"


def test_folders_that_are_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hint = "give the folder of a saved model, such as runs/NAME/export"
    missing = tmp_path / "missing"
    assert fails(["generate", str(missing), "--prompt", "x"], capsys) == f"{missing}: is not a folder; {hint}"
    assert fails(["generate", str(tmp_path), "--prompt", "x"], capsys) == f"{tmp_path}: holds no config.json; {hint}"


def failure(folder: Path, capsys: pytest.CaptureFixture[str], prompt: str = "x") -> str:
    return fails(["generate", str(folder), "--prompt", prompt], capsys).removeprefix(str(folder))


def test_a_config_that_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text("{")
    assert failure(folder, capsys) == "/config.json: is not the JSON of a model; save the model again"
    path.write_text("[]")
    assert failure(folder, capsys) == "/config.json: is not the JSON of a model; save the model again"
    path.write_text(json.dumps(config | {"pattern": "nothing"}))
    assert failure(folder, capsys) == "/config.json: pattern: unknown block 'nothing'; known: lightning, softmax"
    path.write_text(json.dumps(config | {"model_type": "no_such_model"}))
    assert failure(folder, capsys).startswith(": the ")


def test_no_weights_or_pickled_ones(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").unlink()
    assert failure(folder, capsys) == ": holds no weights (model.safetensors); save the model again"
    torch.save({}, folder / "pytorch_model.bin")
    assert failure(folder, capsys) == ": holds weights as pickle, which may run code; save them as safetensors"


def test_truncated_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        message = failure(folder, capsys)
        assert message.startswith(": the model cannot be loaded (") and message.endswith("); save it again")


def test_weights_of_another_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"pattern": "lightning*2 softmax*2"}))
    assert failure(folder, capsys).startswith(
        ": the weights do not belong to config.json (missing keys: model.layers.3."
    )
    path.write_text(json.dumps(config | {"pattern": "lightning*2"}))
    assert failure(folder, capsys).startswith(
        ": the weights do not belong to config.json (unexpected keys: model.layers.2."
    )
    path.write_text(json.dumps(config | {"hidden_size": 64}))
    assert failure(folder, capsys).startswith(": the ")


def test_the_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(["generate", str(folder), "--prompt", "\udcff"], capsys).startswith("--prompt: is not UTF-8 text")
    (folder / "tokenizer.json").write_text("{}")
    assert failure(folder, capsys).startswith(": the tokenizer cannot be loaded (")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert failure(folder, capsys) == ": holds no tokenizer (tokenizer.json); save the model's tokenizer there"


def test_a_vocabulary_that_is_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path, vocab_size=200)
    assert failure(tmp_path, capsys).startswith(": the tokenizer has 258 tokens and the model 200;")
    assert MODEL["vocab_size"] == 258
