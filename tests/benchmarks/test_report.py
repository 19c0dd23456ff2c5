"""docs/performance.md: its text from fixed results, and that the committed page is what would be written now."""

import pytest

from benchmarks import machine, pictures, report

VERSIONS = {"threads": 2, "torch": "2.13.0"}


def candidate(ms, **more):
    return {"ms": ms, "min_ms": ms, "count": 9, "tokens_per_s": 1e6 / ms, **more}


def row(what, pass_, shape, candidates, **more):
    named = {"what": what, "pass": pass_, "dtype": "float32", "shape": shape, "candidates": candidates}
    return named | {"versions": VERSIONS} | more


def op(pass_, length, torch_ms, peer_ms, variant=None):
    shape = {"variant": variant, "batch": 2, "length": length, "heads": 4, "width": 64, "keys": None}
    ours = candidate(torch_ms, ratios={"transformers": peer_ms / torch_ms}, flop_fraction=0.2, byte_fraction=0.4)
    candidates = {"reference": candidate(0.1), "torch": ours, "transformers": candidate(peer_ms)}
    return row("linear_attention", pass_, shape, candidates)


@pytest.fixture
def results():
    return {
        "machine": {"device": "cpu", "name": "Some CPU, 2 cores"},
        "peaks": {"float32": 2e11, "bfloat16": 2.4e12, "copy": 4e10},
        "ops": [op("forward+backward", length, 5.0, 50.0, "per head") for length in (512, 4096)],
        "train": [
            row(
                "jamba",
                "training step",
                {"batch": 2, "length": 512},
                {
                    "zoo": candidate(500, ratios={"transformers": 150.2}, flop_fraction=0.333),
                    "transformers": candidate(75100) | {"count": 1},
                },
                parameters=11_396_176,
            )
        ],
        "decode": [
            row(
                "llama",
                "loop",
                {"batch": 1, "length": 128, "new": 64},
                {"zoo": candidate(200, ratios={"transformers": 0.876}), "transformers": candidate(175.2)},
            )
        ],
        "length": [
            row(
                "mamba",
                "training step",
                {"batch": 1, "short": 4096, "length": 65536},
                {
                    "4096 tokens": candidate(1, us_per_token=10.0, bytes_per_token=5000),
                    "65536 tokens": candidate(1, us_per_token=11.5, bytes_per_token=5100),
                },
                time_ratio=1.15,
                memory_ratio=1.02,
            )
        ],
        "stream": [],
        "context": [
            row(
                "window",
                pass_,
                {"batch": 1, "short": 4096, "length": long},
                {
                    "4096 tokens": candidate(1, us_per_token=10.0, **{memory: 5000}),
                    f"{long} tokens": candidate(1, us_per_token=11.5, **{memory: 5100}),
                },
                time_ratio=1.15,
                memory_ratio=1.02,
            )
            for pass_, long, memory in (
                ("training step", 32768, "bytes_per_token"),
                ("next token", 131072, "cache_bytes"),
            )
        ],
    }


def test_streaming_is_told_in_words(results):
    shape = {"batch": 1, "length": 100_000, "trained": 64}
    candidates = {"first tenth": candidate(1.5), "last tenth": candidate(1.625)}
    more = {"mixers": ["sinks", "mamba"], "tensor_bytes": 45_678, "resident_bytes": [300_000_000, 301_000_000]}
    longest = row("stream", "token by token", shape, candidates, **more)
    shorter = row("stream", "token by token", shape | {"length": 20_000}, candidates, **more | {"tensor_bytes": 10})
    page = report.page([results | {"stream": [longest, shorter]}])
    assert page.count("### Streaming") == 1 and "20,000" not in page
    assert "A layer each of sinks, mamba," in page and "100,000 tokens one by one behind a prompt of 64." in page
    assert "45.7 kB" in page and "300.0 MB" in page and "1.50 ms in the first and 1.62 ms in the last" in page


def test_the_page_has_every_figure(results):
    page = report.page([results])
    assert "## Some CPU, 2 cores" in page and "Threads: 2" in page
    assert "200 GFLOP/s in float32, 2.4 TFLOP/s in bfloat16, 40 GB/s" in page
    assert "| jamba | 11.4M | 2 x 512 | float32 | 2,000 | 13.3 (one step) | 150x | 33% |" in page
    assert "| llama | loop | 128 + 64 | float32 | 5,000 | 5,710 | 0.876x |" in page
    assert "| mamba | float32 | 10 | 11.5 | 1.15 | 5.0 | 5.1 | 1.02 |" in page
    assert "| at 32,768 | ratio | kB per token at 4,096 |" in page and "| at 131,072 | ratio | cache in kB" in page
    assert page.count("| window | float32 | 10 | 11.5 | 1.15 | 5.0 | 5.1 | 1.02 |") == 2
    assert "| per head | 4 x 64 | 2 x 512 | forward+backward | float32 | 5 torch | 50 (10x) | 40% |" in page


def test_the_reference_is_never_ours(results):
    assert pictures.fastest(results["ops"][0]) == "torch"


def test_what_is_not_measured_is_said(results):
    assert "## GPU\n\nNot yet measured." in report.page([results])
    assert "## CPU\n\nNot yet measured." in report.page([])
    gpu = results | {"machine": {"device": "cuda", "name": "Some GPU"}}
    assert "Not yet" not in report.page([results, gpu])


def test_verbs_without_rows_have_no_section_and_no_picture(results):
    page = report.page([results | {"train": [], "decode": [], "ops": []}])
    assert "### Length" in page and "### Training" not in page
    assert "-length.png" in page and "-ratio.png" not in page


def test_columns_without_a_figure_are_left_out(results):
    assert "peak memory" not in report.page([results])
    results["train"][0]["candidates"]["zoo"]["peak_bytes"] = 2_000_000_000
    assert "| 33% | 2 GB |" in report.page([results])


def test_figures_without_a_peer(results):
    """As benchmarks.gpu_suite writes them."""
    shape = {"batch": 4, "length": 8192}
    ours = {"zoo": candidate(500)}
    train = row("jamba-1b", "training step", shape, ours, parameters=10**9, checkpointing=True)
    after = row("jamba-1b", "after 4,096 tokens", {"batch": 1, "length": 4096, "new": 8}, ours, cache_bytes=10**8)
    page = report.page([results | {"train": [train], "decode": [after]}])
    assert "| jamba-1b | 1000.0M | 4 x 8,192 checkpointed | float32 | 2,000 |\n" in page
    assert "| jamba-1b | after 4,096 tokens | 4,096 + 8 | float32 | 2,000 | 0.1 GB |\n" in page


def test_every_picture_on_the_page_is_drawn(results, tmp_path):
    file = report.write([results], tmp_path)
    drawn = {path.name for path in (tmp_path / "performance").iterdir()}
    assert drawn == {f"some-cpu-2-cores-{kind}.png" for kind in ("ratio", "length", "context", "fraction")}
    assert all(f"(performance/{name})" in file.read_text() for name in drawn)


def test_bars_are_of_the_fastest_peer_and_the_nearer_peak(results):
    results["ops"][1]["candidates"]["torch"]["ratios"]["fla"] = 1.5
    op = "linear_attention, per head, 64 wide, 4,096 tokens"
    assert pictures.against_peers(results) == [
        ("jamba train, 2 x 512", "float32", 150.2),
        ("llama decode, loop", "float32", 0.876),
        (op, "float32", 1.5),
    ]
    assert pictures.of_peak(results) == [("jamba train, 2 x 512", "float32", 0.333), (op, "float32", 0.4)]


def test_lines_are_of_one_pass_and_dtype(results):
    assert pictures.of_two_lengths(results["context"], "two layers") == {
        "two layers: training step, float32": {"window": [(4096, 10.0), (32768, 11.5)]},
        "two layers: next token, float32": {"window": [(4096, 10.0), (131072, 11.5)]},
    }
    panels = pictures.of_ops_and_stacks(results)
    assert list(panels) == ["linear_attention, per head (64 wide), float32", "stacks: training step, float32"]
    assert panels["linear_attention, per head (64 wide), float32"]["torch"] == [(512, 5e3 / 1024), (4096, 5e3 / 8192)]


def test_an_op_is_compared_where_it_has_a_peer(results):
    del results["ops"][1]["candidates"]["transformers"]
    results["ops"][1]["candidates"]["torch"]["ratios"] = {}
    assert pictures.against_peers(results)[-1] == ("linear_attention, per head, 64 wide, 512 tokens", "float32", 10)
    assert "4,096 tokens" in pictures.of_peak(results)[-1][0]


def test_the_committed_page_is_what_would_be_written_now():
    results = machine.read_all()
    assert (report.DOCS / report.FILE).read_text() == report.page(results), "run `python -m benchmarks report`"
    for each in results:
        for _, name in pictures.files(each):
            assert (report.DOCS / "performance" / name).exists()
