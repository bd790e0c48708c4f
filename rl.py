"""
What stage rl needs beside its loss (Sec. 5.3): rewards, curation, the step. The loss, GRPO, is
`rl_losses` in alpamayo.py; `nft`, which is not the paper's, is here. `python train.py --stage rl`
runs the loop; under torchrun each process has its scenes, and all have the same divergences.

    scenes -> a group of rollouts behind one prompt -> rewards (B, G) -> GRPO -> the next scenes

A rollout is a reasoning and a path. The path is either the language model's 128 action tokens
(`--policy tokens`, the paper's, which trains no expert) or the expert's flow (`--policy flow`). Two
heads decide, the thought and the drive, and each is rewarded for what it did: REWARDS. A flow has
no probability. So it learns by flow matching on what was better and what was worse (`nft`), or its
Euler steps are drawn with noise and so have one (`--objective clip`). The expert's loss does not
reach the language model, here as everywhere, but with --expert-teaches.

What usual GRPO has and this leaves out, or leaves off by default:
    a value network       the group's mean reward is the baseline, which is GRPO's own idea
    a rollout server      the weights that learn are the weights that sample: nothing is stale
    A / std(r)            the paper has none; a group that differs by centimetres should not count
                          like one with a crash
    mean over tokens      traces are short and of similar length, so log pi is the sum, as in Eq. 10
    many updates a batch  --updates; at 1, as in the release, the ratio is 1 and nothing is clipped
    filtering of groups   a group of equal rewards has no advantage, so it teaches nothing anyway
"""
import contextlib
import hashlib
import json
import math
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

import data
from alpamayo import (
    CLIP,
    DT,
    HORIZON,
    OF_EXPERT,
    Rollout,
    ade,
    pick,
    ratio_of,
    token_log_probs,
)
from data import (
    CAUSES,
    SPLITS,
    decisions,
    is_right,
    rows_of,
    seed_of,
    to_device,
    view_of,
    words_of,
)
from doors import (
    Refused,
    expecting,
    parse_json,
    read_json_lines,
    read_text,
    real,
    whole,
    write_atomically,
)
from draw import GREY, MODEL, pyplot, readable, save_figure
from memory import gathered, without_adapters
from motion import LONGITUDINAL_META, comfort, lateral_events, meta_actions, smooth_motion
from world import LEFT, RIGHT

# --------------------------------------------------------------------------------------------------
# Rewards (Sec. 5.3.2). The paper gives no weights; all numbers here are ours, chosen in our world.

# A part's weight, and which heads it teaches. To add one: a line here, a line in `rewards_of`.
REWARDS = {
    "reason": (0.2, ["thought"]),
    "consistency": (1.0, ["thought", "drive"]),
    "trajectory": (1.0, ["drive"]),
    "outcome": (1.0, ["drive"]),
}
HEADS = "thought", "drive"
DISTANCE = 0.05  # 1/m^2: Eq. 11's lambda of the squared distance to the driven path
DISTANCE_MOST = 1.0  # the most that distance costs
COLLISION = 1.0
JERK = 0.02  # s^3/m
SLOWER = ("yield", "stop", "follow", "search a gap", "adapt speed")  # decisions to slow down
REASONS = {words_of(name, side).reason: name for name in CAUSES for side in (LEFT, RIGHT)}


def reasons_of(text):
    """The reasons that a trace gives, a set of str, and the names of their causes."""
    reasons = set(text.partition(" since ")[2].strip(" .").split(" and "))
    return reasons, {REASONS.get(reason, reason) for reason in reasons}


def grade(said, true):
    """Reasoning quality of a trace against the true one, by the paper's rubric (0 to 5), by rule.

    5 decisions and reasons as in truth; 4 the decisions, and a reason of the right kind (its side
    is wrong, one is missing or one too many); 3 the decisions for another reason; 2 one decision,
    and not the opposite of the other; 1 one decision and the other opposite (goes on where it
    should slow down), or a true reason for wrong decisions; 0 neither, or no decision."""
    ours, theirs = decisions(said), decisions(true)
    if ours is None or theirs is None:
        return 0
    reasons, causes = reasons_of(said)
    true_reasons, true_causes = reasons_of(true)
    if ours == theirs:
        if reasons == true_reasons:
            return 5
        return 4 if causes & true_causes else 3
    if ours[0] == theirs[0] or ours[1] == theirs[1]:
        opposite = (ours[0] in SLOWER) != (theirs[0] in SLOWER)
        return 1 if opposite else 2
    return 1 if causes & true_causes else 0


def consistency(texts, scene, xyz, rot, beside=None):
    """Whether the path does what the trace says (Sec. 5.3.2), (B, G) of 0 or 1: 1 only if both axes
    agree, 0 if the trace holds no decision of the closed set.

    texts: B lists of G; xyz (B, G, 64, 3), rot (B, G, 64, 3, 3). Meta-actions (Table 5) cannot tell
    a nudge from a bend of the road. So where the lane is known (beside, (B, G, 64): m left of the
    line to drive on) the lateral axis goes by the offset in it. The rules are ours. The driver's
    paths agree with its own traces in all of 500 scenes of val and 500 of tail, in 95 % of train,
    and with the traces of other decisions in 30 %."""
    poses = with_history(scene["ego_history_xyz"], xyz)  # (B, G, 80, 3)
    turns = with_history(scene["ego_history_rot"], rot)
    now = poses.shape[2] - HORIZON - 1
    speed, _, yaw, _ = smooth_motion(poses, turns)
    longitudinal, lateral = meta_actions(poses, turns)
    agree = torch.zeros(xyz.shape[:2])
    for b, row in enumerate(texts):
        for g, text in enumerate(row):
            decided = decisions(text)
            if decided is None:
                continue
            along = agrees_along(decided[0], longitudinal[b, g, now + 1 :], speed[b, g, now:])
            if beside is None:
                across = agrees_by_events(decided[1], poses[b, g], yaw[b, g], lateral[b, g])
            else:
                turned = float(yaw[b, g, -1] - yaw[b, g, now])
                across = agrees_by_lane(decided[1], beside[b, g], turned)
            agree[b, g] = float(along and across)
    return agree


def with_history(history, future):
    """A scene's history (B, T, ...) in front of each of its futures (B, G, 64, ...)."""
    history = history.to(future.device)[:, None]
    history = history.expand(-1, future.shape[1], *history.shape[2:])
    return torch.cat([history, future], 2)


def agrees_along(decision, actions, speed):
    """Whether a path does a longitudinal decision: meta-actions (64,), speeds (65,) in m/s."""
    names = [LONGITUDINAL_META[i] for i in actions.tolist()]
    slows = not {"gentle decelerate", "strong decelerate", "stop"}.isdisjoint(names)
    speeds_up = not {"gentle accelerate", "strong accelerate"}.isdisjoint(names)
    if decision in SLOWER:
        return slows
    if decision == "pass":
        return speeds_up
    brakes_hard = "strong decelerate" in names or "stop" in names[-10:]
    fades = slows and not speeds_up and bool(speed[-1] < 0.7 * speed[0])
    return not brakes_hard and not fades


def agrees_by_lane(decision, beside, turned):
    """Whether a path does a lateral decision, by its m left of the line (64,) and its turn, rad."""
    sign = -1 if decision.endswith("right") else 1
    if decision == "keep lane":  # for three seconds: what comes later is another decision
        most = max(0.45, abs(float(beside[0])) + 0.2)
        return float(beside[:30].abs().max()) <= most
    if decision.startswith("turn"):
        return sign * turned >= 0.5
    offsets = {"nudge": (0.35, 1.0), "straddle": (0.9, 2.5)}  # m
    low, high = offsets.get(decision.split()[0], (2.5, math.inf))
    return low <= float((sign * beside).max()) <= high


def agrees_by_events(decision, xyz, yaw, lateral):
    """The same of a path alone: xyz (T, 3), yaw (T,), lateral meta-actions (T,)."""
    events = {kind for _, kind in lateral_events(xyz.double(), yaw, lateral)}
    if decision == "keep lane":
        return not any(kind.startswith(("leave lane", "turn")) for kind in events)
    side = decision.split()[-1]
    if decision.startswith("turn"):
        return not events.isdisjoint({f"turn {side}", f"bend {side}"})
    return f"leave lane {side}" in events


def trajectory(xyz, truth, collision=None):
    """Trajectory quality (Eq. 11), (B, G), at best 0, of paths xyz (B, G, 64, 3).

    What costs: the squared distance to the driven path truth (B, 64, 3), mean over 6.4 s; the
    collision (B, G); jerk. Distance is capped, so that one lost scene does not outweigh all
    others."""
    squared = (xyz - truth[:, None])[..., :2].square().sum(-1).mean(-1)
    cost = (DISTANCE * squared).clamp(max=DISTANCE_MOST) + JERK * jerk(xyz)
    return -(cost if collision is None else cost + COLLISION * collision.float())


def jerk(xyz):
    """The mean length of paths' (..., 64, 3) third difference, m/s^3."""
    return (xyz[..., :2].diff(n=3, dim=-2) / DT**3).norm(dim=-1).mean(-1)


def rewards_of(scene, rollout, scenes, numbers, flags, judge=None):
    """What a Rollout of scenes number `numbers` is rewarded for, {name: (B, G)}: reason 0 to 5,
    consistency 0 or 1, trajectory up to 0, outcome 0 to 1: AlpaSim's scene score of the plan.

    And their sums, see `sums_of`. To look at: collision, off_road, ade (m), comfort (0 to 1). Of a
    clip nobody knows what would have come of it: no outcome, collision, off_road."""
    xyz = rollout.xyz.cpu().float()
    rot = rollout.rot.cpu().float()
    truth = scene["ego_future_xyz"].cpu()
    met = scenes.drive_plans(numbers, rollout.actions.cpu())
    found = {
        "reason": grades_of(rollout, scene, judge),
        "consistency": consistency(rollout.reasoning, scene, xyz, rot, met.get("beside")),
        "trajectory": trajectory(xyz, truth, met.get("collision")),
        "ade": ade(xyz, truth[:, None]),
        "comfort": torch.stack(list(comfort(xyz, rot).values())).float().mean(0),
    }
    if met:
        found["outcome"] = met["score"]
        found["collision"] = met["collision"].float()
        found["off_road"] = met["off_road"].float()
    return found | sums_of(found, flags)


def grades_of(rollout, scene, judge=None):
    """Grades (B, G) of a Rollout's reasoning, by rule or by a judge."""
    pairs = []
    for row, true in zip(rollout.reasoning, scene["reasoning"]):
        pairs += [(said, true) for said in row]
    grades = judge(pairs) if judge else [grade(*pair) for pair in pairs]
    return torch.tensor(grades, dtype=torch.float32).view(rollout.tokens.shape[:2])


def sums_of(found, flags):
    """`total`, the weighted sum of the parts that are rewarded; `thought` and `drive`, what the
    heads are rewarded with: those that teach them, or with --credit total all."""
    parts = {}
    for name in flags.rewards:
        if name in found:
            parts[name] = REWARDS[name][0] * found[name]
    none = torch.zeros_like(found["reason"])
    sums = {"total": sum(parts.values(), none)}
    for head in HEADS:
        taught = [part for name, part in parts.items() if head in REWARDS[name][1]]
        sums[head] = sums["total"] if flags.credit == "total" else sum(taught, none)
    return sums


# --------------------------------------------------------------------------------------------------
# The judge: a language model that grades reasoning, where there is one

RUBRIC = """\
You grade how a driving model explains its next action. You are given the true explanation and the
model's. Judge two things: whether the same driving behaviour follows, and whether the causes are
the same. 5: behaviour and causes fully agree. 4: behaviour right, causes mostly agree. 3: behaviour
roughly right, causes incomplete or slightly wrong. 2: behaviour partly wrong, or causes largely
disagree. 1: behaviour wrong, or it contradicts the truth. 0: unrelated or opposite. Answer with the
number alone.

TRUE: {true}
MODEL: {said}"""


ENDPOINT = r"(https?)://([\w.-]+|\[[\da-f:.]+\])(?::(\d{1,5}))?([\w./~%+-]*)"
GRADE = r"(?:(?:grade|score|rating)\s*:?\s*)?([0-5])(?:\s*/\s*5)?\.?"
LONGEST = 2**20  # bytes of an answer


def endpoint(url):
    """The type of the flag --judge: the URL, if a Judge can ask there."""
    parts = re.fullmatch(ENDPOINT, url, re.A | re.I)
    if not parts or int(parts[3] or 0) > 65535:
        raise Refused("expected http://HOST:PORT/PATH or https://HOST:PORT/PATH")
    return url


class Judge:
    """Grades pairs (said, true) from 0 to 5 by a model behind an OpenAI-compatible endpoint.

    A grade is an answer that is nothing but a digit from 0 to 5, as `4`, `4.`, `**4**`, `4/5` or
    `Grade: 4`. Each is kept in a file, a line each, so a question is asked once; several are asked
    at a time. The API key is the environment variable JUDGE_API_KEY. It goes to the URL's host and
    nowhere else: no redirect is followed, no proxy used. ConnectionError, in one line, where no
    grade comes after `tries`. The paper also shows its judge the cameras' last images; ours reads.
    """

    def __init__(
        self, url, model="judge", file=None, timeout=30.0, tries=3, wait=1.0, store=None,
    ):  # fmt: skip
        self.url = endpoint(url).rstrip("/") + "/chat/completions"
        self.secret = os.environ.get("JUDGE_API_KEY", "").strip()
        if not re.fullmatch("[!-~]*", self.secret):
            raise ValueError("JUDGE_API_KEY: expected one word of ASCII characters")
        self.model = model
        self.file = file
        self.timeout = timeout  # seconds to connect, and again for the whole answer
        self.tries = tries
        self.wait = wait  # seconds before the second try, twice as many before the next
        self.store = store  # of several processes: a question is asked by the first that has it
        self.known = self.read_file() if file and os.path.exists(file) else {}

    def read_file(self):
        """{key: grade} of the file. A half-written last line, a kill's, is dropped for good."""
        text = read_text(self.file)
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_atomically(self.file, lambda part: Path(part).write_text(whole, encoding="utf-8"))
        known = {}
        for number, line in enumerate(whole.splitlines(), 1):
            where = f"{self.file}: line {number}"
            entry = parse_json(line, where)
            fits = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
            if not fits or type(entry[1]) is not int or not 0 <= entry[1] <= 5:
                raise ValueError(f"{where}: expected [key, grade], a grade from 0 to 5")
            known |= [entry]
        return known

    def __call__(self, pairs):
        keys = [self.key(pair) for pair in pairs]
        new = {key: pair for key, pair in zip(keys, pairs) if key not in self.known}
        others = [key for key in new if self.store and self.store.add(f"asked {key}", 1) > 1]
        own = {key: pair for key, pair in new.items() if key not in others}
        with ThreadPoolExecutor(8) as pool:
            for key, score in zip(own, pool.map(self.ask, own.values())):
                self.known[key] = score
                if self.store:
                    self.store.set(f"grade {key}", str(score))
                if self.file:
                    os.makedirs(os.path.dirname(self.file) or ".", exist_ok=True)
                    with open(self.file, "a") as lines:
                        lines.write(json.dumps([key, score]) + "\n")
        for key in others:
            self.store.wait([f"grade {key}"], timedelta(hours=12))
            self.known[key] = int(self.store.get(f"grade {key}"))
        return [self.known[key] for key in keys]

    def key(self, pair):
        text = "\0".join((self.model, *pair))
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]

    def ask(self, pair):
        """The grade of one pair."""
        problem = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                text = self.answer(*pair)
            except HTTPException as error:
                problem = self.unless_secret(type(error).__name__, f": {error}")
                continue
            except (OSError, ValueError) as error:
                problem = readable(f"{type(error).__name__}: {error}"[:100])
                continue
            grade = re.fullmatch(GRADE, text.replace("*", "").strip(), re.I)
            if grade:
                return int(grade[1])
            problem = self.unless_secret("expected a number from 0 to 5", f", not {text!r}")
        raise ConnectionError(f"--judge {self.url}: no grade after {self.tries} tries ({problem})")

    def unless_secret(self, problem, said):
        """A problem, and what the server said, which may be the key: not where there is one."""
        return problem if self.secret else readable(f"{problem}{said}"[:100])

    def answer(self, said, true):
        """What the endpoint says. OSError, ValueError or HTTPException where that is no answer."""
        message = {"role": "user", "content": RUBRIC.format(said=said, true=true)}
        body = {"model": self.model, "temperature": 0, "max_tokens": 8, "messages": [message]}
        headers = {"Content-Type": "application/json"}
        if self.secret:
            headers["Authorization"] = f"Bearer {self.secret}"
        scheme, host, port, path = re.fullmatch(ENDPOINT, self.url, re.A | re.I).groups()
        protocol = HTTPSConnection if scheme.lower() == "https" else HTTPConnection
        port = int(port or protocol.default_port)
        connection = protocol(host.strip("[]"), port, timeout=self.timeout)
        with contextlib.closing(connection):
            connection.connect()
            with hanging_up_after(self.timeout, connection.sock):
                connection.request("POST", path, json.dumps(body), headers)
                answer = connection.getresponse()
                data = answer.read(LONGEST + 1)
        if answer.status != 200:
            raise ValueError(f"HTTP status {answer.status}")
        if len(data) > LONGEST:
            raise ValueError(f"the answer has more than {LONGEST} bytes")
        with expecting("expected choices[0].message.content, text"):
            content = parse_json(data, "the answer")["choices"][0]["message"]["content"]
            if not isinstance(content, str):
                raise TypeError(f"it is {type(content).__name__}")
        return content


@contextlib.contextmanager
def hanging_up_after(seconds, line):
    """TimeoutError where the work in here, with a connected socket, takes longer.

    A socket's own time-out begins anew at every byte."""

    def hang_up():
        with contextlib.suppress(OSError):
            socket.socket.shutdown(line, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, hang_up)
    end = time.monotonic() + seconds
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if time.monotonic() >= end:
            raise TimeoutError(f"no whole answer in {seconds:g} s")


# --------------------------------------------------------------------------------------------------
# Curation (Sec. 5.3.3): scenes on which the model ranks its rollouts otherwise than the rewards do


def divergence(log_probs, rewards, beta):
    """KL[softmax(beta r) || softmax(log pi)] over each group, (B,); the paper names no measure.

    log_probs (B, G): of tokens alone, as those of the flow only tell which noise was drawn. A trace
    that had to be told is both unlikely and good: such scenes come again soon."""
    wanted = (beta * rewards).log_softmax(1)
    ours = log_probs.log_softmax(1)
    return (wanted.exp() * (wanted - ours)).sum(1)


def choose(known, step, count, flags):
    """The numbers of the scenes to try at a step, and how many of them were drawn by divergence.

    These are a share `--curate`, drawn in proportion to their last divergence, known (scenes,), 0
    where there is none yet. The rest is random."""
    generator = torch.Generator().manual_seed(seed_of(flags.seed, step))
    weights = known.clamp(min=0)
    many = min(round(flags.curate * flags.batch), int((weights > 0).sum()))
    drawn = []
    if many:
        drawn = torch.multinomial(weights, many, generator=generator).tolist()
    others = torch.randperm(count, generator=generator).tolist()
    numbers = drawn + [i for i in others if i not in drawn]
    return numbers[: flags.batch], many


# --------------------------------------------------------------------------------------------------
# The step: try out, reward, learn


class Experience(NamedTuple):
    """Groups of rollouts to learn from."""

    scene: dict
    rollout: Rollout
    advantage: dict  # {head: (B, G)}: reward less the group's mean


def step(run, number, model, learn, mean_of, rehearse=None, insulate=True):
    """Step `number` of a train.py's Run: this process's part of it. Returns the line of the log.

    Brings run.known (scenes,), the divergences, up to date. model: that of the run, to ask alone;
    learn, mean_of: train.py's; rehearse: a function of the update's number that adds other
    gradients to it."""
    flags, scenes, known = run.flags, run.scenes, run.known
    numbers, drawn = choose(known, number, len(scenes), flags)
    if run.world_size > 1 and len(numbers) < flags.batch:
        raise ValueError(f"--batch {flags.batch}: there are {len(scenes)} scenes, and each of the "
                         "processes must have its own")
    size = max(1, len(numbers) // (flags.accumulate * run.world_size))
    begin = run.first * size  # its pieces of the batch begin here,
    end = len(numbers) if run.world_size == 1 else begin + flags.accumulate * size
    lived, earned = [], []
    met = dict.fromkeys(numbers, 0.0)
    for first in range(begin, end, size):
        some = numbers[first : min(first + size, end)]
        ask = partial(try_out, model, flags, run.autocast, seed_of(flags.seed, number, first))
        try:
            if flags.episode:
                found, rewards, log_probs = drive_out(model, ask, scenes, some, flags, run.judge)
            else:
                scene = to_device(scenes.batch(some), run.device)
                rollout = ask(scene)
                rewards = rewards_of(scene, rollout, scenes, some, flags, run.judge)
                log_probs = rollout.log_probs.sum(2).cpu()
                found = [Experience(scene, rollout, advantage_of(rewards, flags))]
        except FloatingPointError as error:
            raise FloatingPointError(f"step {number + 1}: {error}") from None
        for name, value in rewards.items():
            expect_finite(number, f"reward `{name}`", value)
        divergences = divergence(log_probs, rewards["total"], flags.beta)
        expect_finite(number, "divergence", divergences)
        met |= zip(some, divergences.tolist())
        piece = first // size
        lived += [(one, seed_of(flags.seed, number, piece + i)) for i, one in enumerate(found)]
        earned.append(rewards)
    met = mean_of(met)  # a scene is one process's
    known[numbers] = run.world_size * torch.tensor([met[i] for i in numbers])
    count = mean_of({"experiences": len(lived)})["experiences"]

    looked = {}
    old = [None] * len(lived)
    for update_number in range(flags.updates):
        sums = {}
        for i, (one, seed) in enumerate(lived):

            def losses_of_piece(one=one, seed=seed, before=old[i]):
                with run.autocast:
                    losses = losses_of(
                        run.model, run.reference, *one, flags, before, seed, insulate)
                loss = losses.pop("policy")
                expect_finite(number, f"loss `{flags.objective}`", loss)
                return loss / count, losses

            last = i == len(lived) - 1 and not rehearse
            losses = learn(losses_of_piece, last=last)
            log_probs = losses.pop("log_probs")
            old[i] = old[i] or log_probs
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item() / len(lived)
        looked |= sums  # those of the last update: in the first no ratio differs from 1
        if rehearse:
            looked["rehearsed"] = rehearse(update_number)
        looked |= update(run.optimisers, number, flags)
    lived = [one for one, _ in lived]
    looked = mean_of(looked | log_of(lived, earned, known[numbers], drawn, flags.group))
    looked["tokens"] *= run.world_size
    return {"step": number + 1, "stage": "rl"} | looked


def advantage_of(rewards, flags, counts=None):
    """{head: (B, G)} of the heads that are rewarded: the group's mean is the baseline. counts
    (B, G), 0 or 1: who is of the group; others have 0."""
    found = {}
    for head in HEADS:
        if is_taught(head, flags):
            own = rewards[head]
            counts = torch.ones_like(own) if counts is None else counts
            mean = (own * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
            found[head] = (own - mean) * counts
    return found


def is_taught(head, flags):
    """Whether a head is rewarded for anything."""
    return flags.credit == "total" or any(head in REWARDS[name][1] for name in flags.rewards)


def try_out(model, flags, autocast, seed, scene, group=None, part=0):
    """A group of rollouts of each scene, by default --group. With --tell, where none of a group
    decides right, the last one is made again, and thinks the true trace."""
    tokens = flags.policy == "tokens"
    options = dict(
        temperature=flags.temperature, top_p=flags.top_p, steps=1 if tokens else flags.flow_steps,
        max_new_tokens=flags.max_new_tokens, seed=seed_of(seed % 2**32, part), reason=True,
        decode=flags.policy, eta=0.0 if tokens or flags.objective == "nft" else flags.eta,
    )  # fmt: skip
    with autocast:
        rollout = model.sample(scene, group or flags.group, **options)
        if flags.tell:
            pairs = zip(rollout.reasoning, scene["reasoning"])
            lost = [i for i, (row, true) in enumerate(pairs) if not any(
                decisions(said) == decisions(true) for said in row)]
            if lost:
                some = rows_of(scene, lost)
                choose = saying(model, some["reasoning"], 1, **options)
                told = model.sample(some, 1, **options, choose=choose)
                replace_last(rollout, lost, told, model.vocabulary["endoftext"])
    return rollout


def saying(model, texts, n, temperature, top_p, max_new_tokens, seed, **_):
    """A choice of tokens for `Alpamayo.sample` that says these texts, one for each scene, in all n
    samples, of at most so many tokens; behind them it picks as `sample` does. Log-probabilities are
    those that `pick` would give: at temperature 0 those at 1."""
    generator = torch.Generator(model.device).manual_seed(seed)
    ids = []
    for text in texts:
        given = model.vocabulary.encode(f"{text}<|cot_end|><|traj_future_start|>")
        ids.append(torch.tensor(given[:max_new_tokens], device=model.device))
    ids = pad_sequence(ids, padding_value=-1).repeat_interleave(n, 1)
    rest = iter(ids)  # a token (N,) of each sample at a time, -1 behind its text

    def choose(logits):
        token, log_prob = pick(logits, temperature, top_p, generator)
        given = next(rest, torch.full_like(token, -1))
        nats = token_log_probs(logits, given.clamp(min=0), temperature or 1.0, top_p)
        return given.where(given >= 0, token), nats.where(given >= 0, log_prob)

    return choose


def replace_last(rollout, rows, other, padding):
    """Put another Rollout, of one sample of these rows, in place of the last sample there."""
    longest = max(rollout.tokens.shape[2], other.tokens.shape[2])
    for one in (rollout, other):
        more = 0, longest - one.tokens.shape[2]
        one.tokens = pad(one.tokens, more, value=padding)
        one.chosen = pad(one.chosen, more)
        one.log_probs = pad(one.log_probs, more)
    for name in ("tokens", "chosen", "log_probs", "actions", "xyz", "rot"):
        getattr(rollout, name)[rows, -1] = getattr(other, name)[:, 0]
    rollout.flow[:, rows, -1] = other.flow[:, :, 0]
    for row, texts in zip(rows, other.reasoning):
        rollout.reasoning[row][-1] = texts[0]


def drive_out(model, ask, scenes, numbers, flags, judge=None):
    """A group of drives in closed loop of each scene: `--episode` seconds that are planned anew
    every half second by ask(scene, group, part), a Rollout. Returns an Experience for each moment,
    what the drives earned, as `rewards_of`, and the log-probabilities of all that was said, (B, G).

    A thought is rewarded for its moment, beside the others of its group that still drive, though
    these have come elsewhere by then. All plans of a drive are rewarded alike: for its outcome, and
    the means of their consistency and their jerk."""
    groups = len(numbers), flags.group
    seeds = [scenes.seeds[i] for i in numbers for _ in range(flags.group)]
    moments = []  # a Scene and a Rollout of one sample each, of all drives

    def policy(scene):
        rollout = ask(scene, 1, len(moments))
        moments.append((scene, rollout))
        return rollout.actions[:, 0]

    options = {"ask_all": True, **view_of(model.cfg, flags.size)}  # a row is always the same drive
    met = data.drive(policy, seeds, flags.episode, PAUSE, model.device, **options)
    met = {name: value.cpu().view(groups) for name, value in met.items()}
    parts = []
    for scene, rollout in moments:
        xyz, rot = rollout.xyz.cpu().float(), rollout.rot.cpu().float()
        parts.append({
            "reason": grades_of(rollout, scene, judge).view(groups),
            "consistency": consistency(rollout.reasoning, scene, xyz, rot).view(groups),
            "trajectory": -JERK * jerk(xyz).view(groups),
        })
    starts = PAUSE * torch.arange(len(moments))[:, None, None]
    counts = (met["seconds"] > starts).float()  # (moments, B, G): who still drives
    rewards = {"outcome": met["score"], "comfort": met["comfort"]}
    for name in ("collision", "off_road"):
        rewards[name] = met[name].float()
    for name in parts[0]:
        values = torch.stack([part[name] for part in parts])
        rewards[name] = (values * counts).sum(0) / counts.sum(0)
    rewards["trajectory"] = rewards["trajectory"] - COLLISION * rewards["collision"]
    rewards |= sums_of(rewards, flags)

    lived = []
    whole = advantage_of(rewards, flags)
    for (scene, rollout), part, now in zip(moments, parts, counts):
        own = rewards | {name: part[name] for name in ("reason", "consistency")}
        advantage = advantage_of(sums_of(own, flags), flags, now)
        if "drive" in whole:
            advantage["drive"] = whole["drive"]
        rows = now.flatten().nonzero()[:, 0].tolist()
        scene = to_device(rows_of(scene, rows), model.device)
        advantage = {head: a.flatten()[rows, None] for head, a in advantage.items()}
        lived.append(Experience(scene, rows_of_rollout(rollout, rows), advantage))
    said = torch.stack([rollout.log_probs.sum(2).cpu().view(groups) for _, rollout in moments])
    return lived, rewards, (said * counts).sum(0)


def rows_of_rollout(rollout, rows):
    """Some scenes of a Rollout."""
    names = ("tokens", "chosen", "log_probs", "actions", "xyz", "rot")
    some = {name: getattr(rollout, name)[rows] for name in names}
    texts = [rollout.reasoning[i] for i in rows]
    return replace(rollout, reasoning=texts, flow=rollout.flow[:, rows], **some)


def losses_of(
    model, reference, scene, rollout, advantage, flags, old=None, seed=0, insulate=True,
):  # fmt: skip
    """Of an Experience: `policy`, the loss of `rl_losses`; `log_probs`, what each head decided,
    without gradient; and `looks_of`. reference: the KL term's frozen model, or None; old:
    `log_probs` of the first update; seed: of what the loss itself draws; insulate: with the
    stop-gradient."""
    theirs = None
    if reference:
        with without_adapters(reference):
            theirs = reference.replay(scene, rollout)._replace(read=None)  # a cache to let go
    by_nft = flags.objective == "nft"
    advantage = {head: a.to(rollout.tokens.device) for head, a in advantage.items()}
    drive = advantage.pop("drive", None) if by_nft else None
    losses = model(
        scene, "rl", rollout=rollout, advantage=advantage,
        objective="clip" if by_nft else flags.objective, beta=flags.beta,
        drive_weight=flags.drive_weight, reference=theirs, old=old, insulate=insulate,
        kl_weight={"thought": flags.kl, "drive": flags.kl_drive},
    )  # fmt: skip
    policy = losses["policy"]
    if drive is not None:
        matched = nft(model, losses["replay"], rollout, drive, flags.beta, seed, insulate)
        policy = policy + flags.drive_weight * matched
    heads = losses["heads"]
    log_probs = {name: head.log_pi.detach() for name, head in heads.items()}
    looks = looks_of(heads, old or log_probs, losses["replay"], rollout)
    return {"policy": policy, "log_probs": log_probs} | looks


def nft(model, replayed, rollout, advantage, beta, seed, insulate=True, most=6, levels=4):
    """The drive's loss without probabilities (DiffusionNFT, arXiv 2509.16117): flow matching
    (Eq. 7) on what the rollouts drove, towards the better ones of a group, away from the worse.

    replayed: the Rollout's `replay`; advantage (B, G); seed: of noise and times; insulate: with the
    stop-gradient; most: how many of a group teach, those that stand out; levels: noise levels of
    each. A rollout counts as good by a share r = (1 + beta * advantage) / 2, within 0 and 1. The
    velocity v is drawn to the line from noise to it by r, and its mirror image, 2 v_old - v, by
    1 - r. Where v_old is v, as here, the gradient is 2 r - 1 times that of flow matching."""
    prefix, tail, T, length = replayed.read
    B, G = advantage.shape
    rows = advantage.abs().topk(min(most, G)).indices  # (B, most)
    rows = (rows + G * torch.arange(B, device=rows.device)[:, None]).flatten()
    rows = rows.repeat_interleave(levels)
    good = ((1 + beta * advantage) / 2).clamp(0, 1).flatten()[rows]
    x_1 = rollout.flow[-1].flatten(0, 1)[rows]  # (N, 64, 2)
    generator = torch.Generator(x_1.device).manual_seed(seed)
    t, noise = model.draw_flow(x_1, 1, generator=generator)
    share = t[:, None, None]
    own = [kv and tuple(x[rows] for x in kv) for kv in tail]
    length = length[rows]
    past = model.expert_past(prefix, own, T, length, insulate)
    velocity = model.velocity(share * x_1 + (1 - share) * noise, t, past, prefix.end + length)
    mirrored = 2 * velocity.detach() - velocity
    towards = (velocity - (x_1 - noise)).square().mean((1, 2))
    away = (mirrored - (x_1 - noise)).square().mean((1, 2))
    return (good * towards + (1 - good) * away).mean()


@torch.no_grad()
def looks_of(heads, old, replayed, rollout):
    """What to look at in an update: length, tokens a thought; entropy, nats a token; kl, nats a
    rollout, and clipped, share of decisions whose ratio is out of bounds, of the thought; kl_drive
    and clipped_drive, of the drive; mismatch, how far rollout and replay differ in a token's
    log-probability."""
    looks = {}
    for name, head in heads.items():
        end = "_drive" * (name == "drive")
        looks["kl" + end] = head.kl.mean()
        looks["clipped" + end] = clipped_share(head, old[name])
    tokens = [head for name, head in heads.items() if name == "thought" or not replayed.moves]
    said = sum(head.log_pi for head in tokens)
    looks["mismatch"] = (said - rollout.log_probs).abs().max()
    looks["length"] = heads["thought"].decided.sum(2).float().mean()
    log_p = (replayed.logits / rollout.temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1) * rollout.chosen.flatten(0, 1)
    looks["entropy"] = entropy.sum() / rollout.chosen.sum().clamp(min=1)
    return looks


def clipped_share(head, old):
    """The share of a Head's decisions whose ratio is out of bounds."""
    apart = ratio_of(head, old) - 1
    out = head.decided & ((apart < -CLIP[0]) | (apart > CLIP[1]))
    return out.sum() / head.decided.sum().clamp(min=1)


def make_optimisers(model, flags):
    """AdamW for the language model and, with its own rate, for the expert: [(optimiser, rate)].

    No Muon, whose steps are all of one size, where RL wants small ones; no weight decay and no
    decay of the rates: train.py's flags for these do nothing here."""
    language, expert = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (expert if name.startswith(OF_EXPERT) else language).append(p)
    optimisers = []
    for params, lr in ((language, flags.lr), (expert, flags.expert_lr)):
        if params:
            adam = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
            optimisers.append((adam, lr))
    return optimisers


def update(optimisers, number, flags):
    """Clip, warm up, move. Returns the gradients' norms by their name in the log."""
    norms = {}
    for (optimiser, lr), name in zip(optimisers, ("grad_norm", "grad_norm_expert")):
        params = [p for group in optimiser.param_groups for p in group["params"]]
        norm = gathered(torch.nn.utils.clip_grad_norm_(params, flags.clip))
        expect_finite(number, f"`{name}`", norm)
        norms[name] = norm.item()
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (number + 1) / max(flags.warmup, 1))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return norms


def expect_finite(number, what, value):
    """FloatingPointError, in one line, where a value of a step is not finite. `number` counts from
    0, and the line from 1, as the log does."""
    if not value.isfinite().all():
        raise FloatingPointError(f"step {number + 1}: {what} is not finite")


def log_of(lived, earned, divergences, drawn, group):
    """What the log says of a step: of its Experiences; of the rewards, `earned` by each piece of
    the batch; of its scenes' divergences, the first `drawn` of which were drawn by them."""
    line = {"tokens": float(sum(one.rollout.tokens.numel() for one in lived))}
    for name in earned[0]:
        values = torch.cat([rewards[name] for rewards in earned])
        line[name] = values.mean().item()
        line[name + "_spread"] = values.std(1).mean().item()  # in a group: what there is to learn
    totals = torch.cat([rewards["total"] for rewards in earned])
    line["silent"] = (totals.std(1) < 1e-3).float().mean().item()  # groups of equal rewards
    texts = [text for one in lived for row in one.rollout.reasoning for text in row]
    groups = [texts[i : i + group] for i in range(0, len(texts), group)]
    line["one_text"] = sum(len(set(some)) == 1 for some in groups) / len(groups)
    for name, some in (("chosen", divergences[:drawn]), ("random", divergences[drawn:])):
        line[f"divergence_{name}"] = some.mean().item() if len(some) else None
    return line


# --------------------------------------------------------------------------------------------------
# Validation


def validate(model, held, flags, judge=None, rank=0, world_size=1):
    """Means of `likeliest` over the held-out scenes of each split, {"split name": float}.

    Of several processes each has its scenes; the mean of what they return is that of all scenes."""
    found = {}
    for split, scenes in held.items():
        count = min(flags.val_scenes, len(scenes))
        own = range(rank, count, world_size)
        weight = world_size / count if own else 0.0
        for name, values in likeliest(model, scenes, own or [0], flags, judge).items():
            found[f"{split} {name}"] = weight * values.double().sum().item()
    return found


def lines_of(when, values):
    """A validation as lines to read, one a split: how it thinks, how it drives, and both."""
    lines = []
    for split in dict.fromkeys(name.rpartition(" ")[0] for name in values):
        of = {name.removeprefix(f"{split} "): value for name, value in values.items()}
        words = [f"thought: right {of['right']:4.0%}, grade {of['reason']:.2f}",
                 f"drive: ADE {of['ade']:5.2f} m"]
        if "outcome" in of:
            words[1] += (f", collides {of['collision']:4.0%}, off the road {of['off_road']:4.0%}, "
                         f"outcome {of['outcome']:.2f}")
        words.append(f"both: consistent {of['consistency']:4.0%}, total {of['total']:.2f}")
        lines.append(f"{when} {split:5} " + "  ".join(words))
    return "\n".join(lines)


@torch.no_grad()
def likeliest(model, scenes, every, flags, judge=None):
    """The rewards of the likeliest rollout of each of these scenes, {name: (scenes,)}, and
    `right`: whether both decisions are. every: the scenes' numbers."""
    found = {}
    for first in range(0, len(every), 32):
        numbers = every[first : first + 32]
        scene = scenes.batch(numbers)
        options = dict(length=flags.max_new_tokens, decode=flags.policy)
        rollout = likeliest_of(model, scene, flags.flow_steps, **options)
        rewards = rewards_of(scene, rollout, scenes, numbers, flags, judge)
        pairs = zip(rollout.reasoning, scene["reasoning"])
        right = [is_right(said, true)[2] for (said,), true in pairs]
        for name, value in (rewards | {"right": torch.tensor(right).float()}).items():
            found.setdefault(name, []).append(value.flatten())
    return {name: torch.cat(values) for name, values in found.items()}


def likeliest_of(model, scene, steps, reason=True, length=64, decode="flow"):
    """The likeliest rollout of each scene: greedy reasoning, and the flow from zero, the middle of
    the noise. So drives closed loop too: from random noise the plans of successive half seconds
    disagree, and the car wanders off. steps: Euler's; length: tokens, at most; decode: see
    Alpamayo.sample."""
    calm = torch.zeros(len(scene["name"]), HORIZON, 2)
    return model.sample(scene, 1, 0, steps=steps, max_new_tokens=length, noise=calm, reason=reason,
                        decode=decode)


# --------------------------------------------------------------------------------------------------
# Flags and curves

START = 100_000  # the first scene of a split that is tried out; validation takes the first ones
PAUSE = 0.5  # s between the plans of an episode
# train.py's own flags in stage rl, where they are not given.
DEFAULTS = dict(scenes=1000, steps=60, batch=16, lr=1e-4, warmup=5, val_every=25, save_every=25)


def add_flags(add):
    """The flags of stage rl, for train.py's parser."""
    add("--policy", "flow", "what drives and learns beside the reasoning: the expert's flow | "
        "action tokens", choices=("flow", "tokens"))
    add("--objective", None, "clipped surrogate (the release's recipe) | weighted likelihood "
        "(Eq. 10) | clipped thoughts, and DiffusionNFT for the flow (default: that, or clip with "
        "--policy tokens)", choices=("clip", "paper", "nft"))
    add("--rewards", list(REWARDS), "parts of the reward", nargs="+", choices=tuple(REWARDS))
    add("--credit", "heads", "what teaches a head, thought or drive: its own parts | all of them",
        choices=("heads", "total"))
    add("--judge", None, "grade reasoning by a language model behind this OpenAI-compatible "
        "endpoint", endpoint, metavar="URL")
    add("--judge-model", "judge", "its name there", metavar="NAME")
    add("--split", ["tail", "train"], "the world's scenes to try out, --scenes of each; "
        "validation: others of the first", nargs="+", choices=SPLITS)
    add("--group", 12, "rollouts of a scene", whole(2, 10_000))
    add("--temperature", None, "of what is said; a well-taught model says one thing at 0.6 "
        "(default: 1.5, or 0.6 with --policy tokens, where it shakes the path)",
        real(0, 1000, above=0))
    add("--top-p", 1.0, "likeliest tokens that have this probability", real(0, 1, above=0))
    add("--eta", 0.5, "how stochastic the flow's steps are, but nft's", real(0, 1, above=0))
    add("--flow-steps", 5, "Euler steps from noise to controls", whole(2, 1000))
    add("--max-new-tokens", 40, "of a trace, the paper's measure", whole(1, 10_000))
    add("--beta", 2.0, "sharpness of Eq. 10's weights, of nft's and of curation's",
        real(0, 1000, above=0))
    add("--kl", 0.0, "weight of the thought's KL to the reference policy", real(0, 1e6))
    add("--kl-drive", 0.0, "weight of the drive's", real(0, 1e6))
    add("--drive-weight", 1.0, "of the drive's loss beside the thought's", real(0, 1e6))
    add("--episode", 0.0, "seconds of closed loop that are rewarded, with a plan every half "
        "second; 0: a single plan of 6.4 s", real(0, 60))
    add("--tell", False, "where no rollout of a group decides right, one more is the truth: it "
        "thinks the true trace (off-policy)")
    add("--rehearse", 0.0, "weight of stage reason's loss on as many ordinary scenes", real(0, 1e6))
    add("--expert-lr", 5e-5, "AdamW's learning rate of the expert", real(0, 1))
    add("--updates", 1, "updates on a batch of rollouts", whole(1, 1000))
    add("--curate", 0.5, "share of the scenes drawn by divergence", real(0, 1))


def fill_in(flags):
    """Put in place what hangs on other flags."""
    tokens = flags.policy == "tokens"
    if flags.temperature is None:
        flags.temperature = 0.6 if tokens else 1.5
    if flags.objective is None:
        flags.objective = "clip" if tokens else "nft"


def check_flags(flags, error):
    """Call error(line) where flags of stage rl do not go together."""
    tokens = flags.policy == "tokens"
    if tokens and flags.train == "expert":
        error("--policy tokens --train expert: nothing would learn, the tokens are the vlm's")
    if flags.objective == "nft" and (tokens or flags.updates > 1 or flags.kl_drive):
        error("--objective nft: it teaches the flow, without probabilities, and updates once: "
              "without --policy tokens, --updates, --kl-drive")
    learners = {"all": HEADS, "expert": HEADS[1:], "vlm": HEADS if tokens else HEADS[:1]}
    if not any(is_taught(head, flags) for head in learners[flags.train]):
        error(f"--rewards {' '.join(flags.rewards)} --train {flags.train}: nothing would learn, "
              "they reward the other head")
    if flags.episode:
        if flags.data != "world" or flags.objective == "paper" or flags.tell or flags.plan:
            error(f"--episode {flags.episode:g}: it takes --data world, and neither --objective "
                  "paper nor --tell nor --plan")
        if flags.episode < PAUSE or not data.ticks_of(flags.episode):
            error(f"--episode {flags.episode:g}: expected 0, or {PAUSE} s or more in steps of "
                  f"{DT} s")
    for name in ("rewards", "split"):
        values = getattr(flags, name)
        if len(set(values)) < len(values):
            error(f"--{name} {' '.join(values)}: one of them is there twice")


def line_of(line):
    """A step of the log as one line to read: what its rollouts earned, mean and spread in a group;
    then how they differ, and how far the heads move."""
    words = [f"step {line['step']:4}"]
    for name in ("total", *REWARDS):
        if name in line:
            words.append(f"{name} {line[name]:.2f} ± {line[name + '_spread']:.2f}")
    words.append(f"one text {line['one_text']:.0%}, one reward {line['silent']:.0%}")
    told = ("entropy", "grad_norm", "grad_norm_expert", "kl", "kl_drive", "clipped")
    for name in (*told, "clipped_drive"):
        if line.get(name):
            words.append(f"{name} {line[name]:.3g}")
    return "  ".join(words)


CURVES = {
    "total": "reward",
    "reason": "reasoning, 0 to 5",
    "consistency": "consistency",
    "trajectory": "trajectory",
    "outcome": "outcome: scene score of the plan",
    "off_road": "off the road, share",
    "collision": "collisions, share",
    "ade": "ADE, m",
    "one_text": "groups that say one text, share",
}


def draw_curves(log, file):
    """The run's curves, from its log.jsonl into a PNG; nothing without matplotlib."""
    try:
        plt = pyplot()
    except ImportError:
        return
    lines = read_json_lines(log)
    figure, axes = plt.subplots(3, 3, figsize=(13, 8.5), dpi=100, constrained_layout=True)
    for ax, (name, title) in zip(axes.flat, CURVES.items()):
        steps = [line["step"] for line in lines if name in line]
        values = [line[name] for line in lines if name in line]
        recent = [values[max(0, i - 9) : i + 1] for i in range(len(values))]
        ax.plot(steps, values, color=GREY, alpha=0.35, linewidth=1)
        means = [sum(some) / len(some) for some in recent]
        ax.plot(steps, means, color=GREY, linewidth=2, label="tried out, mean of 10 steps")
        for (split, points), style in zip(held_out(lines, name).items(), ("-", "--", ":")):
            label = f"{split}, held out, likeliest"
            ax.plot(*zip(*points), style, color=MODEL, marker="o", markersize=4, label=label)
        ax.set_title(title, loc="left", fontsize=11)
        ax.spines[["top", "right"]].set_visible(False)
    named = axes[0, 0].get_legend_handles_labels()
    figure.legend(*named, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    axes[2, 1].set_xlabel("step; what is tried out are other scenes each step, drawn at random")
    save_figure(figure, file)


def held_out(lines, name):
    """{split: [(step, value)]} of a name in the log's validations."""
    found = {}
    before = {"step": 0, "val": lines[0].get("before", {})}
    for line in (before, *lines):
        for key, value in line.get("val", {}).items():
            split, _, what = key.rpartition(" ")
            if what == name:
                found.setdefault(split, []).append((line["step"], value))
    return found
