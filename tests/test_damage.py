"""
A thousand inputs, damaged at random: each is refused in one line that names it, or read and right.

    python -m pytest tests/test_damage.py -rP                        # with the counts
    DAMAGE_SEED=7 python -m pytest tests/test_damage.py              # other damage
    DAMAGE_CASE=17 python -m pytest tests/test_damage.py -k clips    # one case again

A case is a function of the seed, its class and its number. It copies something whole, damages one
file of it, and reads it as a program does. Not allowed are: any error but those that `doors.run`
prints, a message of several lines or one that names neither the file nor its folder, 20 seconds,
and a value that is not what the files say.
"""
import argparse
import contextlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import SMALL, made_up
from test_checkpoint import scene as small_scene
from test_clips import folder, folder_original, kitti, nvidia, nvidia_original  # noqa: F401
from test_keyframes import LIGHT, STOP_AND_GO, drive, fill, write_clip

import data
import doors
import rl
import sample
import train
from alpamayo import Alpamayo, Vocabulary
from clips import load_clips
from tools import evaluate, gallery, judge, label
from tools import world as world_tool
from tools.experiments import __main__ as experiments
from tools.label import read_labels, write_labels
from world import RIG

SEED = os.environ.get("DAMAGE_SEED", "0")
ONLY = os.environ.get("DAMAGE_CASE")
PATIENCE = 20  # s
REFUSALS = (ValueError, OSError, ImportError, FloatingPointError)  # what doors.run prints


class Hang(BaseException):
    """A case that took too long; no reader catches it."""


class Case:
    """One damaged input: its random numbers, what was done to it, and what came of it."""

    def __init__(self, tally, number):
        self.tally = tally
        self.number = number
        self.chance = random.Random(f"{SEED} {tally.name} {number}")
        self.what = ""

    def fault(self, kind, why):
        text = f"DAMAGE_SEED={SEED} DAMAGE_CASE={self.number} ({self.what}): {kind}: {why}"
        self.tally.faults.setdefault((self.number, kind), text)

    def require(self, holds, why):
        if not holds:
            self.fault("a wrong value in silence", why)

    def attempt(self, names, read, *args, **options):
        """What read(*args) returns, or None if it was refused. names: one must be in the line."""

        def stop(*_):
            raise Hang

        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        counts = self.tally.counts
        try:
            found = read(*args, **options)
            counts["read"] += 1
            return found
        except REFUSALS as error:
            counts["refused"] += 1
            self.look_at(str(error), names)
        except SystemExit as end:
            counts["refused"] += 1
            self.require(end.code, "exit 0")
            self.look_at(str(end.code), names)
        except Hang:
            self.fault("a hang", f"{PATIENCE} s")
        except BaseException as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            self.fault("a traceback", line[:200])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return None

    def look_at(self, line, names):
        if "\n" in line.strip() or len(line) > 1000:
            self.fault("more than a line", line[:300])
        elif names and not any(name in line for name in names):
            self.fault("a line that names nothing", line[:300])


class Tally:
    """The cases of a class, and what became of them."""

    def __init__(self, name, count):
        self.name = name
        self.counts = {"refused": 0, "read": 0}
        self.faults = {}  # (number of the case, kind): what to say
        self.cases = [Case(self, int(ONLY))] if ONLY else [Case(self, i) for i in range(count)]

    def end(self):
        kinds = {}
        for _, kind in self.faults:
            kinds[kind] = kinds.get(kind, 0) + 1
        print(f"{self.name}: {len(self.cases)} cases, {self.counts}, faults {kinds}")
        assert not kinds, f"{kinds}\n" + "\n".join(self.faults.values())


@pytest.fixture(autouse=True, scope="module")
def little_memory():
    """What asks for terabytes fails at once, and not by the machine's killer of processes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def case_folder(tmp_path):
    """copy(good) -> a fresh copy of a folder, of hard links; the one before is gone."""
    place = tmp_path / "damaged"

    def copy(good):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(good, place / Path(good).name, copy_function=os.link)
        return place / Path(good).name

    return copy


def names_of(file):
    """What a line may call a damaged file by."""
    return {file.name, file.parent.name, file.parent.parent.name}


# --------------------------------------------------------------------------------------------------
# Damage. Each takes a file and random numbers, and says what it did.


def put(file, content):
    """Write a file that may be a hard link to the good one."""
    file.unlink()
    file.write_bytes(content)


def cut(file, chance):
    content = file.read_bytes()
    put(file, content[: chance.randrange(len(content) or 1)])


def flip(file, chance):
    content = bytearray(file.read_bytes())
    for _ in range(chance.choice((1, 8, 64))):
        content[chance.randrange(len(content))] = chance.randrange(256)
    put(file, bytes(content))


def empty(file, chance):
    put(file, b"")


def zeros(file, chance):
    put(file, bytes(file.stat().st_size))


def grow(file, chance):
    put(file, file.read_bytes() + chance.randbytes(chance.choice((1, 100))))


def remove(file, chance):
    file.unlink()


def make_folder(file, chance):
    file.unlink()
    file.mkdir()


def utf16(file, chance):
    put(file, file.read_text().encode("utf-16"))


OF_BYTES = (cut, flip, empty, zeros, grow, remove, make_folder)
DEEP = "[" * 100_000 + "]" * 100_000
LITERALS = {"@deep": DEEP, "@huge": "1e999", "@digits": "9" * 5000}  # what json.dumps cannot write
WRONG = [
    None, True, False, -1, 0, 1, 3, 0.5, 2**40, 1e308, -1e308, math.nan, math.inf, "x", "", "../../x",
    "/etc/passwd", "\0", "é" * 300, [], {}, [1], ["a"], [None], {"a": 1}, [[]], *LITERALS,
]  # fmt: skip


def places_in(value, path=()):
    """Yields the path of every value in a JSON value."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places_in(one, (*path, key))


def edit_json(text, chance):
    """A JSON text with one value wrong, gone, or one key more. Returns it, and what was done."""
    value = json.loads(text)
    places = list(places_in(value))
    *way, key = chance.choice(places)
    holder = value
    for step in way:
        holder = holder[step]
    done = chance.choice(("wrong",) * 6 + ("gone", "more"))
    if done == "wrong":
        holder[key] = chance.choice(WRONG)
    elif done == "gone":
        del holder[key]
    elif isinstance(holder, dict):
        holder[f"{key}2"] = 1
    said = f"{done} {'.'.join(map(str, (*way, key)))}: {str(holder[key])[:30] if done == 'wrong' else ''}"
    text = json.dumps(value)
    for name, literal in LITERALS.items():
        text = text.replace(json.dumps(name), literal)
    return text, said


def damage_json(file, chance):
    """Damage a JSON file by its values, and now and then by its bytes."""
    if chance.random() < 0.2:
        damage = chance.choice((*OF_BYTES, utf16))
        damage(file, chance)
        return f"{damage.__name__} {file.name}"
    text, said = edit_json(file.read_text(), chance)
    put(file, text.encode())
    return f"{file.name}: {said}"


CELLS = ("nan", "inf", "-inf", "", "x", "1e300", "-1", "1e999", "1;2", "0x10", "1,2", '"', "\0", "١")


def damage_csv(file, chance):
    """Damage a CSV file by its cells and rows. Returns what was done, and whether it is harmless."""
    lines = file.read_text().splitlines()
    row = chance.randrange(1, len(lines))
    cells = lines[row].split(",")
    kind = chance.choice(("cell", "cell", "cell", "swap", "double", "drop", "header", "scale", "bom", "blank", "crlf",
                          "utf-16", "bytes", "few"))  # fmt: skip
    if kind == "cell":
        at = chance.randrange(len(cells))
        cells[at] = chance.choice(CELLS)
        lines[row] = ",".join(cells)
        kind = f"cell {row} {at} {cells[at]!r}"
    elif kind == "swap":
        other = 1 if row > 1 else 2
        lines[row], lines[other] = lines[other], lines[row]
    elif kind == "double":
        lines.insert(row, lines[row])
    elif kind == "drop":
        del lines[row : row + chance.choice((1, 50))]
    elif kind == "few":
        del lines[3:]
    elif kind == "header":
        lines[0] = chance.choice((lines[0] + ",colour", lines[0][1:], lines[0].upper(), "", lines[0] + "," + lines[0]))
    elif kind == "scale" and lines[1].split(",")[0].replace(".", "").isdigit():  # ms, us, ns
        factor = chance.choice((1e3, 1e6, 1e9, 1e-3))
        first = [line.split(",") for line in lines[1:]]
        lines[1:] = [",".join([f"{factor * float(row[0]):.10g}", *row[1:]]) for row in first]
    text = "\n".join(lines)
    if kind == "bytes":
        damage = chance.choice(OF_BYTES)
        damage(file, chance)
        return f"{damage.__name__} {file.name}", False
    encoded = text.encode("utf-16") if kind == "utf-16" else text.encode()
    encoded = {"bom": b"\xef\xbb\xbf" + encoded, "blank": encoded + b"\n\n\n", "crlf": encoded.replace(b"\n", b"\r\n")}.get(kind, encoded)
    put(file, encoded)
    return f"{file.name}: {kind}", kind in ("bom", "blank", "crlf")


# --------------------------------------------------------------------------------------------------
# Checkpoints: their configs and their weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model in three shards."""
    place = tmp_path_factory.mktemp("checkpoints") / "small"
    model = Alpamayo(SMALL, Vocabulary(SMALL))
    model.load_state_dict({name: made_up(name, p.shape) for name, p in model.named_parameters()}, strict=False)
    model.save_pretrained(str(place), shard_bytes=model.vlm.lm_head.weight.nbytes * 8)
    assert len(list(place.glob("*.safetensors"))) > 1
    return place


def load_and_drive(place, scene):
    model = Alpamayo.from_pretrained(str(place))
    out = model.sample(scene, n=1, steps=1, max_new_tokens=2, seed=0)
    return model, bool(out.xyz.isfinite().all())


NOT_READ = """_target_ _recursive_ architectures model_dtype attn_implementation vlm_backend vlm_name_or_path
keep_same_dtype int_method num_inference_steps accel_bounds curvature_bounds max_position_embeddings rope_type
model_type metadata image_token_id video_token_id vision_start_token_id vision_end_token_id""".split()
NOT_READ += ["text_config.vocab_size"]  # of the words alone, or of all tokens: both are about


def test_configs(checkpoint, case_folder):
    tally = Tally("configs", 260)
    scene = small_scene(32, 64)
    for case in tally.cases:
        chance = case.chance
        place = case_folder(checkpoint)
        file = chance.choice((place / "config.json", place / "vlm" / "config.json"))
        case.what = damage_json(file, chance)
        found = case.attempt({*names_of(file), "images"}, load_and_drive, place, scene)
        if found is None:
            continue
        model, drives = found
        case.require(drives, "a path that is not finite")
        path = re.search(r"wrong ([\w.]+):", case.what)
        if path and not {path[1], *path[1].split(".")} & set(NOT_READ):
            model.save_pretrained(str(place / "again"))
            again, wanted = (json.loads((f / file.relative_to(place)).read_text()) for f in (place / "again", place))
            with contextlib.suppress(LookupError, TypeError):  # what we do not write we do not read
                for key in path[1].split("."):
                    key = int(key) if key.isdigit() else key
                    again, wanted = again[key], wanted[key]
                case.require(again == wanted, f"read as {str(again)[:60]}")
    tally.end()


def edit_settings(text, chance):
    """A safetensors header with another value among the flags of a run, or another metadatum."""
    header = json.loads(text)
    settings = header["__metadata__"]
    if chance.random() < 0.5 and "flags" in settings:
        settings["flags"], said = edit_json(settings["flags"], chance)
    else:
        key = chance.choice(sorted(settings))
        settings[key] = str(chance.choice(WRONG))
        said = f"{key} {settings[key][:30]!r}"
    return json.dumps(header), said


def edit_weights(file, chance):
    """Damage the header of a safetensors file, or the numbers behind it."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, numbers = content[8 : 8 + size], content[8 + size :]
    kind = chance.choice(("header", "header", "settings", "settings", "dtype", "nan", "bytes", "size"))
    if kind == "bytes":
        damage = chance.choice(OF_BYTES)
        damage(file, chance)
        return f"{damage.__name__} {file.name}"
    if kind == "header":
        text, said = edit_json(header.decode(), chance)
        header = text.encode("utf-8", "replace")
        kind = f"header {said}"
    elif kind == "settings":
        text, said = edit_settings(header.decode(), chance)
        header = text.encode()
        kind = f"settings {said}"
    elif kind == "dtype":
        header = header.replace(b"F32", chance.choice((b"I32", b"U32", b"F64", b"F16", b"BF16", b"F8_E4M3", b"BOOL")), chance.choice((1, -1)))
    elif kind == "nan":
        at = 4 * chance.randrange(len(numbers) // 4)
        bad = np.array([chance.choice((math.nan, math.inf, -math.inf))], np.float32).tobytes()
        numbers = numbers[:at] + bad + numbers[at + 4 :]
    else:
        size = chance.choice((0, 1, 2**62, 2**63, size + 1))
        put(file, size.to_bytes(8, "little") + header + numbers)
        return f"{file.name}: size of the header {size}"
    put(file, len(header).to_bytes(8, "little") + header + numbers)
    return f"{file.name}: {kind}"


def test_weights(checkpoint, case_folder):
    tally = Tally("weights", 140)
    scene = small_scene(32, 64)
    for case in tally.cases:
        chance = case.chance
        place = case_folder(checkpoint)
        index = place / "model.safetensors.index.json"
        shards = sorted(place.glob("*.safetensors"))
        kind = chance.random()
        if kind < 0.2:
            file = index
            case.what = damage_json(file, chance)
        elif kind < 0.3:  # a stale copy of a tensor in another shard
            file = shards[0]
            put(file, shards[1].read_bytes())
            case.what = "one shard in another's place"
        else:
            file = chance.choice(shards)
            case.what = edit_weights(file, chance)
        found = case.attempt(names_of(file), load_and_drive, place, scene)
        if found is None:
            continue
        model, drives = found
        case.require(drives, "a path that is not finite")
        where = json.loads(index.read_text())["weight_map"]
        shards = {name: load_file(place / name) for name in set(where.values())}
        wrong = [name for name, tensor in model.state_dict().items()
                 if name not in where or not torch.equal(tensor, shards[where[name]][name].to(tensor.dtype))]  # fmt: skip
        case.require(not wrong, f"{wrong[:2]} are not what the index's files have")
    tally.end()


def test_release_checkpoints(release_folder, case_folder):
    """In the release's own format, with a tokenizer.json."""
    tally = Tally("release checkpoints", 50)
    for case in tally.cases:
        chance = case.chance
        place = case_folder(release_folder)
        file = place / chance.choice(("tokenizer.json", "tokenizer.json", "config.json", "vlm/config.json"))
        case.what = damage_json(file, chance)
        model = case.attempt(names_of(file), Alpamayo.from_pretrained, str(place))
        if model is not None:
            ids = model.vocabulary.encode("Stop since the light is red.")
            case.require(all(0 <= i < model.cfg.vocab for i in ids), f"ids {ids}")
    tally.end()


# --------------------------------------------------------------------------------------------------
# Clips


def scenes_of(place, **options):
    scenes = load_clips(str(place), **options)
    return scenes, scenes.batch(range(len(scenes)))


def is_a_drive(case, scene):
    """What holds of every Scene of these clips, whatever was damaged: a car at up to 50 m/s."""
    for key, value in scene.items():
        if torch.is_tensor(value) and value.is_floating_point():
            case.require(value.isfinite().all(), f"{key} is not finite")
    case.require(scene["images"].dtype == torch.uint8, "images are not uint8")
    case.require(scene["images"].shape[-3] == 3, "images have no three colours")
    last = scene["ego_history_xyz"][:, -1].abs().max()
    case.require(last < 1e-6, f"the history ends {last} m beside the origin")
    for key in ("ego_history_xyz", "ego_future_xyz"):
        speed = scene[key].diff(dim=1).norm(dim=-1).max() / 0.1
        case.require(speed < 50, f"{key} runs at {speed:.0f} m/s, the clip's car at 8")
    speed = scene["ego_kinematics"][..., 0].abs().max()
    case.require(speed < 50, f"kinematics run at {speed:.0f} m/s")
    for text in scene["reasoning"]:
        case.require(isinstance(text, str), f"reasoning {text!r}")


def same(a, b):
    """Whether two Scenes are equal."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def add_litter(place, chance):
    """What macOS, Jupyter and Windows leave behind; harmless."""
    homes = [place, *(entry for entry in place.iterdir() if entry.is_dir())]
    home = chance.choice(homes)
    name = chance.choice((".DS_Store", "._000001.png", "Thumbs.db", ".ipynb_checkpoints/x"))
    (home / name).parent.mkdir(exist_ok=True)
    (home / name).write_bytes(b"\0\1\2")
    return f"{name} in {home.name}", True


def damage_clip(place, chance):
    """Damage one file of a folder of one's own. Returns file, what was done, whether harmless."""
    file = chance.choice((
        place / "egomotion.csv", place / "egomotion.csv", place / "front_wide_120fov" / "times.csv",
        place / "cameras.json", place / "cameras.json", place / "reasoning.json", place / "reasoning.json",
        place / "front_wide_120fov" / f"{chance.randrange(100):06d}.png", place,
    ))  # fmt: skip
    if file == place:
        return file, *add_litter(place, chance)
    if file.suffix == ".csv":
        return file, *damage_csv(file, chance)
    if file.suffix == ".json":
        return file, damage_json(file, chance), False
    damage = chance.choice(OF_BYTES)
    damage(file, chance)
    return file, f"{damage.__name__} {file.name}", False


def test_clips(folder, case_folder):  # noqa: F811
    """A folder of one's own, plain and as the world's rig sees it."""
    (folder / "reasoning.json").write_text(json.dumps([
        {"time": 2.5, "text": "Stop and keep lane since the light ahead is red."},
        {"time": 3.0, "text": "Keep speed and keep lane since the road ahead is free."}]))  # fmt: skip
    tally = Tally("clips", 260)
    plain = {}
    rigged = {"rig": RIG, "size": (32, 64)}
    good = {}
    for name, options in (("plain", plain), ("rigged", rigged)):
        good[name] = scenes_of(folder, **options)[1]
    for case in tally.cases:
        chance = case.chance
        place = case_folder(folder)
        file, case.what, harmless = damage_clip(place, chance)
        name = chance.choice(("plain", "plain", "rigged"))
        options = rigged if name == "rigged" else plain
        found = case.attempt(names_of(file) | {"mine"}, scenes_of, place, **options)
        if found is not None:
            is_a_drive(case, found[1])
        if harmless and not ONLY:
            case.require(found is not None and same(found[1], good[name]), "harmless, and not read the same")
    tally.end()


def test_kitti(kitti, case_folder):  # noqa: F811
    tally = Tally("kitti", 90)
    for case in tally.cases:
        chance = case.chance
        place = case_folder(kitti)
        file = place / chance.choice((
            "oxts/timestamps.txt", "image_02/timestamps.txt", f"oxts/data/{chance.randrange(100):010d}.txt",
            f"image_02/data/{chance.randrange(100):06d}.png",
        ))  # fmt: skip
        if file.suffix == ".txt" and chance.random() < 0.5:
            words = re.split(r"(\s+)", file.read_text())
            at = 2 * chance.randrange(len(words) // 2)
            words[at] = chance.choice((*CELLS, "2011-13-40", "99:99:99.9"))
            put(file, "".join(words).encode())
            case.what = f"{file.name}: word {at} {words[at]!r}"
        else:
            damage = chance.choice((*OF_BYTES, utf16)) if file.suffix == ".txt" else chance.choice(OF_BYTES)
            damage(file, chance)
            case.what = f"{damage.__name__} {file.relative_to(place)}"
        found = case.attempt({*names_of(file), place.name}, scenes_of, place)
        if found is not None:
            is_a_drive(case, found[1])
    tally.end()


def test_nvidia(nvidia, case_folder):  # noqa: F811
    tally = Tally("nvidia", 60)
    for case in tally.cases:
        chance = case.chance
        place = case_folder(nvidia)
        files = sorted(file for file in place.rglob("*") if file.is_file())
        file = chance.choice(files)
        if file.suffix == ".csv":
            case.what, _ = damage_csv(file, chance)
        else:
            damage = chance.choice(OF_BYTES)
            damage(file, chance)
            case.what = f"{damage.__name__} {file.relative_to(place)}"
        found = case.attempt({*names_of(file), place.name}, scenes_of, place)
        if found is not None:
            is_a_drive(case, found[1])
    tally.end()


# --------------------------------------------------------------------------------------------------
# Scenes on disk, labels


def opened(place, view):
    scenes = data.load_world(folder=str(place), **view)
    return scenes, scenes.batch([2, 0, 1])


def test_scene_sets(tmp_path, case_folder):
    view = dict(split="val", scenes=3, size=(32, 64), camera_ids=(1,), frames=2, workers=0)
    made = data.load_world(folder=str(tmp_path / "sets"), **view)
    good = made.batch(range(3))
    good_files = {file.name for file in Path(made.folder).iterdir()}
    tally = Tally("scene sets", 110)
    for case in tally.cases:
        chance = case.chance
        place = case_folder(tmp_path / "sets")
        home = place / Path(made.folder).name
        file = chance.choice(sorted(home.iterdir()) + [home / "set.json"] * 8)
        if file.suffix == ".json":
            case.what = damage_json(file, chance)
        elif chance.random() < 0.3:
            array = np.load(file)
            bad = (array.astype(object), array[:2], array[:, :-1], array.astype(np.float64) * math.nan, array.astype(np.int8))
            at = chance.randrange(len(bad))
            file.unlink()
            np.save(file, bad[at], allow_pickle=True)
            case.what = f"{file.name}: another array, {at}"
        else:
            damage = chance.choice(OF_BYTES)
            damage(file, chance)
            case.what = f"{damage.__name__} {file.name}"
        found = case.attempt(names_of(file), opened, place, view)
        if found is None:
            continue
        scenes, scene = found
        case.require(len(scenes) == 3, f"{len(scenes)} scenes")
        case.require(scene.keys() == good.keys(), f"keys {sorted(scene.keys() ^ good.keys())}")
        case.require({f.name for f in home.iterdir()} == good_files, "files are not those of a whole set")
        for key in scene.keys() & good.keys():
            if not torch.is_tensor(good[key]):
                case.require(all(isinstance(text, str) for text in scene[key]), f"{key} {scene[key]}")
                continue
            alike = scene[key].shape == good[key].shape and scene[key].dtype == good[key].dtype
            case.require(alike, f"{key} {scene[key].dtype} {tuple(scene[key].shape)}")
            case.require(scene[key].float().isfinite().all(), f"{key} is not finite")
    tally.end()


@pytest.fixture
def labelled(tmp_path):
    """A clip and the folder of its labels, of which one is filled in."""
    clip, labels = tmp_path / "mine", tmp_path / "labels"
    write_clip(clip, *drive(STOP_AND_GO))
    ((_, frames),) = write_labels(clip, labels)
    first = labels / frames[0]["label"]
    fill(first / "stage_1" / "label.json", critical_components=LIGHT)
    text = "Stop and keep lane since the light ahead turns red."
    fill(first / "stage_2" / "label.json", exclude="no", longitudinal="stop", lateral="none", reasoning=text)
    return clip, labels


def test_labels(labelled, case_folder):
    """What annotators bring back."""
    clip, labels = labelled
    tally = Tally("labels", 110)
    reasoning = clip / "reasoning.json"
    for case in tally.cases:
        chance = case.chance
        place = case_folder(labels)
        reasoning.unlink(missing_ok=True)
        file = chance.choice(sorted(place.rglob("*.json")))
        case.what = damage_json(file, chance)
        said = case.attempt(names_of(file), read_labels, place)
        if said is None:
            case.require(not reasoning.exists(), "refused, and reasoning.json was written")
            continue
        entries = json.loads(reasoning.read_text()) if reasoning.exists() else []
        for entry in entries:
            whole = isinstance(entry["time"], float) and math.isfinite(entry["time"]) and data.decisions(entry["text"])
            case.require(whole, f"{entry}")
    tally.end()


# --------------------------------------------------------------------------------------------------
# Runs to go on with


def call(main, *words):
    """A program in this process, as doors.run runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in words])
        doors.run(main)
    return True


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps that has ended, of a model that knows few words."""
    home = tmp_path_factory.mktemp("runs")
    flags = "--size 32 64 --scenes 4 --batch 2 --val-scenes 2 --steps 2 --warmup 1 --threads 1".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 0)  # renders here
        call(train.main, "train.py", *flags, "--cache", home / "scenes", "--out", home / "run")
    return home / "run"


def test_resumed_runs(finished, case_folder, monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 0)
    tally = Tally("resumed runs", 100)
    for case in tally.cases:
        chance = case.chance
        place = case_folder(finished)
        file = place / chance.choice(("training.safetensors",) * 4 + ("model.safetensors", "config.json", "log.jsonl"))
        if file.suffix == ".json":
            case.what = damage_json(file, chance)
        elif file.suffix == ".safetensors":
            case.what = edit_weights(file, chance)
        else:
            damage = chance.choice(OF_BYTES)
            damage(file, chance)
            case.what = f"{damage.__name__} {file.name}"
        before = {f.relative_to(place): f.read_bytes() for f in place.rglob("*") if f.is_file()}
        capsys.readouterr()
        found = case.attempt(None, call, train.main, "train.py", "--resume", place)
        said = capsys.readouterr().err
        case.require("Traceback" not in said, "a traceback on the console")
        if found:
            tensors = load_file(place / "training.safetensors").values()
            finite = all(tensor.isfinite().all() for tensor in tensors)
            case.require(finite, "moments that are not finite were taken")
            continue
        for name, content in before.items():
            kept = (place / name).exists() and (place / name).read_bytes() == content
            case.require(kept, f"refused, and {name} is another")
    tally.end()


# --------------------------------------------------------------------------------------------------
# Answers of a judge


@pytest.fixture
def answering():
    """A server of raw bytes: set `.answer`; `.url` is where it is."""
    server = socket.create_server(("127.0.0.1", 0))

    class Answering:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        answer = b""

        def serve(self):
            while True:
                try:
                    caller, _ = server.accept()
                except OSError:
                    return
                with caller, contextlib.suppress(OSError):
                    caller.settimeout(1)
                    caller.recv(65536)
                    caller.sendall(self.answer)

    answering = Answering()
    threading.Thread(target=answering.serve, daemon=True).start()
    yield answering
    server.close()


SAID = ("3", "5", " 4 ", "-3", "99", "3.5", "there are 2 decisions", "", "five", "4/0", None, 3, ["3"], {}, "3" * 10**6,
        "٣", "\0", "nan")  # fmt: skip


def test_judge_answers(answering, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret-of-mine")
    tally = Tally("judge answers", 110)
    for case in tally.cases:
        chance = case.chance
        content = chance.choice(SAID)
        body = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})
        case.what = f"says {str(content)[:30]!r}"
        if chance.random() < 0.5:
            body, said = edit_json(body, chance)
            case.what += f", {said}"
        body = body.encode("utf-8", "replace")
        status = chance.choice((b"HTTP/1.1 200 OK",) * 6 + (b"HTTP/1.1 500 X", b"HTTP/9 x", b"", b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/"))
        length = len(body) if chance.random() < 0.8 else chance.choice((-1, 10**9, "x"))
        answering.answer = status + b"\r\nContent-Length: %s\r\nConnection: close\r\n\r\n" % str(length).encode() + body
        if chance.random() < 0.2:
            answering.answer = answering.answer[: chance.randrange(len(answering.answer))]
            case.what += ", cut"
        critic = rl.Judge(answering.url, timeout=0.3, tries=1)
        found = case.attempt({"--judge"}, critic, [("said", "true")])
        if found is not None:
            (grade,) = found
            told = re.findall(r"[-\d.]+", str(json.loads(body)["choices"][0]["message"]["content"]).strip())
            case.require(told and told[0] == str(grade) and 0 <= grade <= 5, f"grade {grade}")
    tally.end()


def asked_twice(url, place, pairs):
    return [rl.Judge(url, file=str(place), timeout=2)(pairs) for _ in range(2)]


def test_judge_caches(answering, tmp_path):
    """A file of answers that was damaged: what is lost is asked again, and what is kept is a grade."""
    answering.answer = b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps({"choices": [{"message": {"content": "3"}}]}).encode()
    good = tmp_path / "answers" / "judge.jsonl"
    pairs = [(f"said {i}", "true") for i in range(6)]
    rl.Judge(answering.url, file=str(good))(pairs)
    place = tmp_path / "judge.jsonl"
    tally = Tally("judge caches", 50)
    for case in tally.cases:
        chance = case.chance
        place.write_bytes(good.read_bytes())
        damage = chance.choice((cut, cut, flip, empty, zeros, grow))
        if chance.random() < 0.4:
            lines = place.read_text().splitlines()
            at = chance.randrange(len(lines))
            lines[at], case.what = edit_json(lines[at], chance)
            place.write_text("\n".join(lines) + "\n")
        else:
            damage(place, chance)
            case.what = damage.__name__
        found = case.attempt({"judge.jsonl"}, asked_twice, answering.url, place, pairs)
        if found is not None:
            first, second = found
            grades = all(isinstance(grade, int) and 0 <= grade <= 5 for grade in first)
            case.require(grades and first == second, f"{first}, then {second}")
    tally.end()


# --------------------------------------------------------------------------------------------------
# Flags


class Parsed(Exception):
    """The command line was read; what follows is work."""


PROGRAMS = {  # its main, and words that it needs
    "sample.py": (sample.main, []), "train.py": (train.main, []), "data.py": (data.main, []),
    "tools.evaluate": (evaluate.main, []), "tools.gallery": (gallery.main, ["out"]),
    "tools.judge": (judge.main, ["http://localhost:1/v1"]), "tools.label": (label.main, ["clip"]),
    "tools.world": (world_tool.main, ["--cost"]), "tools.experiments": (experiments.main, ["rl"]),
}  # fmt: skip
VALUES = ("nan", "inf", "-inf", "1e400", "x", "", "-1", "0", "1e20", "99999999999999999999", "0.5", "1", "--", "None")
NEVER = ("nan", "inf", "-inf", "1e400", "x", "", "None")  # never what a number may be


def is_number(kind):
    """Whether the type of a flag is a number."""
    return kind in (int, float) or getattr(kind, "__qualname__", "").startswith(("whole.", "real."))


def parse_and_stop(main, *words):
    """Run a program up to its work."""
    with contextlib.suppress(Parsed):
        call(main, *words)
    return True


def test_flags(tmp_path, monkeypatch, capsys):
    """Every number on every command line, with values that are none or are out of range."""
    monkeypatch.chdir(tmp_path)
    parse = doors.Flags.parse_args
    parsers = {}
    for name, (main, words) in PROGRAMS.items():

        def look(self, *args, name=name, words=words, **more):
            parsers[name] = self
            for action in self._actions:
                if isinstance(action, argparse._SubParsersAction):  # a tool of several commands
                    parsers[name] = action.choices[words[0]]
            raise Parsed

        monkeypatch.setattr(doors.Flags, "parse_args", look)
        monkeypatch.setattr(doors.Flags, "parse_known_args", look)
        with contextlib.suppress(Parsed):
            call(main, name, *words)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)

    def no_work(*args, **more):
        raise Parsed

    for place in ("alpamayo.Alpamayo.from_pretrained", "sample.load_model", "tools.common.load_model", "tools.judge.load_model",
                  "data.load_world", "data.make_scenes", "data.World", "tools.world.World", "train.load_scenes",
                  "train.starting_model", "train.print_plan", "tools.gallery.first_seed", "tools.world.cost",
                  "tools.label.write_labels", "tools.experiments.rewards.measure"):  # fmt: skip
        monkeypatch.setattr(place, no_work)
    tally = Tally("flags", 300)
    assert parse is doors.Flags.parse_args and parsers.keys() == PROGRAMS.keys()
    numbers = [(name, a) for name, parser in parsers.items() for a in parser._actions
               if a.option_strings and is_number(a.type)]  # fmt: skip
    for case in tally.cases:
        chance = case.chance
        name, action = chance.choice(numbers)
        main, words = PROGRAMS[name]
        value = chance.choice(VALUES)
        count = action.nargs if isinstance(action.nargs, int) else 1
        case.what = f"{name} {action.option_strings[0]} {value!r}"
        capsys.readouterr()
        flags = *words, action.option_strings[0], *[value] * count
        found = case.attempt(None, parse_and_stop, main, name, *flags)
        said = capsys.readouterr().err.strip()
        if "\n" in said:
            case.fault("more than a line", said[:200])
        if value in NEVER:
            case.require(not found, "was taken")
    tally.end()
