"""
Train: the paper's stages, from scratch, from a checkpoint, or on from where a run was stopped (Sec. 5).

    python train.py                                        nano from nothing in the built-in world: a laptop, minutes
    torchrun --nproc_per_node 8 train.py --preset mini ... the same for several GPUs, or processes of a CPU
    python train.py --resume out/nano                      go on after a kill; the losses are those of an unbroken run
    python train.py --stage reason --init FOLDER --data CLIPS --steps 500      fine-tune a checkpoint on your own clips
    python train.py --stage rl                             from the shipped nano: try out, be rewarded, do better
    python train.py --vision flex --flex-tokens 8          another way to see; --keep 0.5: with half of what it sees
    python train.py --plan --preset alpamayo-r1-10b ...    what this would need of a GPU's memory; runs and allocates nothing

Stage `action` teaches the language model the 128 action tokens and the expert flow matching; stage `reason` puts the
Chain of Causation in front of both; `all` runs one after the other. The loss is

    text + --action-weight * action + flow + --path-weight * ade    nats a token, nats a token, mean squared velocity, m

Stage `rl` (rl.py) is reinforcement learning, with losses and flags of its own.

Everything random (the order of scenes, noise, flow times, rollouts) is a function of the seed and the step, so a run
needs no random state to go on, only its weights and its optimiser's moments.
"""
import argparse
import json
import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
import plan
import rl
import world
from alpamayo import OF_EXPERT, PRESETS, Alpamayo, Vocabulary, read_config, with_words
from memory import add_adapters, checkpoint_activations
from release import write_atomically

# ----------------------------------------------------------------------------------------------------------------------
# Flags


def parse_flags():
    p = argparse.ArgumentParser(description="Train Alpamayo-R1.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--stage", choices=("action", "reason", "all", "rl"), default="all",
        help="action tokens and expert | reasoning in front of them | one after the other | reinforcement learning, with "
        + ", ".join(f"--{k.replace('_', '-')} {v}" for k, v in rl.DEFAULTS.items()) + " where not given")
    add("--preset", choices=tuple(PRESETS), default="nano", help="size of a model from scratch; the largest is for --plan")
    add("--init", metavar="FOLDER", help="start from the weights of this checkpoint, ours or the release's")
    add("--resume", metavar="FOLDER", help="go on with the run that was writing FOLDER; takes no other flag")
    add("--out", metavar="FOLDER", help="where checkpoints and log.jsonl go (default: out/PRESET, or out/INIT-STAGE)")
    add("--data", default="world", help="`world`, or a folder of clips that data.py can read")
    add("--scenes", type=int, default=8000, help="training scenes of the world, rendered once to disk")
    add("--size", type=int, nargs=2, default=(64, 128), metavar=("H", "W"), help="pixels of the world's images")
    same = dict(default=argparse.SUPPRESS)  # those not given stay what --init's config or the preset's says
    add("--vision", choices=("image", "triplane", "flex"),
        help="each image its own tokens | planes of space | scene tokens; another one than --init's starts untrained, "
        "behind its tower (default: --init's, or image)", **same)
    add("--planes-patch", type=int, nargs=3, metavar=("X", "Y", "Z"), help="with --vision triplane: cells to a token",
        **same)
    add("--flex-tokens", type=int, help="with --vision flex: scene tokens", **same)
    add("--keep", type=float, help="share of the image tokens that is kept; the least looked at are pruned", **same)
    add("--cache", metavar="FOLDER", default="data", help="where rendered scenes are kept")
    add("--steps", type=int, default=600, help="optimiser steps")
    add("--batch", type=int, default=32, help="scenes a step, over all processes")
    add("--accumulate", type=int, default=1,
        help="split each process's share of the batch into so many pieces, to save memory")
    add("--action-share", type=float, default=0.1, help="share of the steps that stage `all` spends in stage `action`")
    add("--lr", type=float, default=2e-3, help="AdamW's learning rate: embeddings, heads, norms, biases")
    add("--muon-lr", type=float, default=0.01, help="Muon's learning rate: matrices inside the layers; 0: AdamW for all")
    add("--weight-decay", type=float, default=0.05, help="of matrices")
    add("--warmup", type=int, default=40, help="steps of linear warm-up")
    add("--decay", type=float, default=0.4, help="share of the steps, at the end, over which the rates fall to 0")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--action-weight", type=float, default=0.5, help="weight of the action tokens' loss")
    add("--path-weight", type=float, default=0.2,
        help="weight of the metres between the path that the flow points at and the driven one; the paper has none")
    add("--action-every", type=int, default=2, help="the 128 action tokens join every so many steps; 1: always")
    add("--hide-actions", type=float, default=0.5,
        help="share of the scenes whose action tokens are not read back, see forward")
    add("--drive-every", type=int, default=8,
        help="in stage `reason` one step in so many has no reasoning, so that the model can also drive at once; 0: none")
    add("--front-only", type=float, default=0.1,
        help="share of the steps that show the front cameras alone, for rigs that have no others")
    add("--routes", type=float, default=0.5, help="share of the steps that tell the route, so that a model can do without")
    add("--blind", action="store_true", help="grey images: what can be known without looking")
    add("--flow-samples", type=int, default=2, help="noise levels a scene, which share its cache")
    add("--train", choices=("all", "vlm", "expert"), default="all",
        help="what learns; the release trains first vlm, then expert")
    add("--lora", type=int, default=0, metavar="RANK", help="of the vlm only adapters of this rank learn, in the language model's "
        "layers; checkpoints have them merged. The expert learns as --train says. 0: everything, in full")
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of weights that do not learn; what learns is always float32. --init's are rounded to it")
    add("--checkpointing", action="store_true", help="compute activations again in backward instead of keeping them")
    add("--plan", choices=("gpu", "cpu"), nargs="?", const="gpu",
        help="print the memory that these flags need, of a GPU (bfloat16 arithmetic) or a CPU (float32), and stop")
    add("--val-every", type=int, default=200, help="steps between validation passes")
    add("--val-scenes", type=int, default=128, help="scenes of a validation pass")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--seed", type=int, default=0, help="of weights, order and noise")
    add("--threads", type=int, default=0, help="CPU threads of each process; 0: PyTorch's choice")
    rl.add_flags(p)
    if p.parse_known_args()[0].stage == "rl":
        p.set_defaults(**rl.DEFAULTS)
    flags = p.parse_args()
    if flags.resume:
        if len(sys.argv) != (2 if "=" in sys.argv[1] else 3):
            p.error("--resume takes no other flag: the run's own settings hold")
        path = os.path.join(flags.resume, "training.safetensors")
        try:
            with safe_open(path, "pt") as f:
                saved = json.loads(f.metadata()["flags"])
        except (OSError, SafetensorError, TypeError, KeyError) as e:
            p.error(f"{path}: no run to resume ({e})")
        return argparse.Namespace(**{**vars(flags), **saved, "resume": flags.resume, "out": flags.resume})
    if flags.lora < 0 or (flags.lora and flags.train == "expert"):
        p.error(f"--lora {flags.lora} --train {flags.train}: expected a rank of 1 or more, and the vlm among what learns")
    if not flags.plan:
        if flags.preset == "alpamayo-r1-10b":
            p.error(f"--preset {flags.preset}: this can only be planned, with --plan; start from the release with --init")
        if flags.stage == "reason" and not flags.init:
            p.error("--stage reason starts from a checkpoint of stage action: give it with --init, or run --stage all")
        if flags.stage == "rl" and not flags.init and flags.preset != "nano":
            p.error("--stage rl starts from a checkpoint of stage reason: give it with --init")
        if flags.stage == "rl" and not flags.init:
            flags.init = os.path.join(os.path.dirname(os.path.abspath(__file__)), "checkpoints", "nano")
        if flags.stage == "rl":
            rl.check_flags(flags, p.error)
        if flags.lora and not flags.init:
            p.error("--lora adapts a model that has learned: give it with --init")
    for k in ("steps", "batch", "accumulate", "action_every", "flow_samples", "val_every", "val_scenes", "save_every"):
        if getattr(flags, k) < 1:
            p.error(f"--{k.replace('_', '-')} {getattr(flags, k)}: expected 1 or more")
    name = f"{os.path.basename(os.path.abspath(flags.init))}-{flags.stage}" if flags.init else flags.preset
    flags.out = flags.out or os.path.join("out", name)
    if flags.lora and flags.init and os.path.realpath(flags.init) == os.path.realpath(flags.out):
        p.error(f"--out {flags.out}: must be another folder than --init, whose weights a run with --lora needs to go on")
    return flags


# ----------------------------------------------------------------------------------------------------------------------
# Optimiser: Muon for the matrices inside the layers, AdamW for the rest


def orthogonalise(m, steps=5):
    """Newton-Schulz: matrices (..., r, c) to nearly orthogonal ones, U V^T of their singular value decompositions.
    The quintic's coefficients are Keller Jordan's (github.com/KellerJordan/Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = m.shape[-2] > m.shape[-1]
    x = m.mT if tall else m
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, so that every direction of a matrix learns equally fast. Matrices of one
    shape go through Newton-Schulz together: at this size the launches cost more than the arithmetic."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                nesterov = [p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params]
                scale = max(1, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalise(torch.stack(nesterov))):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def make_optimisers(model, flags):
    """Muon gets the two-dimensional weights of layers, blocks, mergers and encoders; AdamW everything else. Adapters are
    AdamW's: a step of Muon is equally long in all directions, those of a B that is still zero included."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    of_muon = (".layers.", ".blocks.", "merger", ".triplane.", ".flex.")
    inside = lambda n, p: flags.muon_lr and p.ndim == 2 and any(k in n for k in of_muon) and "lora_" not in n
    hidden = [p for n, p in named if inside(n, p)]
    matrices = dict(params=[p for n, p in named if p.ndim > 1 and not inside(n, p)], weight_decay=flags.weight_decay)
    vectors = dict(params=[p for n, p in named if p.ndim <= 1], weight_decay=0.0)
    adam = torch.optim.AdamW([matrices, vectors], lr=flags.lr, betas=(0.9, 0.99))
    both = [(adam, flags.lr)]
    if hidden:
        both.append((Muon(hidden, flags.muon_lr, weight_decay=flags.weight_decay), flags.muon_lr))
    return both


def rate(step, flags):
    """Share of the full learning rate at a step: warm-up, plateau, linear fall to zero."""
    left = flags.steps * flags.decay
    return min((step + 1) / max(flags.warmup, 1), 1.0, (flags.steps - step) / left if left else 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# One step


def stage_at(step, flags):
    if flags.stage != "all":
        return flags.stage
    return "action" if step < flags.action_share * flags.steps else "reason"


def scene_numbers(step, rank, world_size, count, flags):
    """Which scenes a process takes at a step: the batch of a random order that changes every epoch."""
    share = flags.batch // world_size
    first = step * flags.batch + rank * share
    return [order_of(i // count, count, flags.seed)[i % count] for i in range(first, first + share)]


@lru_cache(2)
def order_of(epoch, count, seed):
    """The order of an epoch's scenes."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch)).tolist()


def generator_for(step, rank, flags, device):
    return torch.Generator(device).manual_seed((flags.seed * 1_000_003 + step) * 1_003 + rank)


def to_device(scene, device, flags):
    scene = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in scene.items()}
    return scene | {"images": torch.full_like(scene["images"], 127)} if flags.blind else scene


def front_only(scene):
    """The scene as a car sees it that has a front wide camera and a front tele and no others."""
    keep = [i for i, camera in enumerate(scene["camera_ids"][0].tolist()) if camera in (1, 6)]
    if not keep:
        return scene
    return scene | {k: scene[k][:, keep] for k in ("images", "camera_ids", "camera_to_ego", "intrinsics") if k in scene}


def without_route(scene):
    """The scene as it is shown without its route, less the turns that nothing but the route could tell (no turn signal):
    what cannot be known is not taught."""
    if "route" not in scene:
        return scene
    signal = scene["ego_kinematics"][:, -1, 3] != 0
    keep = [i for i, route in enumerate(scene["route"]) if route == data.ROUTES[0] or signal[i]]
    keep = keep or list(range(len(scene["route"])))
    return {k: v[keep] if torch.is_tensor(v) else [v[i] for i in keep] for k, v in scene.items() if k != "route"}


def total_loss(losses, flags):
    weights = {"text": 1.0, "action": flags.action_weight, "flow": 1.0, "ade": flags.path_weight}
    parts = {"all": weights, "vlm": ("text", "action"), "expert": ("flow", "ade")}[flags.train]
    return sum(weights[k] * losses[k] for k in parts if k in losses)


def prepare(model, flags):
    """Say what learns, --train's part, or of the language model only its adapters; and how. Returns what learns, and its
    optimisers."""
    if flags.lora:
        add_adapters(model, flags.lora, torch.Generator().manual_seed(flags.seed))
    if flags.checkpointing:
        checkpoint_activations(model)
    for name, p in model.named_parameters():
        of_expert = name.startswith(OF_EXPERT)
        chosen = flags.train == "all" or of_expert == (flags.train == "expert")
        p.requires_grad_(chosen and (of_expert or not flags.lora or "lora_" in name))
        p.data = p.data.to(torch.float32 if p.requires_grad else getattr(torch, flags.dtype))
    make = rl.make_optimisers if flags.stage == "rl" else make_optimisers
    return [p for p in model.parameters() if p.requires_grad], make(model, flags)


def supervised_step(model, params, optimisers, scenes, step, flags, rank, world_size, device, autocast):
    """A step of the stages `action` and `reason`. Returns what the log says of it, `tokens` and all."""
    stage = stage_at(step, flags)
    at_once = flags.drive_every and step % flags.drive_every == 1 % flags.drive_every
    lesson = "action" if at_once else stage
    # The action tokens are costly; without reasoning they are all that the language model learns from.
    tail = at_once or step % flags.action_every == 0 or (flags.train == "vlm" and lesson == "action")
    generator = generator_for(step, rank, flags, device)
    numbers = scene_numbers(step, rank, world_size, len(scenes), flags)
    piece, means = len(numbers) // flags.accumulate, {}
    for i in range(0, len(numbers), piece):
        scene = to_device(scenes.batch(numbers[i : i + piece]), device, flags)
        if torch.rand(1, generator=generator, device=device) < flags.front_only:
            scene = front_only(scene)
        if torch.rand(1, generator=generator, device=device) >= flags.routes:
            scene = without_route(scene)
        losses = backward(model, scene, lesson, tail, flags, generator, autocast)
        for name, value in losses.items():
            means[name] = means.get(name, 0.0) + value.item() / flags.accumulate
            if not value.isfinite():
                raise FloatingPointError(f"step {step}: loss `{name}` is {value.item()}; the last checkpoint is intact")
    if world_size > 1:
        average_gradients(params, world_size)
    norm = update(params, optimisers, step, flags)
    return {"step": step + 1, "stage": stage, **means, "grad_norm": norm.item()}


def backward(model, scene, lesson, tail, flags, generator, autocast):
    """The losses of a piece of the batch; their gradients are added to those of the pieces before."""
    with autocast:
        losses = model(scene, lesson, action_tokens=tail, flow_samples=flags.flow_samples, generator=generator,
                       hide_actions=flags.hide_actions)
        loss = total_loss(losses, flags) / flags.accumulate
    loss.backward()
    return losses


def update(params, optimisers, step, flags):
    """Move the parameters along their gradients, at this step's rates. Returns the gradients' norm."""
    norm = torch.nn.utils.clip_grad_norm_(params, flags.clip)
    for optimiser, full in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = full * rate(step, flags)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return norm


def average_gradients(params, world_size):
    """All processes' gradients, averaged, in one message. What a step leaves out, all processes leave out."""
    params = [p for p in params if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    for p, g in zip(params, flat.div_(world_size).split([p.numel() for p in params])):
        p.grad = g.view_as(p)


# ----------------------------------------------------------------------------------------------------------------------
# Validation and checkpoints


@torch.no_grad()
def validate(model, scenes, stage, flags, rank, world_size, device, autocast):
    """Losses, ADE (m) of one greedy sample and the shares of right decisions and exact texts, on the same scenes and
    noise every time. Processes share the scenes; all of them must call it."""
    keys = ["action", "flow", "ade"] + (["text", "right", "exact"] if stage == "reason" else [])
    sums = torch.zeros(len(keys) + 1, dtype=torch.float64, device=device)  # the last counts scenes
    numbers = list(range(min(flags.val_scenes, len(scenes))))[rank::world_size]
    piece = flags.batch // world_size // flags.accumulate  # what training has memory for
    for i in range(0, len(numbers), piece):
        scene = to_device(scenes.batch(numbers[i : i + piece]), device, flags)
        B = len(scene["images"])
        with autocast:
            values = model(scene, stage, generator=torch.Generator(device).manual_seed(i))
            out = model.sample(scene, n=1, temperature=0, steps=5, max_new_tokens=64, seed=i, reason=stage == "reason")
        values["ade"] = (out.xyz[:, 0] - scene["ego_future_xyz"])[..., :2].norm(dim=-1).mean()
        pairs = [(said[0], true) for said, true in zip(out.reasoning, scene["reasoning"])]
        decided = [(data.decisions(said), data.decisions(true)) for said, true in pairs]
        values["right"] = sum(said == true is not None for said, true in decided) / B
        values["exact"] = sum(said == true for said, true in pairs) / B
        sums += torch.tensor([float(values[k]) * B for k in keys] + [B], dtype=torch.float64, device=device)
    if world_size > 1:
        dist.all_reduce(sums)
    return {k: v / sums[-1].item() for k, v in zip(keys, sums.tolist())}


def save(model, optimisers, step, flags, known=None):
    """The checkpoint to use, and then one file with what has been learned and is needed to go on. Each is written whole
    or not at all. known: what stage `rl` knows of its scenes."""
    model.save_pretrained(flags.out, reasoning="off" if stage_at(step - 1, flags) == "action" else "on")
    names = {p: n for n, p in model.named_parameters()}
    tensors = {f"model.{n}": p.detach().contiguous() for p, n in names.items() if p.requires_grad}
    for optimiser, _ in optimisers:
        for p, state in optimiser.state.items():
            tensors |= {f"{k}.{names[p]}": torch.as_tensor(v).contiguous() for k, v in state.items()}
    if known is not None:
        tensors["rl.known"] = known
    settings = {"flags": json.dumps(vars(flags)), "step": str(step), "world": str(world.WORLD_VERSION)}
    write_atomically(os.path.join(flags.out, "training.safetensors"), lambda part: save_file(tensors, part, settings))


def restore(model, optimisers, flags, known=None):
    """Weights and moments of a stopped run, into place, and `known`. Returns the step to go on with."""
    path = os.path.join(flags.out, "training.safetensors")
    try:
        with safe_open(path, "pt") as f:
            step, tensors = int(f.metadata()["step"]), {k: f.get_tensor(k) for k in f.keys()}
    except SafetensorError as e:
        raise ValueError(f"{path}: not a whole safetensors file ({e})") from None
    names = {p: n for n, p in model.named_parameters()}
    if known is not None:
        known.copy_(tensors["rl.known"])
    with torch.no_grad():
        for p, n in names.items():
            if p.requires_grad:
                p.copy_(tensors[f"model.{n}"])
    for optimiser, _ in optimisers:
        keys = ("momentum",) if isinstance(optimiser, Muon) else ("step", "exp_avg", "exp_avg_sq")
        for group in optimiser.param_groups:
            for p in group["params"]:
                found = {k: tensors[f"{k}.{names[p]}"] for k in keys if f"{k}.{names[p]}" in tensors}
                if found:
                    optimiser.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in found.items()}
    return step


# ----------------------------------------------------------------------------------------------------------------------


def main():
    flags = parse_flags()
    if flags.plan:
        return print_plan(flags)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if flags.threads:
        torch.set_num_threads(flags.threads)
    if cuda:
        torch.cuda.set_device(device)
    if world_size > 1:  # the others wait while the first renders the world
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12))
    if flags.stage == "rl" and world_size > 1:
        raise ValueError("--stage rl runs in one process")
    if flags.batch % (world_size * flags.accumulate):
        pieces = world_size * flags.accumulate
        raise ValueError(f"--batch {flags.batch}: must be a multiple of processes x --accumulate = {pieces}")
    # One detected precision: bfloat16 arithmetic with float32 weights on a GPU, float32 on a CPU, where it is faster.
    halved = cuda or flags.dtype == "bfloat16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=halved)
    say = print if rank == 0 else lambda *a, **k: None

    # The model decides how it wants to be shown scenes, so it comes first; its words come from the scenes' reasoning.
    source = flags.init if flags.lora else flags.resume or flags.init  # adapters go on from the weights without them
    model = Alpamayo.from_pretrained(source, getattr(torch, flags.dtype), device) if source else None
    cfg = model.cfg if model else PRESETS[flags.preset]
    if not flags.resume or flags.lora:  # else the checkpoint says how it sees
        cfg = seen_by(cfg, flags)
        if model and cfg != model.cfg:
            model, fresh = seeing_anew(model, cfg, flags)
            say(f"{flags.init}: all tensors but {fresh} new ones, which see by {cfg.vision}")
            if fresh and flags.lora:
                raise ValueError(f"--lora: an untrained encoder, --vision {cfg.vision}, would never learn; train it without")
    if flags.lora:
        base = sum_of_bits(model)
        if getattr(flags, "base", base) != base:
            raise ValueError(f"{flags.init}: other weights than those that this run began with; its adapters do not fit")
        flags.base = base
    if rank == 0:
        load_scenes(flags, cfg)  # renders what is not yet on disk
    if world_size > 1:
        dist.barrier()
    train, val = load_scenes(flags, cfg)
    if model is None:
        cfg = with_words(cfg, train.reasoning + list(data.ROUTES.values()))
        model = Alpamayo(cfg, Vocabulary(cfg))
        model.init_weights(torch.Generator().manual_seed(flags.seed))
        model.to(device)
    reference = known = judge = None
    if flags.stage == "rl":
        known = torch.full((len(train),), torch.nan)
        judge = flags.judge and rl.Judge(flags.judge, flags.judge_model, os.path.join(flags.out, "judge.jsonl"))
        if flags.kl:  # to the model as it was before it learned: with adapters, itself without them
            reference = model if flags.lora else Alpamayo.from_pretrained(flags.init, getattr(torch, flags.dtype), device)
            reference.cfg = model.cfg
    params, optimisers = prepare(model, flags)
    first = restore(model, optimisers, flags, known) if flags.resume else 0

    say(f"{flags.preset if not source else source}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{sum(p.numel() for p in params):,} learn; {len(train)} scenes; {world_size} x {device.type}, "
        f"{'bfloat16' if halved else 'float32'}; steps {first} to {flags.steps}; writes {flags.out}")  # fmt: skip
    os.makedirs(flags.out, exist_ok=True)
    log_path = os.path.join(flags.out, "log.jsonl")
    if rank == 0:  # a new run starts a new log; a resumed one forgets what it will do again
        with open(log_path, "a+") as f:
            f.seek(0)
            kept = f.readlines()[:first]  # a line a step
            f.truncate(0)
            f.writelines(kept)
    bar = tqdm(total=flags.steps, initial=first, disable=rank > 0, smoothing=0.05, mininterval=1)
    shown, begin, tokens = {}, time.time(), 0

    for step in range(first, flags.steps):
        if flags.stage == "rl":
            before = {}
            if step == 0:
                with autocast:
                    before["before"] = rl.validate(model, val, flags, judge)
                bar.write("before      validation: " + "  ".join(f"{k} {v:.3f}" for k, v in before["before"].items()))
            line = rl.step(model, reference, optimisers, train, step, known, flags, device, autocast, judge) | before
            bar.write(rl.line_of(line))
        else:
            line = supervised_step(model, params, optimisers, train, step, flags, rank, world_size, device, autocast)
        stage = line["stage"]
        tokens += line.pop("tokens") * flags.accumulate * world_size
        for k in ("text", "action", "flow", "ade"):
            if k in line:
                shown[k] = line[k] if k not in shown else 0.95 * shown[k] + 0.05 * line[k]
        speed = tokens / (time.time() - begin)
        smooth = {k: f"{v:.3f}" for k, v in shown.items()}
        bar.set_postfix({"stage": stage, **smooth, "tok/s": f"{speed:.0f}"}, refresh=False)
        bar.update()
        last = step + 1 == flags.steps
        if (step + 1) % flags.val_every == 0 or last:
            if flags.stage == "rl":
                with autocast:
                    values = rl.validate(model, val, flags, judge)
            else:
                values = validate(model, val, stage, flags, rank, world_size, device, autocast)
            line["val"] = values
            if rank == 0:
                bar.write(f"step {step + 1:6} {stage:6} validation: " + "  ".join(f"{k} {v:.3f}" for k, v in values.items()))
        if rank == 0:
            with open(log_path, "a") as f:
                f.write(json.dumps(line) + "\n")
            if (step + 1) % flags.save_every == 0 or last:
                save(model, optimisers, step + 1, flags, known)
            if flags.stage == "rl" and "val" in line:
                rl.draw_curves(log_path, os.path.join(flags.out, "curves.png"))
    bar.close()
    say(f"done in {(time.time() - begin) / 60:.1f} minutes; look at it: python sample.py --checkpoint {flags.out}")
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def print_plan(flags):
    """The memory of a step with these flags, found out by plan.py."""
    cfg = seen_by(read_config(flags.init) if flags.init else PRESETS[flags.preset], flags)
    text, size = " word" * 38, (1080, 1920)  # NVIDIA's cameras
    if not cfg.max_pixels:
        texts, size = [data.sentence(cause, world.LEFT) for cause in data.CAUSES], tuple(flags.size)
        text = max(texts, key=len)
        cfg = cfg if flags.init else with_words(cfg, texts + list(data.ROUTES.values()))
    halved, learns_by_trying = flags.plan == "gpu" or flags.dtype == "bfloat16", flags.stage == "rl"
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=halved)
    fake = plan.FakeTensorMode(allow_non_fake_inputs=True)
    model = plan.model_without_weights(cfg, fake)
    params, optimisers = prepare(model, flags)
    for group in optimisers[0][0].param_groups:
        group["foreach"] = flags.plan == "gpu"  # PyTorch's choice there
    piece, rest = divmod(flags.batch, flags.accumulate)
    if rest:
        raise ValueError(f"--accumulate {flags.accumulate}: {flags.batch} are not so many equal pieces")
    scene = plan.made_up_scene(cfg, piece, size, text)
    scene["images"] = fake.from_tensor(scene["images"])
    phases = {"update": lambda: update(params, optimisers, 0, flags)}
    reference = None
    if learns_by_trying:
        if flags.kl:
            reference = model if flags.lora else plan.model_without_weights(cfg, fake)
            for p in reference.parameters() if not flags.lora else ():
                p.data = p.data.to(getattr(torch, flags.dtype))
        tokens = flags.policy == "tokens"
        out = plan.made_up_rollout(model, piece, flags.group, flags.max_new_tokens, 0 if tokens else flags.flow_steps)
        try_out, learn, rewards = autocast(plan.last_token), autocast(rl.loss_of), torch.zeros(piece, flags.group)
        phases = {"rollouts": lambda: try_out(model, scene, flags.group, out.tokens.shape[2]),
                  "losses": lambda: learn(model, reference, scene, out, rewards, flags)["policy"].backward()} | phases  # fmt: skip
    else:
        lesson, generator = "action" if flags.stage == "action" else "reason", torch.Generator().manual_seed(flags.seed)
        phases = {"losses": lambda: backward(model, scene, lesson, True, flags, generator, autocast)} | phases
    found = plan.peaks(model, [optimiser for optimiser, _ in optimisers], phases, None if flags.lora else reference)
    print(f"{flags.init or flags.preset}, stage {flags.stage}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{sum(p.numel() for p in params):,} learn; "
          f"{piece} scene{'s' * (piece > 1)}{f' of {flags.group} rollouts' if learns_by_trying else ''} at a time, "
          f"{'bfloat16' if halved else 'float32'} arithmetic")  # fmt: skip
    print(plan.table(found))


def seen_by(cfg, flags):
    """The Config as the flags say that the model sees."""
    seeing = {k: getattr(flags, k) for k in ("vision", "planes_patch", "flex_tokens", "keep") if k in flags}
    return replace(cfg, **{k: tuple(v) if isinstance(v, list) else v for k, v in seeing.items()})


def sum_of_bits(model):
    """A number that tells whether weights are the same, to the last bit and on any device."""
    integers = {2: torch.int16, 4: torch.int32}
    return sum(p.detach().view(integers[p.element_size()]).sum().item() for p in model.parameters())


def seeing_anew(model, cfg, flags):
    """The model with another way to see, and how many of its tensors are new: tower, language model and expert are taken
    over by their names, the encoder starts from nothing."""
    other = Alpamayo(cfg, model.vocabulary)
    other.init_weights(torch.Generator().manual_seed(flags.seed))
    old, new = model.state_dict(), other.state_dict()
    taken = {k: old[k] for k in new if k in old and old[k].shape == new[k].shape}
    other.load_state_dict(new | taken)
    return other.to(model.device), len(new) - len(taken)


def load_scenes(flags, cfg):
    """Training and validation scenes as the model wants to be shown them."""
    unit = cfg.patch * cfg.merge
    if not cfg.max_pixels and any(s % unit for s in flags.size):
        raise ValueError("--size {} {}: height and width must be multiples of {}".format(*flags.size, unit))
    view = dict(frames=cfg.frames, frame_dt=cfg.frame_dt)
    if flags.data == "world":
        view |= dict(camera_ids=cfg.cameras, size=tuple(flags.size), folder=flags.cache, workers=os.cpu_count())
        if flags.stage == "rl":
            sets = [data.load("world", split=split, scenes=flags.scenes, start=rl.START, **view) for split in flags.split]
            held_out = data.load("world", split=flags.split[0], scenes=flags.val_scenes, **view)
            return data.Together(sets), held_out
        counts = {"train": flags.scenes, "val": flags.val_scenes}
        return [data.load("world", split=split, scenes=count, **view) for split, count in counts.items()]
    of_world = {} if cfg.max_pixels else dict(size=tuple(flags.size), rig=world.RIG)  # it knows only the world's cameras
    clips = data.load(flags.data, **view, **of_world)
    silent = clips.reasoning.count("")
    if silent and flags.stage != "action":
        raise ValueError(f"{flags.data}: {silent} of {len(clips)} scenes have no reasoning; write it, or --stage action")
    return clips, clips  # too few to spare any: what validation says of one's own clips is how well they were learned


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
