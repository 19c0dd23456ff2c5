# ruff: noqa: E501  (a case of a table is one line)
"""The command itself: unknown verbs and options, exit statuses, pipes and Ctrl-C, in real processes where it matters."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess

import pytest

from tests.cli.helpers import ENVIRONMENT, ZOO, fails
from zoo.cli import main

LONG = 5000 * "a"
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
    (["describe", "x", "--length", "3q"], "--length: must be a number of tokens such as 4096, 128k or 1M, at most 1024G, got '3q'"),
    (["describe", "x", "--length", "0"], "--length: must be a number of tokens such as 4096, 128k or 1M, at most 1024G, got '0'"),
    (["describe", "x", "--length", "1025G"], "--length: must be a number of tokens such as 4096, 128k or 1M, at most 1024G, got '1025G'"),
    (["check", ""], "FILE: is empty; give a name"),
    (["describe", ""], "FILE: is empty; give a name"),
    (["generate", "", "--prompt", "x"], "DIR: is empty; give a name"),
    (["import", "", "x"], "SRC: is empty; give a name"),
    (["export", "x", ""], "DST: is empty; give a name"),
    (["describe", "x", "--html", ""], "--html: is empty; give a name"),
    (["generate", "x", "--prompt", "a", "--offload", ""], "--offload: is empty; give a name"),
    (["import", "x", "y", "--shard-size", "1000TB"], "--shard-size: must be a size such as 5GB or 200MB, got '1000TB'"),
    (["check", LONG], f"{LONG}: cannot be read (File name too long); check its name and permissions"),
    (["describe", LONG], f"{LONG}: cannot be read (File name too long); check its name and permissions"),
    (["generate", LONG, "--prompt", "x"], f"{LONG}: is not a folder; give the folder of a saved model, such as runs/NAME/export"),
    (["generate", "x", "--prompt", "a", "--temperature", "1e-30"], "--temperature: 1e-30 is too small to divide by; give 0, which takes the likeliest token, or at least 1e-06"),
    (["describe", "x", "--batch", "0"], "--batch: must be a whole number >= 1, got 0"),
    (["describe", "x", "--batch", "two"], "--batch: must be a whole number, got 'two'"),
    (["generate", "x", "--prompt", "a", "--temperature", "-1"], "--temperature: must be a number >= 0, got -1"),
    (["generate", "x", "--prompt", "a", "--temperature", ".inf"], "--temperature: must be a number, got '.inf'"),
    (["generate", "x", "--prompt", "a", "--top-p", "0"], "--top-p: must be a number > 0 and <= 1, got 0"),
    (["generate", "x", "--prompt", "a", "--top-p", "1.1"], "--top-p: must be a number > 0 and <= 1, got 1.1"),
    (["generate", "x", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens: must be a whole number >= 1, got 0"),
    (["generate", "x", "--prompt", "a", "--seed", "-1"], "--seed: must be a whole number >= 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=[" ".join(case[0])[:60] or "nothing" for case in MISTAKES]
)
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        ("> /dev/full", "error: the output cannot be written (No space left on device); give it another place\n"),
        (">&-", "error: the output is closed; give it a terminal, a file or a pipe\n"),
        (">&- 2>&-", ""),
    ],
)
def test_an_output_that_cannot_be_written(redirection: str, message: str) -> None:
    command = f"{shlex.join([*ZOO, 'check', 'configs/models/minimax-tiny.yaml'])} {redirection}"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stderr) == (2, message)


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
