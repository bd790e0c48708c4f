"""
The page of tools/watch.py in a real browser, and what it is made of.

    python -m pytest tests/test_watch.py

The browser is any Chromium of this machine, or playwright's own (playwright install chromium).
"""
import json
import os
import shutil
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT
from test_sample import checkpoint, run, write_clip  # noqa: F401

import data
import doors
import world
from alpamayo import Alpamayo, project, rotate
from tools import watch
from tools.common import Policy

playwright = pytest.importorskip("playwright.sync_api")
NANO = os.path.join(ROOT, "checkpoints", "nano")
KNOWN = ("chromium-headless-shell", "chromium", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        path = next(filter(None, map(shutil.which, KNOWN)), None)
        try:
            chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no browser: playwright install chromium ({error})")
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens a page file at a size; at the end it must have complained of and asked for nothing."""
    trouble, asked = [], []

    def open_page(file, width=1200, height=800):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{file}")
        page.wait_for_function("page.drives.every(one => one.frames.every(f => f.picture.complete))")
        return page

    yield open_page
    assert trouble == []
    assert all(url.startswith(("file://", "data:image/")) for url in asked), asked


def written(folder, *flags):
    """Runs the tool: the page's file, and the data in it."""
    code, said, trouble = run(folder, "-m", "tools.watch", "--n", 2, "--steps", 3, *flags)
    assert code == 0, trouble
    file = folder / "out" / "watch.html"
    assert said == [f"page       out/watch.html, {len(file.read_text()) / 1e6:.1f} MB"]
    text = file.read_text().partition('<script type="application/json">')[2].partition("</script>")[0]
    return file, json.loads(text)


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    """1.4 s of a pedestrian with nano, who is shown where it looked."""
    seed = world.find("pedestrian", "val") - world.SEEDS["val"]
    return written(tmp_path_factory.mktemp("drive"), "--seed", seed, "--seconds", 1.4, "--look")


def drawn(page, name):
    return page.evaluate(f"document.querySelector('{name}').toDataURL()")


def text(page, name):
    return page.locator(name).first.inner_text()


# --------------------------------------------------------------------------------------------------
# In the browser


def test_the_scrubber_moves_the_drive(drive, visit):
    file, shown = drive
    page = visit(file)
    plans = shown["drives"][0]["plans"]
    assert len(plans) == 3 and len(shown["drives"][0]["frames"]) == 14
    seen = set()
    for moment in (0, 4, 5, 13):
        page.locator("input").fill(str(moment))
        assert text(page, "#time") == f"{moment / 10:.1f} s"
        plan = plans[moment // 5]
        assert text(page, ".said") == "".join(plan["words"])
        assert text(page, ".verdict") == plan["verdict"]
        assert text(page, ".true") == f"truth: {plan['true']}"
        seen |= {drawn(page, ".above"), drawn(page, ".of1"), drawn(page, ".of6")}
    assert len(seen) == 12  # each moment looks different, from above and in the cameras


def test_a_plan_is_drawn_where_it_leads(drive, visit):
    """The page's cameras are alpamayo.project; without its paths a picture is another one."""
    file, shown = drive
    page = visit(file)
    one = shown["drives"][0]
    pinhole = [1, 640, 480, 320, 240, 500, 510, 0, 0, 0]
    for i, lens in [*enumerate(one["intrinsics"]), (1, pinhole)]:
        for x, y in ((8, 0), (30, -4), (12, 5), (-20, 3)):
            pose = torch.tensor(one["camera_to_ego"][i])
            point = (torch.tensor([x, y, 0.0]) - pose[:3, 3]) @ pose[:3, :3]
            expected = project(point, torch.tensor(lens).float())[0].tolist() if point[2] > 0.1 else False
            found = page.evaluate(f"pixel({{x: {x}, y: {y}}}, {lens}, {pose.tolist()})")
            assert found == (expected and pytest.approx(expected, rel=1e-3))
    for name in (".above", ".of1"):
        before = drawn(page, name)
        page.evaluate("page.drives[0].plans[0].path = page.drives[0].plans[0].path.map(([x, y]) => [x, y + 300]); draw()")
        assert drawn(page, name) != before


def test_keys(drive, visit):
    file, shown = drive
    page = visit(file)
    time = lambda: text(page, "#time")
    for key, expected in (
        ("ArrowRight", 0.1), ("ArrowRight", 0.2), ("ArrowLeft", 0.1), ("ArrowLeft", 0), ("ArrowLeft", 0), ("ArrowDown", 0.5),
        ("ArrowRight", 0.6), ("ArrowDown", 1.0), ("ArrowUp", 0.5), ("End", 1.3), ("Home", 0)):  # fmt: skip
        page.keyboard.press(key)
        assert time() == f"{expected:.1f} s", key
    page.keyboard.press(" ")
    assert text(page, "#play") == "Pause"
    page.wait_for_function("now > 1")
    page.keyboard.press(" ")
    moment = time()
    page.wait_for_timeout(250)
    assert text(page, "#play") == "Play" and time() == moment
    page.keyboard.press("End")
    page.keyboard.press(" ")  # from the start again, to the end
    page.wait_for_function("!timer && now === last")


def test_from_noise_to_the_path(drive, visit):
    page = visit(drive[0])
    page.keyboard.press("ArrowRight")
    page.locator("#noise").click()
    drawings = set()
    for step in range(4):  # three steps of Euler
        page.wait_for_function(f"euler === {step}")
        assert text(page, "#time") == f"Euler step {step} of 3"
        drawings.add(drawn(page, ".above"))
    assert len(drawings) == 4
    page.wait_for_function("!timer")
    assert text(page, "#time") == "0.0 s"  # where this plan was made


def test_a_word_tells_where_it_looked(drive, visit):
    file, shown = drive
    page = visit(file)
    words = shown["drives"][0]["plans"][0]["words"]
    plain = drawn(page, ".of1")
    page.locator(".said span").nth(2).click()
    assert text(page, ".said .on") == words[2] and drawn(page, ".of1") != plain
    page.keyboard.press("l")
    assert text(page, ".said .on") == words[3]
    page.locator(".said span").nth(3).click()
    assert page.locator(".said .on").count() == 0 and drawn(page, ".of1") == plain


def test_on_a_phone_in_the_dark(drive, visit):
    page = visit(drive[0], 390, 844)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    light = drawn(page, ".above")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("before => $('.above').toDataURL() !== before", arg=light)
    wide = page.locator(".of1").bounding_box()
    assert wide["height"] == pytest.approx(wide["width"] / 2, abs=1)


def test_two_checkpoints_side_by_side(checkpoint, tmp_path, visit):  # noqa: F811
    file, shown = written(tmp_path, "--seconds", 0.6, "--beside", checkpoint, "--no-route")
    page = visit(file)
    assert [one["name"] for one in shown["drives"]] == ["nano", os.path.basename(checkpoint)]
    left, right = (page.locator("section").nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    page.keyboard.press("ArrowDown")
    for i, one in enumerate(shown["drives"]):
        assert page.locator(".said").nth(i).inner_text() == "".join(one["plans"][1]["words"]).strip()


def test_a_clip(tmp_path, visit):
    clip = write_clip(tmp_path / "clip", (1, 6))
    file, shown = written(tmp_path, "--clip", clip, "--t0", 2, "--seconds", 1)
    (one,) = shown["drives"]
    assert shown["title"] == "clip" and one["camera_ids"] == [0, 1, 2, 6]
    assert [frame["time"] for frame in one["frames"]] == [2.0, 2.5, 3.0]
    assert one["plans"][0]["truth"][-1] == pytest.approx([6400, 0], abs=1)  # cm: 6.4 s at 10 m/s
    page = visit(file)
    page.keyboard.press("ArrowRight")
    assert text(page, "#time") == "2.5 s" and text(page, ".verdict") == "not labelled"


def test_a_thought_cannot_end_the_script(drive, tmp_path, visit, monkeypatch):
    page = visit(drive[0])
    page.evaluate("page.drives[0].plans[0].words = ['</script><img src=x>']; draw()")
    assert text(page, ".said") == "</script><img src=x>"


# --------------------------------------------------------------------------------------------------
# What it is made of


def flags(**more):
    args = dict(checkpoint=NANO, device="cpu", seed=0, size=(64, 128), steps=2, n=1, reason=True, route=True)
    return Namespace(**args | dict(keep=None, retrieve=None, seconds=3.0, replan=0.5, look=False) | more)


def test_it_drives_as_every_policy_does():
    """Asked every 0.1 s for the film's sake, it goes where it goes when asked every half second."""
    film = watch.Film(NANO, flags(seconds=1.6))
    seed = world.SEEDS["val"] + 3
    view = data.view_of(film.model.cfg, (64, 128))
    watch.drive_world([film], flags(seconds=1.6, split="val", seed=3))
    poses = []
    note = lambda traffic, scene, plan: poses.append([traffic.x.item(), traffic.y.item(), traffic.yaw.item()])
    data.drive(Policy(film.model, film.args), [seed], 1.6, 0.5, film=note, **view)
    assert [frame["pose"] for frame in film.shown["frames"][::5]] == poses


@pytest.mark.parametrize(
    "situation, curvature, expected",
    [("stopped lead", 0, "collision"), ("red light", 0, "ran"), ("free", 0.03, "off_road")],
)
def test_events_are_those_of_the_judge(situation, curvature, expected, monkeypatch):
    """Who holds the wheel still meets what data.drive says, when it says so."""
    policy = lambda scene: torch.tensor([0.0, curvature]).expand(len(scene["name"]), 64, 2)
    monkeypatch.setattr(watch.Film, "add_plan", lambda *_: None)
    seed = world.find(situation, "val")
    film = watch.Film(NANO, flags())
    film.policy = policy
    args = flags(split="val", seed=seed - world.SEEDS["val"], seconds=7.0, size=(32, 64))
    watch.drive_world([film], args)
    met = data.drive(policy, [seed], 7.0, 0.5, camera_ids=(1,), size=(2, 4), frames=1)
    events = film.shown["events"]
    assert met[expected]
    for name, words in watch.EVENTS.items():
        if met[name]:
            assert words in ", ".join(events.values())
    if met["close"] | met["off_road"]:
        assert any(0 <= met["seconds"].item() - time + 0.05 < 1.1 for time in events)  # told together


def test_attention_is_the_models_own():
    """Of a word: softmax of its query and all keys, as the layers compute them."""
    model = Alpamayo.from_pretrained(NANO)
    scene = data.make_scenes([world.find("pedestrian", "val")])
    said = scene["reasoning"][0]
    words, seen = watch.look_back(model, scene, said)
    assert "".join(words) == said
    assert torch.tensor(seen).shape == (len(words), 4, 2, 4)
    expected = []

    def attend(layer, args, out):
        x, cos, sin = args[:3]
        q = layer.q_norm(layer.q_proj(x).unflatten(2, (layer.n_head, -1))).transpose(1, 2)
        q = rotate(q, cos, sin)[:, :, -1:]
        k = out[1][0].repeat_interleave(layer.n_head // layer.n_kv_head, 1)
        expected.append((q @ k.mT / layer.head_dim**0.5).softmax(-1).mean(1)[0, 0])

    for layer in model.vlm.model.language_model.layers:
        layer.self_attn.register_forward_hook(attend)
    prompt = model.embed_prompt(scene)
    with torch.no_grad():
        model.read(prompt, torch.tensor([model.vocabulary.encode(said)[:5]]))  # what chose word 5
    images = torch.stack(expected).mean(0)[prompt.image_at[0]].view(4, 2, 2, 4).sum(1)
    assert torch.tensor(seen[5]).sub(1000 * images).abs().max() <= 1


def test_pruned_patches_were_not_looked_at():
    model = Alpamayo.from_pretrained(NANO, keep=0.25)
    _, seen = watch.look_back(model, data.make_scenes([world.SEEDS["val"]]), "Keep speed")
    assert 0 < (torch.tensor(seen).sum(0) > 0).sum() <= 16  # of 64 image tokens, at two times


@pytest.mark.parametrize(
    "words, line",
    [
        ("--checkpoint nowhere", "tools.watch: nowhere: missing"),
        ("--beside nowhere", "tools.watch: nowhere: missing"),
        ("--seed 10000000", "tools.watch: --seed: "),
        ("--seed -1", "tools.watch: --seed: expected"),
        ("--split snow", "tools.watch: --split: invalid choice"),
        ("--replan 0.25", "tools.watch: --replan: expected a multiple of 0.1 s"),
        ("--out page.png", "tools.watch: --out: expected a name ending in .html"),
        ("--clip nowhere", "tools.watch: nowhere: no ego motion"),
    ],
)
def test_what_cannot_be_shown_is_one_line(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doors, "name_of_program", lambda: "tools.watch")
    monkeypatch.setattr(sys, "argv", ["watch", "--seconds", "0.1", *words.split()])
    with pytest.raises(SystemExit) as exit:
        doors.run(watch.main)
    said = capsys.readouterr()
    told = said.err or f"{exit.value.code}\n"  # Python prints what is no number
    assert said.out == "" and told.startswith(line) and told.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_tokens_without_a_place_are_not_looked_at():
    cfg = Namespace(vision="flex")
    with pytest.raises(ValueError, match="--look: tokens of flex"):
        watch.look_back(Namespace(cfg=cfg), {}, "Keep speed")
