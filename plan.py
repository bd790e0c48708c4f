"""
What a run needs of memory, found out without the memory.

    python train.py --plan                                                      nano, learning from nothing, on a GPU
    python train.py --plan cpu --preset mini --size 128 256 --batch 8           mini on a CPU
    python train.py --plan --preset alpamayo-r1-10b --stage rl --lora 16 --dtype bfloat16 --checkpointing --accumulate 16

There is no formula here that could go stale. The code that trains runs, forward, backward and optimisers, on tensors
that have a shape and a type and no contents (PyTorch's FakeTensor); every storage that it makes is counted from its
birth to its death. A GPU is planned as a CPU that does its matrix products in bfloat16 and its optimisers' arithmetic
for all tensors at once, as on a GPU they are.

Not counted: what a kernel takes and gives back by itself, CUDA's own share, gaps between storages. On a GPU leave a
tenth and a GiB for these. Counted for one process; under torchrun each has all this for its share of the batch, and its
gradients once more while they are averaged.

The page reads: counting; a scene and a model without contents; rollouts; the table.
"""
import weakref
from collections import Counter
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: F401, train.py takes it from here
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alpamayo import HORIZON, ActionSpace, Alpamayo, Past, Rollout, Vocabulary, pick, rope
from release import split_words

# ----------------------------------------------------------------------------------------------------------------------
# Counting


class Tracker(TorchDispatchMode):
    """Bytes of all storages alive, by kind: `now`, and at the moment when they were most: `peak`."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, Counter(), Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.index.Tensor:  # how many True select only contents tell; how many places, the shape does
            places = [i.nonzero().unbind(1) if torch.is_tensor(i) and i.dtype == torch.bool else (i,) for i in args[1]]
            args = (args[0], sum(map(tuple, places), ()))
        out = op(*args, **kwargs or {})
        self.count(out)
        return out

    def count(self, tensors, kind=None):
        """See these tensors, in whatever nest of lists; with a kind, that is what they are from now on."""
        for t in tree_leaves(tensors):
            if not torch.is_tensor(t):
                continue
            storage = t.untyped_storage()
            if id(storage) not in self.alive:
                self.alive[id(storage)] = "activations", storage.nbytes()
                self.now["activations"] += storage.nbytes()
                weakref.finalize(storage, self.forget, id(storage))
            if kind:
                old, size = self.alive[id(storage)]
                self.alive[id(storage)] = kind, size
                self.now[old] -= size
                self.now[kind] += size
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def forget(self, storage):
        kind, size = self.alive.pop(storage)
        self.now[kind] -= size


def peaks(model, optimisers, phases, reference=None):
    """Run the phases of a step, {name: function} of which the last is "update", and return {name: Counter of bytes by
    kind, when they were most}. It is the second step, by which all moments of the optimisers exist. Real tensors are
    counted as well as those without contents."""
    stay, learn = ([p for p in model.parameters() if p.requires_grad == yes] for yes in (False, True))
    for p in learn:
        p.grad = torch.zeros_like(p)
    phases["update"]()
    with Tracker() as tracker:
        tracker.count([stay, list(model.buffers())], "weights that stay")
        tracker.count(learn, "weights that learn")
        tracker.count([list(state.values()) for o in optimisers for state in o.state.values()], "optimiser")
        tracker.count(list(reference.parameters()) if reference else [], "reference model")
        hooks = [p.register_post_accumulate_grad_hook(lambda p: tracker.count(p.grad, "gradients")) for p in learn]
        hooks += [lm.register_forward_hook(lambda lm, args, out: tracker.count(out[1], "keys and values"))
                  for lm in (m.vlm.model.language_model for m in (model, reference) if m)]  # fmt: skip
        found = {}
        for name, phase in phases.items():
            tracker.peak = Counter()
            phase()
            found[name] = tracker.peak
        for hook in hooks:
            hook.remove()
    return found


# ----------------------------------------------------------------------------------------------------------------------
# A model and a scene without contents


def model_without_weights(cfg, fake):
    """The model, its weights without contents. Its vocabulary takes every word for one token: no tokenizer is needed."""
    vocabulary = Vocabulary(replace(cfg, chat=False))
    vocabulary.text.encode = lambda text: [0] * len(split_words(text))
    with fake:
        model = Alpamayo(cfg, vocabulary)
    model.action_space = ActionSpace(cfg)  # four numbers: with them action are numbers too
    return model


def made_up_scene(cfg, batch, size, text):
    """A Scene (data.py): a straight drive at 10 m/s, black images of `size` (H, W), `text` as its reasoning."""
    path = lambda first, last: F.pad(torch.arange(first, last)[:, None] * 1.0, (0, 2))
    cameras, many = len(cfg.cameras), lambda t: t.expand(batch, *t.shape).contiguous()
    return {
        "images": torch.zeros(batch, cameras, cfg.frames, 3, *size, dtype=torch.uint8), "reasoning": [text] * batch,
        "camera_ids": many(torch.tensor(cfg.cameras)), "route": ["turn left"] * batch,
        "ego_history_xyz": many(path(-15, 1)), "ego_history_rot": many(torch.eye(3).expand(16, 3, 3)),
        "ego_future_xyz": many(path(1, 65)), "ego_future_rot": many(torch.eye(3).expand(64, 3, 3)),
        "ego_kinematics": many(torch.tensor([10.0, 0, 0, 0]).expand(20, 4)),
        "camera_to_ego": many(torch.eye(4).expand(cameras, 4, 4)), "intrinsics": torch.ones(batch, cameras, 10),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Reinforcement learning: the rollouts of a scene when their caches are largest, and what the update is given


@torch.no_grad()
def last_token(model, scene, group, said):
    """What `sample` does at the last of `said` tokens of a group's rollouts of each scene: its loop cannot be run without
    contents, since it ends where they say so."""
    lm, n = model.vlm.model.language_model, len(scene["route"]) * group
    prefix = model.prefill(model.embed_prompt(scene))
    x = prefix.x
    token, _ = pick(model.vlm.lm_head(x[:, -1]).float().repeat_interleave(group, 0), 0.6, 0.98)
    tails = [[a.new_zeros(n, a.shape[1], said - 1, a.shape[3]) for a in kv] for kv in prefix.layers]
    past = [Past(kv, tail) for kv, tail in zip(prefix.layers, tails)]
    at = torch.full((3, 1, 1), prefix.end + said - 1)
    x, tails = lm(lm.embed_tokens(token)[:, None], *rope(at, model.cfg, x.dtype), past)
    pick(model.vlm.lm_head(x[:, -1]).float(), 0.6, 0.98)


def made_up_rollout(model, scenes, group, thought, steps):
    """A Rollout of thoughts of `thought` tokens, and of flow steps, or, for no steps, of 128 action tokens."""
    tokens = torch.full((scenes, group, thought + (0 if steps else 2 * HORIZON)), model.vocabulary.first_action)
    tokens[..., :thought], tokens[..., thought - 1] = 0, model.vocabulary["traj_future_start"]
    flow = torch.zeros(steps + 1, scenes, group, HORIZON, 2)
    chosen = torch.ones_like(tokens, dtype=torch.bool)
    return Rollout([], tokens, chosen, torch.full(tokens.shape, -1.0), flow[0], None, None, flow, {}, eta=0.5)


# ----------------------------------------------------------------------------------------------------------------------
# The table

KINDS = ("weights that stay", "weights that learn", "reference model", "gradients", "optimiser", "keys and values",
         "activations")  # fmt: skip


def table(found):
    """A table in GiB of what `peaks` found: a column a phase, when it needs most."""
    row = lambda name, cells: f"{name:20}" + "".join(f"{cell:>14}" for cell in cells)
    gib = lambda cells: [f"{cell / 2**30:.3f}" for cell in cells]
    lines = [row("GiB, at the peak of", found)]
    for kind in KINDS:
        if any(peak[kind] for peak in found.values()):
            lines.append(row(kind, gib(peak[kind] for peak in found.values())))
    return "\n".join([*lines, row("total", gib(peak.total() for peak in found.values()))])
