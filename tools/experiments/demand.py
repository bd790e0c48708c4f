"""
Reasoning on demand, the paper's future work: drive at once, and think only where it is in doubt.

    python -m tools.experiments demand

Two doubts are tried. `word`: the entropy in nats of the first word it would say, which costs one
more pass behind the prompt. `flow`: how far apart, in m, six plans made without thinking end, which
costs no word. A scene is thought about where its doubt exceeds a threshold; thresholds are chosen
on other scenes, so that a given share of them is thought about.
"""
from functools import partial
from statistics import median

import torch
from tqdm import tqdm

import data
import rl
import runs
import world
from alpamayo import NANO, ade, load_model
from doors import whole
from tools import markdown
from tools.common import batches, drive_scenes
from tools.experiments import measures
from tools.experiments.measures import FIRST, means, shown
from tools.experiments.trainings import Training, folder_of, measured

ABOUT = "reasoning on demand: think only where the model is in doubt"
NEEDS = "45 minutes of a busy core"
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)  # of the scenes that are thought about
DRIVEN = (0.0, 0.25, 1.0)  # of these, what also drives
DOUBTS = ("word", "flow")
SPLITS = ("val", "tail")
CHOICE = 70_000  # of a split, the first scene that thresholds are chosen on
STEPS = 10  # Euler's
NOTE = """\
{eval} scenes and {drive} scenarios of 20 s a split; thresholds from {eval} others of val. Thinks:
share of those scenes that is thought about. Milliseconds: one scene, median of {plans} plans; of
thinking on demand the mean over scenes, the doubt included."""


def add_flags(add):
    measures.add_flags(add)
    add("--checkpoint", metavar="FOLDER", default=NANO, help="whose thoughts")
    add("--plans", type=whole(1), default=20, help="of which the median time is shown")


def doubt_of(model, scene, doubt):
    """(B,) how much a model doubts what to do in each scene."""
    if doubt == "word":
        prefix = model.prefill(model.embed_prompt(scene, True))
        logits = model.vlm.lm_head(prefix.x[:, -1]).float()
        driving = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        logits = model.allowed(logits, driving)
        log_p = logits.log_softmax(-1)
        return -(log_p.exp() * log_p.clamp(min=-100)).sum(-1).cpu()
    out = model.sample(scene, 6, steps=2, reason=False, seed=0)
    ends = out.xyz[:, :, -1, :2].cpu()  # (B, 6, 2)
    return (ends - ends.mean(1, keepdim=True)).norm(dim=-1).mean(1)


@torch.no_grad()
def plans_of(model, scenes):
    """Of each scene, {name: (N,)}: both doubts; ADE of the likeliest plan, at once and thought."""
    parts = []
    for _, scene in batches(scenes):
        part = {doubt: doubt_of(model, scene, doubt) for doubt in DOUBTS}
        for name, reason in (("at once", False), ("thought", True)):
            out = rl.likeliest_of(model, scene, STEPS, reason)
            part[name] = ade(out.xyz[:, 0].cpu(), scene["ego_future_xyz"])
        parts.append(part)
    return data.joined(parts)


class OnDemand:
    """The policy that thinks where its doubt is above a threshold."""

    def __init__(self, model, doubt, threshold):
        self.model = model
        self.doubt = doubt
        self.threshold = threshold

    @torch.no_grad()
    def __call__(self, scene):
        think = doubt_of(self.model, scene, self.doubt) > self.threshold  # (n,)
        plans = rl.likeliest_of(self.model, scene, STEPS, False).actions[:, 0]
        if think.any():
            some = data.rows_of(scene, think.nonzero()[:, 0].tolist())
            thought = rl.likeliest_of(self.model, some, STEPS, True).actions[:, 0]
            plans[think] = thought
        return plans


def milliseconds(model, scene, plans):
    """Median time of a plan at once, of one with thought, and of each doubt; one scene."""
    found = {}
    works = {
        "at once": partial(rl.likeliest_of, model, scene, STEPS, False),
        "thought": partial(rl.likeliest_of, model, scene, STEPS, True),
    }
    for name, work in works.items():
        laps = [sum(work().seconds.values()) for _ in range(plans + 1)][1:]
        found[name] = 1000 * median(laps)
    out = [model.sample(scene, 6, steps=2, reason=False, seed=0) for _ in range(plans + 1)][1:]
    found["flow"] = 1000 * median(one.seconds["flow"] for one in out)  # the rest is done anyway
    thoughts = [works["thought"]() for _ in range(plans)]
    words = [one.seconds["reasoning"] / one.tokens.shape[2] for one in thoughts]
    found["word"] = 1000 * median(words)
    return found


def curve(model, args):
    """{"doubt, share": {split: numbers}} from never to always, which are told of the first doubt:
    they are the same for all."""
    view = data.view_of(model.cfg, args.size)
    load = partial(data.load_world, folder=args.cache, **view)
    chosen_on = plans_of(model, load("val", args.eval, CHOICE))
    planned = {split: plans_of(model, load(split, args.eval, FIRST)) for split in SPLITS}
    cases = [(doubt, share) for doubt in DOUBTS for share in SHARES
             if doubt == DOUBTS[0] or share not in (0, 1)]
    rows = {}
    for doubt, share in tqdm(cases, desc="thinking on demand", unit="row"):
        threshold = threshold_of(chosen_on[doubt], share)
        row = rows[f"{doubt}, {share:g}"] = {}
        for split, numbers in planned.items():
            think = numbers[doubt] > threshold
            error = torch.where(think, numbers["thought"], numbers["at once"])
            row[split] = means({"ade": error, "thinks": think.float()})
            if share in DRIVEN:
                first = world.SEEDS[split] + FIRST
                policy = OnDemand(model, doubt, threshold)
                seeds = range(first, first + args.drive)
                met = means(drive_scenes(policy, seeds, seconds=20.0, **view))
                row[split] |= {f"drive {name}": value for name, value in met.items()}
    return rows


def threshold_of(doubts, share):
    """The doubt that this share of the scenes exceeds."""
    if share in (0, 1):
        return float("inf") if share == 0 else -1.0
    return doubts.quantile(1 - share).item()


def measure(args):
    """{"doubt, share": {split: numbers}}, and {"ms": milliseconds}."""
    model = load_model(args.checkpoint, args.device)
    kept = folder_of(Training(f"--init {args.checkpoint}"), args)
    settings = dict(table="demand", eval=args.eval, drive=args.drive, code=runs.sources())
    rows = dict(measured(kept, settings, partial(curve, model, args)))
    scene = data.load_world("val", args.eval, FIRST, args.cache,
                            **data.view_of(model.cfg, args.size)).batch([0])
    return rows | {"ms": milliseconds(model, scene, args.plans)}


def text(rows, settings):
    """A table for each split."""
    ms = rows["ms"]
    tables = []
    for split in SPLITS:
        lines = []
        for row, found in rows.items():
            if row == "ms":
                continue
            doubt, share = row.split(", ")
            numbers = found[split]
            thinks = numbers["thinks"]
            cost = ms["at once"] + thinks * (ms["thought"] - ms["at once"])
            cost += ms[doubt] * (0 < float(share) < 1)
            lines.append([
                doubt, f"{100 * thinks:.0f}", f"{cost:.0f}", shown(numbers, "ade"),
                shown(numbers, "drive score"), shown(numbers, "drive close", 0, 100),
            ])  # fmt: skip
        header = [f"{split}: doubt by", "thinks, %", "ms", "ADE, m", "score",
                  "close encounters, %"]
        tables.append(markdown(lines, header))
    return "\n\n".join([*tables, NOTE.format(**settings)])
