"""The pages tell the truth: their links, paths, commands, flags, and the code that they show.

    python -m pytest tests/test_docs.py
    python tests/test_docs.py               puts right the line number behind every link, in place

A link such as [`Expert`](alpamayo.py#L900) names a definition; where several have the name, it says
which: [`Alpamayo.forward`](alpamayo.py#L500). A flag, [`--train`](train.py#L80), is where it is
added."""
import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import warnings
from functools import cache
from glob import glob

import pytest
import torch
from conftest import ROOT

README = "README.md"
WITH_COMMANDS = [README, *sorted(glob("docs/*.md", root_dir=ROOT))]
PAGES = WITH_COMMANDS + ["world/README.md", "kernels/README.md"]
PAGES = [page for page in PAGES if os.path.exists(os.path.join(ROOT, page))]
CODE_LINK = re.compile(r"(\[`([\w.-]+)`\]\(([\w./-]+\.py)#L)(\d+)\)")
LINK = re.compile(r"\]\(([\w./-]*)(?:#([\w-]+))?\)")
PROGRAM = r"(?:[A-Z_]+=\w+ )?(?:python3?|torchrun|pip) "


@cache
def text_of(page):
    with open(os.path.join(ROOT, page)) as file:
        return file.read()


def beside(page, path):
    """The path from the root of what a page's link names."""
    return os.path.normpath(os.path.join(os.path.dirname(page), path))


# --------------------------------------------------------------------------------------------------
# Links


@cache
def definitions(file):
    """{name: line} of a Python file: what stands at its margin, methods and fields as `Class.name`,
    flags as `--name`."""
    found = {}
    owner = ""
    for number, line in enumerate(text_of(file).splitlines(), 1):
        for flag in re.findall(r'"(--[a-z][\w-]*)"', line):
            found.setdefault(flag, number)
        match = re.match(r"(?:def |class )?(\w+)(?: = |: |\(|:)", line)
        if match:
            owner = match[1] if line.startswith("class ") else ""
            found.setdefault(match[1], number)
        match = re.match(r"    (?:def (\w+)\(|(\w+): [\w.]+(?: =|  #|$))", line)
        if match and owner:
            found.setdefault(f"{owner}.{match[1] or match[2]}", number)
    return found


def line_of(file, name):
    """The line of a definition, by its dotted name or the end of it. ValueError where it is not
    exactly one."""
    known = definitions(file)
    fitting = [name] if name in known else [n for n in known if n.endswith("." + name)]
    if not fitting:
        raise ValueError(f"{file} has no {name}")
    if len(fitting) > 1:
        raise ValueError(f"{file}: which {name}? {', '.join(fitting)}")
    return known[fitting[0]]


@pytest.mark.parametrize("page", PAGES)
def test_links_to_code_point_at_the_line(page):
    wrong = []
    for _, name, path, line in CODE_LINK.findall(text_of(page)):
        true = line_of(beside(page, path), name)
        if int(line) != true:
            wrong.append(f"{path}: {name} is at line {true}, not {line}")
    assert not wrong, f"{page}: `python tests/test_docs.py` puts right\n" + "\n".join(wrong)


def test_the_index_is_there():
    assert len(CODE_LINK.findall(text_of(README))) >= 50


def headings(page):
    """The anchors of a page, as GitHub makes them of its headings."""
    lines = re.findall(r"^#+ +(.+)$", text_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_exists(page):
    for path, anchor in LINK.findall(text_of(page)):
        target = beside(page, path) if path else page
        assert os.path.exists(os.path.join(ROOT, target)), f"{page}: {path}"
        if anchor and target.endswith(".md"):
            assert anchor in headings(target), f"{page}: {target} has no heading {anchor}"


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- table" in text_of(page)])
def test_tables_are_those_of_the_rows(page):
    """`python -m tools.experiments page` puts right."""
    from tools.experiments import rows
    from tools.experiments.__main__ import EXPERIMENTS

    assert rows.fill(text_of(page), rows.read(rows.KEPT), EXPERIMENTS) == text_of(page)


# --------------------------------------------------------------------------------------------------
# Paths and commands


def code_in(page):
    """Lines that are indented as code, and what stands between backquotes."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S)  # Python, see below
    text = re.sub(r" \\\n +", " ", text)  # a command may go on in the next line
    if page == "docs/moved.md":  # its tables begin with what is no more
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)
    lines = [line.split("  #")[0].strip() for line in re.findall(r"^ {4,}(.+)$", text, re.M)]
    return lines + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_exists(page):
    for code in code_in(page):
        for path in re.findall(r"(?<![\w/.-])[\w/-]+\.(?:py|md)\b", code):
            places = {os.path.join(ROOT, path), os.path.join(ROOT, os.path.dirname(page), path)}
            assert any(map(os.path.exists, places)), f"{page}: {path} in `{code}`"


COMMANDS = sorted({
    command.strip()
    for page in PAGES
    for code in code_in(page)
    if re.match(PROGRAM, code)
    for command in code.split("&&")
})


@cache
def help_of(program, *words):
    """What `--help` prints, of a script (train.py) or a module (tools.world)."""
    saved, sys.argv = sys.argv, [program, *words, "--help"]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of runpy, that the module was imported before
                if program.endswith(".py"):
                    runpy.run_path(os.path.join(ROOT, program), run_name="__main__")
                else:
                    runpy.run_module(program, run_name="__main__")
    finally:
        sys.argv = saved
    assert not end.value.code, f"{program} --help: {end.value.code}"
    return printed.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_exists(command):
    words = shlex.split(command)
    if "-m" in words and "=" not in words[words.index("-m") + 1]:
        at = words.index("-m") + 1
    else:
        at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if at is None or words[at] in ("venv", "pip"):
        return
    if words[at] == "pytest":  # test_every_file_exists looks for the files
        return
    program, given = words[at], words[at + 1 :]
    known = help_of(program)
    commands = re.search(r"\{([a-z]+(?:,[a-z]+)+)\}\s+\.\.\.", known)
    if commands and given and given[0] in commands[1].split(","):
        known += help_of(program, given[0])
    for word in given:
        flag = word.split("=")[0]
        if flag.startswith("--"):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", known), f"{program} has no flag {flag}"


def test_commands_are_found():
    assert len(COMMANDS) >= 30


# --------------------------------------------------------------------------------------------------
# The front page


def test_the_front_page_is_short():
    assert len(text_of(README).splitlines()) <= 200
    assert len(text_of(README).split()) <= 2400


def test_the_first_command_works(tmp_path):
    """What a newcomer runs, with the shipped checkpoint, from any folder."""
    picture = tmp_path / "sample.png"
    command = [sys.executable, os.path.join(ROOT, "sample.py"), "--out", str(picture)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert picture.stat().st_size > 50_000
    truth = re.search(r"truth +(.+)", done.stdout).group(1)
    assert truth in text_of(README)
    assert done.stdout.count(truth) >= 4, done.stdout  # most of six samples say what is true


@pytest.mark.in_pytorch("nano in Triton's interpreter takes minutes and would teach nothing more")
def test_the_python_of_the_front_page_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"^```python\n(.*?)^```", text_of(README), re.M | re.S)
    lines = [line for line in code.splitlines() if not re.match("import|from", line)]
    assert len(lines) <= 8
    here = {}
    exec(code, here)
    shown = capsys.readouterr().out
    assert here["out"].reasoning[0][0] in shown


def test_the_shipped_checkpoint_is_small():
    weights = os.path.join(ROOT, "checkpoints", "nano", "model.safetensors")
    assert os.path.getsize(weights) <= 8e6


# --------------------------------------------------------------------------------------------------
# Other pages


def test_recipes_are_short():
    recipes = re.split(r"^## ", text_of("docs/recipes.md"), flags=re.M)[1:]
    names = [recipe.split("\n")[0] for recipe in recipes]
    assert {"Add a situation", "Add a reward", "Add a vision encoder", "Add a layout of clips",
            "Add a preset"} <= set(names)
    for name, recipe in zip(names, recipes, strict=True):
        lines = [line for line in recipe.splitlines()[1:] if line.strip()]
        assert len(lines) <= 15, f"{name}: {len(lines)} lines"


def test_the_kernel_that_is_explained(tmp_path, monkeypatch):
    """kernels/README.md shows one: it computes what the line of PyTorch above it does."""
    pytest.importorskip("triton")
    import cpu_triton  # noqa: F401

    text = text_of("kernels/README.md")
    line = re.search(r"^    v = .*$", text, re.M)[0]
    kernel = re.search(r"^(    @triton\.jit.*?)^    speeds\[", text, re.M | re.S)[1]
    launch = re.search(r"^    speeds\[.*?$", text, re.M)[0]
    imports = "import triton\nimport triton.language as tl\n\n\n"
    (tmp_path / "explained.py").write_text(imports + textwrap.dedent(kernel))
    monkeypatch.syspath_prepend(tmp_path)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        here = dict(accel=torch.randn(5, 64), v0=torch.rand(5), v=torch.empty(5, 64))
    here |= dict(cars=5, dt=0.1)
    exec("import triton; from explained import speeds; " + launch.strip(), here)
    torch.testing.assert_close(here["v"], eval(line.split("=", 1)[1].strip(), dict(here)))


def put_right(page):
    """Write the true line number behind each of a page's links; returns what it could not find."""
    lost = []

    def true(match):
        start, name, path, line = match.groups()
        try:
            line = line_of(beside(page, path), name)
        except (ValueError, OSError) as error:
            lost.append(f"{page}: {error}")
        return f"{start}{line})"

    text = CODE_LINK.sub(true, text_of(page))
    if text != text_of(page):
        with open(os.path.join(ROOT, page), "w") as file:
            file.write(text)
        print(f"{page}: put right")
    return lost


if __name__ == "__main__":
    os.chdir(ROOT)
    raise SystemExit("\n".join(sum(map(put_right, PAGES), [])) or None)
