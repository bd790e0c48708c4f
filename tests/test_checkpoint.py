"""
Checkpoints: what is saved comes back, the release's format is kept, and whatever is broken is one clear line.

    python -m pytest tests/test_checkpoint.py
"""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, ROOT, made_up
from safetensors.torch import load_file, save_file

from alpamayo import PRESETS, Alpamayo, Config, Vocabulary, read_config, with_words
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
}  # fmt: skip


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


def test_tensor_that_no_shard_holds(model, tmp_path):
    model.save_pretrained(str(tmp_path), shard_bytes=50_000)
    for shard in tmp_path.glob("*.safetensors"):
        if NORM in load_file(shard):
            edit(shard, lambda tensors: tensors.pop(NORM))
    assert_one_clear_line(tmp_path, NORM)


def another_size(folder):
    edit(folder / "tokenizer.json", lambda t: t["added_tokens"].pop())


TOKENIZERS = {
    "missing": lambda f: (f / "tokenizer.json").unlink(),
    "broken": lambda f: cut(f / "tokenizer.json"),
    "another size": another_size,
}


@pytest.mark.parametrize("spoil", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_broken_tokenizer(release_folder, tmp_path, spoil):
    folder = shutil.copytree(release_folder, tmp_path / "broken")
    spoil(folder)
    assert_one_clear_line(folder, "tokenizer.json")


def test_images_that_the_patches_do_not_divide(model):
    with pytest.raises(ValueError, match=r"^images: 40 x 64 pixels.* multiples of 16[^\n]*$"):
        model.sample(scene(40, 64), n=1)
