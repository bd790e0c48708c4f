"""
The tools as a person runs them, on models of random weights.

    python -m pytest tests/test_tools.py
"""
import ast
import json
import os
import re
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from test_sample import checkpoint, run, write_clip  # noqa: F401
from test_vision import H, W, build, in_double, scene  # noqa: F401

import alpamayo
import data
import doors
import draw
import motion
import sample
import train
import world
from alpamayo import Alpamayo
from tools import blind, evaluate, gallery, judge, label
from tools.common import batches
from tools.experiments import __main__ as experiments
from tools.experiments import (
    decoding,
    demand,
    latency,
    lessons,
    measures,
    reasoning,
    rewards,
    rows,
    scaling,
    signal,
    trainings,
    vision,
)

NANO = os.path.join(ROOT, "checkpoints", "nano")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(autouse=True)
def render_here(monkeypatch):
    """Scenes are rendered in this process: starting others takes longer."""
    monkeypatch.setattr(os, "cpu_count", lambda: 0)


@pytest.fixture(autouse=True)
def blind_in_a_moment(monkeypatch):
    """Drivers without eyes that learn from a few scenes."""
    monkeypatch.setattr(blind, "SCENES", 40)
    monkeypatch.setattr(blind, "STEPS", 20)
    monkeypatch.setattr(blind, "ROUNDS", 4)


@pytest.fixture
def command(monkeypatch):
    """Sets the command line that a script of this process sees."""
    return lambda *words: monkeypatch.setattr(sys, "argv", [*map(str, words)])


@pytest.fixture
def again(command, tmp_path, monkeypatch, capsys):
    """Runs a tool in this process, in the test's folder, and returns the lines that it prints."""

    def run_tool(tool, flags):
        monkeypatch.chdir(tmp_path)
        command("tool", *flags)
        tool.main()
        return capsys.readouterr().out.splitlines()

    return run_tool


# --------------------------------------------------------------------------------------------------
# evaluate


def test_open_loop(checkpoint, tmp_path, again):  # noqa: F811
    flags = ("--checkpoint", checkpoint, "--scenes", 6, "--n", 2, "--steps", 2, "--batch", 4)
    flags += ("--blind", checkpoint)
    said = again(evaluate, flags)
    record = json.loads(said[-1])
    rows = record.pop("rows")
    assert record == {
        "checkpoint": checkpoint, "keep": 1, "retrieve": 1, "split": "val", "samples": 2, "seed": 0}
    kinds = [row["scenes"] for name, row in rows.items() if name in world.SITUATIONS]
    assert rows["all"]["scenes"] == sum(kinds) == 6
    eyeless = list(evaluate.blind.fit_drivers())
    assert eyeless == ["constant velocity", "fixed offsets", "blind network"]
    assert rows["fixed offsets"]["minade"] < rows["fixed offsets"]["ade"]
    assert rows["constant velocity"]["minade"] == rows["constant velocity"]["ade"]
    removed = 1 - rows["all"]["ade"] / rows["blind network"]["ade"]
    assert rows["all"]["eyes"] == pytest.approx(removed, abs=1e-3)
    assert rows["blind network"]["eyes"] == 0 and "both" not in rows["blind network"]
    assert rows["trained blind"] == rows["no images (grey)"]  # the same weights, shown the same
    assert list(rows)[-8:-6] == ["all", "without the route"] and list(rows)[-3:] == eyeless
    assert said[: len(rows) + 2] == evaluate.open_table(rows).splitlines()
    assert said[0] == (
        "| situation | scenes | ADE | longitudinal | lateral | both | exact | minADE | eyes remove, % |")
    assert again(evaluate, flags) == said  # nothing is random but by the seed


def test_what_a_model_is_not_shown_matters(cache, command, capsys):
    """Rows differ; --no-route hides the route in all of them, and then none is without it."""
    flags = ("evaluate", "--checkpoint", NANO, "--scenes", 3, "--n", 1, "--steps", 1)
    found = []
    for more in ((), ("--no-route",)):
        command(*flags, "--cache", cache, *more)
        evaluate.main()
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"])
    told, untold = found
    for row in told["without the route"], untold["all"]:  # whose blind networks differ
        assert row.pop("eyes") and row.pop("blind_ade") and row.pop("blind_ade_se")
    assert told["without the route"] == untold["all"]
    assert told["without the route"]["ade"] != told["all"]["ade"]
    assert told["all"] != told["no images (grey)"] != told["another scene's images"] != told["all"]
    assert "without the route" not in untold


def test_drivers_without_eyes_learn_what_history_tells(monkeypatch):
    """All cars of these scenes keep the acceleration that they show: the network finds out, fixed
    offsets cannot. Six fixed offsets fit six kinds of paths, and one of them fits in the middle."""
    def scenes(first, count):
        scene = data.make_scenes(range(first, first + count), **blind.BLINK)
        accel = torch.linspace(-1, 1, count)[torch.randperm(count)]
        scene["ego_kinematics"][:, -1, 1] = accel
        scene["ego_future_xyz"] = blind.going_on(scene)[:, 0].clone()
        t = 0.1 * torch.arange(1, 65)
        scene["ego_future_xyz"][..., 0] += accel[:, None] / 2 * t**2
        return scene

    torch.manual_seed(0)
    known, others = scenes(0, 200), scenes(world.SEEDS["val"], 50)
    monkeypatch.setattr(blind, "STEPS", 200)
    truth = others["ego_future_xyz"]
    error = {}
    for fit in (blind.fit_offsets, blind.fit_network):
        for modes in (1, 6):
            paths = fit(known, modes)(others)
            assert paths.shape == (50, modes, 64, 3)
            error[fit, modes] = motion.min_ade(paths, truth).mean()
    assert error[blind.fit_network, 1] < 0.4 * error[blind.fit_offsets, 1]
    assert error[blind.fit_offsets, 6] < 0.4 * error[blind.fit_offsets, 1]
    assert torch.equal(blind.fit_network(known, 1)(others), blind.fit_network(known, 1)(others))


def test_no_scene_is_left_its_own_images(cache):
    scenes = data.load_world("val", 3, folder=cache, size=(32, 64))
    others = evaluate.OtherImages(scenes)
    shown = [scene["images"] for _, scene in batches(others, 2)]  # the last batch is of one
    assert torch.equal(torch.cat(shown), scenes.batch([2, 0, 1])["images"])
    assert len(others) == 3 and others.batch([2])["name"] == [scenes.names[2]]


def test_closed_loop(checkpoint, tmp_path, again):  # noqa: F811
    flags = ("--checkpoint", checkpoint, "--drive", 3, "--split", "tail", "--seconds", 2)
    flags += ("--steps", 2, "--batch", 2, "--keep", 0.5, "--retrieve", 0.8)
    code, said, trouble = run(tmp_path, "-m", "tools.evaluate", *flags)
    assert code == 0, trouble
    record = json.loads(said[-1])
    rows = record.pop("rows")
    assert record == {
        "checkpoint": checkpoint, "keep": 0.5, "retrieve": 0.8, "split": "tail", "seed": 0}
    assert list(rows) == ["expert", "go straight", "stand still", "model"]
    assert said[: len(rows) + 2] == evaluate.drive_table(rows).splitlines()
    expert = rows["expert"]
    assert expert["close"] == expert["off_road"] == expert["events"] == expert["ran"] == 0
    assert expert["score"] == expert["progress"] == 1 and expert["km"] > 0.01
    for row in rows.values():
        shares = [row[key] for key in ("score", "close", "collision", "comfort")]
        assert min(shares) >= 0 and max(shares) <= 1
    assert again(evaluate, flags) == said


def test_the_score_stands_first_and_kilometres_between_ends_last():
    row = {"scenarios": 4, "km": 3.0, "events": 2, "score": 0.75, "score_se": 0.05}
    for name in evaluate.DRIVES:
        row = {name: 0.25, name + "_se": 0.1} | row
    lines = evaluate.drive_table({"model": row, "clean": row | {"events": 0}}).splitlines()
    assert lines[0].startswith("| policy | score | close encounter |")
    assert lines[2].startswith("| model | 0.75 ± 0.05 | 25.0 ± 10.0 |") and lines[2].endswith("| 1.50 |")
    assert lines[3].endswith("| > 3.0 |")


def test_who_stands_still_brakes_in_comfort():
    seeds = range(world.SEEDS["val"], world.SEEDS["val"] + 12)
    options = dict(size=(2, 4), frames=1, camera_ids=(1,))
    met = data.drive(evaluate.stand_still, seeds, seconds=10, **options)
    speeds = []
    data.drive(
        lambda scene: speeds.append(scene["ego_kinematics"][:, -1, 0]) or evaluate.stand_still(scene),
        seeds, seconds=10, **options)  # fmt: skip
    assert speeds[0].max() > 5 and speeds[-1].max() == 0
    assert met["comfort"].mean() > 0.98 and met["progress"].mean() < 0.6


WRONG = {
    evaluate: [
        "--drive 1 --replan 0", "--drive 1 --replan nan", "--drive 1 --replan 9", "--drive 1 --seconds 0", "--drive 0", "--seed -1",
        "--n 0", "--n 1e20", "--scenes 0", "--steps 0", "--batch 0", "--size 0 0", "--size -1 2", "--keep nan", "--keep 0", "--retrieve 1.5",
        "--split snow", "--device tpu", "--cameras 1", "--clip c --drive", "--clip c --cameras 9", "--seconds inf",
    ],
    gallery: ["", "a_file", "a_file/b", "g --replan 0.01", "g --seconds nan", "g --size 0 128", "g --seed -1", "g --steps 1e9"],
    judge: ["", "localhost:8000", "ftp://a/v1", "http://", "http://a --scenes 0", "http://a --size 0 0", "http://a --device x"],
    label: ["", "clip --out a_file", "clip --nowhere"],
    experiments: [
        "", "snow", "vision --jobs 0", "vision --eval 0", "vision --train-steps -1", "vision --scenes 1e20", "vision --seeds -1",
        "vision --out a_file", "vision --picture a.xyz", "vision --picture a_file/a.png", "vision --size 0 0", "vision --device tpu",
        "size --train-steps 0", "lessons --eval 0", "demand --plans 0", "page --jobs 2",
        "rl --rows none", "rl --drive 0", "rl --splits snow", "signal --draws 1", "list --jobs 2", "latency --plans 0", "latency --presets huge",
    ],
}  # fmt: skip


@pytest.mark.parametrize("tool, flags", [(tool, flags) for tool in WRONG for flags in WRONG[tool]])
def test_a_wrong_flag_is_one_line_before_the_work(tool, flags, tmp_path, command, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doors, "name_of_program", lambda: tool.__name__)
    (tmp_path / "a_file").touch()
    command("tool", *flags.split())
    with pytest.raises(SystemExit) as exit:
        tool.main()
    said = capsys.readouterr()
    assert exit.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert re.match(rf"{re.escape(tool.__name__)}( \w+)?: ", said.err)
    assert os.listdir(tmp_path) == ["a_file"]


def test_what_cannot_be_driven_is_one_line(checkpoint, tmp_path, command, cache):  # noqa: F811
    code, said, trouble = run(tmp_path, "-m", "tools.evaluate", "--checkpoint", "nowhere")
    assert code == 1 and said == [] and len(trouble) == 1, trouble
    assert trouble[0].startswith("tools.evaluate: nowhere: missing")
    flags = ("--checkpoint", checkpoint)
    for tool, more, word in (
        (gallery, (tmp_path / "g", "--situation", "snow"), "--situation 'snow'"),
        (gallery, (tmp_path / "g", "--replan", 0.25), "replan"),
        (evaluate, ("--size", 50, 100, "--cache", cache), "--size: height and width must be mult"),
        (evaluate, ("--clip", tmp_path), "no ego motion in it"),
    ):
        command("tool", *flags, *more)
        with pytest.raises((ValueError, OSError), match=word):
            tool.main()


def test_open_loop_in_clips(tmp_path, again):
    """All scenes of a folder; shares of those that state decisions; rows that a clip can fill."""
    clip = write_clip(tmp_path / "clip", (1, 6))
    flags = ("--checkpoint", NANO, "--clip", clip, "--n", 1, "--steps", 1, "--cameras", 6)
    said = again(evaluate, flags)
    record = json.loads(said[-1])
    rows = record.pop("rows")
    assert list(rows) == ["all", "no images (grey)", "CV", "CTRV", "CTRA"]
    assert record["clip"] == str(clip) and "split" not in record and rows["all"]["scenes"] == 4
    assert "both" not in rows["all"] and said[2].count("| - | - | - | - |") == 1
    assert "eyes" not in rows["all"] and said[2].endswith(" | - |")
    assert rows["CTRV"]["ade"] == 0  # the car drives straight on
    texts = [{"time": 2.5, "text": "Stop and keep lane since the light is red."}, {"time": 3, "text": "Watch out!"}]
    (clip / "reasoning.json").write_text(json.dumps(texts))
    row = json.loads(again(evaluate, flags)[-1])["rows"]["all"]
    assert row["scenes"] == 2 and row["both"] in (0, 1)


# --------------------------------------------------------------------------------------------------
# gallery


def test_gallery(checkpoint, tmp_path, command, capsys):  # noqa: F811
    command("gallery", tmp_path / "pictures", "--checkpoint", checkpoint, "--seconds", 1.5,
            "--steps", 2, "--situation", "deer")
    gallery.main()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("drive      deer, seed 300000") and "km 0.0" in said[0]
    with Image.open(tmp_path / "pictures" / "drive.gif") as film:
        assert film.n_frames == 3  # a picture a plan
    with Image.open(tmp_path / "pictures" / "gallery.png") as sheet:
        assert sheet.size[0] > 1000 and len(sheet.convert("L").getcolors()) > 100


# --------------------------------------------------------------------------------------------------
# judge


class Stub(BaseHTTPRequestHandler):
    """A language model that gives every reasoning a 3."""

    def do_POST(self):
        self.server.asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        answer = {"choices": [{"message": {"content": "Grade: 3"}}]}
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = HTTPServer(("127.0.0.1", 0), Stub)
    server.asked = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_judge(server, cache, command, capsys, monkeypatch):
    grades = iter([5, 3, 4, 0])
    monkeypatch.setattr(judge.rl, "grade", lambda said, true: next(grades))
    url = f"http://127.0.0.1:{server.server_port}/v1"
    command("judge", url, "--checkpoint", NANO, "--scenes", 4, "--cache", cache)
    judge.main()
    said = capsys.readouterr().out.splitlines()
    found = json.loads(said[-1])
    assert found.pop("checkpoint") == NANO and 1 <= server.asked <= 4  # the same is asked once
    assert found == {
        "scenes": 4, "rule, mean": 3, "judge, mean": 3, "equal": 0.25, "within one": 0.5}
    assert said[0].startswith("| scenes | rule, mean |") and said[2].startswith("| 4 | 3 | 3 |")


# --------------------------------------------------------------------------------------------------
# experiments


@pytest.fixture
def here(command, monkeypatch):
    """Trains in this process; a list of the words of each training."""
    trained = []

    def run_here(words, **_):
        trained.append(words)
        command(*words[1:], "--batch", "2", "--val-scenes", "2", "--device", "cpu")
        train.main()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(trainings.subprocess, "run", run_here)
    return trained


def test_rl_rows_are_trained_and_measured_once(here, cache, tmp_path, command, monkeypatch, capsys):
    monkeypatch.setitem(rewards.ROWS, "nft", "--scenes 4 --group 2 --flow-steps 2")
    flags = ("experiments", "rl", "--rows", "before", "nft", "--eval", 2, "--drive", 1, "--train-steps", 1,
             "--splits", "tail", "--cache", cache, "--out", tmp_path)  # fmt: skip
    monkeypatch.setattr(rewards, "drive_scenes", lambda policy, seeds, **_: {
        name: torch.zeros(1) for name in ("score", "close", "off_road", "progress")})
    found = []
    for _ in range(2):
        command(*flags)
        experiments.main()
        found.append(capsys.readouterr().out.splitlines())
        monkeypatch.setattr(rewards, "think_and_drive", lambda *_: 1 / 0)  # then all is known
    lines = found[1]
    assert found[0][-len(lines) :] == lines and len(here) == 1  # before them, what training said
    assert lines[0].startswith("| tail | both right, % |") and lines[2].startswith("| before |")
    assert "| tail, score | before | nft |" in lines and "| tail, both right, % | before | nft |" in lines
    numbers = json.loads(lines[-1])["rows"]
    assert list(numbers) == ["before", "nft"] and 0 <= numbers["nft"][0]["tail"]["reason"] <= 5


def test_the_signal_in_a_gradient(cache, command, monkeypatch, capsys):
    """What a head is not rewarded for has no gradient; a row for each part and sum."""
    monkeypatch.setattr(signal, "SCENES", 2)
    usual = rewards.flags_of_rl()
    usual.group, usual.flow_steps = 3, 2
    monkeypatch.setattr(signal, "flags_of_rl", lambda: usual)
    command("experiments", "signal", "--draws", 2, "--cache", cache)
    experiments.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| rewarded for | thought: norm | cosine | drive by steps: norm | cosine | drive by nft: norm | cosine |"
    assert [line.split("|")[1].strip() for line in lines[2 : 2 + len(signal.PARTS)]] == list(signal.PARTS)


def test_ways_to_decode_a_path(cache, tmp_path, command, monkeypatch, capsys):
    """Every row is measured once; more samples are never worse, and a second run says the same but for the times."""
    monkeypatch.setattr(decoding, "ROWS", {name: decoding.ROWS[name] for name in ("128 tokens", "flow, 1 step")})
    monkeypatch.setattr(decoding, "HEATS", (0.6,))
    driven = []

    def drive(policy, seeds, **_):
        driven.append(policy(data.make_scenes(list(seeds), **data.view_of(alpamayo.PRESETS["nano"], (64, 128)))).shape)
        return {name: torch.zeros(1) for name in ("score", "close")}

    monkeypatch.setattr(decoding, "drive_scenes", drive)
    found = []
    for _ in range(2):
        command("experiments", "decoding", "--eval", 2, "--drive", 1, "--plans", 1, "--cache", cache, "--out", tmp_path)
        experiments.main()
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    found = [one["rows"] for one in found]
    assert driven == [(1, 64, 2)] * 2
    samples, again = (one.pop("samples") for one in found)
    best = list(samples["0.6"].values())
    assert samples == again and best == sorted(best, reverse=True)
    for row, numbers in found[0].items():
        assert numbers["ade"] == found[1][row]["ade"] > 0 and 0 < numbers["ms"] < numbers["ms of all"]


def test_milliseconds_of_a_plan(command, capsys):
    """A row for each way to drive, and what it cannot be faster than."""
    command("experiments", "latency", "--presets", "nano", "--plans", 1)
    experiments.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| nano, ms | vision | prefill | reasoning | path | all |"
    (rows,) = json.loads(lines[-1])["rows"].values()
    assert list(rows)[: len(latency.ROWS)] == list(latency.ROWS)
    assert "reasoning" not in rows["path only, by flow"]
    by_flow, by_tokens = (rows[f"floor, path by {way}"] for way in ("flow", "tokens"))
    assert all(ms > 0 for ms in by_flow.values()) and by_flow["flow"] < by_tokens["flow"]
    assert by_flow["reasoning"] == pytest.approx(by_tokens["flow"] * 40 / 128)


def test_the_same_checkpoint_learns_to_say_three_things(here, cache, tmp_path, command, monkeypatch, capsys):
    """Tables 6 to 8: four trainings for as many rows, since two share one; each measured as it was taught to speak."""
    spoke = []

    def plans(model, split, args, reason, route=True):
        spoke.append(reason)
        return {"ade": 1.0, "ade_se": 0.1}

    monkeypatch.setattr(measures, "plans", plans)
    monkeypatch.setattr(measures, "drives", lambda *_, **__: {"score": 0.5, "score_se": 0.1})
    file = tmp_path / "rows.jsonl"
    for _ in range(2):
        command("experiments", "reasoning", "--action-steps", 1, "--train-steps", 1, "--scenes", 4, "--cache", cache,
                "--out", tmp_path / "out", "--rows-to", file)  # fmt: skip
        experiments.main()
    assert len(here) == 4 and [("--says" in words) for words in here] == [False, False, True, False]
    assert sorted(spoke) == [False] * 8 + [True] * 8  # two splits, with and without the route; once
    said = capsys.readouterr().out
    assert said.count("| path only | 1.00 ± 0.10 | - |") == 4 and "Tables 6, 7, 8" in said
    found, about = rows.read(file)["reasoning"]
    assert list(found) == list(reasoning.ROWS) and found["path only"][0]["tail"]["drive score"] == 0.5
    assert about["command"] == "python -m tools.experiments reasoning --action-steps 1 --train-steps 1 --scenes 4"


def test_a_table_replaces_its_older_rows_and_the_docs_are_made_of_them(tmp_path, monkeypatch, capsys):
    about = {"command": "c", "settings": {"plans": 3}, "machine": "m", "date": "d", "code": "e"}
    ms = {"vision": 1.0, "prefill": 2.0, "flow": 3.0, "all": 6.0}
    file = tmp_path / "rows.jsonl"
    rows.write(file, "latency", {"old": {"row": ms}}, about)
    rows.write(file, "size", {"a": []}, about)
    rows.write(file, "latency", {"nano": {"row": ms}}, about)
    assert list(rows.read(file)) == ["size", "latency"] and list(rows.read(file)["latency"][0]) == ["nano"]
    page = tmp_path / "page.md"
    page.write_text("above\n\n<!-- table latency -->\nstale\n<!-- end -->\n\nbelow\n")
    for name, value in (("KEPT", file), ("DOCS", tmp_path)):
        monkeypatch.setattr(experiments.rows, name, value)
    monkeypatch.setattr(sys, "argv", ["experiments", "page"])
    for times in (1, 0):  # the second time there is nothing to do
        experiments.main()
        assert capsys.readouterr().out.count("made anew") == times
    text = page.read_text()
    assert "| row | 1.00 | 2.00 | - | 3.00 | 6.00 |" in text and "`c`: m, d, code `e`." in text and "stale" not in text
    assert text.startswith("above\n") and text.endswith("below\n")


@pytest.mark.parametrize("name", lessons.LESSONS)
def test_the_line_of_a_lesson_is_there(name):
    lesson = lessons.LESSONS[name]
    text = (lessons.ROOT / lesson.file).read_text()
    new = lessons.changed(text, lesson)
    ast.parse(new)
    different = [a for a, b in zip(text.splitlines(), new.splitlines()) if a != b]
    assert len(different) == 1
    with pytest.raises(ValueError, match=f"^{lesson.file}: expected once: "):
        lessons.changed(new, lesson)


def test_a_lesson_is_learned_in_a_copy(cache, tmp_path, command, monkeypatch, capsys):
    """The copy has the changed line, the project has not; what is not changed is measured once for all; then it is drawn."""
    common = ("experiments", "lessons", "--eval", 2, "--cache", cache, "--out", tmp_path, "--device", "cpu")
    command(*common, "--of", NANO)
    experiments.main()
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["ade"] > 0 and torch.tensor(numbers["paths"]).shape == (6, 64, 2)
    names = ("one Euler step", "no rotation in the tower", "greedy rollouts")
    monkeypatch.setattr(lessons, "LESSONS", {name: lessons.LESSONS[name] for name in names})
    ran = []

    def look(words, cwd, **_):
        if words[1] == "train.py":
            ran.append("train")
            folder = words[words.index("--out") + 1]
            os.makedirs(folder)
            line = json.dumps({"step": 1, "one_text": 0.25, "val": {}})
            open(f"{folder}/log.jsonl", "w").write(line + "\n")
        else:
            changed = [file for file in ("alpamayo.py", "rl.py") if open(f"{cwd}/{file}").read() != open(f"{ROOT}/{file}").read()]
            ran.append(changed)
            numbers["ade"] = 1.0 + len(changed)
        return SimpleNamespace(returncode=0, stdout=json.dumps(numbers))

    monkeypatch.setattr(lessons.subprocess, "run", look)
    command(*common)
    experiments.main()
    said = capsys.readouterr().out
    assert ran == [["alpamayo.py"], [], ["alpamayo.py"], "train", ["rl.py"], "train", []]
    assert re.search(r"\| one Euler step \| as shipped \| 1.00 ± [\d.]+ -> 2.00 ± ", said) and "`one_text` 0.25 -> 0.25" in said
    command(*common, "--picture", tmp_path / "l.png")
    experiments.main()
    assert len(ran) == 7
    with Image.open(tmp_path / "l.png") as picture:
        assert picture.size == (1280, 720)


def test_who_doubts_thinks(cache, command, tmp_path, monkeypatch, capsys):
    """At a share of 0 nobody thinks, at 1 everybody; a policy thinks where its doubt exceeds the threshold."""
    monkeypatch.setattr(demand, "SHARES", (0.0, 0.5, 1.0))
    monkeypatch.setattr(demand, "DRIVEN", ())
    command("experiments", "demand", "--eval", 4, "--plans", 1, "--cache", cache, "--out", tmp_path)
    experiments.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    never, always = found["word, 0"]["val"], found["word, 1"]["val"]
    assert never["thinks"] == 0 and always["thinks"] == 1 and never["ade"] != always["ade"]
    assert "flow, 0.5" in found and "flow, 0" not in found
    model = alpamayo.load_model(NANO, "cpu")
    scene = data.make_scenes([0, 1, 2], **data.view_of(model.cfg, (64, 128)))
    doubts = demand.doubt_of(model, scene, "word")
    plans = [demand.OnDemand(model, "word", at)(scene) for at in (-1, doubts.median().item(), 99)]
    thinks = doubts > doubts.median()
    assert thinks.sum() == 1 and torch.equal(plans[1][~thinks], plans[2][~thinks])
    torch.testing.assert_close(plans[1][thinks], plans[0][thinks], atol=1e-4, rtol=1e-4)


def test_the_slope_of_a_power_law():
    found = {row: [{"parameters": n, "last": {"ade": 3 * n**-0.25}}] for row, n in (("a", 1e5), ("b", 1e6), ("c", 4e6))}
    assert scaling.slope(found, "parameters", "ade") == pytest.approx(-0.25)


@pytest.fixture
def short(monkeypatch):
    """The least that can be measured."""
    for name in ("n", "steps"):
        monkeypatch.setitem(vision.SAMPLING, name, 1)
    monkeypatch.setattr(vision, "REPEATS", 1)


def test_the_table_trains_what_is_missing(short, here, cache, tmp_path, command, monkeypatch, capsys):
    """Two trainings, three rows; a second call trains nothing more; another training would go
    into another folder."""
    ways = vision.WAYS
    pruned = vision.Way("keep 0.25", switches={"keep": 0.25})
    monkeypatch.setattr(vision, "WAYS", [ways[0], ways[3], pruned])
    command("experiments", "vision", "--out", tmp_path, "--cache", cache, "--size", H, W,
            "--scenes", 4, "--eval", 2, "--train-steps", 1)
    args = experiments.parse_flags()
    experiments.main()
    said = capsys.readouterr().out.splitlines()
    rows = json.loads(said[-1])["rows"]
    eyeless = {name: rows.pop(name) for name in ("constant velocity", "fixed offsets", "blind network")}
    assert len(here) == 2 and list(rows) == [way.name for way in vision.WAYS]
    needed = [one for way in vision.WAYS for one in vision.trainings_of(way, args)]
    trainings.train(needed, args)
    assert len(here) == 2
    folder, flex_folder, pruned_folder = (trainings.folder_of(one, args) for one in needed)
    assert folder == pruned_folder != flex_folder
    elsewhere = [SimpleNamespace(**vars(args) | other) for other in (
        {"train_steps": 2}, {"scenes": 5}, {"size": (H, 2 * W)}, {"seeds": [1]})]
    folders = {trainings.folder_of(*vision.trainings_of(ways[0], other), other) for other in elsewhere}
    monkeypatch.setattr(trainings.runs, "sources", lambda: "another model")
    folders.add(trainings.folder_of(needed[0], args))
    assert len(folders - {folder}) == 5
    image, flex, pruned = rows.values()
    assert (image["tokens"], flex["tokens"], pruned["tokens"]) == (2, 20 / 8, 0.5)
    relative = flex["minade"][0] / image["minade"][0] - 1
    assert image["relative"] == [0] and flex["relative"][0] == pytest.approx(relative)
    assert pruned["flops"]["vision"] < image["flops"]["vision"]
    assert pruned["flops"]["prefill"] < image["flops"]["prefill"] / 1.5
    assert image["parameters"] == pruned["parameters"]
    header = next(i for i, line in enumerate(said) if line.startswith("| encoder"))
    assert said[header].startswith("| encoder | both right, % | ADE, m | tokens a picture |")
    assert said[header + 2].count("|") == 13 and "61.6 M" in "".join(said)
    names = [line.split("|")[1].strip() for line in said[header + 2 : header + 5]]
    assert names == sorted(rows, key=lambda name: (-rows[name]["both"][0], rows[name]["ade"][0]))
    last = said[header + 5].split("|")
    assert last[1].strip() in eyeless and last[2].strip() == "-"


def test_a_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    args = SimpleNamespace(cache="c")
    training = trainings.Training("--steps 3 --keep 0.5", 7)
    ran = []

    def run_nothing(words, **_):
        ran.append(words)
        return SimpleNamespace(returncode=len(ran) - 1, stderr="Traceback\nValueError: too few\n")

    monkeypatch.setattr(trainings.subprocess, "run", run_nothing)
    save_file({"x": torch.zeros(1)}, tmp_path / "training.safetensors", {"step": "2"})
    trainings.run_training(tmp_path, training, args)
    assert ran[0][2:] == ["--resume", tmp_path]
    with pytest.raises(ValueError, match="elsewhere: ValueError: too few"):
        trainings.run_training(f"{tmp_path}/elsewhere", training, args)
    assert {"--keep", "0.5", "--steps", "3", "--seed", "7"} <= set(ran[1])
    save_file({"x": torch.zeros(1)}, tmp_path / "training.safetensors", {"step": "3"})
    trainings.run_training(tmp_path, training, args)
    assert len(ran) == 2


def test_what_the_picture_shows(scene):  # noqa: F811
    """The newest groups that are kept at 0.5; attention of scene tokens, a share of all they give;
    a plane for two axes."""
    scene = in_double(scene)
    share = vision.shares_that_keep(build(), scene)
    assert share.shape == (3, 4, 2, 4)
    newest = torch.arange(64).view(4, 2, 2, 4)[:, 1]
    for kept, shares in zip(build(keep=0.5).look(scene)[-1].tolist(), share):
        assert set(newest[shares <= 0.5].tolist()) == set(kept) & set(newest.flatten().tolist())
    attention = vision.scene_token_attention(build(vision="flex"), scene)
    assert attention.shape == (3, 4, 2, 4) and attention.min() > 0
    assert (attention.sum((1, 2, 3)) < 0.95).all()
    planes = vision.plane_contrast(build(vision="triplane"), scene)
    assert [tuple(plane.shape) for plane in planes] == [(3, 12, 12), (3, 12, 2), (3, 12, 2)]
    assert all(plane.std(0).max() > 1e-3 for plane in planes)


def test_the_picture_is_drawn(tmp_path, command, capsys):
    flags = ("experiments", "vision", "--out", tmp_path, "--size", H, W)
    command(*flags)
    args = experiments.parse_flags()
    for way in (vision.WAYS[i] for i in (0, 1, 3)):
        folder = trainings.folder_of(vision.trainings_of(way, args)[0], args)
        seen = way.flags.split()[1] if way.flags else "image"
        build(torch.float32, vision=seen).save_pretrained(folder)
    file = tmp_path / "seeing" / "a.png"
    command(*flags, "--picture", file)
    experiments.main()
    assert str(file) in capsys.readouterr().out
    os.rename(folder, folder + ".away")
    with pytest.raises(FileNotFoundError, match="missing; run `vision` with these flags, without --picture, first$"):
        experiments.main()
    with Image.open(file) as picture:
        assert picture.size == (1600, 1040) and len(picture.convert("L").getcolors()) > 100


# --------------------------------------------------------------------------------------------------
# Ways to see, from training to sample.py


@pytest.mark.parametrize(
    "flags",
    ["--vision triplane --planes-patch 6 6 2", "--vision flex --flex-tokens 7 --keep 0.5"])
def test_trained_saved_loaded_and_driven(flags, cache, tmp_path, command, monkeypatch, capsys):
    """Both stages from one script; the checkpoint knows how it sees; sample.py runs and prunes."""
    common = f"--size {H} {W} --scenes 4 --batch 2 --val-scenes 2 --threads 1 --cache {cache}"
    common = f"train.py {common} --steps 1 --action-every 2".split()
    command(*common, "--stage", "action", "--out", tmp_path / "a", *flags.split())
    train.main()
    command(*common, "--stage", "reason", "--init", tmp_path / "a", "--out", tmp_path / "b")
    train.main()
    cfg = alpamayo.read_config(str(tmp_path / "b"))
    if cfg.vision == "flex":  # another encoder behind the same tower
        command(*common, "--stage", "reason", "--init", tmp_path / "b", "--out", tmp_path / "d",
                "--vision", "image", "--keep", 1, "--muon-lr", 0, "--lr", 0)
        train.main()
        was, now = (load_file(tmp_path / name / "model.safetensors") for name in "bd")
        changed = replace(cfg, vision="image", keep=1.0)
        assert alpamayo.read_config(str(tmp_path / "d")) == changed
        parts = {k.split(".")[3] for k in was.keys() ^ now.keys() if k != "view_embed"}
        assert parts == {"flex", "merger", "deepstack_merger_list"}
        assert all(torch.equal(was[k], now[k]) for k in was.keys() & now.keys())
    if "triplane" in flags:
        assert (cfg.vision, cfg.keep, cfg.planes_patch) == ("triplane", 1.0, (6, 6, 2))
    else:
        assert (cfg.vision, cfg.keep, cfg.flex_tokens) == ("flex", 0.5, 7)
    model = Alpamayo.from_pretrained(str(tmp_path / "b"))
    model.save_pretrained(str(tmp_path / "c"))
    assert alpamayo.read_config(str(tmp_path / "c")) == cfg
    monkeypatch.setattr(sample, "draw_scene", lambda *_: None)  # test_sample.py draws
    command("sample.py", "--checkpoint", tmp_path / "b", "--n", 1, "--steps", 1, "--size", H, W,
            "--keep", 0.5, "--retrieve", 0.5)
    sample.main()
    assert "sample 1" in capsys.readouterr().out


@pytest.mark.parametrize("tool, flags", [(gallery, "g"), (experiments, "vision --picture a.png"), (label, "clip")])
def test_pictures_need_one_more_package_before_the_work(tool, flags, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command("tool", *flags.split())
    with pytest.raises(ImportError, match="pip install matplotlib"):
        tool.main()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_no_half_picture(tmp_path, monkeypatch):
    """The picture that was there stays."""
    file = tmp_path / "a.png"
    figure = draw.pyplot().figure()
    draw.save_figure(figure, file)
    before = file.read_bytes()

    def fill_the_disk(part, format):
        with open(part, "wb") as half:
            half.write(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        draw.save_figure(figure, file)
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]
