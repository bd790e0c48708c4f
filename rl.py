"""
Reinforcement learning, the paper's third stage (Sec. 5.3): what the model thinks and where it drives, tried out in groups
and rewarded. `python train.py --stage rl` runs it, in one process, on one GPU or a laptop.

    scene -> a group of rollouts behind one prompt -> rewards (B, G) -> advantages -> one update -> the next scenes

A rollout is a reasoning and a path. Its path is either the language model's 128 action tokens (`--policy tokens`, the
paper's, which trains no expert), or what the expert's flow made of it (`--policy flow`): the Euler steps are drawn with
noise, so each is a Gaussian that has a log-probability, and reasoning and flow learn from one reward. No gradient of the
expert reaches the language model, here as everywhere.

Two objectives. The paper's (Eq. 10), A = r - mean(r) over the group of G:

    L = - sum_i softmax_i(beta A) (log pi(i) - kl KL[pi(i) || pi_SFT(i)])

and the clipped surrogate that the release's recipe uses (0.2 below, 0.28 above, KL 0), for each token or flow step:

    L = - mean_i sum_t min(rho A, clip(rho, 1 - 0.2, 1 + 0.28) A),   rho = pi(t) / pi_old(t)

What usual GRPO has and this leaves out, and why:
    a value network       the group's mean is the baseline; that is GRPO's own idea
    a rollout server      the weights that learn are the weights that sample, in one process: nothing is stale or sent
    A / std(r)            the paper has none; a group that differs by centimetres should not count like one with a crash
    mean over tokens      traces are short and of about one length: log pi is the sum, as the formula says
    many updates a batch  --updates; at 1, as in the release, rho is 1 and the clip sleeps
    filtering of groups   a group of equal rewards has no advantage, so the clipped form learns nothing from it anyway

    python rl.py "SFT=checkpoints/nano" "RL=out/rl-0,out/rl-1"     the paper's Table 9 in small, for these checkpoints

The page reads: rewards, the judge, objectives, curation, the loop, its curves, the table.
"""
import argparse
import hashlib
import json
import math
import os
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import motion
import world
from alpamayo import DT, HORIZON, OF_EXPERT, Alpamayo, Rollout, yaw_of
from memory import without_adapters

# ----------------------------------------------------------------------------------------------------------------------
# Rewards (Sec. 5.3.2). The paper gives no weights; these and the thresholds below are ours, chosen in our world.

WEIGHTS = {"reason": 0.2, "consistency": 1.0, "trajectory": 1.0}  # of the parts in the sum: at most 2
DISTANCE, DISTANCE_MOST, COLLISION, JERK = 0.05, 1.0, 1.0, 0.02  # lambdas: 1/m^2; the most that distance costs; -; s^3/m
SLOWER = ("yield", "stop", "follow", "search a gap", "adapt speed")  # decisions that make a car slow down or stand
REASONS = {text.format(side=side, other=other): name for name, (*_, text) in data.CAUSES.items()
           for side, other in (("left", "right"), ("right", "left"))}  # fmt: skip


def causes_of(text):
    """What a trace gives as its reasons: (names of data.CAUSES, the words themselves), two sets."""
    said = set(text.partition(" since ")[2].strip(" .").split(" and "))
    return {REASONS.get(reason, reason) for reason in said}, said


def grade(said, true):
    """Reasoning quality by the paper's rubric, 0 to 5, of a trace against the true one; a rule instead of a language model.

    5 both decisions and all reasons as in truth; 4 both decisions, and a reason of the right kind (its side is wrong, one
    is missing, or one too many); 3 both decisions for another reason; 2 one decision right, and not the opposite of the
    other; 1 one right and the other opposite (goes on where it should slow down), or a true reason for wrong decisions;
    0 neither, or no decision of the closed set."""
    ours, theirs = data.decisions(said), data.decisions(true)
    if ours is None or theirs is None:
        return 0
    (kinds, words), (true_kinds, true_words) = causes_of(said), causes_of(true)
    if ours == theirs:
        return 5 if words == true_words else 4 if kinds & true_kinds else 3
    opposite = (ours[0] in SLOWER) != (theirs[0] in SLOWER)
    if ours[0] == theirs[0] or ours[1] == theirs[1]:
        return 1 if opposite else 2
    return 1 if kinds & true_kinds else 0


def consistency(texts, scene, xyz, rot, beside=None):
    """Whether the path does what the trace says (Sec. 5.3.2): (B, G) of 0 or 1; 1 only if both axes agree, 0 if the trace
    holds no decision of the closed set.

    texts: B lists of G; xyz (B, G, 64, 3), rot (B, G, 64, 3, 3). Longitudinal: the path's meta-actions (Table 5). Lateral:
    they cannot tell a nudge from a bend of the road, so where the lane is known (beside, (B, G, 64): metres left of the
    line to drive on) its offset decides, and elsewhere the path's turns and ways out of the lane. The rules are ours.
    The expert's own paths agree with its own traces in all of 500 scenes of val and 500 of tail, and in 95 % of train, where
    some already follow at the speed of the car ahead; with the traces of other decisions in 30 %."""
    G = xyz.shape[1]
    past = [scene[key].to(xyz.device) for key in ("ego_history_xyz", "ego_history_rot")]
    past = [one[:, None].expand(-1, G, *one.shape[1:]) for one in past]
    poses, turns = torch.cat([past[0], xyz], 2), torch.cat([past[1], rot], 2)  # (B, G, 80, 3[, 3])
    speed, _, yaw, _ = motion.smooth_motion(poses, turns)
    longitudinal, lateral = motion.meta_actions(poses, turns)
    now = past[0].shape[2] - 1
    name, after = motion.LONGITUDINAL_META.index, longitudinal[..., now + 1 :]
    is_one = lambda *names: torch.isin(after, torch.tensor([name(n) for n in names], device=after.device))
    slows = is_one("gentle decelerate", "strong decelerate", "stop").any(-1)
    speeds_up = is_one("gentle accelerate", "strong accelerate").any(-1)
    hard = is_one("strong decelerate").any(-1) | is_one("stop")[..., -10:].any(-1)
    fades = slows & ~speeds_up & (speed[..., -1] < 0.7 * speed[..., now])
    turned = yaw[..., -1] - yaw[..., now]
    agree = torch.zeros(xyz.shape[:2])
    for b, row in enumerate(texts):
        for g, text in enumerate(row):
            decided = data.decisions(text)
            if decided is None:
                continue
            if decided[0] in SLOWER:
                along = slows[b, g]
            else:
                along = speeds_up[b, g] if decided[0] == "pass" else ~hard[b, g] & ~fades[b, g]
            if beside is None:
                across = across_by_events(decided[1], poses[b, g], yaw[b, g], lateral[b, g])
            else:
                across = across_by_lane(decided[1], beside[b, g], float(turned[b, g]))
            agree[b, g] = float(bool(along) and across)
    return agree


def across_by_lane(decision, beside, turned):
    """Whether a path does a lateral decision, from its metres beside the line to drive on (64,) and how far it turned (rad)."""
    sign = -1 if decision.endswith("right") else 1
    most = float((sign * beside).max())
    if decision == "keep lane":  # for three seconds: what comes later is another decision
        return float(beside[:30].abs().max()) <= max(0.45, abs(float(beside[0])) + 0.2)
    if decision.startswith("turn"):
        return sign * turned >= 0.5
    low, high = {"nudge": (0.35, 1.0), "straddle": (0.9, 2.5)}.get(decision.split()[0], (2.5, math.inf))
    return low <= most <= high


def across_by_events(decision, xyz, yaw, lateral):
    """The same of a path alone: xyz (T, 3), yaw (T,), lateral meta-actions (T,)."""
    events = [kind for _, kind in motion.lateral_events(xyz.double(), yaw, lateral)]
    if decision == "keep lane":
        return not any(kind.startswith(("leave lane", "turn")) for kind in events)
    side = decision.split()[-1]
    if decision.startswith("turn"):
        return f"turn {side}" in events or f"bend {side}" in events
    return f"leave lane {side}" in events


def trajectory(xyz, truth, collision=None):
    """Trajectory quality (Eq. 11), (B, G), at best 0: squared distance to the expert's path (mean over 6.4 s, m^2, at most
    DISTANCE_MOST in all, so that one lost scene does not outweigh all others), collision (B, G) and jerk (m/s^3, mean
    length of the path's third difference). xyz (B, G, 64, 3), truth (B, 64, 3)."""
    squared = (xyz - truth[:, None])[..., :2].square().sum(-1).mean(-1)
    jerk = (xyz[..., :2].diff(n=3, dim=-2) / DT**3).norm(dim=-1).mean(-1)
    cost = (DISTANCE * squared).clamp(max=DISTANCE_MOST) + JERK * jerk
    return -(cost if collision is None else cost + COLLISION * collision.float())


def comfort(xyz, rot):
    """The release's six comfort tests of paths (..., T, 3), (..., T, 3, 3): {name of motion.COMFORT_BOUNDS: (...) bool}.

    The rule is that of its reward, and its verdicts are in tests/golden: every rate is a forward difference whose last
    value is repeated, also on rates. So a path that still brakes or speeds up when it ends jerks there: more than 0.41
    m/s^2 in its last step fails "longitudinal jerk", more than 0.84 "jerk"."""
    rate = lambda x: torch.cat([(d := x.diff(dim=-1) / DT), d[..., -1:]], -1)
    yaw = yaw_of(rot)
    turn = (yaw.diff(dim=-1) + math.pi) % (2 * math.pi) - math.pi
    turn = torch.cat([turn, turn[..., -1:]], -1) / DT
    vx, vy = rate(xyz[..., 0]), rate(xyz[..., 1])
    along, across = yaw.cos() * vx + yaw.sin() * vy, yaw.cos() * vy - yaw.sin() * vx
    values = {"accel": rate(along), "lateral accel": rate(across), "jerk": rate(rate(torch.hypot(vx, vy))),
              "longitudinal jerk": rate(rate(along)), "yaw accel": rate(turn), "yaw rate": turn}  # fmt: skip
    bounds = motion.COMFORT_BOUNDS.items()
    return {name: ((values[name] > low) & (values[name] < high)).all(-1) for name, (low, high) in bounds}


def rewards_of(scene, out, scenes, numbers, flags, judge=None):
    """All that is rewarded in a Rollout of scenes number `numbers`, {part: (B, G)}: reason 0 to 5, consistency 0 or 1,
    trajectory up to 0; what is looked at beside them: collision, ade (m), comfort 0 to 1; and `total`, the weighted sum of
    the parts in flags.rewards."""
    xyz, rot, truth = out.xyz.cpu().float(), out.rot.cpu().float(), scene["ego_future_xyz"].cpu()
    met = scenes.drive_plans(numbers, out.actions.cpu())  # of a clip: nothing
    pairs = [(said, true) for row, true in zip(out.reasoning, scene["reasoning"]) for said in row]
    scores = judge(pairs) if judge else [grade(*pair) for pair in pairs]
    parts = {
        "reason": torch.tensor(scores, dtype=torch.float32).view(xyz.shape[:2]),
        "consistency": consistency(out.reasoning, scene, xyz, rot, met.get("beside")),
        "trajectory": trajectory(xyz, truth, met.get("collision")),
        "collision": met.get("collision", torch.zeros(xyz.shape[:2])).float(),
        "ade": (xyz - truth[:, None])[..., :2].norm(dim=-1).mean(-1),
        "comfort": torch.stack(list(comfort(xyz, rot).values())).float().mean(0),
    }
    return parts | {"total": sum(WEIGHTS[name] * parts[name] for name in flags.rewards)}


# ----------------------------------------------------------------------------------------------------------------------
# The judge: a language model that grades reasoning, where there is one

RUBRIC = """You grade how a driving model explains its next action. You are given the true explanation and the model's.
Judge two things: whether the same driving behaviour follows, and whether the causes are the same.
5: behaviour and causes fully agree. 4: behaviour right, causes mostly agree. 3: behaviour roughly right, causes incomplete
or slightly wrong. 2: behaviour partly wrong, or causes largely disagree. 1: behaviour wrong, or it contradicts the truth.
0: unrelated or opposite. Answer with the number alone.

TRUE: {true}
MODEL: {said}"""


class Judge:
    """Grades pairs (said, true) from 0 to 5 by a model behind an OpenAI-compatible endpoint, `URL/chat/completions`.

    Every answer is kept in a file, so a question is asked once; several are asked at a time. An API key is read from the
    environment variable JUDGE_API_KEY. ConnectionError, in one line, where no answer comes after `tries`. The paper also
    shows its judge the cameras' last images; ours reads."""

    def __init__(self, url, model="judge", file=None, timeout=30.0, tries=3, wait=1.0):
        self.url, self.model, self.file = url.rstrip("/") + "/chat/completions", model, file
        self.timeout, self.tries, self.wait, self.known = timeout, tries, wait, {}
        if file and os.path.exists(file):
            with open(file) as lines:
                for line in lines:
                    if line.endswith("\n"):  # a killed run may leave half a line
                        key, score = json.loads(line)
                        self.known[key] = score

    def key(self, pair):
        return hashlib.sha256("\0".join((self.model, *pair)).encode()).hexdigest()[:32]

    def __call__(self, pairs):
        new = list({self.key(pair): pair for pair in pairs if self.key(pair) not in self.known}.items())
        with ThreadPoolExecutor(8) as pool:
            for (key, _), score in zip(new, pool.map(self.ask, [pair for _, pair in new])):
                self.known[key] = score
                if self.file:
                    os.makedirs(os.path.dirname(self.file) or ".", exist_ok=True)
                    with open(self.file, "a") as lines:
                        lines.write(json.dumps([key, score]) + "\n")
        return [self.known[self.key(pair)] for pair in pairs]

    def ask(self, pair):
        said, true = pair
        body = {"model": self.model, "temperature": 0, "max_tokens": 8,
                "messages": [{"role": "user", "content": RUBRIC.format(said=said, true=true)}]}  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if os.environ.get("JUDGE_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['JUDGE_API_KEY']}"
        problem = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    text = json.load(answer)["choices"][0]["message"]["content"]
                digits = [c for c in text if c.isdigit()]
                if len(digits) == 1 and digits[0] <= "5":
                    return int(digits[0])
                problem = f"expected a number from 0 to 5, not {text[:40]!r}"
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:  # OSError: urllib's, and time-outs
                problem = f"{type(error).__name__}: {error}"
        raise ConnectionError(f"--judge {self.url}: no grade after {self.tries} tries ({problem})")


# ----------------------------------------------------------------------------------------------------------------------
# Curation (Sec. 5.3.3): scenes on which the model's ranking of its rollouts is not the rewards'


def divergence(log_probs, rewards, beta):
    """KL[softmax(beta r) || softmax(log pi)] over each group, (B,): large where the model prefers what is rewarded less.
    log_probs (B, G): of tokens alone, for those of the flow only tell which noise was drawn. The paper names no measure."""
    wanted, ours = (beta * rewards).log_softmax(1), log_probs.log_softmax(1)
    return (wanted.exp() * (wanted - ours)).sum(1)


def choose(known, step, count, flags):
    """Which scenes to try at a step: `curate` of them drawn in proportion to their last divergence, `known` (scenes,), NaN
    where there is none yet; the rest at random. Returns (numbers, how many were drawn so)."""
    generator = torch.Generator().manual_seed(flags.seed * 1_000_003 + step)
    weights = torch.nan_to_num(known).clamp(min=0)
    many = min(round(flags.curate * flags.batch), int((weights > 0).sum()))
    chosen = torch.multinomial(weights, many, generator=generator).tolist() if many else []
    others = torch.randperm(count, generator=generator).tolist()
    return (chosen + [i for i in others if i not in chosen])[: flags.batch], many


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def make_optimisers(model, flags):
    """AdamW, with a rate of its own for the expert. No Muon: its steps are all of one size, and RL wants small ones; nor
    weight decay, nor a fall of the rates at the end: train.py's flags for these do nothing here."""
    sides = (flags.lr, []), (flags.expert_lr, [])
    for name, p in model.named_parameters():
        if p.requires_grad:
            sides[name.startswith(OF_EXPERT)][1].append(p)
    return [(torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0.0), lr) for lr, params in sides if params]


def try_out(model, scene, flags, seed):
    """Rollouts of a Scene, a group of each of its scenes, as the flags say."""
    steps, eta = (1, 0.0) if flags.policy == "tokens" else (flags.flow_steps, flags.eta)
    return model.sample(scene, flags.group, flags.temperature, flags.top_p, steps, flags.max_new_tokens, seed=seed,
                        reason=True, decode=flags.policy, eta=eta)  # fmt: skip


def loss_of(model, reference, scene, out, rewards, flags, old=None):
    """The losses of a batch of groups, see `Alpamayo.rl_losses`. old: log-probabilities before the first update."""
    its = None
    if reference:
        with without_adapters(reference):
            its = reference.replay(scene, out)
    return model(scene, "rl", rollout=out, rewards=rewards, objective=flags.objective, beta=flags.beta, kl=flags.kl,
                 flow_weight=flags.flow_weight, reference=its, old=old)


class Groups(NamedTuple):
    """Some scenes of a step, what was tried out in them, and what came of it."""

    scene: dict
    out: Rollout
    parts: dict  # of `rewards_of`, (B, G) each
    divergence: torch.Tensor  # (B,)


def step(model, reference, optimisers, scenes, number, known, flags, device, autocast, judge=None):
    """Try out, reward, learn: step `number` of a run. `known` (scenes,), the divergences, is brought up to date. Returns
    what the log says of it."""
    numbers, drawn = choose(known, number, len(scenes), flags)
    piece, pieces = max(1, len(numbers) // flags.accumulate), []
    for i in range(0, len(numbers), piece):
        some = numbers[i : i + piece]
        scene = {k: v.to(device) if torch.is_tensor(v) else v for k, v in scenes.batch(some).items()}
        with autocast:  # the seed is a function of run, step and piece
            out = try_out(model, scene, flags, seed=(flags.seed * 1_000_003 + number) * 1_003 + i)
        parts = rewards_of(scene, out, scenes, some, flags, judge)
        for name, value in parts.items():
            expect_finite(number, f"reward `{name}`", value)
        pieces.append(Groups(scene, out, parts, divergence(out.log_probs.sum(2).cpu(), parts["total"], flags.beta)))
        known[some] = pieces[-1].divergence

    line, old = {"step": number + 1, "stage": "rl"}, [None] * len(pieces)
    for _ in range(flags.updates):
        for i, groups in enumerate(pieces):
            rewards = groups.parts["total"].to(device)
            with autocast:
                look = loss_of(model, reference, groups.scene, groups.out, rewards, flags, old[i])
            loss, decided = look.pop("policy"), look.pop("log_probs")
            expect_finite(number, f"loss `{flags.objective}`", loss)
            old[i] = old[i] or decided
            (loss / len(pieces)).backward()
            for name, value in look.items():
                line[name] = line.get(name, 0.0) + value.item() / len(pieces) / flags.updates
        for (optimiser, full), name in zip(optimisers, ("grad_norm", "grad_norm_expert")):
            params = [p for group in optimiser.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(params, flags.clip)
            expect_finite(number, f"`{name}`", norm)
            line[name] = norm.item()
            for group in optimiser.param_groups:
                group["lr"] = full * min(1.0, (number + 1) / max(flags.warmup, 1))
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    return line | summary(pieces, drawn)


def expect_finite(number, what, value):
    if not value.isfinite().all():
        raise FloatingPointError(f"step {number}: {what} is not finite; the last checkpoint is intact")


def summary(pieces, drawn):
    """What the log says of a step's groups, of which the first `drawn` scenes were drawn by their divergence."""
    line = {"tokens": float(sum(groups.out.tokens.numel() for groups in pieces))}
    for name in pieces[0].parts:
        values = torch.cat([groups.parts[name] for groups in pieces])
        line[name] = values.mean().item()
        line[name + "_spread"] = values.std(1).mean().item()  # within a group: what there is to learn from
    line["silent"] = (torch.cat([groups.parts["total"] for groups in pieces]).std(1) < 1e-3).float().mean().item()
    line["one_text"] = np.mean([len(set(texts)) == 1 for groups in pieces for texts in groups.out.reasoning])
    divergences = torch.cat([groups.divergence for groups in pieces])
    for name, some in (("chosen", divergences[:drawn]), ("random", divergences[drawn:])):
        line[f"divergence_{name}"] = some.mean().item() if len(some) else None
    return line


def validate(model, scenes, flags, judge=None):
    """Means of `likeliest` over the held-out scenes."""
    found = likeliest(model, scenes, min(flags.val_scenes, len(scenes)), flags, judge)
    return {name: value.mean().item() for name, value in found.items()}


def likeliest_of(model, scene, flags):
    """The likeliest rollout of each scene: the likeliest thought, and the flow from the middle of the noise, as
    closed-loop driving does it."""
    calm = torch.zeros(len(scene["name"]), HORIZON, 2)
    return model.sample(scene, 1, 0, steps=flags.flow_steps, max_new_tokens=flags.max_new_tokens, noise=calm, reason=True)


@torch.no_grad()
def likeliest(model, scenes, count, flags, judge=None):
    """How good the likeliest rollout of each of the first scenes is, {name: (count,)}. `right`: both decisions."""
    found = {}
    for i in range(0, count, 32):
        numbers = range(i, min(i + 32, count))
        scene = scenes.batch(numbers)
        out = likeliest_of(model, scene, flags)
        parts = rewards_of(scene, out, scenes, numbers, flags, judge)
        right = [data.decisions(said) == data.decisions(true) for (said,), true in zip(out.reasoning, scene["reasoning"])]
        for name, value in {**parts, "right": torch.tensor(right).float()}.items():
            found.setdefault(name, []).append(value.flatten())
    return {name: torch.cat(values) for name, values in found.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Its flags and its curves

START = 100_000  # the first scene of a split that is tried out; validation and tables take the first ones
# What train.py's own flags are in stage rl where they are not given.
DEFAULTS = dict(scenes=1000, steps=100, batch=16, lr=1e-4, warmup=5, val_every=25, save_every=25)


def add_flags(p):
    """The flags of stage rl, for train.py's parser."""
    add = p.add_argument_group("stage rl").add_argument
    add("--policy", choices=("flow", "tokens"), default="flow",
        help="what drives and learns beside the reasoning: the expert's flow | the language model's action tokens (the paper's)")
    add("--objective", choices=("clip", "paper"), default="clip", help="clipped surrogate | the paper's weighted likelihood")
    add("--rewards", nargs="+", choices=tuple(WEIGHTS), default=list(WEIGHTS), help="parts of the reward")
    add("--judge", metavar="URL",
        help="grade reasoning by a language model behind this OpenAI-compatible endpoint, not by rule")
    add("--judge-model", metavar="NAME", default="judge", help="its name there")
    add("--split", nargs="+", choices=data.SPLITS, default=["tail", "train"],
        help="scenes of the world to try out, --scenes of each; validation takes others of the first")
    add("--group", type=int, default=12, help="rollouts of a scene")
    add("--temperature", type=float, default=1.5,
        help="of the rollouts' reasoning; a well-taught model says one thing at 0.6")
    add("--top-p", type=float, default=1.0, help="likeliest tokens that together have this probability")
    add("--eta", type=float, default=0.5, help="how stochastic the flow's steps are, in (0, 1]")
    add("--flow-steps", type=int, default=5, help="Euler steps from noise to controls")
    add("--max-new-tokens", type=int, default=40, help="of a trace, the paper's measure")
    add("--beta", type=float, default=2.0, help="sharpness of the paper's weights, and of curation's")
    add("--kl", type=float, default=0.0, help="weight of the KL to the model that the run starts from")
    add("--flow-weight", type=float, default=1.0, help="of the flow's loss beside the reasoning's")
    add("--expert-lr", type=float, default=5e-5, help="AdamW's learning rate of the expert")
    add("--updates", type=int, default=1, help="updates on a batch of rollouts")
    add("--curate", type=float, default=0.5, help="share of the scenes chosen because rewards and model disagreed on them")


def check_flags(flags, error):
    """Call error(line) where a flag of stage rl cannot be meant."""
    least = {"group": 2, "flow_steps": 2, "max_new_tokens": 1, "updates": 1, "kl": 0, "curate": 0}
    above = {"eta": 0, "top_p": 0, "temperature": 0, "beta": 0}
    most = {"eta": 1, "top_p": 1, "curate": 1}
    for names, fine, words in ((least, lambda x, y: x >= y, "at least"), (above, lambda x, y: x > y, "more than"),
                               (most, lambda x, y: x <= y, "at most")):  # fmt: skip
        for name, limit in names.items():
            if not fine(getattr(flags, name), limit):
                error(f"--{name.replace('_', '-')} {getattr(flags, name)}: expected {words} {limit}")


def line_of(line):
    """A step of the log as one line to read."""
    def part(name):
        return f"{name} {line[name]:.2f} ± {line[name + '_spread']:.2f}"

    numbers = "  ".join(f"{name} {line[name]:.3g}" for name in ("silent", "length", "entropy", "kl", "grad_norm"))
    return f"step {line['step']:4}  " + "  ".join(part(name) for name in ("total", *WEIGHTS)) + "  " + numbers


def draw_curves(log, file):
    """The run's curves, from its log.jsonl into a PNG: rewards and what is beside them, step by step, and validation."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(log) as f:
        lines = [json.loads(line) for line in f]
    shown = {"total": "reward", "reason": "reasoning, 0 to 5", "consistency": "consistency", "trajectory": "trajectory",
             "collision": "collisions, share", "ade": "ADE, m", "entropy": "entropy, nats a token",
             "silent": "groups of equal rewards, share", "grad_norm": "gradient norm"}  # fmt: skip
    figure, axes = plt.subplots(3, 3, figsize=(13, 8.5), dpi=100, constrained_layout=True)
    for ax, (name, title) in zip(axes.flat, shown.items()):
        steps = np.array([line["step"] for line in lines])
        values = np.array([line[name] for line in lines])
        smooth = [values[max(0, i - 9) : i + 1].mean() for i in range(len(values))]
        ax.plot(steps, values, color="#8b919c", alpha=0.35, linewidth=1)
        ax.plot(steps, smooth, color="#8b919c", linewidth=2, label="rollouts, mean of 10 steps")
        held = [(0, lines[0]["before"][name])] if name in lines[0].get("before", {}) else []
        held += [(line["step"], line["val"][name]) for line in lines if name in line.get("val", {})]
        if held:
            ax.plot(*zip(*held), color="#ff5a1f", marker="o", markersize=4, label="held out, likeliest")
        ax.set_title(title, loc="left", fontsize=11)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    axes[2, 1].set_xlabel("step")
    figure.savefig(file)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# The table: the paper's Table 9 in small

PAPER = """\
| the paper's Table 9 | ADE | reasoning | consistency | close encounters, % |
| --- | ---: | ---: | ---: | ---: |
| SFT | 2.12 | 3.1 | 0.62 | 6.9 |
| + reasoning | 2.19 | 4.5 | 0.53 | 5.8 |
| + consistency | 1.92 | 4.5 | 0.85 | 6.2 |
| + trajectory | 1.94 | 4.4 | 0.83 | 3.7 |"""


def measure(folder, args):
    """The table's numbers of a checkpoint: {name: float}."""
    model = Alpamayo.from_pretrained(folder)
    view = dict(camera_ids=model.cfg.cameras, size=tuple(args.size), frames=model.cfg.frames, frame_dt=model.cfg.frame_dt)
    found = {}
    for split in (args.split, "val"):
        scenes = data.load("world", split=split, scenes=args.eval, folder=args.cache, workers=os.cpu_count(), **view)
        met = likeliest(model, scenes, args.eval, args)
        names = ("ade", "reason", "consistency", "collision", "right")
        found |= {f"{split} {name}": met[name].mean().item() for name in names}

    policy = lambda scene: likeliest_of(model, scene, args).actions[:, 0]
    first, met = world.SEEDS[args.split], []
    for i in tqdm(range(0, args.drive, 32), desc=f"driving {folder}"):
        met.append(data.drive(policy, range(first + i, first + min(i + 32, args.drive)), args.seconds, **view))
    for name in ("close", "off_road"):
        found[name] = torch.cat([part[name] for part in met]).float().mean().item()
    return found


def table(rows, args):
    """Rows {name: [numbers of each checkpoint]} as Markdown: mean, and ± the standard deviation over checkpoints."""
    columns = {f"{args.split} ade": ("ADE, m", 1, 2), f"{args.split} reason": ("reasoning, 0 to 5", 1, 2),
               f"{args.split} consistency": ("consistency", 1, 2), "close": ("close encounters, %", 100, 1),
               "off_road": ("off the road, %", 100, 1), f"{args.split} right": ("both right, %", 100, 0),
               "val reason": ("val: reasoning", 1, 2), "val ade": ("val: ADE", 1, 2)}  # fmt: skip
    lines = [["", *(title for title, *_ in columns.values())], ["---"] + ["---:"] * len(columns)]
    for row, found in rows.items():
        cells = [row]
        for name, (_, scale, digits) in columns.items():
            values = [scale * numbers[name] for numbers in found]
            spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.{digits}f}{spread}")
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    p = argparse.ArgumentParser(description="The paper's Table 9 in small.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    add = p.add_argument
    add("rows", nargs="+", metavar="NAME=FOLDER,FOLDER", help="a row: its name and its checkpoints, one a seed")
    add("--split", choices=data.SPLITS, default="tail", help="held-out scenes")
    add("--eval", type=int, default=256, metavar="N", help="scenes to think and plan in")
    add("--drive", type=int, default=128, metavar="N", help="scenarios to drive in closed loop")
    add("--seconds", type=float, default=8.0, help="of each")
    add("--size", type=int, nargs=2, default=(64, 128), metavar=("H", "W"), help="pixels of the world's images")
    add("--cache", metavar="FOLDER", default="data", help="where rendered scenes are kept")
    add("--flow-steps", type=int, default=5, help="Euler steps of the flow")
    add("--max-new-tokens", type=int, default=40, help="of a trace")
    p.set_defaults(rewards=list(WEIGHTS))
    args = p.parse_args()
    rows = {}
    for row in args.rows:
        name, found, folders = row.partition("=")
        if not found:
            raise ValueError(f"{row}: expected NAME=FOLDER,FOLDER")
        rows[name] = [measure(folder, args) for folder in folders.split(",")]
    print(table(rows, args))
    print(f"\nThe likeliest rollout of {args.eval} held-out scenes; {args.drive} scenarios of {args.seconds:g} s.\n\n{PAPER}")
    print(json.dumps(rows))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"rl.py: {error}")
