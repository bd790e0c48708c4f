"""
Which part of stage rl's gradient is signal: what two independent draws of rollouts agree about.

    python -m tools.experiments signal

A head that is rewarded for what it did not do learns noise: its gradient is as long, and points
elsewhere with each draw. So does a drive that is given credit for the noise of its steps alone,
where most of what sets it apart from others is how it began, and what it thought.
"""
from contextlib import nullcontext
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import rl
from alpamayo import NANO, OF_EXPERT, Alpamayo, grpo, heads_of
from doors import whole
from tools import markdown
from tools.common import world_scenes
from tools.experiments.rewards import flags_of_rl

ABOUT = "which part of stage rl's gradient is signal"
NEEDS = "4 minutes on one core"
SCENES = 8
PARTS = (*rl.REWARDS, "thought", "drive", "total")
WAYS = {"thought": "clip", "drive by steps": "clip", "drive by nft": "nft"}  # head, objective
SIGNAL_NOTE = """\
{scenes} scenes of {split}, {draws} independent draws of {group} rollouts of each. norm: of the mean
gradient; cosine: between the gradients of two draws, mean over pairs: 1 is signal alone, 0 noise
alone. The drive by its random steps (flow-GRPO), and by nft."""


def gradients(model, scene, rewards, rollout, beta, seed):
    """{(way, part): gradient, flat} of what each head decided, rewarded for one part alone."""
    replayed = model.replay(scene, rollout)
    decided = heads_of(replayed, rollout)
    found = {}
    for way, objective in WAYS.items():
        head = way.split()[0]
        params = list(model.vlm.parameters()) if head == "thought" else params_of_expert(model)
        for part in PARTS:
            advantage = (rewards[part] - rewards[part].mean(1, keepdim=True)).to(model.device)
            if objective == "nft":
                loss = rl.nft(model, replayed, rollout, advantage, beta, seed)
            else:
                now = decided[head]
                loss = grpo("clip", now, now.log_pi.detach(), advantage, beta, kl_weight=0.0)
            grads = torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)
            found[way, part] = torch.cat([grad.flatten().cpu() for grad in grads])
    return found


def params_of_expert(model):
    return [p for name, p in model.named_parameters() if name.startswith(OF_EXPERT)]


def measure(args):
    """{part: {way: norm and cosine}}: how much of a head's gradient two independent draws share."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = Alpamayo.from_pretrained(args.checkpoint, torch.float32, device)  # as it learns
    scenes = world_scenes(model.cfg, args.split, SCENES, args)
    numbers = range(len(scenes))
    scene = data.to_device(scenes.batch(numbers), model.device)
    flags = flags_of_rl()
    flags.objective = "clip"  # whose steps are random
    draws = []
    for seed in tqdm(range(args.draws), desc="drawing", leave=False):
        rollout = rl.try_out(model, flags, nullcontext(), seed, scene)
        rewards = rl.rewards_of(scene, rollout, scenes, numbers, flags)
        draws.append(gradients(model, scene, rewards, rollout, flags.beta, seed))
    rows = {}
    for part in PARTS:
        rows[part] = {}
        for way in WAYS:
            grads = [draw[way, part] for draw in draws]
            norm = torch.stack(grads).mean(0).norm().item()
            pairs = combinations(grads, 2)
            cosines = [F.cosine_similarity(a, b, dim=0).item() for a, b in pairs]
            rows[part][way] = {"norm": norm, "cosine": float(np.mean(cosines))}
    return rows


def text(rows, settings):
    """The table."""
    lines = []
    for part, found in rows.items():
        cells = [(f"{one['norm']:.2g}", f"{one['cosine']:.2f}") for one in found.values()]
        lines.append([part, *(cell for pair in cells for cell in pair)])
    titles = [title for way in WAYS for title in (f"{way}: norm", "cosine")]
    group = flags_of_rl().group
    note = SIGNAL_NOTE.format(scenes=SCENES, group=group, **settings)
    return f"{markdown(lines, ['rewarded for', *titles])}\n\n{note}"


def add_flags(add):
    add("--checkpoint", metavar="FOLDER", default=NANO, help="whose gradient")
    add("--split", choices=data.SPLITS, default="tail", help="which scenes are tried out")
    add("--draws", type=whole(2, 100), default=4, help="of rollouts")
