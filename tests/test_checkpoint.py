"""
Checkpoints: what is saved comes back, the release's format is kept, and whatever is broken is one clear line.

    python -m pytest tests/test_checkpoint.py
"""
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, ROOT, made_up
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import doors
from alpamayo import NANO, PRESETS, Alpamayo, Config, Vocabulary, read_config, with_words
from release import backbone_json, release_json

SMALL = with_words(
    replace(
        PRESETS["nano"], n_layer=3, n_embd=48, n_head=2, n_kv_head=1, head_dim=24, n_mlp=64, mrope_section=(4, 4, 4),
        v_embd=32, v_head=2, v_mlp=32, v_grid=4, patch=8, e_embd=32, e_head=2, e_mlp=32, a_embd=32, bins=16, frames=2,
    ),
    ["Stop at the line", "Yield to the pedestrian"],
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    model = Alpamayo(SMALL, Vocabulary(SMALL))
    model.load_state_dict({name: made_up(name, p.shape) for name, p in model.named_parameters()}, strict=False)
    return model


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def sharded(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder, shard_bytes=50_000)
    return folder


def scene(H, W):
    images = torch.randint(0, 256, (1, 4, 2, 3, H, W), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    xyz = torch.stack([torch.linspace(-15, 0, 16), torch.zeros(16), torch.zeros(16)], -1)[None]
    return {
        "images": images, "camera_ids": torch.tensor([[0, 1, 2, 6]]), "ego_history_xyz": xyz,
        "ego_history_rot": torch.eye(3).expand(1, 16, 3, 3), "ego_kinematics": torch.ones(1, 20, 4),
    }  # fmt: skip


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# -------------------------------------------------------------------------------------------------- saving, loading


@pytest.mark.parametrize("shard_bytes", [2**30, 50_000], ids=["one file", "many shards"])
def test_what_is_saved_comes_back(model, tmp_path, shard_bytes):
    model.save_pretrained(str(tmp_path), shard_bytes=shard_bytes)
    loaded = Alpamayo.from_pretrained(str(tmp_path))
    assert loaded.cfg == model.cfg
    assert_same_weights(loaded.state_dict(), model.state_dict())
    ours, theirs = (m.sample(scene(32, 64), n=2, seed=0, max_new_tokens=8) for m in (model, loaded))
    assert ours.reasoning == theirs.reasoning and torch.equal(ours.xyz, theirs.xyz)


def test_shards_keep_to_their_size(model, tmp_path):
    model.save_pretrained(str(tmp_path), shard_bytes=50_000)
    shards = [load_file(file) for file in tmp_path.glob("*.safetensors")]
    assert len(shards) > 3
    for shard in shards:
        assert len(shard) == 1 or sum(t.numel() * t.element_size() for t in shard.values()) <= 50_000


def test_a_later_save_in_one_file_is_what_is_loaded(model, tmp_path):
    model.save_pretrained(str(tmp_path), shard_bytes=50_000)
    other = Alpamayo(SMALL, Vocabulary(SMALL))
    other.save_pretrained(str(tmp_path))
    assert_same_weights(Alpamayo.from_pretrained(str(tmp_path)).state_dict(), other.state_dict())


def test_saving_in_bfloat16(model, tmp_path):
    """Half the bytes; frequencies and moments, which are buffers, stay float32."""
    model.save_pretrained(str(tmp_path), dtype=torch.bfloat16)
    buffers = dict(model.named_buffers())
    rounded = {k: v if k in buffers else v.bfloat16() for k, v in model.state_dict().items()}
    assert_same_weights(load_file(tmp_path / "model.safetensors"), rounded)
    assert_same_weights(Alpamayo.from_pretrained(str(tmp_path), dtype=torch.bfloat16).state_dict(), rounded)
    in_float32 = {k: v.float() for k, v in rounded.items()}
    assert_same_weights(Alpamayo.from_pretrained(str(tmp_path)).state_dict(), in_float32)


class Killed(BaseException):
    pass


def killed_after(monkeypatch, steps):
    """From then on nothing is renamed or removed any more, cleaning up included."""
    left = [steps]

    def dying(act):
        def step(*args, **more):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return act(*args, **more)

        return step

    for module, name in ((os, "replace"), (os, "remove"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))


@pytest.mark.parametrize("before, after", [(300_000, 300_000), (300_000, 2**30), (2**30, 300_000)])
def test_a_save_that_is_killed_leaves_the_old_weights_or_the_new(model, tmp_path, before, after):
    """At any of its steps; then a save that is not killed leaves nothing of the others."""
    new = Alpamayo(SMALL, Vocabulary(SMALL))
    new.load_state_dict({name: 2 * p for name, p in model.named_parameters()}, strict=False)
    seen = set()
    for steps in range(200):
        folder = tmp_path / str(steps)
        model.save_pretrained(folder, shard_bytes=before)
        with pytest.MonkeyPatch.context() as patch:
            killed_after(patch, steps)
            try:
                new.save_pretrained(folder, shard_bytes=after)
                done = True
            except Killed:
                done = False
        loaded = Alpamayo.from_pretrained(folder).state_dict()
        which = "new" if torch.equal(loaded[NORM], new.state_dict()[NORM]) else "old"
        assert_same_weights(loaded, (new if which == "new" else model).state_dict())
        seen.add(which)
        if done:
            break
        new.save_pretrained(folder, shard_bytes=after)
        assert_same_weights(Alpamayo.from_pretrained(folder).state_dict(), new.state_dict())
        weights = {file.name for file in folder.glob("*.safetensors")}
        index = folder / "model.safetensors.index.json"
        named = json.loads(index.read_text())["weight_map"].values() if index.exists() else ["model.safetensors"]
        assert weights == set(named)
    assert done and seen == {"old", "new"}


@pytest.mark.parametrize("shard_bytes", [2**30, 50_000], ids=["one file", "many shards"])
@pytest.mark.parametrize("bad, dtype", [(torch.nan, None), (-torch.inf, None), (1e6, torch.float16)])
def test_what_is_not_finite_is_not_saved(model, tmp_path, shard_bytes, bad, dtype):
    """The last tensor of the last shard; in float16 a million is infinite. The earlier checkpoint is as it was."""
    model.save_pretrained(tmp_path, shard_bytes=shard_bytes)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    broken = Alpamayo(SMALL, Vocabulary(SMALL))
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.ego_embed.fc2.bias[3] = bad
    with pytest.raises(ValueError, match=r"^.*: tensor ego_embed.fc2.bias holds values that are NaN or infinite in float"):
        broken.save_pretrained(tmp_path, dtype, shard_bytes)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("shard_bytes", [2**30, 50_000], ids=["one file", "many shards"])
def test_a_full_disk_is_one_line_and_loses_nothing(model, tmp_path, monkeypatch, error, shard_bytes):
    model.save_pretrained(tmp_path, shard_bytes=shard_bytes)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    calls = []

    def save_half(tensors, path, metadata):
        calls.append(path)
        if shard_bytes < 2**30 and len(calls) < 3:
            return save_file(tensors, path, metadata)
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(doors, "save_file", save_half)
    with pytest.raises(OSError) as caught:
        model.save_pretrained(tmp_path, shard_bytes=shard_bytes)
    line = str(caught.value)
    assert "\n" not in line and "safetensors: not written" in line and "No space left" in line
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert not list(tmp_path.rglob("*.part"))


def test_files_that_are_written_have_the_mode_of_the_umask(model, tmp_path):
    old = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path)
    finally:
        os.umask(old)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 3 and {file.stat().st_mode & 0o777 for file in files} == {0o640}


def test_two_writers_of_one_file(tmp_path):
    """Each has a temporary file of its own. What a killed one left behind goes an hour later."""
    path = tmp_path / "file"

    def outer(part):
        doors.write_atomically(path, lambda other: other != part and Path(other).write_text("inner"))
        assert path.read_text() == "inner"
        Path(part).write_text("outer")

    left = [tmp_path / "file.a.part", tmp_path / "file.b.part"]
    for folder in left:
        folder.mkdir()
        (folder / "file").write_text("half")
    os.utime(left[0], (time.time() - 4000,) * 2)
    doors.write_atomically(path, outer)
    assert path.read_text() == "outer" and sorted(tmp_path.iterdir()) == [path, left[1]]


@pytest.mark.parametrize("cfg", [*PRESETS.values(), SMALL, Config(name_cameras=True, reasoning="off", min_pixels=1024)])
def test_every_field_of_a_config_comes_back(cfg, tmp_path):
    (tmp_path / "vlm").mkdir()
    (tmp_path / "vlm" / "config.json").write_text(json.dumps(backbone_json(vars(cfg))))
    (tmp_path / "config.json").write_text(json.dumps(release_json(vars(cfg), vars(Config()))))
    assert read_config(str(tmp_path)) == cfg


@pytest.mark.parametrize("name", ["nvidia/Cosmos-Reason2-8B", "Qwen/Qwen3-VL-8B-Instruct"])
def test_the_release_only_names_its_backbone(name, tmp_path):
    """No vlm/config.json came with it: the numbers of Qwen3-VL-8B are known."""
    (tmp_path / "config.json").write_text(json.dumps({**release_json(vars(Config()), vars(Config())), "vlm_name_or_path": name}))
    assert read_config(str(tmp_path)) == Config()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory's peak from Linux's /proc")
def test_loading_many_shards_holds_the_weights_once(saved, tmp_path):
    """200 MB of weights in 10 MB shards, loaded by a process of its own that has loaded a small model before: its peak
    grows by less than 1.25 times that."""
    cfg = replace(SMALL, n_embd=512, n_mlp=10240)
    model = Alpamayo(cfg, Vocabulary(cfg))
    model.save_pretrained(str(tmp_path), shard_bytes=10 * 2**20)
    script = f"""
import re, sys
sys.path.insert(0, {ROOT!r})
from alpamayo import Alpamayo
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
Alpamayo.from_pretrained({str(saved)!r})
before = peak()
model = Alpamayo.from_pretrained({str(tmp_path)!r})
print(1024 * (peak() - before))
"""
    grown = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert grown < 1.25 * sum(4 * p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------------------------- the release's format


def test_parameters_of_the_release():
    """Counted without memory; the total is the released checkpoint's."""
    with torch.device("meta"):
        model = Alpamayo(Config())

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(model.vlm.model.visual) == 576_388_336
    assert count(model.vlm.model.language_model.layers) == 6_946_071_552
    assert count(model.vlm) == 8_797_933_808
    assert count(model.expert) == 2_279_238_656
    assert count(model.action_in_proj) == 1_349_632
    assert count(model.action_out_proj) == 4_098
    assert count(model) == 11_078_526_194


def test_a_saved_release_keeps_its_format(release_folder, tmp_path):
    """Loaded and saved, the golden checkpoint has the same config.json, tensors and tokenizer: the official code would
    load it. Only the backbone's name, which is now a folder, and the numbers' type may differ."""
    Alpamayo.from_pretrained(str(release_folder)).save_pretrained(str(tmp_path))
    with open(os.path.join(GOLDEN, "spec.json")) as f:
        spec = json.load(f)
    config, vlm = (json.loads((tmp_path / file).read_text()) for file in ("config.json", "vlm/config.json"))
    may_differ = {"vlm_name_or_path", "model_dtype"}
    assert {k: config[k] for k in spec["config.json"].keys() - may_differ} == {
        k: v for k, v in spec["config.json"].items() if k not in may_differ
    }
    ids = [k for k in vlm if k.endswith("_token_id")]
    assert ids and {k: vlm[k] for k in ids} == {k: spec["vlm/config.json"][k] for k in ids}
    assert_same_weights(load_file(tmp_path / "model.safetensors"), load_file(release_folder / "model.safetensors"))
    assert (tmp_path / "tokenizer.json").read_text() == (release_folder / "tokenizer.json").read_text()


@pytest.mark.parametrize("folder", ["nano", "saved", "older", "release"])
def test_the_backbone_loads_in_transformers(folder, saved, release_folder, tmp_path):
    """From vlm/config.json and the tensors vlm.*, as they are. Older files say the text tokenizer's vocabulary there, as
    the backbone's own does; this code reads neither."""
    qwen = pytest.importorskip("transformers.models.qwen3_vl")
    path = {"nano": NANO, "saved": saved, "older": saved, "release": tmp_path / "release"}[folder]
    if folder == "release":
        Alpamayo.from_pretrained(release_folder).save_pretrained(path)
    if folder == "older":
        path = shutil.copytree(saved, tmp_path / "older")
        edit(path / "vlm" / "config.json", lambda c: c["text_config"].update(vocab_size=SMALL.text_vocab))
        assert read_config(path) == SMALL
        return
    config = qwen.Qwen3VLConfig.from_pretrained(os.path.join(path, "vlm"))
    with torch.device("meta"):
        backbone = qwen.Qwen3VLForConditionalGeneration(config)
    tensors = load_file(os.path.join(path, "model.safetensors"))
    ours = {name.removeprefix("vlm."): tensor for name, tensor in tensors.items() if name.startswith("vlm.")}
    backbone.load_state_dict(ours, strict=True, assign=True)


# ------------------------------------------------------------------------------------------------- what files may hold


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_any_floating_point_type_load(saved, tmp_path, kind):
    folder = shutil.copytree(saved, tmp_path / "cast")
    edit(folder / "model.safetensors", lambda w: w.update({NORM: w[NORM].to(kind)}))
    loaded = Alpamayo.from_pretrained(folder).state_dict()[NORM]
    assert torch.equal(loaded, load_file(folder / "model.safetensors")[NORM].float())


def test_the_index_says_which_file_a_tensor_comes_from(model, sharded, tmp_path):
    """Other copies of a tensor are not read, nor what the index does not name."""
    folder = shutil.copytree(sharded, tmp_path / "stale")
    for shard in folder.glob("*.safetensors"):
        if NORM not in load_file(shard):
            edit(shard, lambda w: w.update({NORM: torch.zeros(32), "other": torch.zeros(2)}))
    save_file({NORM: torch.zeros(32)}, folder / "model.safetensors")
    assert_same_weights(Alpamayo.from_pretrained(folder).state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["with a space", "Pfad ü 路", "bytes", "path"])
def test_any_path_to_a_folder(model, tmp_path, name):
    folder = str(tmp_path / name)
    folder = {"bytes": os.fsencode(folder), "path": Path(folder)}.get(name, folder)
    model.save_pretrained(folder)
    assert_same_weights(Alpamayo.from_pretrained(folder).state_dict(), model.state_dict())


def test_no_folder(tmp_path, saved):
    for path, line in (("none", "missing"), ("file", "expected a checkpoint's folder"), ("empty", "config.json: missing")):
        if path == "file":
            (tmp_path / path).write_text("")
        if path == "empty":
            (tmp_path / path).mkdir()
        with pytest.raises((ValueError, OSError), match=f"^{tmp_path / path}[^\n]*{line}[^\n]*$"):
            Alpamayo.from_pretrained(tmp_path / path)
    with pytest.raises(OSError, match=f"^{tmp_path / 'file'}.*: not written"):
        Alpamayo.from_pretrained(saved).save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="^dtype: expected float32"):
        Alpamayo.from_pretrained(saved, dtype=torch.int8)


# ------------------------------------------------------------------------------------------------------- bad inputs


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path, change):
    """change(dict) of a JSON file or of a safetensors file's tensors."""
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


def config(change):
    return lambda folder: edit(folder / "config.json", change)


def vlm(change):
    return lambda folder: edit(folder / "vlm" / "config.json", change)


def weights(change):
    return lambda folder: edit(folder / "model.safetensors", change)


NORM = "expert.norm.weight"
BROKEN = {  # how a checkpoint is spoiled, and what the message must name
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "half a config": (lambda f: cut(f / "config.json"), "config.json"),
    "no field": (config(lambda c: c.pop("traj_token_start_idx")), "config.json traj_token_start_idx"),
    "no inner field": (config(lambda c: c["action_space_cfg"].pop("accel_std")), "config.json action_space_cfg.accel"),
    "another fit": (config(lambda c: c["action_space_cfg"].update(dt=0.2)), "config.json action_space_cfg.dt 0.2 0.1"),
    "another mask": (
        config(lambda c: c.update(expert_non_causal_attention=False)), "config.json expert_non_causal_attention False"),
    "another vocabulary": (config(lambda c: c.update(vocab_size=9)), "config.json vocab_size 9"),
    "another expert": (config(lambda c: c["expert_cfg"].update(head_dim=7)), "config.json expert_cfg.head_dim 7 24"),
    "unknown extra": (config(lambda c: c["extra"].update(colour="red")), "config.json extra.colour"),
    "another ego": (config(lambda c: c["extra"].update(ego="telepathy")), "config.json extra.ego telepathy"),
    "a word too few": (config(lambda c: c["extra"]["words"].pop()), "config.json text_vocab words"),
    "no backbone": (lambda f: (f / "vlm" / "config.json").unlink(), "vlm/config.json vlm_name_or_path"),
    "half a backbone": (lambda f: cut(f / "vlm" / "config.json"), "vlm/config.json"),
    "no backbone field": (vlm(lambda c: c["text_config"].pop("head_dim")), "vlm/config.json text_config.head_dim"),
    "other ids": (config(lambda c: c["traj_token_ids"].update(future_start=7)), "config.json traj_token_ids"),
    "other range": (config(lambda c: c["traj_tokenizer_cfg"].update(dims_min=[-3, -3])), "config.json dims_min"),
    "tied embeddings": (vlm(lambda c: c.update(tie_word_embeddings=True)), "vlm/config.json tie_word_embeddings"),
    "other epsilon": (vlm(lambda c: c["text_config"].update(rms_norm_eps=1e-5)), "vlm/config.json rms_norm_eps"),
    "not an object": (lambda f: (f / "config.json").write_text("5"), "config.json object"),
    "null": (config(lambda c: c.update(traj_tokenizer_cfg=None)), "config.json traj_tokenizer_cfg null"),
    "a word for a number": (config(lambda c: c.update(traj_token_start_idx="x")), "config.json text_vocab 'x'"),
    "a zero": (vlm(lambda c: c["vision_config"].update(temporal_patch_size=0)), "vlm/config.json temporal_patch 0"),
    "a word for a switch": (config(lambda c: c["extra"].update(pair_frames="x")), "config.json pair_frames 'x'"),
    "other sections": (vlm(lambda c: c["text_config"]["rope_scaling"].update(mrope_section=[1, 1, 1])), "mrope_section"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "half the weights": (lambda f: cut(f / "model.safetensors"), "model.safetensors"),
    "no tensor": (weights(lambda w: w.pop(NORM)), f"safetensors {NORM}"),
    "one more tensor": (weights(lambda w: w.update(other=torch.zeros(1))), "model.safetensors other"),
    "another shape": (weights(lambda w: w.update({NORM: torch.ones(7)})), f"model.safetensors {NORM} (7,) (32,)"),
    "NaN": (weights(lambda w: w[NORM].fill_(torch.nan)), f"model.safetensors {NORM} NaN"),
    "infinity": (weights(lambda w: w[NORM][3:4].fill_(-torch.inf)), f"model.safetensors {NORM} infinite"),
    "too large": (weights(lambda w: w.update({NORM: torch.full((32,), 1e300, dtype=torch.float64)})), f"{NORM} infinite float32"),
    "int8": (weights(lambda w: w.update({NORM: torch.ones(32).char()})), f"model.safetensors {NORM} I8"),
    "bool": (weights(lambda w: w.update({NORM: torch.ones(32).bool()})), f"model.safetensors {NORM} BOOL"),
    "complex": (weights(lambda w: w.update({NORM: torch.ones(32) * 1j})), f"model.safetensors {NORM} C64"),
    "no spread": (weights(lambda w: w["action_space.accel_std"].zero_()), "model.safetensors action_space.accel_std 1.5"),
    "another spread": (weights(lambda w: w["action_space.curvature_std"].fill_(3.0)), "action_space.curvature_std 0.03"),
    "NaN for a mean": (weights(lambda w: w["action_space.accel_mean"].fill_(torch.nan)), "action_space.accel_mean NaN"),
    "other frequencies": (weights(lambda w: w["action_in_proj.sinus.0.freqs"].mul_(2)), "sinus.0.freqs 200 100"),
    "an infinite frequency": (weights(lambda w: w["action_in_proj.sinus.1.freqs"].div_(0)), "sinus.1.freqs infinite"),
    "a folder for weights": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()), "model.safetensors expected"),
    "other moments": (
        config(lambda c: c["traj_tokenizer_cfg"]["action_space_cfg"].update(accel_std=2.0)),
        "config.json action_space_cfg.accel_std 1.5 2.0"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json nested"),
    "NaN in JSON": (lambda f: (f / "config.json").write_text('{"a": NaN}'), "config.json NaN"),
    "a huge number in JSON": (lambda f: (f / "config.json").write_text('{"a": 1' + "0" * 5000 + "}"), "config.json JSON"),
    "a line in a name": (config(lambda c: c["extra"].update({"a\nb": 1})), "config.json extra.a"),
    "no image token": (
        lambda f: (f / "tokenizer.json").write_text(Path(GOLDEN, "tokenizer.json").read_text()), "tokenizer.json 264"),
}  # fmt: skip
WRONG = [  # file, field, values that are each one line which names both
    ("config.json", "extra.cameras", [[7], [-1], [0.0], [True], 3, "x", {}, [[1]]]),
    ("config.json", "extra.chat", [0, 1, "false", []]),
    ("config.json", "extra.frames", [0, -1, 2.0, True, "2", [2], 2**40, 10**400]),
    ("config.json", "extra.frame_dt", [0, -0.5, "0.5", 1e300, False]),
    ("config.json", "extra.keep", [0, -1, 1.5, "1", [1], True]),
    ("config.json", "extra.max_pixels", ["0", [], False, 196608, 0.0, {}, -1]),
    ("config.json", "extra.planes", [[12, 12], [12, 12, 0], [12, 12, 2.5], [12, 12, 2**40], ["1", "2", "3"], 12]),
    ("config.json", "extra.planes_reach", [[0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1e300], "123456"]),
    ("config.json", "extra.reasoning", ["maybe", True, 1, []]),
    ("config.json", "extra.words", [["a", "a"], [""], [1], "words", [None], ["\ud800"], [["a"]], {"a": 1}, ["\n"]]),
    ("config.json", "extra", [[], "x", 3]),
    ("config.json", "action_space_cfg", [[], "x", None, 3]),
    ("config.json", "action_space_cfg.accel_std", [0, -1.5, "1.5", None, [], 1e300, True]),
    ("config.json", "action_space_cfg.curvature_mean", ["0", [0], 1e30]),
    ("config.json", "action_space_cfg.dt", [0, "0.1", None, {}]),
    ("config.json", "action_in_proj_cfg.num_fourier_feats", [0, 2**40, "20", 20.0]),
    ("config.json", "action_in_proj_cfg.max_freq", [0, -1, 1e300, "100"]),
    ("config.json", "action_in_proj_cfg.num_enc_layers", [0, 2**40, True]),
    ("config.json", "expert_cfg.num_attention_heads", [0, -2, "2", 2.0, 2**40]),
    ("config.json", "hist_traj_tokenizer_cfg.num_bins", [-1, 2**40, "0", True, None]),
    ("config.json", "traj_tokenizer_cfg.num_bins", [0, 1, 2**40, 16.0, "16"]),
    ("config.json", "traj_tokenizer_cfg.dims_max", [[], "44", [4], [4, 5], [0, 0], [-4, -4], 4, {}, [True, True]]),
    ("config.json", "traj_token_start_idx", [0, -1, 2**40, 1e3, True, "x", [], 10**400]),
    ("config.json", "traj_token_ids", [[], "x", {}, 3]),
    ("config.json", "vlm_name_or_path", [3, [], {}, None]),
    ("config.json", "include_camera_ids", [0, "x", []]),
    ("config.json", "min_pixels", [-1, "x", 1.5, True, 2**40]),
    ("vlm/config.json", "text_config", [[], "x", None, 3]),
    ("vlm/config.json", "text_config.num_hidden_layers", [0, 2**40, "3", 3.0, True, 10**400]),
    ("vlm/config.json", "text_config.head_dim", [0, 2**40, "24", 24.5]),
    ("vlm/config.json", "text_config.num_key_value_heads", [0, 2**40, "1", False]),
    ("vlm/config.json", "text_config.rope_theta", [0, -1, "1e4", 1e300, []]),
    ("vlm/config.json", "text_config.rope_scaling", [[], "x", 3]),
    ("vlm/config.json", "text_config.rope_scaling.mrope_section", [[4, 4], [4, 4, 4, 0], [13, -1, 0], "444", [4.0, 4, 4]]),
    ("vlm/config.json", "vision_config.depth", [0, 2**40, "3"]),
    ("vlm/config.json", "vision_config.deepstack_visual_indexes", [[-1], ["0"], [0.0], 1, [None], [[0]], [512]]),
    ("vlm/config.json", "vision_config.num_position_embeddings", [0, -1, 15, 16.0, "16", 2**40, True, 10**400]),
    ("vlm/config.json", "vision_config.patch_size", [0, 2**40, 8.0]),
    ("vlm/config.json", "vision_config.spatial_merge_size", [0, 2**40, -2]),
]
NOT_TOGETHER = [  # file, field, value, what the line must name
    ("config.json", "extra.cameras", [], "cameras"),
    ("config.json", "extra.cameras", [1, 1], "cameras"),
    ("config.json", "extra.frames", 3, "temporal_patch"),
    ("config.json", "action_in_proj_cfg.num_fourier_feats", 7, "a_fourier"),
    ("config.json", "extra.planes_reach", [0, 1, 0, 1, 1, 1], "planes_reach"),
    ("config.json", "extra.pair_frames", False, "shape"),
    ("config.json", "expert_cfg.num_attention_heads", 3, "shape"),
    ("config.json", "min_pixels", 2**20, "min_pixels"),
    ("config.json", "include_camera_ids", True, "include_frame_nums"),
    ("config.json", "extra.ego", "deltas", "history_bins"),
    ("vlm/config.json", "text_config.num_attention_heads", 3, "shape"),
    ("vlm/config.json", "text_config.num_key_value_heads", 3, "n_kv_head"),
    ("vlm/config.json", "text_config.head_dim", 25, "head_dim"),
    ("vlm/config.json", "vision_config.num_heads", 16, "v_head"),
    ("vlm/config.json", "vision_config.deepstack_visual_indexes", [1, 1], "deepstack"),
    ("vlm/config.json", "vision_config.deepstack_visual_indexes", [1, 0], "deepstack"),
    ("vlm/config.json", "vision_config.deepstack_visual_indexes", [3], "deepstack"),
]


def put(folder, file, field, value):
    def change(data):
        *around, last = field.split(".")
        for key in around:
            data = data[key]
        data[last] = value

    edit(folder / file, change)


@pytest.fixture(scope="module")
def spoilt(saved, tmp_path_factory):
    """A copy whose JSON may be changed: `restore` brings it back."""
    return shutil.copytree(saved, tmp_path_factory.mktemp("spoilt") / "copy")


def restore(spoilt, saved):
    for file in ("config.json", "vlm/config.json"):
        shutil.copyfile(saved / file, spoilt / file)


@pytest.mark.parametrize("file, field, values", WRONG, ids=[f"{file} {field}" for file, field, _ in WRONG])
def test_wrong_values(saved, spoilt, file, field, values):
    for value in values:
        restore(spoilt, saved)
        put(spoilt, file, field, value)
        assert_one_clear_line(spoilt, f"{file} {field.split('.')[-1]}")


@pytest.mark.parametrize("file, field, value, named", NOT_TOGETHER)
def test_fields_that_do_not_fit(saved, spoilt, file, field, value, named):
    restore(spoilt, saved)
    put(spoilt, file, field, value)
    assert_one_clear_line(spoilt, named)


def test_a_config_is_checked_wherever_it_comes_from():
    """The presets' numbers, changed by hand or by a switch."""
    for switches, line in (
        ({"n_layer": 0}, "^n_layer is 0, expected a whole number from 1 to 512$"),
        ({"n_layer": 2**40}, "n_layer"), ({"n_layer": 4.0}, "n_layer"), ({"n_layer": True}, "n_layer"),
        ({"accel_std": float("inf")}, "accel_std is inf"), ({"cameras": [0, 1]}, "cameras is "),
        ({"head_dim": 41}, "head_dim must be even"), ({"n_kv_head": 3}, "n_kv_head"), ({"frames": 3}, "temporal_patch"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=line):
            replace(PRESETS["nano"], **switches)


def assert_one_clear_line(folder, named):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        Alpamayo.from_pretrained(str(folder))
    line = str(caught.value)
    assert "\n" not in line
    assert str(folder) in line
    for word in named.split():
        assert word in line, line


@pytest.mark.parametrize("spoil, named", BROKEN.values(), ids=BROKEN.keys())
def test_broken_checkpoint(saved, tmp_path, spoil, named):
    folder = shutil.copytree(saved, tmp_path / "broken")
    spoil(folder)
    assert_one_clear_line(folder, named)


def test_missing_shard(model, tmp_path):
    model.save_pretrained(str(tmp_path), shard_bytes=50_000)
    next(tmp_path.glob("model-00002-*")).unlink()
    assert_one_clear_line(tmp_path, "model-00002-of index")


SHARDS = {  # what the index is made to say, and what the line must name
    "a number": (3, "weight_map.expert.norm.weight text"),
    "null": (None, "weight_map.expert.norm.weight null"),
    "a list": (["a"], "weight_map.expert.norm.weight text"),
    "out of the folder": ("../a.safetensors", "weight_map.expert.norm.weight ../a.safetensors"),
    "absolute": ("/a.safetensors", "weight_map.expert.norm.weight /a.safetensors"),
    "nothing": ("", "weight_map.expert.norm.weight"),
    "the folder": (".", "expected safetensors"),
    "no file": ("a\nb.safetensors", "missing index.json"),
    "a text file": ("config.json", "config.json safetensors"),
}


@pytest.mark.parametrize("file, named", SHARDS.values(), ids=SHARDS.keys())
def test_what_the_index_may_not_name(sharded, tmp_path, file, named):
    folder = shutil.copytree(sharded, tmp_path / "broken")
    edit(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({NORM: file}))
    assert_one_clear_line(folder, named)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": None}, {"weight_map": "x"}, [], {"weight_map": {}}])
def test_an_index_of_another_form(sharded, tmp_path, index):
    folder = shutil.copytree(sharded, tmp_path / "broken")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_one_clear_line(folder, "safetensors")


def test_a_shard_that_lacks_its_tensor(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "broken")
    other = next(shard.name for shard in sorted(folder.glob("*.safetensors")) if NORM not in load_file(shard))
    edit(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({NORM: other, "a\nb": other}))
    assert_one_clear_line(folder, r"unexpected 'a\nb'")
    edit(folder / "model.safetensors.index.json", lambda index: index["weight_map"].pop("a\nb"))
    assert_one_clear_line(folder, f"{other} {NORM}")


def test_weights_that_only_a_wider_type_can_hold(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "wide")
    weights(lambda w: w[NORM].fill_(1e6))(folder)
    assert Alpamayo.from_pretrained(folder).state_dict()[NORM][0] == 1e6
    with pytest.raises(ValueError, match=f"tensor {NORM} holds .* infinite in float16"):
        Alpamayo.from_pretrained(folder, dtype=torch.float16)


def test_tensor_that_no_shard_holds(model, tmp_path):
    model.save_pretrained(str(tmp_path), shard_bytes=50_000)
    for shard in tmp_path.glob("*.safetensors"):
        if NORM in load_file(shard):
            edit(shard, lambda tensors: tensors.pop(NORM))
    assert_one_clear_line(tmp_path, NORM)


def tokenizer(change):
    return lambda folder: edit(folder / "tokenizer.json", change)


def exchanged(tokens):
    """Two special tokens have one another's number."""
    *_, a, b = tokens["added_tokens"]
    a["content"], b["content"] = b["content"], a["content"]


TOKENIZERS = {
    "missing": lambda f: (f / "tokenizer.json").unlink(),
    "broken": lambda f: cut(f / "tokenizer.json"),
    "another size": tokenizer(lambda t: t["added_tokens"].pop()),
    "exchanged": tokenizer(exchanged),
    "no words": tokenizer(lambda t: t["model"].update(vocab={})),
    "no model": tokenizer(lambda t: t.pop("model")),
    "another model": tokenizer(lambda t: t.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"})),
    "no decoder": tokenizer(lambda t: t.update(decoder=None)),
    "empty": lambda f: (f / "tokenizer.json").write_text(""),
    "binary": lambda f: (f / "tokenizer.json").write_bytes(bytes(range(256))),
    "deep": lambda f: (f / "tokenizer.json").write_text("[" * 100_000),
    "a folder": lambda f: ((f / "tokenizer.json").unlink(), (f / "tokenizer.json").mkdir()),
}


@pytest.mark.parametrize("spoil", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_broken_tokenizer(release_folder, tmp_path, spoil):
    folder = shutil.copytree(release_folder, tmp_path / "broken")
    spoil(folder)
    assert_one_clear_line(folder, "tokenizer.json")


# ------------------------------------------------------------------------------- what the model is given

SCENES = {  # how a scene is spoiled, and what the line must name
    "no history": (lambda s: s.pop("ego_history_xyz"), "ego_history_xyz missing (B, 16, 3)"),
    "no kinematics": (lambda s: s.pop("ego_kinematics"), "ego_kinematics missing (B, 20, 4)"),
    "no cameras": (lambda s: s.pop("camera_ids"), "camera_ids missing"),
    "0 to 1": (lambda s: s.update(images=s["images"] / 255), "images float32 uint8"),
    "an array": (lambda s: s.update(images=s["images"].numpy()), "images tensor ndarray"),
    "two images, four cameras": (lambda s: s.update(images=s["images"][:, :2]), "camera_ids (1, 4) (B, cameras) (1, 2)"),
    "no batch": (lambda s: s.update({k: v[0] for k, v in s.items()}), "images (4, 2, 3, 32, 64) (B, cameras, frames, 3,"),
    "grey": (lambda s: s.update(images=s["images"][:, :, :, :1]), "images (1, 4, 2, 1, 32, 64) (B, cameras, frames, 3,"),
    "no pixels": (lambda s: s.update(images=s["images"][..., :0]), "images (1, 4, 2, 3, 32, 0)"),
    "camera 7": (lambda s: s.update(camera_ids=torch.tensor([[0, 1, 2, 7]])), "camera_ids [[0, 1, 2, 7]] 0 6"),
    "camera -1": (lambda s: s.update(camera_ids=torch.tensor([[-1, 1, 2, 6]])), "camera_ids 0 6"),
    "cameras as numbers": (lambda s: s.update(camera_ids=torch.tensor([[0.0, 1, 2, 6]])), "camera_ids float32 int64"),
    "short history": (lambda s: s.update(ego_history_xyz=torch.zeros(1, 15, 3)), "ego_history_xyz (1, 15, 3) (1, 16, 3)"),
    "yaw for a matrix": (lambda s: s.update(ego_history_rot=torch.zeros(1, 16)), "ego_history_rot (1, 16) (B, 16, 3, 3)"),
    "NaN": (lambda s: s.update(ego_history_xyz=torch.full((1, 16, 3), torch.nan)), "ego_history_xyz NaN"),
    "infinity": (lambda s: s["ego_kinematics"].fill_(torch.inf), "ego_kinematics infinite"),
    "two routes": (lambda s: s.update(route=["turn left", "turn right"]), "route (2,) (1,)"),
    "a route for a list": (lambda s: s.update(route="turn left"), "route list"),
    "a token for a route": (lambda s: s.update(route=["<|image_pad|>"]), "route special <|image_pad|>"),
    "three frames": (lambda s: s.update(images=s["images"][:, :, [0, 1, 1]]), "images: 3 frames 2"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, named", SCENES.values(), ids=SCENES.keys())
def test_wrong_scene(model, spoil, named):
    wrong = scene(32, 64)
    spoil(wrong)
    with pytest.raises(ValueError) as caught:
        model.sample(wrong, n=1)
    line = str(caught.value)
    assert "\n" not in line
    for word in named.split():
        assert word in line, line


def test_scenes_of_a_batch_have_the_same_cameras(model):
    batch = {key: torch.cat([value, value]) for key, value in scene(32, 64).items()}
    batch["camera_ids"][1] = torch.tensor([6, 0, 1, 2])
    with pytest.raises(ValueError, match="camera_ids are .* the same in the same order"):
        model.sample(batch, n=1)


@pytest.mark.parametrize("key, value", [
    ("ego_future_xyz", None), ("reasoning", None), ("reasoning", ["a", "b"]), ("reasoning", [None]),
    ("ego_future_xyz", torch.full((1, 64, 3), torch.nan)), ("ego_future_xyz", torch.zeros(1, 60, 3)),
    ("ego_future_rot", torch.zeros(1, 64)), ("ego_future_rot", None),
])  # fmt: skip
def test_wrong_scene_to_learn_from(model, key, value):
    right = {"ego_future_xyz": torch.zeros(1, 64, 3), "reasoning": ["Stop"], "ego_future_rot": torch.eye(3).expand(1, 64, 3, 3)}
    scenes = {**scene(32, 64), **right, key: value}
    if value is None:
        del scenes[key]
    with pytest.raises(ValueError, match=f"^scene: {key} [^\n]*$"):
        model(scenes)


@pytest.mark.parametrize("how", [
    {"n": 0}, {"n": 1.5}, {"n": True}, {"n": "1"}, {"steps": 1.5}, {"steps": 0}, {"max_new_tokens": 0}, {"seed": 1.5},
    {"seed": 2**64}, {"temperature": float("nan")}, {"temperature": -1}, {"temperature": 1e-30}, {"temperature": 1e9},
    {"top_p": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"eta": float("nan")}, {"eta": 2}, {"decode": "words"},
    {"noise": torch.zeros(1, 64, 3)}, {"noise": torch.zeros(2, 64, 2)}, {"noise": torch.zeros(1, 64, 2).long()},
    {"noise": torch.full((1, 64, 2), torch.nan)}, {"noise": 0.5}, {"temperature": None},
], ids=str)  # fmt: skip
def test_wrong_sampling(model, how):
    (name,) = how
    with pytest.raises(ValueError, match="(sample|scene|noise): [^\n]*") as caught:
        model.sample(scene(32, 64), **{"n": 1, "max_new_tokens": 4} | how)
    assert name in str(caught.value)


def test_images_that_the_patches_do_not_divide(model):
    with pytest.raises(ValueError, match=r"^images: 40 x 64 pixels.* multiples of 16[^\n]*$"):
        model.sample(scene(40, 64), n=1)
