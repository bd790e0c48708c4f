"""
Training as a user runs it: learn, be killed, go on, fail clearly.

    python -m pytest tests/test_train.py
"""
import json
import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_clips import folder  # noqa: F401, a clip of one's own
from test_vision import build, scene  # noqa: F401, a tiny model without zeros, three scenes

import data
import train
import world
from alpamayo import OF_EXPERT, Alpamayo

SMALL = "--size 32 64 --scenes 32 --batch 8 --val-scenes 8 --val-every 4 --save-every 2".split()
SMALL += "--warmup 2 --threads 1".split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("scenes"))


def command(cache, out, *more):
    script = [sys.executable, os.path.join(ROOT, "train.py")]
    return [*script, *SMALL, "--cache", cache, "--out", str(out), *more]


def run(args, ok=True):
    done = subprocess.run(args, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def complaint(args, capsys):
    """The last line of what a failing command says. In this process: another takes seconds."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", args[1:])
        runpy.run_path(args[1], run_name="__main__")
    assert end.value.code
    said = capsys.readouterr().err.splitlines()
    return end.value.code if isinstance(end.value.code, str) else said[-1]


def log(out):
    """The run's log, a dict a step; the last line of a step counts."""
    lines = [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]
    return {line["step"]: line for line in lines}


@pytest.fixture(scope="module")
def unbroken(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    run(command(cache, out, "--steps", "10", "--action-share", "0.3"))
    return out


def test_it_learns_and_leaves_a_checkpoint_that_drives(unbroken):
    lines = log(unbroken)
    assert sorted(lines) == list(range(1, 11))
    assert [lines[i]["stage"] for i in (3, 4)] == ["action", "reason"]
    assert lines[9]["text"] < lines[4]["text"] - 1
    # For the flow ten steps are too few to tell.
    assert lines[10]["val"]["action"] < lines[4]["val"]["action"] - 0.3
    assert "text" not in lines[10]  # every eighth step drives without reasoning
    assert 0 <= lines[10]["val"]["right"] <= 1 and lines[10]["val"]["ade"] > 0
    model = Alpamayo.from_pretrained(str(unbroken))
    assert model.cfg.reasoning == "on" and model.cfg.words
    assert not [f for f in os.listdir(unbroken) if f.endswith(".part")]


def killed_and_resumed(args, out, after=5, of=10):
    """Run, kill with SIGKILL after five steps, and go on."""
    running = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = out / "log.jsonl"

    def is_early():
        return not path.exists() or len(path.read_text().splitlines()) < after

    while running.poll() is None and is_early():
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert len(log(out)) < of, "the run ended before it could be killed"
    run([sys.executable, os.path.join(ROOT, "train.py"), "--resume", str(out)])


def assert_same_run(out, other):
    """Every loss, gradient norm, validation and weight, to the last bit."""
    assert log(out) == log(other)
    a, b = (load_file(f / "model.safetensors") for f in (out, other))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_killed_run_goes_on_as_if_it_had_not_been(cache, unbroken, tmp_path):
    killed_and_resumed(command(cache, tmp_path, "--steps", "10", "--action-share", "0.3"), tmp_path)
    assert_same_run(tmp_path, unbroken)


def test_so_does_one_that_trains_the_expert_alone(cache, unbroken, tmp_path):
    """Its frozen weights are not in what it saved to go on: the checkpoint beside has them."""
    flags = ("--init", str(unbroken), "--stage", "reason", "--train", "expert", "--steps", "10")
    run(command(cache, tmp_path / "whole", *flags))
    killed_and_resumed(command(cache, tmp_path / "killed", *flags), tmp_path / "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_two_processes_share_the_batch(cache, tmp_path):
    launch = "-m torch.distributed.run --nproc_per_node 2 --master-port 29617".split()
    args = command(cache, tmp_path, "--steps", "4", "--action-share", "0")
    run([sys.executable, *launch, *args[1:]])
    lines = log(tmp_path)
    assert sorted(lines) == [1, 2, 3, 4] and lines[4]["val"]["text"] < 8


def test_processes_take_parts_of_one_order():
    flags = train.argparse.Namespace(batch=8, seed=3, accumulate=1)
    whole = train.Run(flags, scenes=range(30))
    halves = [train.Run(flags, rank=rank, world_size=2, scenes=range(30)) for rank in (0, 1)]
    for step in (0, 5, 9):  # the second epoch begins inside step 3
        parts = [train.scene_numbers(half, step) for half in halves]
        assert parts[0] + parts[1] == train.scene_numbers(whole, step)
    run = train.Run(flags, scenes=range(32))
    epoch = sum((train.scene_numbers(run, step) for step in range(4)), [])
    assert sorted(epoch) == list(range(32))


def test_fine_tuning_one_part_leaves_the_other(cache, unbroken, tmp_path):
    flags = "--steps 2 --stage reason --train expert --muon-lr 0".split()
    run(command(cache, tmp_path, *flags, "--init", str(unbroken)))
    before, after = (load_file(out / "model.safetensors") for out in (unbroken, tmp_path))
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("vlm."))
    one = "expert.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before[one], after[one])


def write_reasoning(clip):
    rows = [{"time": t, "text": "Turn left, since the road does."} for t in (2, 2.5, 3)]
    (clip / "reasoning.json").write_text(json.dumps(rows))


def test_ones_own_clips_train_too(cache, unbroken, folder, tmp_path):  # noqa: F811
    """A clip's wide and tele camera, re-projected, fine-tune a model of the world.

    Reasoning must be there."""
    flags = ("--data", str(folder), "--init", str(unbroken), "--steps", "2", "--batch", "4")
    args = command(cache, tmp_path / "out", *flags)
    run([*args, "--stage", "action"])
    assert log(tmp_path / "out")[2]["val"]["ade"] > 0
    done = run([*args, "--stage", "reason"], ok=False)
    assert "have no reasoning" in done.stderr.splitlines()[-1]
    write_reasoning(folder)
    run([*args, "--stage", "reason"])
    assert log(tmp_path / "out")[1]["text"] > 0


def test_a_released_checkpoint_is_tuned_and_sampled(release_folder, cache, folder, tmp_path):  # noqa: F811
    """The README's way with NVIDIA's weights, on the tiny checkpoint in their format.

    First the expert learns, then the backbone."""
    write_reasoning(folder)
    flags = "--stage reason --muon-lr 0 --lr 1e-4 --batch 2".split()
    args = command(cache, tmp_path / "expert", "--data", str(folder), *flags)
    run([*args, "--init", str(release_folder), "--train", "expert", "--steps", "2"])
    folders = (release_folder, tmp_path / "expert")
    before, after = (load_file(f / "model.safetensors") for f in folders)
    of_expert = {k for k in before if k.startswith(("expert.", "action_in", "action_out"))}
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in of_expert if "freqs" not in k}
    args[args.index(str(tmp_path / "expert"))] = str(tmp_path / "vlm")
    run([*args, "--init", str(tmp_path / "expert"), "--train", "vlm", "--steps", "2"])
    assert (tmp_path / "vlm" / "tokenizer.json").exists()
    sample = [sys.executable, os.path.join(ROOT, "sample.py"), "--clip", str(folder), "--n", "2"]
    where = ["--out", str(tmp_path / "a.png"), "--checkpoint", str(tmp_path / "vlm")]
    assert "minADE" in run(sample + where).stdout


def test_hidden_action_tokens_are_not_read(scene):  # noqa: F811
    """No gradient reaches the embeddings of action bins in scenes that hide them; else it does."""
    model = build(torch.float32).requires_grad_(True)
    table, first = model.vlm.model.language_model.embed_tokens.weight, model.vocabulary.first_action
    for stage in ("action", "reason"):
        for hide, read in ((1.0, False), (0.0, True)):
            model.zero_grad()
            generator = torch.Generator().manual_seed(1)
            losses = model(scene, stage, hide_actions=hide, generator=generator)
            (losses["action"] + losses.get("text", 0)).backward()
            bins = table.grad[first : first + model.cfg.bins]
            placeholder = table.grad[model.vocabulary["traj_future"]]
            assert (bins.any(), placeholder.any()) == (read, not read), (stage, hide)


def test_the_losses_of_the_path_teach_the_expert_alone(scene):  # noqa: F811
    """Knowledge insulation, for `ade` as for `flow`: every weight of the expert learns.

    None of what it reads does."""
    model = build(torch.float32).requires_grad_(True)
    expert = {n for n, _ in model.named_parameters() if n.startswith(OF_EXPERT)}
    for loss in ("ade", "flow"):
        model.zero_grad()
        generator = torch.Generator().manual_seed(2)
        model(scene, "reason", flow_samples=2, generator=generator)[loss].backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        assert {n for n, grad in grads.items() if grad is not None and grad.any()} == expert, loss


def test_the_expert_learns_a_batch_by_heart(scene):  # noqa: F811
    """Three scenes with two fixed noises each: in 25 steps from scratch the flow loss falls to less
    than 0.4 of itself, 0.2 as measured."""
    model = build(torch.float32).requires_grad_(True)
    model.init_weights(torch.Generator().manual_seed(3))
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=0.02), []
    for _ in range(26):
        fixed = dict(flow_samples=2, generator=torch.Generator().manual_seed(4))
        loss = model(scene, "action", action_tokens=False, **fixed)["flow"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[25] < 0.4 * losses[0], losses


def test_without_a_route_only_turns_that_a_signal_tells_are_shown():
    first = world.SEEDS["val"]
    turns = [seed for seed in range(first, first + 400) if world.draw(seed).situation == "turn"][:8]
    seeds = [*range(first, first + 6), *turns]
    drawn = [world.draw(seed) for seed in seeds]
    silent = [one.situation == "turn" and not one.signal for one in drawn]
    assert 0 < sum(silent) < len(turns)
    whole = data.make_scenes(seeds, size=(2, 4), frames=1)
    shown = train.hide_route(whole)
    keep = [i for i, quiet in enumerate(silent) if not quiet]
    assert shown.keys() == whole.keys() - {"route"}
    for key, value in shown.items():
        if torch.is_tensor(value):
            assert torch.equal(value, whole[key][keep]), key
        else:
            assert value == [whole[key][i] for i in keep], key
    quiet_turns = [seed for seed, quiet in zip(seeds, silent) if quiet]
    alone = data.make_scenes(quiet_turns, size=(2, 4), frames=1)
    assert train.hide_route(alone)["name"] == alone["name"]  # a batch of these alone stays whole
    assert train.hide_route(shown) is shown  # there is no route to hide


def newton_schulz(m):
    """Five steps of Keller Jordan's quintic towards U V^T of a matrix's singular vectors."""
    x = m.double() / m.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x


def test_muon_moves_the_matrices_inside_layers_in_float32(monkeypatch):
    """Orthogonalised, by the rate times sqrt(rows / columns); in bfloat16 it would be 1 % off."""
    monkeypatch.setattr(sys, "argv", "train.py --weight-decay 0 --warmup 0 --clip 1e9".split())
    run = train.Run(train.parse_flags(), model=build(torch.float32))
    train.prepare(run)
    (adam, lr), (muon, muon_lr) = run.optimisers
    assert (lr, muon_lr) == (2e-3, 0.01)
    names = {p: name for name, p in run.model.named_parameters()}
    hidden = {names[p]: p for group in muon.param_groups for p in group["params"]}
    rest = {names[p]: p for group in adam.param_groups for p in group["params"]}
    assert not hidden.keys() & rest.keys() and len(hidden) + len(rest) == len(names)
    assert all(p.ndim == 2 for p in hidden.values())
    inside = (
        "layers.0.self_attn.q_proj.weight",
        "layers.1.mlp.down_proj.weight",
        "blocks.0.attn.qkv.weight",
    )
    assert all(any(name.endswith(end) for name in hidden) for end in inside)
    assert {"vlm.lm_head.weight", "action_out_proj.weight", "expert.norm.weight"} < rest.keys()
    before = {name: p.detach().clone() for name, p in hidden.items()}
    grads = {}
    for i, (name, p) in enumerate(hidden.items()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        grads[name] = p.grad.clone()
    train.update(run, 0)
    for name, p in hidden.items():
        rows, columns = p.shape
        moved = (before[name] - p.detach()) / (0.01 * max(1, rows / columns) ** 0.5)
        torch.testing.assert_close(moved.double(), newton_schulz(grads[name]), rtol=0, atol=5e-4)


def test_bad_input_is_one_line(cache, unbroken, tmp_path, capsys):
    script, broken = command(cache, tmp_path)[:2], tmp_path / "broken"
    os.makedirs(broken)
    half = (unbroken / "training.safetensors").read_bytes()[:100_000]
    (broken / "training.safetensors").write_bytes(half)
    old = tmp_path / "old"
    os.makedirs(old)
    tensors = {"momentum.x": torch.zeros(2)}
    save_file(tensors, old / "training.safetensors", {"flags": "{}", "step": "4"})
    for args, words in (
        (command(cache, tmp_path / "a", "--stage", "reason"), "--init"),
        (command(cache, tmp_path / "b", "--init", "nowhere"), "nowhere"),
        (command(cache, tmp_path / "c", "--size", "48", "96"), "multiples of 32"),
        (command(cache, tmp_path / "d", "--accumulate", "3"), "multiple of processes"),
        ([*script, "--resume", str(tmp_path)], "no run to resume"),
        ([*script, "--resume", str(unbroken), "--lr", "1"], "no other flag"),
        ([*script, "--resume", str(broken)], "training.safetensors"),
        ([*script, "--resume", str(old)], "of an earlier train.py"),
    ):
        line = complaint(args, capsys)
        assert words in line and ("error:" in line or line.startswith("train.py:")), line


def test_a_loss_that_is_not_finite_stops_the_run_and_names_itself(cache, unbroken, tmp_path):
    tensors = load_file(unbroken / "model.safetensors")
    tensors["action_out_proj.bias"] += 1e30  # squares to infinity
    os.makedirs(tmp_path / "vlm")
    for file in ("config.json", "vlm/config.json"):
        (tmp_path / file).write_text((unbroken / file).read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    flags = ("--stage", "reason", "--init", str(tmp_path), "--steps", "2")
    done = run(command(cache, tmp_path / "out", *flags), ok=False)
    assert "step 0: loss `flow` is not finite" in done.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()
