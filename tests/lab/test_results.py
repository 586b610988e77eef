"""How results reach the disk, and what an interrupt says."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sib_fast import cli
from sib_fast.lab import results, train
from sib_fast.lab.results import Interrupted, remove_partials, write_atomically


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_or_the_new_file(tmp_path):
    path, size = tmp_path / "file", 1 << 24
    # the module alone, or the process would spend its time on importing torch
    code = (
        "import importlib.util, sys, types, pathlib\n"
        "sys.modules['torch'] = types.ModuleType('torch')\n"
        f"spec = importlib.util.spec_from_file_location('results', {results.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"path, contents = pathlib.Path({str(path)!r}), [bytes([k]) * {size} for k in (1, 2)]\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for content in contents: module.write_atomically(path, content)\n"
    )
    for k in range(8):
        write_atomically(path, b"\0" * size)
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.003 * k)
            process.kill()
        content = path.read_bytes()
        assert len(content) == size
        assert content in (b"\0" * size, b"\1" * size, b"\2" * size)
    remove_partials(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(self, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "sib-fast train: interrupted. Nothing has been written; the same command starts again.\n"),
        (Interrupted("Two are kept."), "sib-fast train: interrupted. Two are kept.\n"),
        (Interrupted(""), ""),  # of a process that is not the first
    ],
)
def test_an_interrupt_is_a_sentence_and_130(error, said, monkeypatch, capsys, tmp_path):
    def interrupted(*arguments, **named):
        raise error

    monkeypatch.setattr(train, "run", interrupted)
    assert cli.main(["train", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == said


def test_commands_that_write_nothing_until_the_end_end_so_too(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.doctor, "main", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err.startswith("sib-fast doctor: interrupted. ")
