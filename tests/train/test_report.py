"""zoo/train/report.py, on a run's files written here by hand."""

import json
import lzma
import re
from html.parser import HTMLParser

import pytest

import zoo
from tests.train.helpers import MODEL
from zoo.train.report import series, smooth, write_report, xz_bits_per_byte

HELD_OUT = b"def add(a, b):\n    return a + b\n" * 40


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order; collects tags, attributes and text."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    parser = Balanced()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


@pytest.fixture
def run_folder(tmp_path):
    rows = [f"{i},{6 - i * 0.04},,,{1000 + i},0.25" for i in range(1, 51)]
    rows += ["25,,4.1,3.5,,", "50,,3.2,2.125,,"]
    header = "step,train/loss,val/loss,val/bpb,throughput/tokens_per_second,throughput/mfu"
    (tmp_path / "metrics.csv").write_text("\n".join([header, *rows]) + "\n51,3.9")  # the last line cut short by a kill
    samples = [{"step": 25, "prompt": "def ", "text": "early"}, {"step": 50, "prompt": "def ", "text": "<b>late</b> &"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (tmp_path / "config.yaml").write_text("seed_everything: 7\n")
    return tmp_path


def test_shows_the_run(run_folder):
    config = zoo.load_config(MODEL)
    page = parse(write_report(run_folder, config, 1_234_567, HELD_OUT))
    text = " ".join(page.text)
    xz = 8 * len(lzma.compress(HELD_OUT, preset=9 | lzma.PRESET_EXTREME)) / len(HELD_OUT)
    for figure in ("1.23 M", "50", "2.125", f"{xz:.3f}", "1,026", "25.0%", "lightning softmax"):
        assert figure in text, figure
    assert "<b>late</b> &" in text and "early" in text  # shown as text, not as markup
    assert "seed_everything: 7" in text
    assert sum(tag == "svg" for tag, _ in page.seen) == 4
    assert "layer 0: lightning, lightning + moe" in text and "layer 1: softmax, attention + mlp" in text


def test_needs_nothing_but_itself(run_folder):
    page = parse(write_report(run_folder, zoo.load_config(MODEL), 1, HELD_OUT))
    assert not {tag for tag, _ in page.seen} & {"script", "link", "img", "iframe", "object"}
    for _, attributes in page.seen:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    source = (run_folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)", source)


def test_a_run_that_was_never_validated_still_has_a_page(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,5.5\n")
    page = parse(write_report(tmp_path, zoo.load_config(MODEL), 10, b""))
    assert "xz" not in " ".join(page.text)
    assert sum(tag == "svg" for tag, _ in page.seen) == 2


def test_the_same_files_give_the_same_page(run_folder):
    config = zoo.load_config(MODEL)
    first = write_report(run_folder, config, 1, HELD_OUT)
    content = first.read_text()
    assert write_report(run_folder, config, 1, HELD_OUT).read_text() == content


def test_xz_of_noise_is_eight_bits():
    noise = bytes((i * i * 7919 + i // 3 * 104729) % 65521 % 256 for i in range(20000))
    assert xz_bits_per_byte(noise) == pytest.approx(8, rel=0.05)
    assert xz_bits_per_byte(b"a" * 20000) < 0.1


def test_smooth_starts_at_the_first_value_and_keeps_constants():
    assert smooth([3.0, 3.0, 3.0], 0.9) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([4.0, 0.0], 0.5) == pytest.approx([4.0, 4 / 3])
    assert series([{"step": 2.0, "a": 1.0}, {"step": 3.0}], "a") == ([2], [1.0])
