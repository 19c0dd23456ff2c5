# ruff: noqa: E501  (a case of a table is one line)
"""The command itself: unknown verbs and options, exit statuses, pipes and Ctrl-C, in real processes where it matters."""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests.cli.helpers import ENVIRONMENT, ZOO, fails
from zoo.cli import main

MISTAKES = [
    ([], "give a command: check, describe, generate, import, export; `zoo --help` says what they do"),
    (["genrate"], "genrate: unknown command; did you mean 'generate'?"),
    (["check"], "FILE is missing; `zoo COMMAND --help` says what it is"),
    (["generate"], "DIR is missing; `zoo COMMAND --help` says what it is"),
    (["generate", "x"], "--prompt is missing; `zoo COMMAND --help` says what it is"),
    (["generate", "x", "--prompt"], "--prompt: expected one argument"),
    (["check", "a", "b"], "b: is one argument too many; remove it, or put quotes around a text with spaces"),
    (["describe", "--lenght", "3"], "--lenght: unknown option; did you mean '--length'?"),
    (["describe", "--zzz=3"], "--zzz: unknown option; known: --help, --length, --batch, --html, --kinds"),
    (["describe", "x", "--length", "3q"], "--length: must be a number of tokens such as 4096, 128k or 1M, got '3q'"),
    (["describe", "x", "--length", "0"], "--length: must be a number of tokens such as 4096, 128k or 1M, got '0'"),
    (["describe", "x", "--batch", "0"], "--batch: must be a whole number >= 1, got 0"),
    (["describe", "x", "--batch", "two"], "--batch: must be a whole number, got 'two'"),
    (["generate", "x", "--prompt", "a", "--temperature", "-1"], "--temperature: must be a number >= 0, got -1"),
    (["generate", "x", "--prompt", "a", "--temperature", ".inf"], "--temperature: must be a number, got '.inf'"),
    (["generate", "x", "--prompt", "a", "--top-p", "0"], "--top-p: must be a number > 0 and <= 1, got 0"),
    (["generate", "x", "--prompt", "a", "--top-p", "1.1"], "--top-p: must be a number > 0 and <= 1, got 1.1"),
    (["generate", "x", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens: must be a whole number >= 1, got 0"),
    (["generate", "x", "--prompt", "a", "--seed", "-1"], "--seed: must be a whole number >= 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(case[0]) or "nothing" for case in MISTAKES])
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(arguments, capsys) == message


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["--help"])
    assert status.value.code == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in ("check", "describe", "generate"))


def test_a_mistake_in_a_real_process() -> None:
    done = subprocess.run([*ZOO, "check", "no.yaml"], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: no.yaml: no such file; check the path\n")


def test_a_closed_pipe_is_quiet() -> None:
    with subprocess.Popen(
        [*ZOO, "check", "configs/models/minimax-tiny.yaml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_ctrl_c_is_quiet(tmp_path: object) -> None:
    script = (
        "import signal, sys, zoo.cli\n"
        # Whoever runs the tests in the background may have had the signal ignored, which children inherit.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "zoo.cli.check.run = lambda arguments: (print('ready', flush=True), signal.pause())\n"
        "sys.exit(zoo.cli.main(['check', 'x']))"
    )
    with subprocess.Popen(
        [ZOO[0], "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
        assert process.wait() == 130
