"""
Reinforcement learning, where small code is silently wrong: probabilities of the rollout and of the update, gradients,
rewards that prefer the better rollout, updates that make it likelier.    python -m pytest tests/test_rl.py
"""
import argparse
import contextlib
import copy
import json
import math
import os
import re
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_clips import folder, folder_original  # noqa: F401, a clip of one's own
from test_train import cache, complaint, log, run  # noqa: F401
from test_vision import TINY, H, W

import alpamayo
import data
import rl
import train
import world
from alpamayo import Alpamayo, Vocabulary, euler_step, gaussian_log_prob, token_log_probs

CPU = torch.device("cpu")


def flags_of(**other):
    usual = dict(policy="flow", objective="clip", rewards=list(rl.REWARDS), credit="heads", tell=False, episode=0.0, size=(H, W), group=4, temperature=1.3, top_p=0.9, eta=0.5, flow_steps=3,
                 max_new_tokens=12, beta=2.0, kl=0.0, kl_drive=0.0, drive_weight=1.0, lr=1e-3, expert_lr=1e-3, updates=1, curate=0.5, batch=2,
                 accumulate=1, clip=1.0, warmup=1, seed=0)  # fmt: skip
    return argparse.Namespace(**usual | other)


def both(rewards):
    """The advantage of one reward for both heads."""
    return dict.fromkeys(rl.HEADS, rewards - rewards.mean(1, keepdim=True))


def tried(model, scene, flags):
    return rl.try_out(model, flags, contextlib.nullcontext(), 4, scene)


def tiny(seed=0):
    """A model with random weights that are not zero anywhere, so that it says and does anything."""
    torch.manual_seed(seed)
    model = Alpamayo(replace(TINY), Vocabulary(TINY))  # a Config of its own: tests change it
    model.init_weights(torch.Generator().manual_seed(seed))
    for p in model.parameters():
        p.data += 0.03 * torch.randn_like(p)
    start = model.vocabulary["traj_future_start"]
    model.vlm.lm_head.weight.data[start] += 0.5 * model.vlm.lm_head.weight.data.std() * torch.randn(TINY.n_embd)
    model.vlm.lm_head.weight.data[start] *= 2.5  # so that it comes to a decision, now here, now there
    return model


@pytest.fixture(scope="module")
def scene():
    return data.make_scenes(range(world.SEEDS["val"] + 70, world.SEEDS["val"] + 72), size=(H, W))


class Few:
    """Scenes of the world in memory, as a WorldSet is one on disk."""

    def __init__(self, seeds):
        self.seeds, self.whole = list(seeds), data.make_scenes(seeds, size=(H, W))

    def __len__(self):
        return len(self.seeds)

    def batch(self, numbers):
        numbers = list(numbers)
        return {k: v[numbers] if torch.is_tensor(v) else [v[i] for i in numbers] for k, v in self.whole.items()}

    def drive_plans(self, numbers, plans):
        return data.drive_plans([self.seeds[i] for i in numbers], plans)


# ------------------------------------------------------------------------------------------------------ probabilities


@pytest.mark.parametrize("decode, temperature, top_p", [("flow", 1.0, 1.0), ("flow", 1.7, 0.9), ("tokens", 0.8, 0.9)])
def test_the_update_sees_the_probabilities_that_were_drawn_from(scene, decode, temperature, top_p):
    model = tiny()
    with torch.no_grad():
        out = model.sample(scene, 5, temperature, top_p, steps=2, max_new_tokens=9, seed=1, decode=decode)
        logits, *_ = model.replay(scene, out)
    tokens = out.tokens.flatten(0, 1)
    vocab, ends = model.vocabulary, (tokens == model.vocabulary["traj_future_start"]).int().argmax(1) + 1
    assert ends.unique().numel() > 1  # thoughts of several lengths, side by side
    width = 128 if decode == "tokens" else 0
    busy = torch.arange(tokens.shape[1]) < (ends + width)[:, None]
    ours = token_log_probs(logits, tokens, temperature, top_p)
    theirs = out.log_probs.flatten(0, 1)
    assert (theirs[~busy] == 0).all() and (tokens[~busy] == vocab["endoftext"]).all()
    forced = (ends == 9)[:, None] & (torch.arange(tokens.shape[1]) == 8) & (theirs == 0)  # out of time: not its choice
    assert (theirs[busy] != 0).float().mean() > 0.5  # else there was little to compare
    assert (ours - theirs)[busy & ~forced].abs().max() < 2e-5 and (theirs[busy & ~forced] > -20).all()
    if decode == "tokens":
        bins = torch.stack([row[e : e + 128] for row, e in zip(tokens, ends)]) - vocab.first_action
        assert ((bins >= 0) & (bins < TINY.bins)).all()
        assert out.actions.shape == (2, 5, 64, 2) and len(out.flow) == 1


def test_the_nucleus_is_where_tokens_were_drawn_from():
    """Counts of many draws against the probabilities that the update would give them."""
    logits = torch.randn(7, generator=torch.Generator().manual_seed(3)) * 2
    draws, told = alpamayo.pick(logits.expand(40_000, -1), 1.4, 0.8, torch.Generator().manual_seed(0))
    share = torch.bincount(draws, minlength=7) / 40_000
    p = token_log_probs(logits.expand(7, -1), torch.arange(7), 1.4, 0.8).exp()
    drawn = share > 0
    assert 1 < drawn.sum() < 7
    assert (share - p)[drawn].abs().max() < 0.01 and abs(p[drawn].sum() - 1) < 1e-5
    assert torch.allclose(told.exp(), p[draws], atol=1e-6)  # and what pick says of it


def test_a_step_without_noise_is_eulers():
    x, v = torch.randn(3, 64, 2), torch.randn(3, 64, 2)
    assert all(euler_step(x, v, (n - 1) / n, 1 / n, 0.7)[1] == 0 for n in range(1, 50))  # the last step never has any
    for i in range(5):
        mean, std = euler_step(x, v, i / 5, 1 / 5, 0.0)
        assert torch.equal(mean, x + 1 / 5 * v) and std == 0
        assert euler_step(x, v, i / 5, 1 / 5, 0.7)[1] == pytest.approx((1 - (i + 1) / 5) * math.sin(0.35 * math.pi), abs=1e-12)


def test_sampling_without_noise_in_its_steps_is_the_sampler(scene):
    model = tiny()
    usual = model.sample(scene, 2, steps=4, max_new_tokens=6, seed=5)
    assert torch.equal(usual.flow, model.sample(scene, 2, steps=4, max_new_tokens=6, seed=5, eta=0.0).flow)
    assert not torch.allclose(usual.flow[-1], model.sample(scene, 2, steps=4, max_new_tokens=6, seed=5, eta=0.5).flow[-1])


def test_noisy_steps_keep_the_amount_of_noise_that_training_showed():
    """Where all data is one point the velocity is known: x_t must have mean t d and standard deviation 1 - t at every step."""
    generator, d = torch.Generator().manual_seed(0), 2.5
    x, steps = torch.randn(20_000, generator=generator), 6
    for i in range(steps):
        t = i / steps
        mean, std = euler_step(x, (d - x) / (1 - t), t, 1 / steps, 0.8)
        x = mean + std * torch.randn(x.shape, generator=generator)
        s = t + 1 / steps
        assert abs(x.mean() - s * d) < 0.03 and abs(x.std() - (1 - s)) < 0.02


def test_log_probability_of_a_step():
    x, mean = torch.randn(2, 3, 64, 2)
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x).sum((1, 2))
    assert torch.allclose(gaussian_log_prob(x, mean, 0.3), expected, rtol=1e-5)


def test_gradient_of_the_flows_log_probability(scene):
    """Against a finite difference, in float64."""
    model = tiny().double()
    scene = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in scene.items()}
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.sample(scene, 2, steps=3, max_new_tokens=5, seed=2, eta=0.6, noise=torch.randn(4, 64, 2).double())
        out.flow += 0.05 * torch.randn_like(out.flow)  # any path will do

    def log_prob():
        moves = model.replay(scene, out).moves
        assert len(moves) == 2 and min(std for _, std in moves) > 0  # the last step is Euler's
        return sum(gaussian_log_prob(out.flow[i + 1].flatten(0, 1), *moves[i]).sum() for i in range(2))

    log_prob().backward()
    checked = 0
    for name in ("action_out_proj.weight", "expert.layers.1.mlp.up_proj.weight", "action_in_proj.encoder.trunk.0.weight"):
        p = dict(model.named_parameters())[name]
        direction, h = torch.randn_like(p), 1e-6
        slope = (p.grad * direction).sum()
        with torch.no_grad():
            p += h * direction
            up = log_prob()
            p -= 2 * h * direction
            down = log_prob()
            p += h * direction
        assert (up - down) / (2 * h) == pytest.approx(slope.item(), rel=1e-5)
        checked += 1
    assert checked == 3
    assert all(p.grad is None or not p.grad.any() for p in model.vlm.parameters())  # knowledge insulation


@pytest.mark.parametrize("policy", ["flow", "tokens"])
@pytest.mark.parametrize("objective", ["clip", "paper"])
def test_an_update_makes_the_better_rollout_likelier(scene, policy, objective):
    """The test that catches GRPO which silently learns nothing: one rollout of each group is rewarded, and after a few
    small updates on these very rollouts it has gained on the others, in every decision that it is made of."""
    flags = flags_of(policy=policy, objective=objective, temperature=1.0, top_p=1.0, max_new_tokens=6, beta=20.0, group=3)
    model = tiny()
    out = tried(model, scene, flags)
    rewards = torch.zeros(2, 3)
    rewards[0, 1] = rewards[1, 2] = 1.0
    better = rewards.bool()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)

    def probabilities():
        with torch.no_grad():
            heads = alpamayo.heads_of(model.replay(scene, out), out)
        return [head.log_pi.sum(2) for head in heads.values()]

    before, old = probabilities(), None
    for _ in range(3):
        losses = rl.losses_of(model, None, scene, out, both(rewards), flags, old)
        old = old or losses["log_probs"]
        optimiser.zero_grad()
        losses["policy"].backward()
        torch.nn.utils.clip_grad_norm_(model.vlm.parameters(), 1.0)
        torch.nn.utils.clip_grad_norm_(model.expert.parameters(), 1.0)
        optimiser.step()
    for was, now in zip(before, probabilities()):
        gain = now - was
        assert gain[better].mean() > gain[~better].mean() + 1e-6 and gain[better].mean() > 0


@pytest.mark.parametrize("objective", ["clip", "nft"])
def test_the_drive_teaches_the_language_model_only_if_asked(objective, scene):
    model = tiny()
    rewards = {"drive": torch.tensor([[1.0, -1.0, 0.5, -0.5], [3.0, -3.0, 0.5, -0.5]])}
    for teaches in (False, True):
        flags = flags_of(objective=objective)
        model.zero_grad()
        out = tried(model, scene, flags)
        rl.losses_of(model, None, scene, out, rewards, flags, insulate=not teaches)["policy"].backward()
        for part in (model.vlm.model.visual, model.vlm.model.language_model):
            assert any(p.grad is not None and p.grad.any() for p in part.parameters()) == teaches


def test_without_probabilities_the_flow_matches_what_was_better(scene):
    """DiffusionNFT's gradient is flow matching's on what the rollouts drove, each weighed from 1 for the best to -1; the
    six of a group that stand out, at four noise levels each."""
    flags = flags_of(objective="nft", beta=1.5, group=8)
    model = tiny()
    out = tried(model, scene, flags)
    assert out.eta == 0
    rewards = torch.tensor([[0.0, 0.21, 0.42, 1.0, 0.4, 0.3, -0.5, 0.7], [3.0, -3.0, 0.5, 0.3, 1.5, -0.7, 0.06, 1.1]])
    advantage = both(rewards)["drive"]
    rl.losses_of(model, None, scene, out, {"drive": advantage}, flags)["policy"].backward()
    found = [p.grad.clone() for p in model.expert.parameters()]
    model.zero_grad()
    rows = []
    for b, own in enumerate(advantage.tolist()):
        rows += [8 * b + i for i in sorted(range(8), key=lambda i: -abs(own[i]))[:6] for _ in range(4)]
    weights = (1.5 * advantage).clamp(-1, 1).flatten()[rows]
    data_ = out.flow[-1].flatten(0, 1)[rows]
    t, noise = model.draw_flow(data_, 1, generator=torch.Generator().manual_seed(0))
    prefix, tail, T, length = model.replay(scene, out).read
    x_t = t[:, None, None] * data_ + (1 - t[:, None, None]) * noise
    velocity = []
    for i, row in enumerate(rows):  # one at a time
        layers = [tuple(x[row // 8 : row // 8 + 1] for x in kv) for kv in prefix.layers]
        own = [tuple(x[row : row + 1] for x in kv) for kv in tail]
        past = model.expert_past(prefix._replace(layers=layers), own, T, length[row : row + 1])
        velocity.append(model.velocity(x_t[i : i + 1], t[i : i + 1], past, prefix.end + length[row : row + 1]))
    errors = (torch.cat(velocity) - (data_ - noise)).square().mean((1, 2))
    (weights * errors).mean().backward()
    for p, grad in zip(model.expert.parameters(), found):
        assert torch.allclose(p.grad, grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()) + 1e-9)


def test_a_ratio_is_never_infinite():
    """Where a log-ratio is 200 the loss is finite, and has no gradient."""
    log_pi = torch.tensor([[[200.0], [-200.0]]], requires_grad=True)
    head = alpamayo.Head(log_pi, torch.ones(1, 2, 1, dtype=torch.bool), torch.zeros(1, 2))
    for rewards in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]):
        loss = alpamayo.grpo("clip", head, torch.zeros(1, 2, 1), both(torch.tensor([rewards]))["drive"], 2.0, 0.0)
        (grad,) = torch.autograd.grad(loss, log_pi)
        assert loss.isfinite() and not grad.any()
    assert rl.clipped_share(head, torch.zeros(1, 2, 1)) == 1


def test_each_head_learns_from_its_own_reward(scene):
    model = tiny()
    out = tried(model, scene, flags_of())
    rewards = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    for name, learner, other in (("thought", model.vlm, model.expert), ("drive", model.expert, model.vlm)):
        model.zero_grad()
        model(scene, "rl", rollout=out, advantage={name: rewards})["policy"].backward()
        assert any(p.grad is not None and p.grad.any() for p in learner.parameters())
        assert all(p.grad is None or not p.grad.any() for p in other.parameters())


def test_what_none_of_a_group_said_is_told(scene):
    """The last rollout then says the truth, drives after it, and has the probability that it had."""
    model = tiny()
    flags = flags_of(tell=True, max_new_tokens=60)
    out = tried(model, scene, flags)
    plain = tried(model, scene, flags_of(max_new_tokens=60))
    assert [row[-1] for row in out.reasoning] == scene["reasoning"]
    T = plain.tokens.shape[2]
    assert torch.equal(out.tokens[:, :-1, :T], plain.tokens[:, :-1]) and torch.equal(out.xyz[:, :-1], plain.xyz[:, :-1])
    assert not torch.allclose(out.xyz[:, -1], plain.xyz[:, -1], atol=1e-3)
    with torch.no_grad():
        heads = alpamayo.heads_of(model.replay(scene, out), out)
    said = heads["thought"].decided * out.log_probs
    assert (heads["thought"].log_pi - said).abs().max() < 2e-4 and heads["thought"].decided[:, -1].sum() > 20


def test_kl_is_zero_to_itself_and_holds_the_policy_back(scene):
    flags = flags_of(kl=1.0)
    model, other = tiny(), tiny(1)
    out = tried(model, scene, flags)
    rewards = torch.randn(2, 4)
    look = rl.losses_of(model, model, scene, out, both(rewards), flags)
    assert look["kl"] == 0 and look["kl_drive"] == 0 and look["mismatch"] < 2e-5
    look = rl.losses_of(model, other, scene, out, both(rewards), flags)
    assert look["kl"] > 0.01 and look["kl_drive"] > 0.01


def test_sure_tokens_count(scene):
    """A sure token's log-probability is exactly 0 in float32. It was drawn all the same: length and KL are sums over all that
    was drawn, here by hand and in float64."""
    model, other, longest = tiny(), tiny(1), 9
    model.vlm.lm_head.weight.data *= 20  # a sharpened policy
    out = model.sample(scene, 5, temperature=0.6, top_p=1.0, steps=1, max_new_tokens=longest, seed=3)
    with torch.no_grad():
        reference = other.replay(scene, out)
        losses = model(scene, "rl", rollout=out, advantage=both(torch.randn(2, 5)), reference=reference)
        old = {name: head.log_pi for name, head in losses["heads"].items()}
        looks = rl.looks_of(losses["heads"], old, losses["replay"], out)
        logits = model.replay(scene, out).logits.double()
    lengths, kls = [], []
    for i, row in enumerate(out.tokens.flatten(0, 1).tolist()):
        said = row.index(model.vocabulary["traj_future_start"]) + 1
        drawn = said - (said == longest)  # the last one was forced
        lengths.append(drawn)
        p, q = (logits[i, :drawn] / 0.6).softmax(-1), (reference.logits[i, :drawn].double() / 0.6).softmax(-1)
        kls.append((p * (p / q.clamp(min=1e-300)).clamp(min=1e-300).log()).sum().item())
    assert (out.log_probs[out.chosen] == 0).float().mean() > 0.1  # the sure ones
    assert looks["length"] == pytest.approx(sum(lengths) / 10)
    assert looks["kl"] == pytest.approx(sum(kls) / 10, rel=1e-3) and looks["kl"] > 1
    assert out.chosen.sum() == sum(lengths) and not out.log_probs[~out.chosen].any()


# ------------------------------------------------------------------------------------------------------------ rewards

PEDESTRIAN = data.sentence("pedestrian", world.LEFT)


def test_grades_fall_with_the_quality_of_the_reasoning():
    """Each of these is worse than the one before it: a reward with its sign turned, as the released recipe's reasoning term
    seems to be, cannot pass."""
    both = data.compose([("pedestrian", world.LEFT), ("cut-in", world.RIGHT)])[2]
    ladder = [
        (PEDESTRIAN, 5),
        (data.sentence("pedestrian", world.RIGHT), 4),  # right kind, wrong side
        (data.sentence("cut-in", world.LEFT), 3),  # the same decisions for another reason
        (data.sentence("red light", world.LEFT), 2),  # stops where it should yield
        (data.sentence("free", world.LEFT), 1),  # goes on
        (data.sentence("cones", world.LEFT), 0),  # goes on, around what is not there
    ]
    assert [rl.grade(said, PEDESTRIAN) for said, _ in ladder] == [score for _, score in ladder]
    assert rl.grade("the the", PEDESTRIAN) == rl.grade("", PEDESTRIAN) == 0
    assert rl.grade(both, both) == 5 and rl.grade(PEDESTRIAN, both) == 4
    for cause in data.CAUSES:
        for side in (world.LEFT, world.RIGHT):
            true = data.sentence(cause, side)
            assert rl.grade(true, true) == 5
            assert rl.reasons_of(true)[1] == {cause}


def test_the_expert_does_what_it_says_and_not_what_another_says():
    seeds = range(world.SEEDS["tail"] + 900, world.SEEDS["tail"] + 980)
    scene = data.make_scenes(seeds, camera_ids=(1,), size=(2, 4), frames=1)
    xyz, rot = scene["ego_future_xyz"][:, None], scene["ego_future_rot"][:, None]
    beside = experts_offsets(seeds)
    said = [[text] for text in scene["reasoning"]]
    agree = rl.consistency(said, scene, xyz, rot, beside)
    assert agree.mean() > 0.97
    other = said[5:] + said[:5]
    differ = torch.tensor([data.decisions(a[0]) != data.decisions(b[0]) for a, b in zip(said, other)])
    assert rl.consistency(other, scene, xyz, rot, beside)[differ].mean() < 0.4
    assert rl.consistency([["Stop the car"]] * 80, scene, xyz, rot, beside).sum() == 0  # no decision of the closed set
    blind = rl.consistency(said, scene, xyz, rot)  # without a lane: what its path alone can tell
    assert 0.6 < blind.mean() <= agree.mean()


def experts_offsets(seeds):
    """Metres beside its line, (n, 1, 64), of the expert in scenes of the world."""
    w = world.World(seeds)
    w.catch_up()
    beside = []
    for _ in range(data.PAST + 64):
        w.step(*w.expert())
        beside.append(world.locate(w.x, w.y, w.scene.route)[1])
    return torch.stack(beside[data.PAST :], 1)[:, None]


def test_trajectory_prefers_the_closer_the_calmer_and_the_safer():
    t = torch.arange(1, 65) * 0.1
    truth = torch.stack([10 * t, 0 * t, 0 * t], -1)[None]
    aside, far = truth + torch.tensor([0, 1.0, 0]), truth + torch.tensor([0, 500.0, 0])
    shaky = truth + 0.02 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    values = rl.trajectory(torch.stack([truth, aside, far, shaky], 1), truth)[0]
    assert values[0] > -1e-3 and values[1] == pytest.approx(-rl.DISTANCE, abs=1e-3) and values[3] < -1  # 2 cm of shaking are 100 m/s^3
    assert values[2] == pytest.approx(-rl.DISTANCE_MOST, abs=1e-2)
    crash = rl.trajectory(torch.stack([truth, truth], 1), truth, torch.tensor([[False, True]]))[0]
    assert crash[0] - crash[1] == pytest.approx(rl.COLLISION)


def test_plans_are_driven_among_the_others():
    """The expert's own controls meet nothing; to go straight on meets what the expert avoids; and every copy of a scene is
    the scene."""
    seeds = range(world.SEEDS["tail"] + 300, world.SEEDS["tail"] + 324)
    w = world.World(seeds)
    w.catch_up()
    controls = []
    for _ in range(data.PAST + 64):
        w.step(*w.expert())
        controls.append(torch.stack([w.accel, w.curvature], -1))
    expert = torch.stack(controls[data.PAST :], 1)
    met = data.drive_plans(seeds, torch.stack([expert, 0 * expert, expert], 1))
    assert not met["collision"][:, [0, 2]].any() and not met["off_road"][:, [0, 2]].any() and met["collision"][:, 1].float().mean() > 0.3
    assert torch.equal(met["beside"][:, 0], met["beside"][:, 2])
    assert torch.allclose(met["beside"][:, 0], experts_offsets(seeds)[:, 0], atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- curation


def test_curation_prefers_scenes_on_which_model_and_rewards_disagree():
    rewards = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0.5, 0.5, 0.5]])
    log_probs = torch.tensor([[-1.0, -5, -5], [-5.0, -1, -5], [-2.0, -2, -2]])
    agrees, disagrees, equal = rl.divergence(log_probs, rewards, beta=2.0)
    assert disagrees > 1 > agrees > equal == pytest.approx(0, abs=1e-6)
    known = torch.zeros(100)
    numbers, drawn = rl.choose(known, 0, 100, flags_of(batch=8))
    assert drawn == 0 and len(set(numbers)) == 8
    known[:10], known[3] = 0.0, 5.0
    known[50:60] = 1.0
    picks = [rl.choose(known, step, 100, flags_of(batch=8)) for step in range(200)]
    assert all(drawn == 4 and len(set(numbers)) == 8 for numbers, drawn in picks)
    chosen = [n for numbers, drawn in picks for n in numbers[:drawn]]
    assert set(chosen) <= {3, *range(50, 60)} and chosen.count(3) > 2 * chosen.count(55)
    assert picks[7] == rl.choose(known, 7, 100, flags_of(batch=8)) != rl.choose(known, 7, 100, flags_of(batch=8, seed=1))


# ---------------------------------------------------------------------------------------------------------- the judge


class Stub(BaseHTTPRequestHandler):
    """A language model of few words: what the server was told to answer, in turn; then always 4.

    Bytes are what it sends, status line and headers included; a list of bytes is sent with pauses."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        says = self.server.answers.pop(0) if self.server.answers else "4"
        if isinstance(says, str):
            says = answer({"choices": [{"message": {"content": says}}]})
        with contextlib.suppress(OSError):
            for part in says if isinstance(says, list) else [says]:
                self.wfile.write(part)
                time.sleep(0.1 * isinstance(says, list))
        self.close_connection = True

    def log_message(self, *_):
        pass


def answer(body, status=b"200 OK"):
    return b"HTTP/1.1 " + status + b"\r\n\r\n" + (body if isinstance(body, bytes) else json.dumps(body).encode())


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.asked, server.answers, server.url = [], [], f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_judge_is_asked_once_and_again_when_it_stumbles(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", " secret\n")  # as `cat key` gives it
    file = str(tmp_path / "judge.jsonl")
    judge = rl.Judge(server.url, "critic", file, timeout=0.3, wait=0.01)
    server.answers[:] = [answer(b"", b"500 broken"), answer({}), "Grade: 3"]
    assert judge([("a", "b")]) == [3]
    path, body, key = server.asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "critic" and key == "Bearer secret"
    assert "TRUE: b" in body["messages"][0]["content"] and "MODEL: a" in body["messages"][0]["content"]
    server.answers[:] = [[b""] * 6, "2"]
    assert judge([("c", "d"), ("a", "b"), ("c", "d")]) == [2, 3, 2]
    assert rl.Judge(server.url, "another", file)([("a", "\ud800")]) == [4]  # another judge is asked again


def test_a_half_written_line_of_the_judges_file_is_dropped_for_good(server, tmp_path):
    file = tmp_path / "judge.jsonl"
    assert rl.Judge(server.url, file=str(file))([("a", "b")]) == [4]
    whole = file.read_text()
    for cut in range(1, len(whole)):
        file.write_text(whole + whole[:cut])  # of a run that was killed
        judge = rl.Judge(server.url, file=str(file))
        assert file.read_text() == whole and judge([("a", "b")]) == [4]
    server.answers[:] = ["2"]
    assert judge([("c", "d")]) == [2]
    assert sorted(rl.Judge(server.url, file=str(file)).known.values()) == [2, 4]
    assert len(server.asked) == 2 and os.listdir(tmp_path) == ["judge.jsonl"]


@pytest.mark.parametrize("line", [
    '["a", 7]', '["a", NaN]', '["a", -1]', '["a", "4"]', '["a", 4.0]', '["a", true]', '["a", null]', '["a"]', '{"a": 4}', "4", "",
    '["a", 4] 5', "[" * 100_000, '[["a"], 4]'])  # fmt: skip
def test_a_wrong_line_of_the_judges_file_is_told(line, tmp_path):
    file = tmp_path / "judge.jsonl"
    file.write_text(f'["b", 3]\n{line}\n["c", 3]\n')
    with pytest.raises(ValueError, match=r"^[^\n]*judge.jsonl: line 2: [^\n]*$"):
        rl.Judge("http://127.0.0.1:9/v1", file=str(file))


@pytest.mark.parametrize("says, score", [
    ("4", 4), (" 0\n", 0), ("5.", 5), ("**4**", 4), ("Grade: 3", 3), ("grade 3", 3), ("**Score:** 2", 2), ("4/5", 4), ("Rating: 4 / 5.", 4),
    ("-3", None), ("there are 2 decisions", None), ("99", None), ("6", None), ("4.5", None), ("3 of 5", None), ("7 of 10", None),
    ("2/3", None), ("4 4", None), ("\u0664", None), ("\u00b2", None), ("", None), ("four", None), ("+4", None), ("4, as all agrees", None),
])  # fmt: skip
def test_what_a_grade_is(says, score, server):
    judge = rl.Judge(server.url, tries=1)
    server.answers[:] = [says]
    if score is None:
        with pytest.raises(ConnectionError, match=r"no grade after 1 tries \(expected a number from 0 to 5, not "):
            judge([("a", "b")])
    else:
        assert judge([("a", "b")]) == [score]


FOUR = json.dumps({"choices": [{"message": {"content": "4"}}]}).encode()


@pytest.mark.parametrize("says", [
    b"", b"\0\0\0\n", b"HTTP/1.1 none\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + FOUR[:-1],
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n" + FOUR,
    b"HTTP/1.1 200 OK\r\na: " + b"x" * 70_000 + b"\r\n\r\n" + FOUR, answer(FOUR, b"404 Not Found"), answer(b"<html>"), answer(b"\xff\xfe{"),
    answer(b"[" * 100_000), answer([]), answer({"choices": []}), answer({"choices": {"a": 1}}), answer({"choices": [{"message": None}]}),
    *(answer({"choices": [{"message": {"content": content}}]}) for content in (4, 4.0, None, ["4"], {"text": "4"}, True)),
    answer(FOUR + b" " * rl.LONGEST), answer(b"9" * 5000), answer(b"NaN"),
])  # fmt: skip
def test_a_malformed_answer_is_one_line(says, server):
    server.answers[:] = [says] * 2
    with pytest.raises(ConnectionError) as error:
        rl.Judge(server.url, tries=2, wait=0.01)([("a", "b")])
    line = str(error.value)
    assert line.startswith(f"--judge {server.url}/chat/completions: no grade after 2 tries (") and "\n" not in line and len(line) < 250
    assert len(server.asked) == 2


@pytest.mark.parametrize("dripping", [[b"H"] * 30, [b"HTTP/1.1 200 OK\r\n"] + [b"a: b\r\n"] * 30, [answer(b"[")] + [b" "] * 30,
                                      [b"HTTP/1.1 100 Continue\r\n\r\n"] * 30])  # fmt: skip
def test_a_dripping_answer_ends_at_the_time_out(dripping, server):
    server.answers[:] = [dripping]
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match="TimeoutError: no whole answer in 0.3 s"):
        rl.Judge(server.url, timeout=0.3, tries=1)([("a", "b")])
    assert time.monotonic() - begin < 1


def test_the_key_goes_nowhere_else(server, monkeypatch, capfd):
    monkeypatch.setenv("JUDGE_API_KEY", "sec-ret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody answers
    elsewhere = server.url.replace("127.0.0.1", "localhost").encode()
    for status in (b"301", b"302", b"303", b"307", b"308"):
        moved = b"HTTP/1.1 " + status + b" Moved\r\nLocation: " + elsewhere + b"\r\n\r\n"
        server.answers[:] = [moved]
        with pytest.raises(ConnectionError, match=f"HTTP status {status.decode()}"):
            rl.Judge(server.url, tries=1)([("a", "b")])
    assert len(server.asked) == 5  # once each
    server.answers[:] = ["you sent Bearer sec-ret"]
    with pytest.raises(ConnectionError, match="expected a number from 0 to 5[)]$"):
        rl.Judge(server.url, tries=1)([("a", "b")])
    for key in ("sec\nret", "sec ret", "s\u00e9cret"):
        monkeypatch.setenv("JUDGE_API_KEY", key)
        with pytest.raises(ValueError, match="^JUDGE_API_KEY: expected one word of ASCII characters$"):
            rl.Judge(server.url)
    assert "ret" not in "".join(capfd.readouterr())


def test_a_judge_that_is_away_is_one_line(server):
    with pytest.raises(ConnectionError, match="no grade after 1 tries"):
        rl.Judge("http://127.0.0.1:9/v1", tries=1)([("a", "b")])
    with pytest.raises(ConnectionError, match="no grade after 1 tries"):
        rl.Judge("http://no..name/v1", tries=1)([("a", "b")])


def test_where_a_judge_may_be():
    for url in ("http://localhost:8000/v1", "https://api.example.com/v1/", "http://[::1]:80", "http://a"):
        assert rl.endpoint(url) == url
    for url in ("", "localhost:8000", "ftp://a/v1", "http://", "http:///v1", "http://user:word@a/v1", "http://a/v1?key=b", "http://a:99999/v1",
                "http://a:b/v1", "http://a/v 1", "http://a/v1\r\nX: y", "http://\u00e9/v1", "file:///etc/passwd", "http://a/v1#b"):  # fmt: skip
        with pytest.raises(ValueError, match="^expected http://HOST:PORT/PATH"):
            rl.endpoint(url)


# ------------------------------------------------------------------------------------------------------------- a step


@pytest.fixture(scope="module")
def few():
    return Few(range(world.SEEDS["tail"] + 500, world.SEEDS["tail"] + 504))


def one_step(model, few, flags, judge=None, reference=None, step=0):
    own = dict(model=model, reference=reference, optimisers=rl.make_optimisers(model, flags), scenes=few, judge=judge)
    run = train.Run(flags, known=torch.zeros(len(few)), **own)
    line = rl.step(run, step, model, partial(train.learn, run), partial(train.mean_of, run))
    return line, run.known


def test_an_episode_teaches_each_moment(few):
    """A thought by its moment, a plan by the outcome of its drive; a drive that is over teaches nothing more."""
    model = tiny()
    flags = flags_of(group=3, episode=1.5, batch=2, max_new_tokens=6)
    seen = []

    def ask(scene, group, part):
        seen.append((scene, rl.try_out(model, flags, contextlib.nullcontext(), 3, scene, group, part)))
        return seen[-1][1]

    lived, rewards, said = rl.drive_out(model, ask, few, [0, 2], flags)
    assert len(lived) == 3 and said.shape == rewards["outcome"].shape == (2, 3)
    seeds = [few.seeds[i] for i in (0, 0, 0, 2, 2, 2)]
    plans = iter([rollout.actions[:, 0] for _, rollout in seen])
    met = data.drive(lambda scene: next(plans), seeds, 1.5, 0.5, ask_all=True, camera_ids=(1,), size=(2, 4), frames=1)
    assert torch.equal(rewards["outcome"], met["score"].view(2, 3)) and torch.equal(rewards["off_road"], met["off_road"].float().view(2, 3))
    drive = rewards["drive"] - rewards["drive"].mean(1, keepdim=True)
    for i, ((scene, rollout), one) in enumerate(zip(seen, lived)):
        rows = (met["seconds"] > 0.5 * i).nonzero()[:, 0].tolist()
        assert one.scene["reasoning"] == [scene["reasoning"][row] for row in rows]
        assert torch.equal(one.rollout.tokens, rollout.tokens[rows]) and torch.equal(one.rollout.flow, rollout.flow[:, rows])
        assert torch.allclose(one.advantage["drive"][:, 0], drive.flatten()[rows])
        grades = torch.tensor([rl.grade(row[0], true) for row, true in zip(rollout.reasoning, scene["reasoning"])]).float()
        agree = rl.consistency(rollout.reasoning, scene, rollout.xyz, rollout.rot)[:, 0]
        earned = 0.2 * grades + agree
        for row, advantage in zip(rows, one.advantage["thought"][:, 0]):
            group = [other for other in rows if other // 3 == row // 3]
            assert advantage == pytest.approx(float(earned[row] - earned[group].mean()), abs=1e-5)
    line, known = one_step(model, few, flags)
    assert line["outcome"] >= 0 and (known != 0).any()


@pytest.mark.parametrize("policy", ["flow", "tokens"])
def test_a_step_is_a_function_of_weights_seed_and_step(few, policy):
    flags = flags_of(policy=policy, objective="paper", kl=0.1, group=2)
    first, second, other = tiny(), tiny(), tiny()
    line, known = one_step(first, few, flags, reference=copy.deepcopy(first))
    again, _ = one_step(second, few, flags, reference=copy.deepcopy(second))
    assert line == again and (known == 0).sum() == 2
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(first.expert.parameters(), other.expert.parameters())) == (policy == "flow")
    assert any(not torch.equal(a, b) for a, b in zip(first.vlm.parameters(), other.vlm.parameters()))
    assert one_step(tiny(), few, flags, reference=copy.deepcopy(other), step=1)[0]["total"] != line["total"]


def test_pieces_of_a_batch_are_the_batch(few):
    """--accumulate changes the seeds of the rollouts and nothing else; with the same rollouts, the gradients add up."""
    flags = flags_of()
    model = tiny()
    scene = few.batch(range(2))
    out = tried(model, scene, flags)
    rewards = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    rl.losses_of(model, None, scene, out, both(rewards), flags)["policy"].backward()
    whole = [p.grad.clone() if p.grad is not None else None for p in model.parameters()]
    model.zero_grad()
    for i in range(2):
        part = replace(out, reasoning=out.reasoning[i : i + 1], tokens=out.tokens[i : i + 1], chosen=out.chosen[i : i + 1], log_probs=out.log_probs[i : i + 1],
                       flow=out.flow[:, i : i + 1])  # fmt: skip
        (rl.losses_of(model, None, few.batch([i]), part, both(rewards[i : i + 1]), flags)["policy"] / 2).backward()
    for p, g in zip(model.parameters(), whole):
        if g is not None:
            assert torch.allclose(p.grad, g, atol=1e-4 * float(g.abs().max()) + 1e-6)


def test_what_is_not_a_number_stops_the_run_and_says_where(few):
    flags = flags_of()
    model = tiny()
    with pytest.raises(FloatingPointError, match="step 1: reward `reason` is not finite"):
        one_step(model, few, flags, judge=lambda pairs: [math.nan] * len(pairs))
    before = copy.deepcopy(model)
    model.vlm.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(FloatingPointError, match="step 3: `grad_norm` is not finite"):
        one_step(model, few, flags, step=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    model.action_out_proj.weight.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="step 1: sample: what the model computes is not finite"):
        one_step(model, few, flags)


# ---------------------------------------------------------------------------------------------- as a user runs it

TRY = "--stage rl --scenes 8 --batch 2 --group 3 --flow-steps 2 --max-new-tokens 30 --val-scenes 4 --val-every 2 --save-every 1 --threads 1 --workers 0 --device cpu".split()


def rl_command(cache, out, *more):
    return [sys.executable, os.path.join(ROOT, "train.py"), *TRY, "--cache", cache, "--out", str(out), *more]


def test_a_run_of_the_shipped_nano(cache, tmp_path):  # noqa: F811
    said = run(rl_command(cache, tmp_path, "--steps", "2", "--objective", "clip", "--kl", "0.01", "--kl-drive", "0.01", "--rehearse", "0.1", "--tell"))
    for split in ("tail", "val", "rare"):
        assert re.search(rf"before +{split} +thought: right +\d+%, grade \d.\d\d  drive: ADE", said)
        assert re.search(rf"step +2 {split} +thought: ", said)
    assert f"tools.watch --split tail --seed 3 --checkpoint {os.path.join(ROOT, 'checkpoints', 'nano')} --beside {tmp_path}" in said
    lines = log(tmp_path)
    assert sorted(lines) == [1, 2] and lines[2]["divergence_chosen"] is not None
    for name in ("total", "reason", "consistency", "trajectory", "silent", "length", "entropy", "kl", "grad_norm", "grad_norm_expert"):
        assert all(math.isfinite(line[name]) for line in lines.values())
    assert all(line["mismatch"] < 1e-4 for line in lines.values())
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    Alpamayo.from_pretrained(str(tmp_path))  # a checkpoint as any other


def test_a_run_without_probabilities(cache, tmp_path):  # noqa: F811
    run(rl_command(cache, tmp_path, "--steps", "1", "--objective", "nft", "--split", "train", "--credit", "total"))
    assert log(tmp_path)[1]["grad_norm_expert"] > 0


def test_adapters_alone_learn_by_trying(cache, tmp_path):  # noqa: F811
    """--lora with the KL to the model without its adapters, the paper's objective and the paper's policy."""
    run(rl_command(cache, tmp_path, "--steps", "2", "--lora", "4", "--train", "vlm", "--kl", "0.1", "--objective", "paper",
                   "--policy", "tokens", "--checkpointing", "--kl-drive", "0.1", "--temperature", "1.5"))  # fmt: skip
    lines = log(tmp_path)
    assert lines[1]["kl"] == 0 < lines[2]["kl"] and lines[2]["mismatch"] < 1e-3
    before, after = (load_file(os.path.join(folder, "model.safetensors")) for folder in (os.path.join(ROOT, "checkpoints", "nano"), tmp_path))
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed and all(".language_model.layers." in name for name in changed)


def test_ones_own_clips_are_tried_too(cache, folder, tmp_path):  # noqa: F811
    """They cannot be driven, so nothing collides in them; all else is rewarded."""
    times = [3.0, 4.0]
    (folder / "reasoning.json").write_text(json.dumps([{"time": t, "text": PEDESTRIAN} for t in times]))
    run(rl_command(cache, tmp_path / "out", "--data", str(folder), "--steps", "1"))
    line = log(tmp_path / "out")[1]
    assert "collision" not in line and "outcome" not in line  # nobody knows
    assert math.isfinite(line["total"]) and 0 <= line["consistency"] <= 1


def test_flags_that_cannot_be_meant_are_one_line(cache, tmp_path, capsys):  # noqa: F811
    for more, line in (
        (("--group", "1"), "--group: expected a whole number from 2"),
        (("--eta", "0"), "--eta: expected a number, 0 or more and more than 0"),
        (("--preset", "mini"), "--stage rl starts from a checkpoint of stage reason: give it with --init"),
        (("--policy", "tokens", "--train", "expert"), "--policy tokens --train expert: nothing would learn"),
        (("--rewards", "reason", "reason"), "--rewards reason reason: one of them is there twice"),
        (("--rewards", "reason", "--train", "expert"), "--rewards reason --train expert: nothing would learn"),
        (("--rewards", "outcome", "--train", "vlm"), "--rewards outcome --train vlm: nothing would learn"),
        (("--objective", "nft", "--updates", "2"), "--objective nft: it teaches the flow"),
        (("--episode", "0.73"), "--episode 0.73: expected 0, or 0.5 s or more in steps of 0.1 s"),
        (("--episode", "61"), "--episode: expected a number, 0 or more and at most 60"),
        (("--episode", "2", "--tell"), "--episode 2: it takes --data world, and neither"),
        (("--judge", "http://127.0.0.1:9/v1", "--steps", "1"), "train.py: --judge http://127.0.0.1:9/v1/chat/completions: no grade"),
    ):
        assert line in complaint(rl_command(cache, tmp_path, *more), capsys)
