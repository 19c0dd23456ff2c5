import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from zoo.data import DataError, load_corpus, open_source
from zoo.data.cache import held_out_documents

BUILD = """
import sys
from zoo.data import load_corpus, open_source
print("starting", flush=True)
cache = load_corpus(open_source(sys.argv[1]), "bytes", sys.argv[2], 0.1)
print(cache.fingerprint)
"""


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"document {i}<eos>: " + "ünï " * (i * 7 % 50))
    return folder


def load(folder, cache_dir, tokenizer="bytes", fraction=0.1):
    return load_corpus(open_source(str(folder)), tokenizer, cache_dir, fraction)


def start(folder, cache_dir):
    command = [sys.executable, "-c", BUILD, str(folder), str(cache_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def error_of(action):
    with pytest.raises(DataError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tokens_lengths_and_reuse(text_folder, tmp_path, capsys):
    cache = load(text_folder, tmp_path / "cache")
    texts = [path.read_bytes() for path in sorted(text_folder.iterdir())]
    assert cache.tokens.dtype == np.uint16
    assert cache.tokens.tolist() == [token for text in texts for token in [*text, 256]]
    assert cache.byte_lengths.tolist() == [len(text) for text in texts]
    assert cache.lengths.tolist() == [len(text) + 1 for text in texts]
    assert cache.text(np.arange(30)) == b"".join(texts)
    assert "30 documents" in capsys.readouterr().err
    again = load(text_folder, tmp_path / "cache")
    assert again.folder == cache.folder and again.fingerprint == cache.fingerprint
    assert capsys.readouterr().err == ""  # nothing was built
    (text_folder / "00.txt").write_text("another text")
    changed = load(text_folder, tmp_path / "cache")
    assert changed.folder != cache.folder and changed.fingerprint != cache.fingerprint


def test_empty_documents_are_left_out(text_folder, tmp_path):
    (text_folder / "00.txt").write_text("")
    assert load(text_folder, tmp_path / "cache").meta["documents"] == 29


def test_bpe_is_trained_without_the_held_out_text_and_kept(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    words = [" " + chr(0x420 + i) for i in range(30)]  # one word per document; all share their first byte
    for i, word in enumerate(words):
        (folder / f"{i:02}.txt").write_text(word * 50)
    training, held_out = load(folder, tmp_path / "cache").split(0.1)
    assert len(held_out) == 3
    spec = f"bpe:{258 + 1 + len(training)}"  # one entry for space and first byte, one for each training word
    cache = load(folder, tmp_path / "cache", spec)
    tokens = [len(cache.tokenizer(word)["input_ids"]) for word in words]
    assert [tokens[i] for i in training] == [1] * 27 and [tokens[i] for i in held_out] == [2] * 3
    assert cache.meta["token_bytes"] == cache.meta["bytes"] == cache.byte_lengths.sum()
    again = load(folder, tmp_path / "cache", spec)
    assert again.tokenizer.backend_tokenizer.to_str() == cache.tokenizer.backend_tokenizer.to_str()
    assert load(folder, tmp_path / "cache", "bpe:270", 0.5).folder != load(folder, tmp_path / "cache", "bpe:270").folder


def test_held_out_documents():
    random = np.random.RandomState(0)
    hashes = random.randint(0, 2**63, 1000).astype(np.uint64)
    hashes[500:] = hashes[:500]  # every document has a copy
    lengths = np.concatenate([random.randint(1, 999, 500)] * 2)
    held_out = held_out_documents(hashes, lengths, 0.1)
    assert 0.1 <= lengths[held_out].sum() / lengths.sum() < 0.11
    assert not set(hashes[held_out]) & set(hashes[~held_out])
    order = random.permutation(1000)
    assert (held_out_documents(hashes[order], lengths[order], 0.1) == held_out[order]).all()
    assert (held_out_documents(hashes, lengths, 0.2) >= held_out).all()  # a larger part holds the smaller one
    assert held_out_documents(hashes[:9], lengths[:9], 1e-9).sum() == 1


def test_an_empty_corpus_leaves_no_cache(text_folder, tmp_path):
    for path in text_folder.iterdir():
        path.write_text("")
    for tokenizer in ["bytes", "bpe:300"]:
        assert "corpus is empty" in error_of(lambda spec=tokenizer: load(text_folder, tmp_path / "cache", spec))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_text_that_is_not_utf8_leaves_no_cache(text_folder, tmp_path):
    (text_folder / "29.txt").write_bytes(b"ok\xff")
    assert "29.txt: byte 2 (0xff)" in error_of(lambda: load(text_folder, tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npz", "meta.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_cache_is_built_again(name, damage, text_folder, tmp_path, capsys):
    cache = load(text_folder, tmp_path / "cache", "bpe:290")
    good, fingerprint = cache.tokens.tolist(), cache.fingerprint
    path = cache.folder / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        data[middle : middle + 4] = bytes(255 - byte for byte in data[middle : middle + 4])
        path.write_bytes(data)
    capsys.readouterr()
    again = load(text_folder, tmp_path / "cache", "bpe:290")
    assert "building it again" in capsys.readouterr().err
    assert again.tokens.tolist() == good and again.fingerprint == fingerprint
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [cache.folder.name]


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    for i in range(8):
        text = np.random.RandomState(i).randint(32, 127, 1 << 20).astype(np.uint8).tobytes()
        (folder / f"{i:02}.txt").write_bytes(text)
    return folder


def start_and_wait_for_tokens(folder, cache_dir):
    process = start(folder, cache_dir)
    while not any(path.stat().st_size for path in cache_dir.glob("*.tmp/tokens.bin")):
        assert process.poll() is None
        time.sleep(0.002)
    return process


def test_two_processes_at_once(large_folder, tmp_path):
    first = start_and_wait_for_tokens(large_folder, tmp_path / "cache")
    os.kill(first.pid, signal.SIGSTOP)  # in the middle of its work
    second = start(large_folder, tmp_path / "cache")
    try:
        assert second.stdout.readline() == "starting\n"
        time.sleep(1)  # so that it finds the first one at work
    finally:
        os.kill(first.pid, signal.SIGCONT)
    outputs = [process.communicate(timeout=120) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert outputs[0][0].splitlines()[-1] == outputs[1][0].strip() == load(large_folder, tmp_path / "cache").fingerprint
    assert ["8 documents" in errors for _, errors in outputs] == [True, False]  # one built, the other waited


def test_kill_in_the_middle(large_folder, tmp_path):
    cache_dir = tmp_path / "cache"
    process = start_and_wait_for_tokens(large_folder, cache_dir)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.suffix for path in cache_dir.iterdir() if path.is_dir()] == [".tmp"]

    cache = load(large_folder, cache_dir)
    assert cache.text(np.arange(8)) == b"".join(path.read_bytes() for path in sorted(large_folder.iterdir()))
    assert [path for path in cache_dir.iterdir() if path.is_dir()] == [cache.folder]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:262"])
def test_a_full_disk(tokenizer, text_folder, tmp_path, small_disk):
    kept = load(text_folder, small_disk, tokenizer)
    for i in range(10):
        (text_folder / f"large{i}.txt").write_text(f"some words and {i} more words\n" * 3000)
    line = error_of(lambda: load(text_folder, small_disk, tokenizer))
    needed = load(text_folder, tmp_path / "elsewhere").meta["tokens"] * 2 + 40 * 24
    assert str(small_disk) in line and "disk is full" in line and f"{needed:,} bytes" in line
    assert "data.cache_dir" in line
    assert [path for path in small_disk.iterdir() if path.is_dir()] == [kept.folder]
    for path in text_folder.glob("large*"):
        path.unlink()
    assert load(text_folder, small_disk, tokenizer).fingerprint == kept.fingerprint


def test_a_folder_that_cannot_be_written(text_folder, tmp_path):
    (tmp_path / "file").write_text("")
    line = error_of(lambda: load(text_folder, tmp_path / "file" / "cache"))
    assert "cannot be written" in line and str(tmp_path / "file") in line
