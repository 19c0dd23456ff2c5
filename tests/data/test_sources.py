import json
import os

import pytest

from zoo.data import DataError, open_source
from zoo.data.sources import cut


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.txt").write_bytes(text.encode() if isinstance(text, str) else text)


def error_of(action):
    with pytest.raises(DataError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_cut_keeps_every_character_and_ends_at_blank_lines():
    text = "".join(f"paragraph {i} " + "word " * (i % 40) + ("\n \n" if i % 3 == 0 else "\n\n") for i in range(3000))
    pieces = cut(text)
    assert "".join(pieces) == text
    assert len(pieces) > 100
    assert all(2048 <= len(piece) <= 8192 and piece.endswith("\n") for piece in pieces[:-1])
    assert all(piece.startswith("paragraph") for piece in pieces)


@pytest.mark.parametrize(("text", "end"), [("line of text\n" * 9999, "\n"), ("x" * 99999, "x")])
def test_cut_without_blank_lines(text, end):
    pieces = cut(text)
    assert "".join(pieces) == text
    assert len(pieces) > 10 and all(piece.endswith(end) for piece in pieces)


def test_a_named_file_is_cut_and_files_of_a_folder_are_whole(tmp_path):
    long = "a line\r\n\n" * 5000
    write(tmp_path, a=long, b="ünï\r\n")
    (tmp_path / ".hidden").write_text("no")
    assert len(list(open_source(str(tmp_path / "a.txt")))) > 1
    assert list(open_source(str(tmp_path))) == [long, "ünï\r\n"]
    assert list(open_source(str(tmp_path / "**" / "b*.txt"))) == ["ünï\r\n"]
    assert list(open_source([str(tmp_path / "b*"), str(tmp_path)])) == ["ünï\r\n", long, "ünï\r\n"]


def test_identity_follows_size_and_time(tmp_path):
    write(tmp_path, a="one")
    first = open_source(str(tmp_path)).identity
    assert open_source(str(tmp_path)).identity == first
    os.utime(tmp_path / "a.txt", (1, 1))
    assert open_source(str(tmp_path)).identity != first
    assert open_source(str(tmp_path / "a.txt")).identity != open_source(str(tmp_path / "a*")).identity  # cut or whole


def test_standard_library():
    source = open_source("python-stdlib")
    assert source.num_bytes > 5_000_000
    texts = list(source)
    assert len(texts) > 500
    assert sum(len(text.encode()) for text in texts) > 0.99 * source.num_bytes
    assert any("class OrderedDict" in text for text in texts)
    assert source.identity == open_source("python-stdlib").identity
    assert not any("site-packages" in str(entry) for entry in source.identity)


def test_missing_file_and_pattern(tmp_path):
    missing = str(tmp_path / "none.txt")
    assert missing in error_of(lambda: open_source(missing))
    pattern = str(tmp_path / "*.txt")
    assert pattern in error_of(lambda: open_source(pattern)) and "no file matches" in error_of(
        lambda: open_source(pattern)
    )
    assert "no files" in error_of(lambda: open_source(str(tmp_path)))
    assert "empty list" in error_of(lambda: open_source([]))


def test_text_that_is_not_utf8_names_file_and_byte(tmp_path):
    write(tmp_path, a="fine", b=b"caf\xe9 au lait")
    line = error_of(lambda: list(open_source(str(tmp_path))))
    assert str(tmp_path / "b.txt") in line and "byte 3 (0xe9)" in line and "iconv" in line


def test_hub_data_set_from_a_local_folder_streams(tmp_path):
    rows = [{"body": f"text {i}", "n": i} for i in range(5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(f"hf:{tmp_path}?field=body&split=train")
    assert list(source) == [row["body"] for row in rows]
    assert list(source) == [row["body"] for row in rows]
    before = source.identity
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"body": "more", "n": 5}\n')
    assert open_source(source.name).identity != before

    line = error_of(lambda: list(open_source(f"hf:{tmp_path}")))
    assert "'text'" in line and "body, n" in line and "?field=" in line
    assert "?split=" in error_of(lambda: list(open_source(f"hf:{tmp_path}?split=nowhere&field=body")))


def test_hub_data_set_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "cannot be read" in error_of(lambda: list(open_source(f"hf:{tmp_path / 'nothing'}")))
    assert "unknown option subset" in error_of(lambda: open_source("hf:org/name?subset=en"))
    assert "no id" in error_of(lambda: open_source("hf:"))
