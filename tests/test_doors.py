"""
The doors by themselves: flags, text, numbers, paths, and how a program ends.    pytest tests/test_doors.py
"""
import io
import math
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import doors
from doors import Flags, finite, inside, read_json, read_text, real, whole


def parsed(words, capsys, **more):
    """The value of a parser's only flag, or the line that refuses it."""
    parser = Flags("Test.")
    parser.add_argument("--value", **more)
    try:
        return parser.parse_args(words).value
    except SystemExit as end:
        assert end.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "--value" in line or words == ["--nonsense"]
        return line


def test_flags_that_are_numbers(capsys):
    def count(text):
        return parsed(["--value", text], capsys, type=whole(1, 10))

    def share(text):
        return parsed(["--value", text], capsys, type=real(0, 1))

    def above(text):
        return parsed(["--value", text], capsys, type=real(above=0))

    assert count("10") == 10 and share("1") == 1.0 and share("0") == 0.0 and above("1e-9") == 1e-9
    for read, words in (
        (count, "0 11 1e3 1.5 nan x 1_0 ٣ 99999999999999999999"),
        (share, "nan inf -0.1 1.1 1e400 x"),
        (above, "nan inf 0 -1 1e400"),
    ):
        for text in words.split():
            line = read(text)
            assert isinstance(line, str) and "expected" in line and text in line, (text, line)
    assert "unrecognized" in parsed(["--nonsense"], capsys)


def test_help_tells_defaults_that_can_be_typed(capsys):
    parser = Flags("Test.")
    parser.add_argument("--steps", type=whole(1), default=10, help="of Euler")
    parser.add_argument("--no-route", dest="route", action="store_false", help="hide it")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "of Euler (default: 10)" in shown and "True" not in shown


def test_numbers():
    assert all(map(finite, (0, -1, 1.5, 10**30)))
    assert not any(map(finite, (math.nan, math.inf, True, None, "1", [1], 10**400)))


@pytest.mark.parametrize("name", ["", "../x", "a/../../x", "/etc/passwd", "..\\x", "C:\\x", "a\0b"])
def test_names_do_not_lead_out_of_their_folder(name, tmp_path):
    with pytest.raises(ValueError, match="index: shard is .*, expected a file in") as error:
        inside(str(tmp_path), name, "index: shard")
    assert "\n" not in str(error.value)


def test_names_inside_a_folder():
    assert inside("here", "a/b.png", "-") == os.path.join("here", "a/b.png")
    assert inside("here", "..a", "-") == os.path.join("here", "..a")


def test_text(tmp_path):
    file = tmp_path / "file.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_text(file) == '{"a": 1}' and read_json(file) == {"a": 1}
    for content in (b"\xff\xfe{\0", b"\x80", b"a\0b"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="file.json: expected text in UTF-8$"):
            read_text(file)
    with pytest.raises(FileNotFoundError, match="gone.json: missing$"):
        read_text(tmp_path / "gone.json")
    with pytest.raises(ValueError, match=f"{tmp_path.name}: Is a directory$"):
        read_text(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: expected a file$"):  # and does not wait for it
        read_text(tmp_path / "pipe")


@pytest.mark.parametrize("text", ["", "{", "NaN", '{"a": 1e999}', '{"a": Infinity}', "[" * 100_000, "9" * 5000, "5"])
def test_what_is_no_json_object(text, tmp_path):
    file = tmp_path / "file.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="file.json: ") as error:
        read_json(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


# --------------------------------------------------------------------------------------------------
# How a program ends


@pytest.mark.parametrize("error, status, said", [
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError(), 1, "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 1, "out of memory"),
    (ValueError("frames: expected 1 or more"), 1, "frames: expected 1 or more"),
])  # fmt: skip
def test_what_ends_in_a_line(error, status, said, capsys):
    def fails():
        raise error

    with pytest.raises(SystemExit) as end:
        doors.run(fails)
    if isinstance(end.value.code, str):
        assert status == 1 and said in end.value.code and "\n" not in end.value.code
    else:
        assert end.value.code == status and said in capsys.readouterr().err


def test_what_is_our_own_mistake_is_told_whole():
    for error in (RuntimeError("shapes differ"), KeyError("x"), AssertionError()):

        def fails(error=error):
            raise error

        with pytest.raises(type(error)):
            doors.run(fails)


def test_a_console_that_lacks_a_character(monkeypatch):
    """cp1252 and ASCII have no check mark."""
    for encoding in ("cp1252", "ascii"):
        console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", console)
        doors.run(lambda: print("sample 1 ✓ 0.19 m"))
        console.flush()
        assert console.buffer.getvalue().decode("ascii").split() == ["sample", "1", "?", "0.19", "m"]


def test_a_reader_that_has_seen_enough():
    """python ... | head: no traceback."""
    script = "import doors; doors.run(lambda: [print(i) for i in range(100_000)])"
    command = f"{sys.executable} -c '{script}' | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "0\n" and done.stderr == ""


def test_python_reads_more_than_numbers(capsys):
    for text in ("1_5", "٣.5", "0x10", "1e", ".", ""):
        assert "expected a number" in parsed([f"--value={text}"], capsys, type=real())
        with pytest.raises(ValueError, match="x is .*, expected a finite number"):
            doors.number_of(text, "x")
    assert doors.number_of(" -1.5e-3 ", "x") == -0.0015 and doors.number_of(".5", "x") == 0.5


def test_ctrl_c_says_what_it_is_told(capsys):
    def stops():
        raise KeyboardInterrupt("the checkpoint of step 2 in out is intact")

    with pytest.raises(SystemExit):
        doors.run(stops)
    assert capsys.readouterr().err.endswith(": interrupted; the checkpoint of step 2 in out is intact\n")
