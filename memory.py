"""
Training in less memory, and a plan of how much a run needs.

    adapters         the language model's matrices are frozen; beside each learns a change of low
                     rank (LoRA)
    checkpointing    activations are computed again in the backward pass instead of being kept
    sharding         each of many devices has a part of every weight, gradient and moment (FSDP2)
    the plan         what a run will need, before it runs: train.py --plan

    python train.py --plan                                              nano from scratch, on a GPU
    python train.py --plan cpu --preset mini --size 128 256 --batch 8   mini on a CPU
    python train.py --plan --preset alpamayo-r1-10b --stage rl --lora 16 --dtype bfloat16 \\
        --checkpointing --accumulate 16                                 the 10B

The plan has no formula that could go stale. It runs the training code (forward, backward,
optimisers) on tensors that have shape and type but no contents, PyTorch's FakeTensor, and counts
every storage from birth to death. A GPU is planned as a CPU with bfloat16 matrix products, whose
optimisers update all tensors at once, as a GPU's do.

On a GPU it adds what the Triton kernels keep while stage rl tries out. Not counted: scratch memory
inside PyTorch's kernels, CUDA's own share, fragmentation. Leave a tenth and one GiB for these. The
plan is for one process, or with --shard N for each of N. Under torchrun without --shard each
process needs all of it for its share of the batch and, with --accumulate, its gradients once more.
"""
import os
import select
import socket
import sys
import threading
import time
import warnings
import weakref
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: F401, train.py's
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import data
from alpamayo import (
    HORIZON,
    ActionEmbed,
    ActionSpace,
    Alpamayo,
    Expert,
    Layer,
    Merger,
    Past,
    Rollout,
    Triplane,
    VisionBlock,
    pick,
    rope,
)
from kernels import decoding, in_multiples, one_launch, sampler
from release import Vocabulary, split_words

# --------------------------------------------------------------------------------------------------
# Adapters


class Adapted(nn.Module):
    """y = W x + B (A x): a frozen matrix W, and a change of rank r that learns.

    LoRA, arXiv 2106.09685. A (r, in) and B (out, r) are float32. B starts at zero, so the model
    starts unchanged. LoRA's factor alpha / r is 1 here: Adam normalises gradients, so another one
    would act like another learning rate. Adapters are in neither the paper nor the release.

    In a state_dict this is one matrix, W + B A. A saved checkpoint therefore has no adapters."""

    def __init__(self, linear, rank, generator=None):
        super().__init__()
        rows, columns = linear.weight.shape
        device = linear.weight.device
        self.weight = linear.weight
        self.on = True
        a = torch.randn(rank, columns, generator=generator)  # on the CPU: the same for any device
        self.lora_A = nn.Parameter((a * columns**-0.5).to(device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, device=device))

    def forward(self, x):
        y = F.linear(x, self.weight)
        if not self.on:
            return y
        low = F.linear(x, self.lora_A.to(x.dtype))  # (..., r)
        return y + F.linear(low, self.lora_B.to(x.dtype))

    @torch.no_grad()
    def merged(self):
        """W + B A, (out, in)."""
        change = self.lora_B @ self.lora_A
        return (self.weight.float() + change).to(self.weight.dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # On the CPU: a GPU may have no room for a second copy. Of a sharded one it has a part.
        merged = self.merged()
        destination[prefix + "weight"] = merged if is_sharded(merged) else merged.cpu()


def add_adapters(model, rank, generator=None):
    """Adapts the language model's seven matrices a layer: q, k, v, o, gate, up, down."""
    for layer in model.vlm.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Adapted(child, rank, generator))


@contextmanager
def without_adapters(model):
    """The reference policy without a second copy of the weights: the model, adapters switched off.

    Gradients are off: a checkpointed layer recomputed in backward would run with adapters on."""
    adapters = [m for m in model.modules() if isinstance(m, Adapted)]
    for adapter in adapters:
        adapter.on = False
    try:
        with torch.no_grad():
            yield model
    finally:
        for adapter in adapters:
            adapter.on = True


# --------------------------------------------------------------------------------------------------
# Activation checkpointing


def checkpoint_activations(model):
    """Every block and layer keeps only its inputs and outputs, the key-value cache among them.

    The backward pass computes the rest again: the memory of one layer at a time, for the time of a
    second forward pass."""
    options = dict(use_reentrant=False, preserve_rng_state=False)  # nothing inside is random
    for m in model.modules():
        if isinstance(m, VisionBlock | Layer):
            m.forward = partial(checkpoint, m.forward, **options)
        elif isinstance(m, Triplane):
            m.update = partial(checkpoint, m.update, **options)  # of one slab of its cells


# --------------------------------------------------------------------------------------------------
# Many devices, by PyTorch's engines. One process needs nothing of this section


class Call(nn.Module):
    """The model as an engine has it: a step is a function of the model, called inside `forward`.

    DDP and FSDP2 work around a module's forward. A step has no one method of the model that does
    all of it, so this module's forward is whatever function it is given."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function):
        return function()


def by_itself(function):
    """The engine of a single process."""
    return function()


def replicate(model):
    """DDP: every device has the whole model; gradients are averaged while backward still runs.

    Some steps leave some parameters without gradient; DDP looks for them, and leaves them so."""
    options = dict(find_unused_parameters=True, gradient_as_bucket_view=True)
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # from 2.13 on
    return DistributedDataParallel(Call(model), broadcast_buffers=False, **options)


def shard(model, mesh, half):
    """FSDP2: every device has a part of each parameter, and of its gradient and moments.

    A layer is whole while it computes, and so are in turn the tower's other weights, a merger or
    an encoder, the embeddings, the head, the expert's norm; the rest with the model. half: they are
    gathered in bfloat16, and gradients are still added up in float32. Every piece of a batch adds
    its gradients to the parts at once: whole ones would take the memory that sharding saves."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # slow to import

    vlm = model.vlm
    tower = vlm.model.visual
    alone = [m for m in model.modules() if isinstance(m, Layer | VisionBlock | Merger)]
    alone += [m for m in (getattr(tower, "flex", None), getattr(tower, "triplane", None)) if m]
    alone += [tower, vlm.model.language_model.embed_tokens, vlm.lm_head, model.expert]
    dtypes = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else {}
    policy = MixedPrecisionPolicy(cast_forward_inputs=False, **dtypes)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    engine = Call(model)
    for part in (*alone, engine):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return engine


def is_sharded(tensor):
    """Whether a tensor is a DTensor, of which each process has a part."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor):
    """A tensor whole, on every device; all processes must ask. Most tensors are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor):
    """What this process has of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def part_of(tensor, like):
    """This process's part of a whole tensor, sharded like another of the same shape."""
    if not is_sharded(like):
        return tensor
    mesh = like.device_mesh
    parts = tensor.chunk(mesh.size())  # as FSDP2 does; the last devices may have nothing
    rank = mesh.get_local_rank()
    rows = parts[rank] if rank < len(parts) else tensor[:0]
    return type(like.detach()).from_local(rows.to(like.device), mesh, like.placements,
                                          shape=like.shape, stride=like.stride())


class WholeModel:
    """A copy of a sharded model to sample with: whole on each device, plain, in 16 bits there.

    Rollouts end after different numbers of tokens. Gathered layer by layer, a model would have to
    be asked equally often in all processes, and every token would move all weights once."""

    def __init__(self, model, rank, dtype):
        with torch.device("meta"):
            copy = Alpamayo(model.cfg, model.vocabulary)
            if rank:
                add_adapters(copy, rank)
        copy.action_space = model.action_space
        for name, buffer in model.named_buffers():
            place, _, leaf = name.rpartition(".")
            copy.get_submodule(place).register_buffer(leaf, buffer)
        self.model = copy.eval()
        self.source = model
        self.dtype = dtype

    @torch.no_grad()
    def refresh(self):
        """The model, with the weights of now; all processes must ask."""
        for name, p in self.source.named_parameters():
            place, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(place)
            own = getattr(module, leaf)
            if own.is_meta:
                dtype = p.dtype if "lora_" in name else self.dtype
                own = nn.Parameter(gathered(p).to(dtype, copy=True), requires_grad=False)
                setattr(module, leaf, own)
            elif p.requires_grad:  # in place: recorded graphs of kernels read from there
                own.copy_(gathered(p))
        return self.model


# --------------------------------------------------------------------------------------------------
# Who ends, ends all


class Watch:
    """Ends this process, with a line, some seconds after another one has ended too early.

    Every process has a connection to process 0. The system closes it when its process ends,
    however it does, and finds out within 40 s when the machine is gone. A process that is slow, or
    waits for a disk, keeps it. told(): what else to say."""

    def __init__(self, store, rank, world_size, told=str):
        self.rank = rank
        self.told = told
        self.lines = {}  # rank: the connection to it
        host = os.environ["MASTER_ADDR"]
        if rank == 0:
            with socket.create_server(("", 0)) as door:
                door.settimeout(300)  # s, as train.JOIN
                store.set("watch", str(door.getsockname()[1]))
                for _ in range(world_size - 1):
                    line, _ = door.accept()
                    self.lines[int(line.recv(16))] = line
        else:
            self.lines[0] = socket.create_connection((host, int(store.get("watch"))))
            self.lines[0].sendall(str(rank).encode())
        for line in self.lines.values():
            line.settimeout(None)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in (("KEEPIDLE", 10), ("KEEPINTVL", 10), ("KEEPCNT", 3)):
                if hasattr(socket, f"TCP_{name}"):  # Linux
                    line.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
        threading.Thread(target=self.look, daemon=True).start()

    def look(self):
        lines = dict(self.lines)
        while lines:
            for line in select.select(list(lines.values()), [], [])[0]:
                rank = next(r for r, one in lines.items() if one is line)
                try:
                    said = line.recv(64).decode()
                except OSError:
                    said = ""
                if said == BYE:
                    del lines[rank]
                else:
                    return self.end(int(said or rank))

    def end(self, rank):
        """Process `rank` has ended: tell the others, and end too."""
        for other, line in self.lines.items():
            if other != rank:
                with suppress(OSError):
                    line.sendall(str(rank).encode())
        time.sleep(GRACE)  # this process may have something of its own to say, and end by itself
        print(f"train.py: process {rank} has ended, so process {self.rank} ends; {self.told()}",
              file=sys.stderr, flush=True)
        os._exit(1)

    def leave(self):
        """From here on this process may end."""
        for line in self.lines.values():
            with suppress(OSError):
                line.sendall(BYE.encode())


BYE = "bye"
GRACE = 3.0  # s


# --------------------------------------------------------------------------------------------------
# The plan: counting


class Tracker(TorchDispatchMode):
    """Bytes of all storages alive, by kind: `now`, and when the total was largest, `peak`."""

    def __init__(self):
        super().__init__()
        self.alive = {}  # id of a storage: (kind, bytes)
        self.now = Counter()
        self.peak = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.index.Tensor:
            indices = []
            for index in args[1]:  # boolean indexing depends on the data; use nonzero()
                is_mask = torch.is_tensor(index) and index.dtype == torch.bool
                indices += index.nonzero().unbind(1) if is_mask else [index]
            args = (args[0], indices)
        out = op(*args, **(kwargs or {}))
        self.count(out)
        if op is torch.ops.fsdp.split_with_sizes_copy.default:
            self.count(kwargs["out"], "weights gathered")
        return out

    def __enter__(self):
        """FSDP2 lets gathered weights go by resizing their storage, which no operation tells."""
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage, size):
            resize(storage, size)
            if id(storage) in self.alive:
                self.count_storage(storage, "weights gathered")

        torch.UntypedStorage.resize_ = resize_and_count
        self.resize = resize
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def count(self, tensors, kind=None):
        """Counts the storages of nested tensors. Without a kind, new ones are activations."""
        for t in tree_leaves(tensors):
            if torch.is_tensor(t):
                self.count_storage(local(t).untyped_storage(), kind)
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def count_storage(self, storage, kind):
        key = id(storage)
        if key not in self.alive:
            weakref.finalize(storage, self.forget, key)
        elif kind:
            self.forget(key)  # to count it anew, as this kind, or in this size
        else:
            return
        kind = kind or "activations"
        self.alive[key] = (kind, storage.nbytes())
        self.now[kind] += storage.nbytes()

    def forget(self, key):
        kind, size = self.alive.pop(key)
        self.now[kind] -= size


def peaks(run, phases):
    """{phase: Counter of bytes by kind, at the phase's peak} of a step of train.py's Run.

    phases: {name: function} in their order, the last is "update". The first update only makes the
    optimisers' moments; the step after it is measured. Works for real tensors as for fake ones."""
    for p in run.params:
        p.grad = torch.zeros_like(p)
    phases["update"]()
    found = {}
    with Tracker() as tracker:
        hooks = name_kinds(tracker, run)
        for name, phase in phases.items():
            tracker.count([p.grad for p in run.params if p.grad is not None], "gradients")
            tracker.peak = Counter()
            phase()
            found[name] = tracker.peak
    for hook in hooks:
        hook.remove()
    return found


def name_kinds(tracker, run):
    """Tells the tracker what is what, now and, by the hooks returned, as gradients come."""
    frozen = [p for p in run.model.parameters() if not p.requires_grad]
    tracker.count([frozen, list(run.model.buffers())], "weights that stay")
    tracker.count(list(run.params), "weights that learn")
    for optimiser, _ in run.optimisers:
        tracker.count(list(optimiser.state.values()), "optimiser")
    if run.to_sample:
        tracker.count(list(run.to_sample.model.parameters()), "copy to sample")
    models = {run.model, run.reference or run.model}
    for reference in models - {run.model}:
        tracker.count(list(reference.parameters()), "reference model")

    def count_gradient(p):
        tracker.count(p.grad, "gradients")

    def count_cache(lm, args, out):
        tracker.count(out[1], "keys and values")

    hooks = []
    if not run.mesh:  # else no parameter has a gradient before it has its part: phase by phase
        hooks += [p.register_post_accumulate_grad_hook(count_gradient) for p in run.params]
    if run.to_sample:
        models.add(run.to_sample.model)
    for model in models:
        hooks.append(model.vlm.model.language_model.register_forward_hook(count_cache))
    return hooks


# --------------------------------------------------------------------------------------------------
# The plan: a model and a scene without contents


def stand_in(cfg):
    """A Vocabulary of this size that takes a word for a token and says nothing: no tokenizer
    needed."""
    vocabulary = Vocabulary(replace(cfg, chat=False))
    vocabulary.text.encode = lambda text: [0] * len(split_words(text))
    vocabulary.text.decode = lambda ids: ""
    return vocabulary


def model_without_weights(cfg, fake, dtype=torch.float32):
    """The model with fake weights."""
    with fake:
        model = Alpamayo(cfg, stand_in(cfg))
    for p in model.parameters():
        p.data = p.data.to(dtype)
    model.action_space = ActionSpace(cfg)  # real: its four numbers make actions real, too
    return model


def made_up_scene(cfg, batch, size, text):
    """A Scene of the world, `batch` times, with black images of `size` (H, W), reasoning `text`."""
    scene = data.make_scenes([0], **data.view_of(cfg, (2, 4)))
    for key, value in scene.items():
        scene[key] = torch.cat([value] * batch) if torch.is_tensor(value) else value * batch
    # Zeros that nobody writes to take no memory.
    scene["images"] = torch.zeros(batch, len(cfg.cameras), cfg.frames, 3, *size, dtype=torch.uint8)
    return scene | {"reasoning": [text] * batch, "route": ["turn left"] * batch}


@contextmanager
def one_of(processes):
    """The devices of so many processes, of which this one is the first and the others do not exist;
    None of one process."""
    if processes < 2:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield dist.init_device_mesh("cpu", (processes,))
    finally:
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# The plan: rollouts of stage rl


@torch.no_grad()
def last_token(model, scene, group, count):
    """The last of `count` tokens of every rollout, when the caches are largest, as in `sample`.

    `sample` itself cannot run without contents: they decide when its loop ends."""
    lm = model.vlm.model.language_model
    prefix = model.prefill(model.embed_prompt(scene))
    token = torch.zeros(len(prefix.x) * group, 1, dtype=torch.long)
    past = []
    for k, v in prefix.layers:
        tail = k.new_zeros(len(token), k.shape[1], count - 1, k.shape[3])
        past.append(Past((k, v), (tail, tail.clone())))
    position = torch.full((3, 1, 1), prefix.end + count - 1)
    x, tails = lm(lm.embed_tokens(token), *rope(position, model.cfg, prefix.x.dtype), past)
    pick(model.vlm.lm_head(x[:, -1]).float(), 0.6, 0.98)


def made_up_rollout(model, scenes, group, thought, steps):
    """A Rollout of `thought` reasoning tokens and flow steps; steps 0: of 128 action tokens."""
    actions = 0 if steps else 2 * HORIZON
    tokens = torch.full((scenes, group, thought + actions), model.vocabulary.first_action)
    tokens[..., :thought] = 0
    tokens[..., thought - 1] = model.vocabulary["traj_future_start"]
    flow = torch.zeros(steps + 1, scenes, group, HORIZON, 2)
    chosen = torch.ones_like(tokens, dtype=torch.bool)
    log_probs = torch.full(tokens.shape, -1.0)
    eta = 0.5 if steps else 0.0
    return Rollout([], tokens, chosen, log_probs, flow[0], None, None, flow, {}, eta=eta)


def with_kernels(peaks, run, scene):
    """The peaks with what the Triton kernels keep, on a GPU, once stage rl has tried out."""
    flags = run.flags
    if flags.stage != "rl" or flags.plan != "gpu":
        return peaks
    said, steps = flags.max_new_tokens, flags.flow_steps
    if flags.policy == "tokens":
        said, steps = said + 2 * HORIZON, 0
    model = run.to_sample.model if run.to_sample else run.model
    kept = kept_by_kernels(model, scene, flags.group, said, steps)
    return {phase: peak + Counter(kernels=kept) for phase, peak in peaks.items()}


@torch.no_grad()
def kept_by_kernels(model, scene, group, said, steps):
    """Bytes that the kernels keep for groups that say so many tokens and take so many steps of the
    flow, or none: buffers of graphs, and of an expert that learns a 16-bit copy."""
    cfg, half = model.cfg, torch.bfloat16
    B, P, _ = model.embed_prompt(scene).x.shape
    N = B * group
    kept, copy = [], 0
    with torch.device("meta"):
        layers = [torch.empty(2, B, cfg.n_kv_head, P, cfg.head_dim, dtype=half).unbind()]
        layers *= cfg.n_layer
        angles = torch.empty(2, 1, 1, said, cfg.head_dim // 2).unbind()
        room = in_multiples(P, decoding.SHARED)
        kept.append(decoding.Recording(None, layers, N, room, angles))
        if steps and not one_launch.fits(cfg, HORIZON, half):
            parts = Expert(cfg), ActionEmbed(cfg), nn.Linear(cfg.e_embd, 2)
            parts = nn.ModuleList(parts).to(half)
            room = in_multiples(said, sampler.ROOM)
            kept.append(sampler.Buffers(*parts, steps, B, N, HORIZON, P, room))
            if next(model.expert.parameters()).dtype == torch.float32:
                copy = sum(p.nbytes for p in parts.parameters())
    tensors = [t for t in tree_leaves([vars(x) for x in kept]) if torch.is_tensor(t)]
    storages = [t.untyped_storage() for t in tensors if not isinstance(t, nn.Parameter)]
    return copy + sum({s._cdata: s.nbytes() for s in storages}.values())


# --------------------------------------------------------------------------------------------------
# The plan: its table

KINDS_OF_BYTES = (
    "weights that stay",
    "weights that learn",
    "weights gathered",
    "copy to sample",
    "reference model",
    "gradients",
    "optimiser",
    "keys and values",
    "activations",
    "kernels",
)


def table(found):
    """What `peaks` found, in GiB: a column a phase, at the phase's peak."""

    def row(name, cells):
        return f"{name:20}" + "".join(f"{cell:>14}" for cell in cells)

    def in_gib(name, sizes):
        return row(name, [f"{size / 2**30:.3f}" for size in sizes])

    peaks = found.values()
    lines = [row("GiB, at the peak of", found)]
    for kind in KINDS_OF_BYTES:
        if any(peak[kind] for peak in peaks):
            lines.append(in_gib(kind, [peak[kind] for peak in peaks]))
    lines.append(in_gib("total", [peak.total() for peak in peaks]))
    return "\n".join(lines)
