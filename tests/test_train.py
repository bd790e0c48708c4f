"""
Training as a user runs it: learn, be killed, go on, fail clearly.

    python -m pytest tests/test_train.py
"""
import contextlib
import io
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_clips import folder, folder_original  # noqa: F401, a clip of one's own
from test_vision import TINY, build, scene  # noqa: F401, a tiny model without zeros, three scenes

import data
import doors
import rl
import runs
import sample
import train
import world
from alpamayo import OF_EXPERT, Alpamayo, Vocabulary

SMALL = "--size 32 64 --scenes 32 --batch 8 --val-scenes 8 --val-every 4 --save-every 2".split()
SMALL += "--warmup 2 --threads 1 --workers 0 --device cpu".split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("scenes"))


def command(cache, out, *more):
    script = [sys.executable, os.path.join(ROOT, "train.py")]
    return [*script, *SMALL, "--cache", cache, "--out", str(out), *more]


def run(args):
    """What a command of train.py says. In this process: another takes seconds."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", args[1:])
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            train.main()
    return said.getvalue()


def complaint(args, capsys):
    """The last line of what a failing command says."""
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


def under_torchrun(*args):
    """Two processes of train.py, started by torchrun, in a process group of their own."""
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    pipe = subprocess.PIPE
    command = [sys.executable, *launch, os.path.join(ROOT, "train.py"), *map(str, args)]
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def test_two_processes_share_the_batch_and_survive_a_kill(cache, tmp_path):
    """By torchrun itself. test_kill.py compares such runs, without it, with one that was not killed."""
    out = tmp_path / "killed"
    flags = [*SMALL, "--cache", cache, "--steps", "8", "--val-every", "8", "--action-share", "0"]
    broken = under_torchrun(*flags, "--out", out)
    lines = out / "log.jsonl"
    while broken.poll() is None and not (lines.exists() and len(lines.read_text().splitlines()) > 2):
        time.sleep(0.02)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.wait()
    assert len(log(out)) < 8, "the run ended before it could be killed"
    resumed = under_torchrun("--resume", out)
    said = resumed.communicate(timeout=300)[0]
    assert resumed.returncode == 0, said
    assert "2 x cpu" in said and sorted(log(out)) == list(range(1, 9)) and log(out)[8]["val"]["text"] < 8


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
    run = train.Run(flags, scenes=range(40), own=8)  # the last eight are of its own driving
    numbers = sum((train.scene_numbers(run, step) for step in range(2)), [])
    assert set(numbers[1::2]) <= set(range(32, 40)) and set(numbers[::2]) <= set(range(32))


def test_fine_tuning_one_part_leaves_the_other(cache, unbroken, tmp_path):
    flags = "--steps 2 --stage reason --train expert --muon-lr 0".split()
    run(command(cache, tmp_path, *flags, "--init", str(unbroken)))
    before, after = (load_file(out / "model.safetensors") for out in (unbroken, tmp_path))
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("vlm."))
    one = "expert.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before[one], after[one])


def test_the_best_is_kept_and_a_narrow_model_says_its_meta_action(cache, tmp_path, monkeypatch):
    """--best, --width and --says in one run. The best of three validations is the second."""
    errors = iter([3.0, 1.0, 2.0, 4.0])
    heads = []

    def validate(run, stage):
        heads.append(run.model.vlm.lm_head.weight.clone())
        said = {text for piece in train.pieces(run, run.val, range(8)) for text in piece["reasoning"]}
        assert all(data.decisions(text) and " since " not in text for text in said)
        return {"ade": next(errors)}

    monkeypatch.setattr(train, "validate", validate)
    flags = "--steps 3 --val-every 1 --action-share 0 --best --width 0.5 --says meta"
    run(command(cache, tmp_path, *flags.split()))
    last, best = (Alpamayo.from_pretrained(str(tmp_path / name)) for name in ("", "best"))
    assert torch.equal(best.vlm.lm_head.weight, heads[1]) and torch.equal(last.vlm.lm_head.weight, heads[2])
    assert last.cfg.n_embd == 80 and last.cfg.head_dim == 40
    run(command(cache, tmp_path, "--steps", "1", "--overwrite", "--says", "meta"))
    assert not (tmp_path / "best").exists()  # of the older run


def write_reasoning(clip):
    rows = [{"time": t, "text": "Turn left, since the road does."} for t in (2, 2.5, 3)]
    (clip / "reasoning.json").write_text(json.dumps(rows))


def test_ones_own_clips_train_too(cache, unbroken, folder, tmp_path):  # noqa: F811
    """A clip's wide and tele camera, re-projected, fine-tune a model of the world.

    Reasoning must be there."""
    flags = ("--data", str(folder), "--init", str(unbroken), "--steps", "2", "--batch", "4")
    args = command(cache, tmp_path / "out", "--overwrite", *flags)
    assert "validation on the scenes learned from" in run([*args, "--stage", "action"])
    assert log(tmp_path / "out")[2]["val"]["ade"] > 0
    with pytest.raises(ValueError, match="have no reasoning"):
        run([*args, "--stage", "reason"])
    write_reasoning(folder)
    run([*args, "--stage", "reason", "--cameras", "1"])
    assert log(tmp_path / "out")[1]["text"] > 0
    with pytest.raises(ValueError, match="camera_ids: the rig has"):
        run([*args, "--stage", "reason", "--cameras", "4"])


def test_a_released_checkpoint_is_tuned_and_sampled(  # noqa: F811
    release_folder, cache, folder, tmp_path, monkeypatch, capsys
):
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
    words = ["sample.py", "--clip", folder, "--n", 2, "--out", tmp_path / "a.png"]
    monkeypatch.setattr(sys, "argv", list(map(str, [*words, "--checkpoint", tmp_path / "vlm"])))
    sample.main()
    assert "minADE" in capsys.readouterr().out


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


def test_an_expert_that_teaches_reaches_all_that_it_reads(scene):  # noqa: F811
    """insulate=False: the same losses, and a gradient for the tower and the language model."""
    model = build(torch.float32).requires_grad_(True)
    losses = []
    for insulate in (True, False):
        model.zero_grad()
        generator = torch.Generator().manual_seed(2)
        losses.append(model(scene, "reason", generator=generator, insulate=insulate)["flow"])
    losses[1].backward()
    assert losses[0] == losses[1]
    for part in (model.vlm.model.visual, model.vlm.model.language_model, model.expert):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())


def test_the_expert_teaches_from_its_share_of_the_steps_on(brief, cache, tmp_path, monkeypatch):
    asked = []
    losses = Alpamayo.flow_losses
    monkeypatch.setattr(Alpamayo, "flow_losses", lambda self, *given: asked.append(given[-1]) or losses(self, *given))
    run(command(cache, tmp_path, *brief.words, "--expert-teaches", "0.5", "--val-every", "9"))
    assert asked[:3] == [True, True, False]  # of three steps, two begin before the half


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


# --------------------------------------------------------------------------------------------------
# What is bad is one line, and what was good is still there


def test_bad_input_is_one_line(cache, unbroken, tmp_path, capsys):
    script, broken = command(cache, tmp_path)[:2], tmp_path / "broken"
    os.makedirs(broken)
    half = (unbroken / "training.safetensors").read_bytes()[:100_000]
    (broken / "training.safetensors").write_bytes(half)
    old, file = tmp_path / "old", tmp_path / "file"
    os.makedirs(old)
    file.write_text("")
    tensors = {"momentum.x": torch.zeros(2)}
    save_file(tensors, old / "training.safetensors", {"flags": "{}", "step": "4"})
    for args, words in (
        (command(cache, tmp_path / "a", "--stage", "reason"), "--init"),
        (command(cache, tmp_path / "b", "--init", "nowhere"), "--init nowhere: expected a folder"),
        (command(cache, tmp_path / "b", "--data", "nowhere"), "--data nowhere: expected a folder"),
        (command(cache, tmp_path / "b", "--init", file), f"--init {file}: expected a folder"),
        (command(cache, tmp_path / "b", "--init", ""), "--init : expected a folder"),
        (command(cache, file), f"--out {file}: expected a folder"),
        (command(cache, tmp_path / "c", "--size", "48", "96"), "multiples of 32"),
        (command(cache, tmp_path / "d", "--accumulate", "3"), "multiple of processes"),
        (command(cache, tmp_path / "e", "--vision", "triplane", "--planes-patch", "5", "5", "5"), "whole patches"),
        ([*script, "--resume", tmp_path], "no run to resume"),
        ([*script, "--resume", file], "no run to resume"),
        ([*script, "--resume", ""], "no run to resume"),
        ([*script, "--resume", unbroken, "--lr", "1"], "no other flag"),
        ([*script, "--resume", broken], "training.safetensors"),
        ([*script, "--resume", old], "by an earlier train.py"),
    ):
        line = complaint(list(map(str, args)), capsys)
        assert words in line and line.startswith("train.py: "), line


WRONG = """
--steps 0 | --steps -1 | --steps 1e3 | --action-share nan | --action-share 1.1 | --val-every 0 | --save-every 0 | --seed -1
--threads -1 | --threads 99999 | --planes-patch 0 0 0 | --flex-tokens -1 | --keep 0 | --keep nan | --keep 1.5 | --hold-out 1
--hold-out nan | --scenes 0 | --scenes 99999999 | --val-scenes 0 | --size 0 0 | --size 64 | --size 999999 64 | --front-only -0.1
--front-only inf | --routes nan | --lora -1 | --batch 0 | --batch 99999999999999999999 | --accumulate 0 | --lr nan | --lr -1
--lr inf | --lr 1e20 | --muon-lr nan | --weight-decay nan | --weight-decay -1 | --warmup -1 | --decay nan | --decay inf | --clip nan
--clip 0 | --clip -1 | --clip inf | --action-weight inf | --path-weight nan | --action-every 0 | --hide-actions 2
--drive-every -1 | --flow-samples 0 | --group 0 | --group 1 | --temperature nan | --temperature 0 | --top-p 0 | --top-p nan
--eta nan | --flow-steps 1 | --max-new-tokens 0 | --beta inf | --kl -1 | --kl nan | --flow-weight nan | --expert-lr nan
--updates 0 | --curate 1.1 | --device tpu | --device cuda:x | --workers -1 | --lora 4 --train expert | --policy tokens --train expert --stage rl
--expert-teaches 0 --train vlm | --expert-teaches 2
"""


@pytest.mark.parametrize("more", ["", " --plan"])
def test_flags_are_checked_before_any_work(more, monkeypatch, capsys):
    """Numbers that no run can mean, in a plan too; the line names the flag."""
    for words in WRONG.replace("\n", "|").strip("|").split("|"):
        monkeypatch.setattr(sys, "argv", ["train.py", *words.split(), *more.split()])
        with pytest.raises(SystemExit) as end:
            train.parse_flags()
        said = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(said) == 1 and words.split()[0] in said[0], words


SMALLER = replace(TINY, n_layer=2, v_layer=2, deepstack=(0,))
BRIEF = "--batch 2 --scenes 4 --val-scenes 2 --save-every 1 --val-every 9 --steps 3"


@pytest.fixture(scope="module")
def brief(cache, tmp_path_factory):
    """(the words of a run of a tiny model, a folder in which it has been, its starting point)."""
    place = tmp_path_factory.mktemp("brief")
    model = Alpamayo(SMALLER, Vocabulary(SMALLER))
    model.init_weights(torch.Generator().manual_seed(0))
    model.save_pretrained(str(place / "init"), reasoning="on")
    words = [*BRIEF.split(), "--stage", "reason", "--init", str(place / "init")]
    run(command(cache, place / "out", *words))
    return SimpleNamespace(words=words, out=place / "out", init=place / "init")


def contents(folder):
    """{file: bytes} of a checkpoint and what is needed to go on."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.name != "log.jsonl"}


def infinite_gradient(run):
    """Makes one gradient infinite, with all losses finite."""
    run.model.vlm.lm_head.weight.register_hook(lambda grad: grad * math.inf)


def infinite_weight(run):
    """Makes one weight infinite behind the losses' back: in what is saved and not used."""
    run.model.action_in_proj.encoder.trunk[0].weight.data[0, 0] = math.inf


def nan_moment(run):
    optimiser, _ = run.optimisers[0]
    next(iter(optimiser.state.values()))["exp_avg"][...] = math.nan


@pytest.mark.parametrize("stage", ["action", "reason", "rl"])
@pytest.mark.parametrize("harm, complaint", [
    (infinite_gradient, "`grad_norm` is not finite"), (infinite_weight, "NaN or infinite"), (nan_moment, "exp_avg"),
])  # fmt: skip
def test_the_last_good_checkpoint_survives(harm, complaint, stage, brief, cache, tmp_path, monkeypatch):
    """A saving step whose gradient, weights or moments are not finite ends the run; what is said is true."""
    of_rl = "--split tail --group 2 --flow-steps 2 --max-new-tokens 4 --lr 2e-3 --warmup 1".split()
    words = [*brief.words, "--stage", stage, *of_rl * (stage == "rl")]
    monkeypatch.setattr(rl, "draw_curves", lambda *_: None)
    good, step_of = {}, "rl_step" if stage == "rl" else "supervised_step"
    take_step = getattr(train, step_of)

    def step_with_harm(run, step):
        good.update(contents(tmp_path))  # what was saved before
        if step == harmed - 1 and harm is infinite_gradient:
            harm(run)
        line = take_step(run, step)
        if step == harmed - 1:
            harm(run)
        return line

    monkeypatch.setattr(train, step_of, step_with_harm)
    for harmed, what_is_saved in ((2, f"the checkpoint of step 1 in {tmp_path} is intact"), (1, "no checkpoint was saved")):
        good.clear()
        with pytest.raises((FloatingPointError, ValueError)) as end:
            run(command(cache, tmp_path, *words, "--overwrite"))
        assert complaint in str(end.value) and str(end.value).endswith(what_is_saved)
        if harmed == 2:
            assert good["config.json"] and contents(tmp_path) == good
            Alpamayo.from_pretrained(str(tmp_path))
        assert not (tmp_path / "saving").exists()


def test_a_validation_that_is_not_finite_ends_the_run(brief, cache, tmp_path, monkeypatch):
    """Else the log would hold what no reader of JSON reads."""
    monkeypatch.setattr(train, "validate", lambda *_: {"ade": math.nan})
    with pytest.raises(FloatingPointError, match="step 3: `ade` is not finite; the checkpoint of step 2"):
        run(command(cache, tmp_path, *brief.words))
    assert sorted(log(tmp_path)) == [1, 2]


@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left on device"), OSError(28, "No space left on device")])
def test_a_full_disk_is_one_line_and_the_checkpoint_stays(error, brief, cache, tmp_path, monkeypatch):
    good, calls, write = {}, [], doors.save_file

    def save_file(tensors, part, metadata):
        calls.append(part)
        if len(calls) == 4:  # the second step's model
            good.update(contents(tmp_path))
            open(part, "w").write("half")
            raise error
        write(tensors, part, metadata)

    monkeypatch.setattr(doors, "save_file", save_file)
    with pytest.raises(OSError, match="No space left on device.*; the checkpoint of step 1 in .* is intact$"):
        run(command(cache, tmp_path, *brief.words))
    left = {name: value for name, value in good.items() if not name.startswith("saving")}
    assert contents(tmp_path) == left


# --------------------------------------------------------------------------------------------------
# A run's folder


def test_a_folder_is_one_runs(brief, cache, tmp_path):
    """Other files than a run's that saved nothing stay; what is overwritten is never resumed."""
    out = tmp_path / "out"
    shutil.copytree(brief.out, out)
    args = command(cache, out, *brief.words)
    before = contents(out)
    for there in ([brief.out], [brief.init], [out]):
        with pytest.raises(ValueError, match="--overwrite writes over what is there"):
            run(command(cache, there[0], *brief.words))
    assert contents(out) == before and not (brief.init / "train.lock").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "log.jsonl").write_text("of somebody else")
    with pytest.raises(ValueError, match="has log.jsonl"):
        run(command(cache, tmp_path / "mine", *brief.words))

    with pytest.MonkeyPatch.context() as patch:  # a new run that dies before it saves
        patch.setattr(train, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run([*args, "--overwrite"])
    with pytest.raises(ValueError, match="no run to resume"):
        run(["python", "train.py", "--resume", str(out)])
    shutil.rmtree(out / "vlm")
    for file in ("config.json", "model.safetensors"):
        os.remove(out / file)
    run(args)  # a log and a lock alone are in nobody's way
    assert sorted(log(out)) == [1, 2, 3]
    with doors.locked(str(out / "train.lock"), "held"), pytest.raises(ValueError, match=f"{out}: another run writes it"):
        run(["python", "train.py", "--resume", str(out)])
    with doors.locked(str(out / "train.lock"), "free again"):
        pass


def test_a_checkpoint_in_other_files_takes_the_place_of_an_older_one(tmp_path):
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json", "mine.safetensors"):
        (tmp_path / file).write_text("old")
    with runs.new_checkpoint(str(tmp_path)) as new:
        os.makedirs(os.path.join(new, "vlm"))
        for file in ("model.safetensors", "vlm/config.json"):
            open(os.path.join(new, file), "w").write("new")
    assert sorted(os.listdir(tmp_path)) == ["mine.safetensors", "model.safetensors", "vlm"]


def test_the_log_of_a_killed_run_is_whole_again(brief, cache, tmp_path):
    """A half line, a line of a step that was not saved: they go, for good, in a new file."""
    out = tmp_path / "out"
    shutil.copytree(brief.out, out)
    whole = (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text(whole + '{"step": 4, "stage": "reason"}\n{"step": 5, "sta')
    number = os.stat(out / "log.jsonl").st_ino
    run(["python", "train.py", "--resume", str(out)])
    assert (out / "log.jsonl").read_text() == whole and os.stat(out / "log.jsonl").st_ino != number
    (out / "log.jsonl").write_text('{"step": 4}\nno JSON\n')
    with pytest.raises(ValueError, match="log.jsonl: line 2: not JSON"):
        run(["python", "train.py", "--resume", str(out)])
    os.remove(out / "log.jsonl")
    assert "log.jsonl: has 0 of 3 steps" in run(["python", "train.py", "--resume", str(out)])


# --------------------------------------------------------------------------------------------------
# Going on


def damaged(settings, tensors):
    """[(what must be said, settings, tensors)]: each of them wrong in one place."""
    flags = json.loads(settings["flags"])
    cases = [("format", settings | {"format": "2"}, tensors)]
    for step in ("0", "4", "-1", "1.0", "nan", "", "1" * 5000):
        cases.append(("step is", settings | {"step": step}, tensors))
    for name in ("format", "flags", "step", "tensors"):
        cases.append((name, {k: v for k, v in settings.items() if k != name}, tensors))
    for text in ("", "[]", "1", "{", '{"lr": NaN}', "[" * 100_000):
        cases.append(("flags", settings | {"flags": text}, tensors))
    for name, value in {
        "lr": "fast", "steps": "3", "batch": 2.5, "size": [64], "clip": None, "blind": 1, "train": "nothing", "seed": [0], "init": 5,
        "help": True, "resume": "x", "unheard_of": 1, "": 1, "val_every": 0, "decay": -1, "stage": {}, "out": "elsewhere", "dtype": "int8",
    }.items():  # fmt: skip
        cases.append(("flags", settings | {"flags": json.dumps(flags | {name: value})}, tensors))
    weight = next(name for name in tensors if name.startswith("model."))
    moment = next(name for name in tensors if "exp_avg_sq" in name)
    count = next(name for name in tensors if ".step." in name)
    for name in (weight, moment, count):
        cases.append(("expected", settings, {k: v for k, v in tensors.items() if k != name}))
        cases.append(("expected", settings, tensors | {name: tensors[name].double()}))
        cases.append(("expected", settings, tensors | {name: torch.zeros(3, 3, 3)}))
        for bad in (math.nan, -math.inf):
            cases.append(("NaN or infinite", settings, tensors | {name: torch.full_like(tensors[name], bad)}))
    for name in ("known", "more", "0.exp_avg.more", "7.exp_avg.x", "x"):
        cases.append((f"unexpected: {name}", settings, tensors | {name: torch.zeros(2)}))
    return cases


def test_a_damaged_file_to_go_on_from_is_one_line(brief, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(brief.out, out)
    file = out / "training.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as f:
        settings = f.metadata()
    cases = damaged(settings, tensors)
    scenes = data.make_scenes([0, 1], size=(32, 64))  # the shapes are told before any is read
    assert len(cases) > 45 and scenes
    for words, some_settings, some_tensors in cases:
        save_file(some_tensors, file, some_settings)
        before = file.read_bytes()
        with pytest.raises(ValueError) as end:
            run(["python", "train.py", "--resume", str(out)])
        line = str(end.value)
        assert words in line and str(file) in line and "\n" not in line and len(line) < 6000, line
        assert file.read_bytes() == before
    for size in (0, 7, 100, len(before) - 1):
        file.write_bytes(before[:size])
        with pytest.raises(ValueError, match="training.safetensors"):
            run(["python", "train.py", "--resume", str(out)])


def test_what_changed_is_said_and_the_run_goes_on(brief, cache, tmp_path, monkeypatch):
    """Settings are absolute, so another working directory changes nothing; other scenes and sources do."""
    out = tmp_path / "out"
    shutil.copytree(brief.out, out)
    monkeypatch.chdir(tmp_path)
    resume = ["python", "train.py", "--resume", "out"]
    assert "will not be those" not in run(resume)
    with safe_open(out / "training.safetensors", "pt") as f:
        settings = f.metadata()
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    flags = json.loads(settings["flags"])
    assert flags["cache"] == cache and flags["init"] == str(brief.init) and flags["data"] == "world"
    del flags["muon_lr"]
    other = {"sources": "0", "scenes": "7, 0", "device": "cuda, bfloat16", "threads": "64", "PyTorch": "1.0"}
    other_number = {"processes": "2", "flags": json.dumps(flags)}
    save_file(tensors, out / "training.safetensors", settings | other | other_number)
    said = run(resume)
    assert "training.safetensors: 2 processes when it was saved, 1 now; the losses are the same but for rounding" in said
    for name, was in other.items():
        assert f"training.safetensors: {name}: {was} when it was saved, {settings[name]} now; the losses will not be" in said
    assert "has no flag muon_lr: its default holds" in said


def test_what_the_model_is_made_of_is_signed(brief, tmp_path):
    """A number of its config that was edited is said; frozen weights that were replaced end it."""
    out = tmp_path / "out"
    shutil.copytree(brief.out, out)
    vlm = json.loads((out / "vlm" / "config.json").read_text())
    vlm["text_config"]["rope_theta"] *= 2
    (out / "vlm" / "config.json").write_text(json.dumps(vlm))
    assert "training.safetensors: config: " in run(["python", "train.py", "--resume", str(out)])
    with safe_open(out / "training.safetensors", "pt") as f:
        settings, tensors = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}
    save_file(tensors, out / "training.safetensors", settings | {"base": "1"})
    with pytest.raises(ValueError, match="other weights than those that this run began with"):
        run(["python", "train.py", "--resume", str(out)])


@pytest.mark.parametrize("name, value", [("ade", "x"), ("val", 3.5), ("val", {"ade": "x"}), ("flow", [1]), ("step", None)])
def test_a_log_that_was_edited_is_one_line(name, value, tmp_path):
    """It is told when the run goes on, not when its curves are drawn."""
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "stage": "rl", "ade": 1.0} | {name: value}) + "\n")
    with pytest.raises(ValueError, match=f"log.jsonl: field .*{'ade' if isinstance(value, dict) else name} is "):
        runs.begin_log(tmp_path, 1, print)


class Images:
    """Scenes, each with one image."""
    reasoning = names = ["a"] * 20

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return {"images": self.images[indices]}


def test_other_images_are_another_sign():
    """Of later scenes too, of those to validate on, and of those to rehearse."""
    model = torch.nn.Linear(2, 2)
    model.cfg = train.PRESETS["nano"]

    def sign(scenes, val, ordinary=None):
        ordinary = ordinary if ordinary is None else Images(ordinary)
        run = SimpleNamespace(model=model, reference=None, scenes=Images(scenes), val=Images(val), ordinary=ordinary)
        return runs.signs_of(run)["scenes"]

    plain = torch.zeros(20, 3)
    late = plain.clone()
    late[10:] = 1
    assert sign(plain, plain) == sign(plain.clone(), plain)
    others = sign(late, plain), sign(plain, late), sign(plain, plain, plain), sign(plain, plain, late)
    assert len({sign(plain, plain), *others}) == 5


def test_kernels_that_cannot_run_end_it_before_the_work(monkeypatch):
    monkeypatch.setattr("kernels._choice", None)
    monkeypatch.setenv("ALPAMAYO_KERNELS", "nonsense")
    with pytest.raises(ValueError, match="ALPAMAYO_KERNELS: expected auto, torch or triton"):
        train.start(SimpleNamespace(stage="all", own=0, threads=0, device=torch.device("cpu"), resume=None, shard=0, batch=1, accumulate=1, dtype="float32"))


@pytest.mark.parametrize("rank, world_size", [("3", "1"), ("1", "1"), ("0", "0"), ("-1", "1"), ("x", "1"), ("0", "x"), ("0", "-1")])
def test_a_rank_that_cannot_be(rank, world_size, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ValueError, match="RANK|WORLD_SIZE") as error:
        train.start(SimpleNamespace(stage="all", own=0, threads=0, device=torch.device("cpu"), resume=None, shard=0, batch=1, accumulate=1, dtype="float32"))
    assert "expected" in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Clips that are held out


def test_clips_are_held_out_whole_or_at_their_end():
    two = [("a", float(t)) for t in range(4)] + [("b", float(t)) for t in range(4)]
    ten = [(f"clip {i}", t / 2) for i in range(10) for t in range(3)]
    one = [("a", 2 + t / 2) for t in range(60)]
    for cuts in (two, one):
        assert train.split_clips(cuts, None) == train.split_clips(cuts, 0.0) == (list(range(len(cuts))), [])
    assert train.split_clips(two, 0.1) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert train.split_clips(two, 0.9) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert train.split_clips(ten, None) == (list(range(27)), [27, 28, 29])
    assert train.split_clips(ten, 0.3)[1] == list(range(21, 30))
    learned, held = train.split_clips(one, 0.1)
    assert held == list(range(54, 60)) and learned == list(range(38))  # 2 to 20.5 s, 29 to 31.5 s
    assert one[held[0]][1] - one[learned[-1]][1] >= 1.9 + 6.4  # nothing of one is in the other
    assert train.split_clips(one[:6], 0.5) == ([], [3, 4, 5])


def test_held_out_scenes_are_other_scenes(cache, brief, folder, tmp_path):  # noqa: F811
    write_reasoning(folder)
    args = command(cache, tmp_path / "a", "--data", str(folder), *brief.words, "--steps", "1")
    with pytest.raises(ValueError, match="nothing is left to learn from, .*--hold-out 0"):
        run([*args, "--hold-out", "0.4"])
    clips = data.load(str(folder), frames=1)
    part = train.some_of(clips, [2, 0])
    assert part.names == [clips.names[2], clips.names[0]] and len(part) == 2 and len(clips) == 3
    assert torch.equal(part.batch([0])["ego_history_xyz"], clips.batch([2])["ego_history_xyz"])
