"""
Train: the paper's three stages (Sec. 5), from scratch, from a checkpoint, or on after a kill.

    python train.py                                      nano from scratch in the built-in world
    torchrun --nproc_per_node 8 train.py --preset mini   several GPUs, or processes of a CPU
    python train.py --resume out/nano                    after a kill: the losses of an unbroken run
    python train.py --stage reason --init FOLDER --data CLIPS --steps 500       your own clips
    python train.py --stage rl                           the shipped nano, by reinforcement learning
    python train.py --vision flex --flex-tokens 8        another vision encoder
    python train.py --plan --preset alpamayo-r1-10b      the GPU memory it would take (memory.py)

Stage `action` teaches the language model the 128 action tokens, and the expert flow matching. Stage
`reason` puts the Chain of Causation in front of both. `all` runs one after the other. Their loss is

    text + --action-weight * action + flow + --path-weight * ade

in nats a token, nats a token, mean squared velocity, and metres. Stage `rl` is reinforcement
learning, whose rewards, step and flags are in rl.py.

Whatever is random (order of scenes, noise, flow times, rollouts) is a function of seed and step. So
a run goes on after a kill without any random state: from weights, optimisers' moments and, in stage
rl, the scenes' divergences.

The page reads: flags; a run from start to end; model and optimisers; scenes; a step; stage rl;
validation; checkpoints; the plan. What a run's folder holds is checked in runs.py.
"""
import argparse
import json
import os
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import lru_cache, partial

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import data
import doors
import memory
import rl
import runs
import world
from alpamayo import DT, NANO, OF_EXPERT, PRESETS, Alpamayo, ade, read_config, with_words
from doors import device_of, real, save_tensors, whole
from kernels import by_hand
from release import Vocabulary, save_weights

# --------------------------------------------------------------------------------------------------
# Flags


def parse_flags():
    """The run's flags, checked. With --resume they are those of the stopped run."""
    parser = doors.Flags("Train Alpamayo-R1.")
    add_run_flags(group(parser, "run"))
    add_model_flags(group(parser, "model"))
    add_data_flags(group(parser, "data"))
    add_learning_flags(group(parser, "what learns"))
    add_optimiser_flags(group(parser, "optimiser"))
    add_loss_flags(group(parser, "losses of stages action and reason"))
    rl.add_flags(group(parser, "stage rl"))
    if parser.parse_known_args()[0].stage == "rl":
        parser.set_defaults(**rl.DEFAULTS)
    flags = parser.parse_args()
    if flags.resume is not None:
        return runs.flags_of_stopped_run(flags.resume, parser)
    if flags.init is None and flags.stage == "rl" and flags.preset == "nano" and not flags.plan:
        flags.init = NANO
    source = os.path.basename(os.path.abspath(flags.init or ""))
    name = f"{source}-{flags.stage}" if flags.init else flags.preset
    if flags.out is None:
        flags.out = os.path.join("out", name)
    check_flags(flags, parser.error)
    return flags


def group(parser, title):
    """add(name, default, help, type, ...) for a group of flags; with default False it is a switch.

    A type is whole(least, most), real(least, most) or another function of the text."""
    flags = parser.add_argument_group(title)

    def add(name, default, help, type=str, **more):
        kind = {"action": "store_true"} if default is False else {"type": type}
        flags.add_argument(name, default=default, help=help, **kind, **more)

    return add


def add_run_flags(add):
    others = ", ".join(f"--{k.replace('_', '-')} {v}" for k, v in rl.DEFAULTS.items())
    add("--stage", "all", "action tokens and expert | reasoning in front of them | one after the "
        f"other | reinforcement learning, with {others} where not given",
        choices=("action", "reason", "all", "rl"))
    add("--steps", 600, "optimiser steps", whole(1))
    add("--action-share", 0.1, "share of the steps that stage `all` spends in stage `action`",
        real(0, 1))
    add("--resume", None, "go on with the run that wrote FOLDER; takes no other flag",
        metavar="FOLDER")
    add("--out", None, "for checkpoints and log.jsonl (default: out/PRESET, or out/INIT-STAGE)",
        metavar="FOLDER")
    add("--overwrite", False, "write over the run or the checkpoint that is in --out")
    add("--val-every", 200, "steps between validation passes", whole(1))
    add("--save-every", 200, "steps between checkpoints", whole(1))
    add("--best", False, "early stopping: keep the checkpoint of the least ADE in validation, too, "
        "in OUT/best")
    add("--seed", 0, "of weights, order and noise", whole())
    add("--device", None, "cpu | cuda | mps (default: cuda, where there is one)", device_of)
    add("--threads", 0, "CPU threads of each process; 0: PyTorch's choice", whole(0, 1024))
    add("--shard", 0, "under torchrun: each process has a part of every weight, gradient and "
        "moment (FSDP2), not all of them; N, how many there are, is for --plan", whole(0, 100_000),
        nargs="?", const=1, metavar="N")
    add("--plan", None, "print the memory that these flags need, of a GPU (bfloat16 arithmetic) or "
        "a CPU (float32), and stop", choices=("gpu", "cpu"), nargs="?", const="gpu")


def add_model_flags(add):
    unset = argparse.SUPPRESS  # unset flags keep --init's or the preset's value
    add("--preset", "nano", "size of a model from scratch; the largest is for --plan",
        choices=tuple(PRESETS))
    add("--width", 1.0, "of a model from scratch: how wide its layers are, times the preset's",
        real(0, 16, above=0))
    add("--init", None, "start from this checkpoint, ours or the release's", metavar="FOLDER")
    add("--vision", unset, "image tokens | triplane tokens | Flex scene tokens; another encoder "
        "than --init's starts untrained behind its tower (default: --init's, or image)",
        choices=("image", "triplane", "flex"))
    add("--planes-patch", unset, "with --vision triplane: cells to a token", whole(1, 1000),
        nargs=3, metavar=("X", "Y", "Z"))
    add("--flex-tokens", unset, "with --vision flex: scene tokens", whole(1, 10_000))
    add("--keep", unset, "share of the image tokens kept; the least salient go",
        real(0, 1, above=0))


def add_data_flags(add):
    add("--data", "world", "`world`, or a folder of clips that clips.py can read")
    add("--hold-out", None, "share of the clips to validate on and not to learn from: whole clips, "
        "or the end of a single one (default: a tenth of ten clips or more, else 0, and then "
        "validation says how well they were learned)", real(0, 0.9))
    add("--cameras", None, "of the clips, by id (default: those of 0, 1, 2 and 6 that there are)",
        whole(0, 6), nargs="+", metavar="ID")
    add("--scenes", 8000, "training scenes of the world, rendered once to disk",
        whole(1, world.SEEDS["val"]))
    add("--val-scenes", 128, "scenes of a validation pass", whole(1))
    add("--size", (64, 128), "pixels of the world's images", whole(1, 8192), nargs=2,
        metavar=("H", "W"))
    add("--cache", "data", "where rendered scenes are kept", metavar="FOLDER")
    add("--workers", None, "processes that render them, 0: none but this one (default: one a core)",
        whole(0, 1024))
    add("--front-only", 0.1, "share of steps with the front cameras alone, for rigs without others",
        real(0, 1))
    add("--routes", 0.5, "share of steps that tell the route, so that a model can do without",
        real(0, 1))
    add("--own", 0, "so many scenes more, three times: the model drives, the expert says how to go "
        "on from where it got to. Half of a batch are then such scenes (DAgger; not the paper's)",
        whole())
    add("--blind", False, "grey images: what can be known without looking")
    add("--says", "reasoning", "what stage `reason` learns to say before it drives: the whole "
        "reasoning | the meta-action alone, what is decided without why (the paper's Table 6)",
        choices=("reasoning", "meta"))


def add_learning_flags(add):
    add("--train", "all", "what learns; the release trains first vlm, then expert",
        choices=("all", "vlm", "expert"))
    add("--lora", 0, "of the vlm only adapters of this rank learn, in the language model's layers; "
        "checkpoints have them merged. The expert learns as --train says. 0: no adapters",
        whole(0, 10_000), metavar="RANK")
    add("--dtype", "float32", "of frozen weights; --init's are rounded to it. What learns is "
        "float32", choices=("float32", "bfloat16"))
    add("--checkpointing", False, "compute activations again in backward instead of keeping them")


def add_optimiser_flags(add):
    add("--batch", 32, "scenes a step, over all processes", whole(1, 10**6))
    add("--accumulate", 1, "pieces of each process's share of the batch, to save memory", whole(1))
    add("--lr", 2e-3, "AdamW's learning rate: embeddings, heads, norms, biases", real(0, 1))
    add("--muon-lr", 0.01, "Muon's learning rate: matrices inside the layers; 0: AdamW for all",
        real(0, 1))
    add("--weight-decay", 0.05, "of matrices", real(0, 10))
    add("--warmup", 40, "steps of linear warm-up", whole())
    add("--decay", 0.4, "share of the steps, at the end, over which the rates fall to 0",
        real(0, 1))
    add("--clip", 1.0, "largest gradient norm", real(0, 1e9, above=0))


def add_loss_flags(add):
    add("--action-weight", 0.5, "weight of the action tokens' loss", real(0, 1e6))
    add("--path-weight", 0.2, "weight of `ade`, metres between the flow's path and the driven one; "
        "the paper has none", real(0, 1e6))
    add("--action-every", 2, "the 128 action tokens join every so many steps; 1: always", whole(1))
    add("--hide-actions", 0.5, "share of scenes whose action tokens are not read, see "
        "Alpamayo.supervised_losses", real(0, 1))
    add("--drive-every", 8, "in stage `reason` one step in so many has no reasoning, so that the "
        "model can also drive at once; 0: none", whole())
    add("--expert-teaches", 1.0, "share of the steps from which on the flow's loss teaches the "
        "vlm, too, which the paper's stop-gradient prevents; 1: never", real(0, 1))
    add("--flow-samples", 2, "noise levels a scene, which share its cache", whole(1, 1000))


def check_flags(flags, error):
    """Calls error(line) where flags do not go together, or name folders that are not there."""
    if flags.lora and flags.train == "expert":
        error(f"--lora {flags.lora} --train expert: the vlm must be among what learns")
    if flags.expert_teaches < 1 and flags.train != "all":
        error(f"--expert-teaches {flags.expert_teaches:g} --train {flags.train}: takes --train all")
    rl.fill_in(flags)
    if flags.stage == "rl":
        rl.check_flags(flags, error)
    if flags.shard and flags.episode:
        error(f"--shard --episode {flags.episode:g}: drives end after different numbers of plans, "
              "and sharded processes go in step")
    if flags.shard == 1 and flags.plan:
        error("--plan --shard: of how many processes? --shard N")
    if flags.plan:
        return
    if flags.own and (flags.data != "world" or flags.stage not in ("reason", "all")):
        error(f"--own {flags.own}: the model drives in the world, thinking: it takes --data world "
              "and --stage reason or all")
    if flags.preset == "alpamayo-r1-10b":
        error(f"--preset {flags.preset}: this can only be planned, with --plan; start from the "
              "release with --init")
    if flags.stage == "reason" and not flags.init:
        error("--stage reason starts from a checkpoint of stage action: give it with --init, or "
              "run --stage all")
    if flags.stage == "rl" and not flags.init:
        error("--stage rl starts from a checkpoint of stage reason: give it with --init")
    if flags.says == "meta" and flags.stage not in ("reason", "all"):
        error(f"--says meta --stage {flags.stage}: it is said in stages reason and all")
    if flags.lora and not flags.init:
        error("--lora adapts a model that has learned: give it with --init")
    if flags.lora and os.path.realpath(flags.init) == os.path.realpath(flags.out):
        error(f"--out {flags.out}: must be another folder than --init, whose weights a run with "
              "--lora needs to go on")
    for name in ("init", "data", "out", "cache"):
        folder = getattr(flags, name)
        made = name in ("out", "cache") and folder and not os.path.exists(folder)
        if not made and folder not in (None, "world") and not os.path.isdir(folder):
            error(f"--{name} {folder}: expected a folder")
    if flags.init and flags.width != 1:
        error(f"--width {flags.width:g}: --init's model is as wide as it is")
    if flags.best and flags.shard:
        error("--best --shard: the best is kept of models that a process has whole")
    if flags.best and flags.stage == "rl":
        error("--best: stage rl validates on several splits, none of which decides")
    if not flags.init:
        config_from_scratch(flags)  # raises where there is no such model


# --------------------------------------------------------------------------------------------------
# A run, from start to end


@dataclass
class Run:
    """What travels together through a run."""

    flags: argparse.Namespace
    device: torch.device = torch.device("cpu")
    arithmetic: str = "float32"  # or bfloat16
    rank: int = 0
    world_size: int = 1
    mesh: object = None  # with --shard: the devices that share the weights
    store: object = None  # of what the processes tell one another
    watch: memory.Watch = None  # over the other processes
    model: Alpamayo = None
    engine: object = memory.by_itself  # what computes a function of the model, see `learn`
    to_sample: memory.WholeModel = None  # of a sharded model
    params: list = None  # of the model, those that learn
    optimisers: list = None  # pairs (optimiser, its full learning rate)
    scenes: object = None  # to learn from
    own: int = 0  # how many of them are of the model's own driving; they are the last
    val: object = None  # to validate on
    signs: dict = field(default_factory=dict)  # what else its losses depend on, see runs.signs_of
    # Stage rl:
    reference: Alpamayo = None  # the reference policy, if there is a KL term
    judge: rl.Judge = None  # a language model that grades reasoning
    held: dict = field(default_factory=dict)  # {split: scenes to validate on}
    ordinary: object = None  # scenes to rehearse
    known: torch.Tensor = None  # (scenes,) how much model and rewards last disagreed, at first 0

    def __post_init__(self):
        pieces = self.world_size * self.flags.accumulate
        self.piece, rest = divmod(self.flags.batch, pieces)  # scenes that are read at a time
        if rest:
            raise ValueError(f"--batch {self.flags.batch}: must be a multiple of processes x "
                             f"--accumulate = {pieces}")
        self.first = self.rank * self.flags.accumulate  # its first piece among those of a batch

    @property
    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, self.arithmetic == "bfloat16")

    def say(self, text):
        """Prints, above the progress bar; the first process alone."""
        if self.rank == 0:
            tqdm.write(text)


def main():
    flags = parse_flags()
    if flags.plan:
        return print_plan(flags)
    run = start(flags)
    with ending_together(run), runs.own_folder(flags) if run.rank == 0 else nullcontext():
        run.model = starting_model(run)  # before the scenes: it decides how they are shown
        load_scenes(run)
        run.model = run.model or model_from_scratch(run)  # after the scenes: its words are theirs
        if flags.stage == "rl":
            prepare_rl(run)
        prepare(run)
        run.signs |= runs.signs_of(run)
        loop(run, restore(run) if flags.resume else 0)


def loop(run, first):
    """The steps from `first` on: learn, validate, log, save."""
    flags = run.flags
    run.say(f"{flags.resume or flags.init or flags.preset}: {counts(run)}; {len(run.scenes)} "
            f"scenes; {run.world_size} x {run.device.type}, {run.arithmetic}; steps {first} to "
            f"{flags.steps}; writes {flags.out}")
    with together(run):
        log = runs.begin_log(flags.out, first, run.say) if run.rank == 0 else None
    begin = time.time()
    tokens = 0
    bar = tqdm(total=flags.steps, initial=first, disable=run.rank > 0)
    with bar, runs.telling_what_is_saved(flags.out):
        for step in range(first, flags.steps):
            add_own_scenes(run, step)
            line = rl_step(run, step) if flags.stage == "rl" else supervised_step(run, step)
            tokens += line.pop("tokens")
            seconds = time.time() - begin
            speed = {"tok/s": round(tokens / seconds),
                     "scenes/s": round(flags.batch * (step + 1 - first) / seconds, 1)}
            if run.device.type == "cuda":
                speed["GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
            losses = {k: line[k] for k in ("text", "action", "flow", "ade") if k in line}
            bar.set_postfix({"stage": line["stage"], **losses, **speed}, refresh=False)
            bar.update()
            last = step + 1 == flags.steps
            if last or (step + 1) % flags.val_every == 0:
                line["val"] = validate(run, line["stage"])
                report(run, f"step {step + 1:6}", line["stage"], line["val"])
            write_down(run, line, log, last)
    look = f"python sample.py --checkpoint {flags.out}"
    if flags.stage == "rl" and flags.data == "world":
        split = next((one for one in flags.split if one != "train"), "val")
        watch = f"python -m tools.watch --split {split} --seed 3"
        look = f"{watch} --checkpoint {flags.init} --beside {flags.out}"
    run.say(f"done in {(time.time() - begin) / 60:.1f} minutes; look at it: {look}")


def counts(run):
    total = sum(p.numel() for p in run.model.parameters())
    return f"{total:,} parameters, {sum(p.numel() for p in run.params):,} learn"


def report(run, when, stage, values):
    if stage == "rl":
        return run.say(rl.lines_of(when, values))
    values = "  ".join(f"{k} {v:.3f}" for k, v in values.items())
    run.say(f"{when} {stage:6} validation: {values}")


# --------------------------------------------------------------------------------------------------
# Many devices. torchrun starts this program once for each; with one process nothing here acts

JOIN = 300  # s that processes have to come together


def number_of_process(name, default):
    """A number that torchrun puts into the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r} in the environment, expected a whole number")
    return int(text)


def start(flags):
    """The Run on this process's device. Under torchrun it is one of several."""
    rank = number_of_process("RANK", 0)
    world_size = number_of_process("WORLD_SIZE", 1)
    if not rank < world_size:
        raise ValueError(f"RANK {rank}, WORLD_SIZE {world_size}: expected ranks from 0 on, as "
                         "torchrun sets them")
    if flags.resume:
        runs.share_anew(flags, world_size)
    elif flags.shard > 1 and flags.shard != world_size or flags.shard and world_size == 1:
        raise ValueError(f"--shard {flags.shard}: there are {world_size} processes; torchrun "
                         "--nproc_per_node N starts N")
    if flags.threads:
        torch.set_num_threads(flags.threads)
    device = flags.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    if cuda:
        number = number_of_process("LOCAL_RANK", device.index or 0)
        if number >= torch.cuda.device_count():
            raise ValueError(f"no GPU {number} for this process: there are "
                             f"{torch.cuda.device_count()}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    by_hand(device, torch.float32)  # a wrong ALPAMAYO_KERNELS ends it here
    # GPU: bfloat16 arithmetic, float32 weights that learn. CPU: --dtype, float32 is faster.
    run = Run(flags, device, "bfloat16" if cuda else flags.dtype, rank, world_size)
    run.signs = {"pieces": str(flags.batch // run.piece), "processes": str(world_size),
                 "device": f"{device.type}, {run.arithmetic}"}
    if flags.own % int(run.signs["pieces"]):
        raise ValueError(f"--own {flags.own}: must be a multiple of the {run.signs['pieces']} "
                         "pieces of a batch")
    if world_size > 1:
        join(run)
    return run


def join(run):
    """Meets the other processes."""
    kind = run.device.type
    backend = {"cuda": "nccl", "cpu": "gloo"}.get(kind)
    if not backend or not getattr(dist, f"is_{backend}_available")():
        raise ValueError(f"{run.world_size} processes on {kind}: this PyTorch has no "
                         f"{backend or 'way'} to join them; --device cpu can")
    door = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        wait = timedelta(seconds=JOIN)
        store, *_ = next(dist.rendezvous("env://", run.rank, run.world_size, timeout=wait))
        run.store = store
        # Long: the others wait while the first renders the world. Who dies is seen by the Watch.
        options = dict(store=store, rank=run.rank, world_size=run.world_size)
        dist.init_process_group(backend, timeout=timedelta(hours=12), **options)
    except (RuntimeError, ValueError) as error:
        line = str(error).partition("\n")[0][:200]
        raise ValueError(f"process {run.rank} of {run.world_size} found no others at {door}: "
                         f"{line}") from None
    told = partial(runs.saved_in, run.flags.out)
    run.watch = memory.Watch(store, run.rank, run.world_size, told)
    if run.flags.shard:
        run.mesh = dist.init_device_mesh(kind, (run.world_size,))


@contextmanager
def ending_together(run):
    """Where one process ends early all do, and say which it was: memory.Watch."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt, ValueError, OSError, FloatingPointError):
        raise
    except BaseException as error:  # of a collective, perhaps: then the Watch knows, and ends it
        if run.watch and not isinstance(error, torch.OutOfMemoryError | MemoryError):
            time.sleep(10)
        raise
    if run.watch:
        run.watch.leave()
        run.engine = None  # DDP freed after the group waits for ever, now and then
        dist.destroy_process_group()


@contextmanager
def together(run):
    """All processes end where what stands in this block fails in one of them, which says why.

    In the block no process waits for others."""
    error = None
    try:
        yield
    except Exception as problem:
        error = problem
    if run.world_size > 1:
        failed = torch.tensor(float(error is not None), device=run.device)
        dist.all_reduce(failed)
        if failed and not error:
            error = SystemExit(1)
    if error:
        raise error


def learn(run, function, last=True):
    """Adds the gradients of a piece of the batch. function() is the loss, and what to return.

    The engine averages gradients over the processes: DDP at the last piece of an update, before
    which it would be needless; FSDP2 at every piece, see memory.shard."""
    later = run.world_size > 1 and not run.mesh and not last
    with run.engine.no_sync() if later else nullcontext():
        loss, found = run.engine(function)
        loss.backward()
    return found


def mean_of(run, values):
    """{name: number}, each the mean over the processes. What is None is so in all."""
    if run.world_size == 1:
        return values
    names = [name for name, value in values.items() if value is not None]
    means = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
    means = means.to(run.device)
    dist.all_reduce(means)
    return values | dict(zip(names, (means / run.world_size).tolist()))


def share_of(run, numbers):
    """A process's part of the numbers of a batch's scenes: run.first is the first of its pieces."""
    return numbers[run.first * run.piece :][: run.flags.accumulate * run.piece]


def model_to_sample(run):
    """A model that a process can ask on its own. All processes must call this."""
    if not run.mesh:
        return run.model
    half = run.arithmetic == "bfloat16"
    if not run.to_sample:
        dtype = torch.bfloat16 if half else torch.float32
        run.to_sample = memory.WholeModel(run.model, run.flags.lora, dtype)
    return run.to_sample.refresh()


# --------------------------------------------------------------------------------------------------
# Model and optimisers

SEEING = ("vision", "planes_patch", "flex_tokens", "keep")
WIDTHS = ("n_embd", "n_mlp", "v_embd", "v_mlp", "e_embd", "e_mlp", "a_embd")
OF_MUON = (".layers.", ".blocks.", "merger", ".triplane.", ".flex.")  # in a parameter's name


def seeing(flags):
    """The Config's fields that the flags set, {name: value}."""
    found = {k: v for k, v in vars(flags).items() if k in SEEING}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


def starting_model(run):
    """The model of --resume or --init, seeing as the flags say; None for a run from scratch."""
    flags = run.flags
    # Checkpoints have adapters merged: a run with adapters goes on from the weights before them.
    source = flags.init if flags.lora else flags.resume or flags.init
    if not source:
        return None
    model = Alpamayo.from_pretrained(source, getattr(torch, flags.dtype), run.device)
    cfg = replace(model.cfg, **seeing(flags))
    if cfg != model.cfg:
        model = with_new_encoder(run, model, cfg)
    return model


def with_new_encoder(run, model, cfg):
    """The model, seeing as cfg says. Weights are taken over by name; a new encoder is untrained."""
    new = Alpamayo(cfg, model.vocabulary)
    new.init_weights(seeded(run.flags.seed))
    have = new.state_dict()
    old = model.state_dict().items()
    taken = {k: v for k, v in old if k in have and v.shape == have[k].shape}
    fresh = len(new.load_state_dict(taken, strict=False).missing_keys)
    run.say(f"{run.flags.init}: all tensors but {fresh} new ones, which see by {cfg.vision}")
    if fresh and run.flags.lora:
        raise ValueError(f"--lora: an untrained encoder, --vision {cfg.vision}, would never learn; "
                         "train it without")
    return new.to(run.device)


def config_from_scratch(flags):
    """The Config of --preset, --width and how it sees; still without words."""
    cfg = replace(PRESETS[flags.preset], **seeing(flags))
    wide = {name: round(flags.width * getattr(cfg, name)) for name in WIDTHS}
    return replace(cfg, **wide)


def model_from_scratch(run):
    """A model of --preset. Its vocabulary is that of the training scenes."""
    cfg = config_from_scratch(run.flags)
    cfg = with_words(cfg, run.scenes.reasoning + list(data.ROUTES.values()))
    model = Alpamayo(cfg, Vocabulary(cfg))
    model.init_weights(seeded(run.flags.seed))
    return model.to(run.device)


def prepare(run):
    """Decides what learns (--train's part, or of the language model only adapters), and how."""
    flags = run.flags
    if flags.lora:
        memory.add_adapters(run.model, flags.lora, seeded(flags.seed))
    if flags.checkpointing:
        memory.checkpoint_activations(run.model)
    for name, p in run.model.named_parameters():
        if name.startswith(OF_EXPERT):
            p.requires_grad_(flags.train != "vlm")
        elif flags.lora:
            p.requires_grad_("lora_" in name)
        else:
            p.requires_grad_(flags.train != "expert")
        dtype = torch.float32 if p.requires_grad else getattr(torch, flags.dtype)
        # Copied: a matrix product's last bits depend on where in memory a file put its matrices.
        p.data = p.data.to(dtype, copy=True)
    if run.mesh:
        run.engine = memory.shard(run.model, run.mesh, run.arithmetic == "bfloat16")
    elif run.world_size > 1:
        run.engine = memory.replicate(run.model)
    run.params = [p for p in run.model.parameters() if p.requires_grad]
    make = rl.make_optimisers if flags.stage == "rl" else make_optimisers
    run.optimisers = make(run.model, flags)


def make_optimisers(model, flags):
    """[(optimiser, full learning rate)]: Muon for matrices inside the layers, AdamW for the rest.

    Adapters are AdamW's: Muon's steps are as long in the directions of a zero B as in others."""
    hidden = []
    matrices = []
    vectors = []
    for name, p in model.named_parameters():
        inside = any(part in name for part in OF_MUON) and "lora_" not in name
        if not p.requires_grad:
            continue
        if p.ndim < 2:
            vectors.append(p)
        elif p.ndim == 2 and inside and flags.muon_lr:
            hidden.append(p)
        else:
            matrices.append(p)
    decay = flags.weight_decay
    groups = [dict(params=matrices, weight_decay=decay), dict(params=vectors, weight_decay=0.0)]
    adam = torch.optim.AdamW(groups, flags.lr, betas=(0.9, 0.99))
    muon = torch.optim.Muon([dict(params=hidden)], flags.muon_lr, weight_decay=decay)
    return [(adam, flags.lr), (muon, flags.muon_lr)]


def seeded(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def rate(step, flags):
    """Share of the full learning rate at a step: warm-up, plateau, linear fall to zero."""
    rising = (step + 1) / max(flags.warmup, 1)
    falling = (flags.steps - step) / max(flags.steps * flags.decay, 1e-9)
    return min(rising, 1.0, falling)


# --------------------------------------------------------------------------------------------------
# Scenes


def load_scenes(run):
    """Training scenes and validation scenes, as the model wants to be shown them."""
    flags = run.flags
    cfg = run.model.cfg if run.model else PRESETS[flags.preset]
    unit = cfg.patch * cfg.merge
    if not cfg.max_pixels and any(side % unit for side in flags.size):
        raise ValueError(f"--size {flags.size}: height, width must be multiples of {unit}")
    load = world_scenes if flags.data == "world" else clip_scenes
    for turn in (run.rank == 0, run.rank > 0):  # the first process renders what is not on disk
        with together(run):
            if turn:
                run.scenes, run.val = load(run, cfg)
    if flags.data != "world":
        learned = "the scenes learned from" if run.val is run.scenes else f"{len(run.val)} others"
        run.say(f"{flags.data}: {len(run.scenes)} scenes to learn from; validation on {learned}")


def world_scenes(run, cfg):
    flags = run.flags
    view = data.view_of(cfg, flags.size)
    load = partial(data.load, "world", folder=flags.cache, workers=flags.workers, **view)
    if flags.stage == "rl":
        load_split = partial(load, scenes=flags.scenes, start=rl.START)
        sets = {split: load_split(split=split) for split in flags.split}
        if flags.rehearse:
            run.ordinary = sets.get("train") or load_split(split="train")
        for split in dict.fromkeys([flags.split[0], "val", "rare"]):
            run.held[split] = load(split=split, scenes=flags.val_scenes)
        return data.Together(list(sets.values())), run.held[flags.split[0]]
    train = load(split="train", scenes=flags.scenes)
    return train, load(split="val", scenes=flags.val_scenes)


ROUNDS = 0.4, 0.6, 0.75  # of the steps: when the model drives, and learns from that
OWN = 1_000_000  # train seeds apart that the rounds begin to drive


def add_own_scenes(run, step):
    """From ROUNDS on, scenes that the model got itself into are among those to learn from."""
    flags = run.flags
    number = run.own // flags.own if flags.own else len(ROUNDS)
    if number == len(ROUNDS) or step < ROUNDS[number] * flags.steps:
        return
    run.model.eval()
    model = model_to_sample(run)

    def policy(scene):
        shown = data.in_grey(scene) if flags.blind else scene
        with run.autocast:
            out = rl.likeliest_of(model, shown, flags.flow_steps, length=flags.max_new_tokens)
        return out.actions[:, 0]

    first = OWN * (number + 1)
    view = data.view_of(run.model.cfg, flags.size)

    parts = flags.batch // run.piece  # as many as pieces: the same for any number of processes

    def own_set(part):
        folder = os.path.join(flags.out, f"own-{number}-{part}")
        start = first + part * OWN // parts
        return data.own_set(folder, policy, start, flags.own // parts, **view)

    with together(run):  # each process drives for its share
        for part in range(run.first, run.first + flags.accumulate):
            own_set(part)
    with together(run):
        run.scenes = data.Together([run.scenes, *map(own_set, range(parts))])
    run.own += flags.own
    add_own_scenes(run, step)  # a resumed run has several to add


def clip_scenes(run, cfg):
    """Scenes of clips; those held out are of other clips, or else of another time (--hold-out)."""
    flags = run.flags
    view = dict(frames=cfg.frames, frame_dt=cfg.frame_dt, camera_ids=flags.cameras)
    if not cfg.max_pixels:  # a model of the world knows only the world's cameras
        view |= dict(size=tuple(flags.size), rig=world.RIG)
    clips = data.load(flags.data, **view)
    silent = clips.reasoning.count("")
    if silent and flags.stage != "action":
        raise ValueError(f"{flags.data}: {silent} of {len(clips)} scenes have no reasoning; write "
                         "it, or --stage action")
    learned, held = split_clips([(clip.name, t0) for clip, t0 in clips.cuts], flags.hold_out)
    if not held:
        return clips, clips
    if not learned:
        raise ValueError(f"{flags.data}: nothing is left to learn from, as what is held out must "
                         f"be {APART:g} s away; --hold-out 0")
    return some_of(clips, learned), some_of(clips, held)


APART = (world.PAST + world.FUTURE) * DT  # s between scenes of a clip that share nothing


def split_clips(cuts, share):
    """(Numbers to learn from, numbers held out) of scenes [(clip, t0)]; share: None for default."""
    names = list(dict.fromkeys(name for name, _ in cuts))
    if share is None:
        share = 0.1 if len(names) >= 10 else 0.0
    if not share:
        return list(range(len(cuts))), []
    if len(names) > 1:  # the last clips, at least one, but not all
        last = names[-min(max(1, round(share * len(names))), len(names) - 1) :]
        held = [i for i, (name, _) in enumerate(cuts) if name in last]
        return [i for i in range(len(cuts)) if i not in held], held
    times = sorted(t0 for _, t0 in cuts)
    start = times[-max(1, round(share * len(times)))]
    held = [i for i, (_, t0) in enumerate(cuts) if t0 >= start]
    return [i for i, (_, t0) in enumerate(cuts) if t0 <= start - APART], held


def some_of(clips, numbers):
    """Some of the scenes of ClipScenes."""
    part = copy(clips)
    for name in ("cuts", "names", "reasoning"):
        setattr(part, name, [getattr(clips, name)[i] for i in numbers])
    return part


def scene_numbers(run, step):
    """Which scenes a process takes at a step. Their order is random, and another every epoch.

    Where some are of the model's own driving, every other one is."""
    flags = run.flags
    others = len(run.scenes) - run.own
    numbers = []
    for i in share_of(run, range(step * flags.batch, (step + 1) * flags.batch)):
        of_own = run.own > 0 and i % 2 == 1
        count = run.own if of_own else others
        number = order_of(i // count, count, flags.seed)[i % count]
        numbers.append(number + others * of_own)
    return numbers


@lru_cache(4)
def order_of(epoch, count, seed):
    """The order of an epoch's scenes."""
    return torch.randperm(count, generator=seeded(data.seed_of(seed, epoch))).tolist()


def pieces(run, scenes, numbers):
    """Yields these scenes on the device, as many at a time as a step reads, as the flags show them:
    --blind makes their images grey, --says meta cuts their reasoning short."""
    for i in range(0, len(numbers), run.piece):
        scene = data.to_device(scenes.batch(numbers[i : i + run.piece]), run.device)
        scene = meta_actions_of(scene) if run.flags.says == "meta" else scene
        yield data.in_grey(scene) if run.flags.blind else scene


def front_only(scene):
    """The Scene as a car sees it that has but a front wide and a front tele camera."""
    keep = [i for i, camera in enumerate(scene["camera_ids"][0].tolist()) if camera in (1, 6)]
    if not keep:
        return scene
    keys = scene.keys() & {"images", "camera_ids", "camera_to_ego", "intrinsics"}
    return scene | {key: scene[key][:, keep] for key in keys}


def meta_actions_of(scene):
    """The Scene whose reasoning is its meta-action: what is decided, without why."""
    return scene | {"reasoning": [text.partition(" since ")[0] for text in scene["reasoning"]]}


def hide_route(scene):
    """The Scene without its route.

    Drops unsignalled turns, which cannot be predicted without the route, unless all are such."""
    if "route" not in scene:
        return scene
    shown = data.without_route(scene)
    signal = scene["ego_kinematics"][:, -1, 3]
    keep = [i for i, way in enumerate(scene["route"]) if way == data.ROUTES[0] or signal[i]]
    return data.rows_of(shown, keep) if keep else shown


# --------------------------------------------------------------------------------------------------
# A step of the stages action and reason


def stage_at(step, flags):
    if flags.stage != "all":
        return flags.stage
    return "action" if step < flags.action_share * flags.steps else "reason"


def lesson_at(step, flags):
    """(stage whose losses a step has, whether the costly action tokens are among them)."""
    every = flags.drive_every
    if every and step % every == 1 % every:
        return "action", True  # drive at once: the vlm learns from the action tokens alone
    stage = stage_at(step, flags)
    nothing_else = flags.train == "vlm" and stage == "action"
    return stage, nothing_else or step % flags.action_every == 0


def supervised_step(run, step):
    """Returns the step's line of the log, and in it `tokens`, how many all processes read.

    A loss is the mean over the pieces of a batch of each one's mean, however the pieces are shared
    among processes: a trace in a piece of short ones counts a little more."""
    flags = run.flags
    run.model.train()
    lesson, with_actions = lesson_at(step, flags)
    insulate = insulated(flags, step)
    means = defaultdict(float)
    for i, scene in enumerate(pieces(run, run.scenes, scene_numbers(run, step)), 1):
        generator = seeded(data.seed_of(flags.seed, step, run.first + i - 1), run.device)
        if torch.rand(1, generator=generator, device=run.device) < flags.front_only:
            scene = front_only(scene)
        if torch.rand(1, generator=generator, device=run.device) >= flags.routes:
            scene = hide_route(scene)
        last = i == flags.accumulate
        losses = backward(run, scene, lesson, with_actions, generator, insulate, last)
        for name, value in losses.items():
            means[name] += value.item() / flags.accumulate
    means = mean_of(run, means)  # if one is not finite all processes end
    for name, value in means.items():
        rl.expect_finite(step, f"loss `{name}`", torch.tensor(value))
    means["grad_norm"] = update(run, step).item()
    means["tokens"] *= flags.accumulate * run.world_size
    return {"step": step + 1, "stage": stage_at(step, flags), **means}


def total_loss(losses, flags):
    """The weighted sum of the losses that teach --train's part."""
    weights = {}
    if flags.train != "expert":
        weights |= {"text": 1.0, "action": flags.action_weight}
    if flags.train != "vlm":
        weights |= {"flow": 1.0, "ade": flags.path_weight}
    return sum(weights[name] * losses[name] for name in weights if name in losses)


def insulated(flags, step):
    """Whether the expert's loss stops before the vlm in this step: --expert-teaches."""
    return step < flags.expert_teaches * flags.steps


def backward(run, scene, lesson, with_actions, generator, insulate=True, last=True):
    """The losses of a piece of the batch. Their gradients add to those of the pieces before."""
    flags = run.flags

    def losses_of_piece():
        with run.autocast:
            losses = run.model(scene, lesson, action_tokens=with_actions, generator=generator,
                               flow_samples=flags.flow_samples, hide_actions=flags.hide_actions,
                               insulate=insulate)
        found = {name: value.detach() for name, value in losses.items()}
        return total_loss(losses, flags) / flags.accumulate, found

    return learn(run, losses_of_piece, last)


def update(run, step):
    """Moves the parameters, at the step's rates. Returns the gradients' norm before clipping."""
    norm = memory.gathered(clip_grad_norm_(run.params, run.flags.clip))
    if not run.flags.plan:  # a planned norm has no value
        rl.expect_finite(step, "`grad_norm`", norm)
    for optimiser, full in run.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = full * rate(step, run.flags)
        with MuonsMatrices(run.arithmetic):
            optimiser.step()
        optimiser.zero_grad()
    return norm


class MuonsMatrices(TorchFunctionMode):
    """What PyTorch's Muon makes orthogonal: it casts that to bfloat16 first, which is seen here.

    In float32 arithmetic it stays float32. For bfloat16 most CPUs have no instructions: on one
    core with AVX2 a step of nano's 72 matrices takes 0.25 s; in bfloat16, 3.4 s. A sharded matrix
    is gathered: every process finds the same whole update, and its parameter takes its part."""

    def __init__(self, arithmetic):
        super().__init__()
        self.arithmetic = arithmetic

    def __torch_function__(self, function, types, args=(), kwargs=None):
        casts = function is torch.Tensor.bfloat16
        if casts and self.arithmetic == "float32":
            function = torch.Tensor.float
        out = function(*args, **(kwargs or {}))
        if casts and memory.is_sharded(out):
            from torch.distributed.tensor import Replicate

            out = out.redistribute(placements=[Replicate()])
        return out


# --------------------------------------------------------------------------------------------------
# Stage rl


def prepare_rl(run):
    """What stage rl has beside a model and scenes."""
    flags = run.flags
    run.known = torch.zeros(len(run.scenes))
    if flags.data != "world":
        run.held = {"held out": run.val}
        run.ordinary = run.scenes
    if flags.judge:
        answers = os.path.join(flags.out, "judge.jsonl")
        run.judge = rl.Judge(flags.judge, flags.judge_model, answers, store=run.store)
    if (flags.kl or flags.kl_drive) and flags.lora:
        run.reference = run.model  # its adapters switched off
    elif flags.kl or flags.kl_drive:
        model = Alpamayo.from_pretrained(flags.init, getattr(torch, flags.dtype), run.device,
                                         **seeing(flags))
        run.reference = reference_of(run, model)


def reference_of(run, model):
    """A reference policy of its own, of which only the `replay` is asked for."""
    model.requires_grad_(False)
    if run.mesh:
        engine = memory.shard(model, run.mesh, run.arithmetic == "bfloat16")
        replay = model.replay
        model.replay = lambda *given: engine(partial(replay, *given))
    return model


def rl_step(run, step):
    """Returns the step's line of the log; that of the first has a validation `before`."""
    flags = run.flags
    line = {}
    if step == 0:
        line["before"] = validate(run, "rl")
        report(run, "before     ", "rl", line["before"])
    insulate = insulated(flags, step)
    rehearsal = partial(rehearse, run, step, insulate) if flags.rehearse else None
    line |= rl.step(run, step, model_to_sample(run), partial(learn, run), partial(mean_of, run),
                    rehearsal, insulate)
    run.say(rl.line_of(line))
    return line


def rehearse(run, step, insulate, update_number):
    """Adds the gradients of stage reason on a batch of ordinary scenes. Returns its loss.

    Of action tokens only where they are what drives."""
    flags = run.flags
    seed = data.seed_of(flags.seed, step, 1 + update_number)
    numbers = torch.randint(len(run.ordinary), (flags.batch,), generator=seeded(seed)).tolist()
    total = 0.0
    for i, scene in enumerate(pieces(run, run.ordinary, share_of(run, numbers)), 1):
        generator = seeded(data.seed_of(seed, run.first + i - 1), run.device)

        def losses_of_piece(scene=scene, generator=generator):
            with run.autocast:
                losses = run.model(scene, "reason", action_tokens=flags.policy == "tokens",
                                   generator=generator, flow_samples=flags.flow_samples,
                                   insulate=insulate)
            loss = total_loss(losses, flags) / flags.accumulate
            return flags.rehearse * loss, loss.item()

        total += learn(run, losses_of_piece, last=i == flags.accumulate)
    return total


# --------------------------------------------------------------------------------------------------
# Validation


@torch.no_grad()
def validate(run, stage):
    """{name: mean}: losses, ADE (m) of one greedy sample, shares of right decisions, exact texts.

    Scenes and noise are the same every time. Processes share the scenes, so all must call this."""
    flags = run.flags
    run.model.eval()  # in stage rl for good: the update replays what was sampled
    model = model_to_sample(run)
    if stage == "rl":
        with run.autocast:
            found = rl.validate(model, run.held, flags, run.judge, run.rank, run.world_size)
        return mean_of(run, found)
    reason = stage == "reason"
    names = ["action", "flow", "ade"] + ["text", "right", "exact"] * reason
    sums = torch.zeros(len(names) + 1, dtype=torch.float64)  # last: scenes
    count = min(flags.val_scenes, len(run.val))
    starts = range(run.rank * run.piece, count, run.world_size * run.piece)
    numbers = [i for seed in starts for i in range(seed, min(seed + run.piece, count))]
    for seed, scene in zip(starts, pieces(run, run.val, numbers)):
        with run.autocast:
            values = model(scene, stage, generator=seeded(seed, run.device))
            out = model.sample(scene, n=1, temperature=0, steps=5, max_new_tokens=64, seed=seed,
                               reason=reason)
        values["ade"] = ade(out.xyz[:, 0], scene["ego_future_xyz"]).mean()
        pairs = zip(out.reasoning, scene["reasoning"])
        rights = torch.tensor([data.is_right(said, true) for (said,), true in pairs])
        values["right"], values["exact"] = rights[:, 2:].double().mean(0)
        row = [float(values[name]) for name in names] + [1.0]
        sums += len(scene["images"]) * sums.new_tensor(row)
    run.to_sample = None  # a step of these stages needs its room
    if run.world_size > 1:
        sums = sums.to(run.device)
        dist.all_reduce(sums)
    return dict(zip(names, (sums[:-1] / sums[-1]).tolist()))


# --------------------------------------------------------------------------------------------------
# Checkpoints that survive a kill; what is checked of them stands in runs.py


def write_down(run, line, log, last):
    """Writes a step's line into the log and, where it is time, a checkpoint and the curves."""
    flags = run.flags
    for name, value in (line | line.get("before", {}) | line.get("val", {})).items():
        if isinstance(value, float):
            rl.expect_finite(line["step"] - 1, f"`{name}`", torch.tensor(value))
    with together(run):
        if log:  # process 0's
            print(json.dumps(line), file=log, flush=True)
    if last or line["step"] % flags.save_every == 0:
        save(run, line["step"], line["stage"])
    if flags.best and "val" in line:
        with together(run):
            if log:
                keep_best(run, line, log)
    if log and flags.stage == "rl" and "val" in line:
        rl.draw_curves(log.name, os.path.join(flags.out, "curves.png"))


def save(run, step, stage):
    """Writes the checkpoint to use and, to go on from, all that learns and the moments.

    They replace the last ones when all files are whole and finite."""
    flags = run.flags
    names = {p: name for name, p in run.model.named_parameters()}
    tensors = {f"model.{names[p]}": p.detach() for p in run.params}
    for i, (optimiser, _) in enumerate(run.optimisers):
        for p, state in optimiser.state.items():
            for key, value in state.items():  # exp_avg, momentum_buffer, ...
                tensors[f"{i}.{key}.{names[p]}"] = value
    if run.known is not None:
        tensors["known"] = run.known
    settings = {"format": runs.FORMAT, "flags": json.dumps(runs.kept(flags)), "step": str(step),
                "tensors": str(len(tensors)), **run.signs}
    reasoning = "off" if stage == "action" else "on"
    if run.mesh:
        return save_sharded(run, tensors, settings, reasoning)
    with together(run):
        if run.rank == 0:
            with runs.new_checkpoint(flags.out) as new:
                save_tensors(os.path.join(new, runs.STATE), tensors, settings)
                run.model.save_pretrained(new, reasoning=reasoning)


def keep_best(run, line, log):
    """Writes the checkpoint to use into OUT/best, if this validation's ADE is the least so far."""
    errors = [past["val"]["ade"] for past in doors.read_json_lines(log.name) if "val" in past]
    if errors[-1] == min(errors):
        with runs.new_checkpoint(os.path.join(run.flags.out, "best")) as new:
            reasoning = "off" if line["stage"] == "action" else "on"
            run.model.save_pretrained(new, reasoning=reasoning)


def save_sharded(run, tensors, settings, reasoning):
    """The same of a sharded model. Each process writes its parts of what is sharded; the first
    writes the rest and, a file of weights at a time, the checkpoint to use."""
    first = run.rank == 0
    folder = runs.new_checkpoint(run.flags.out) if first else nullcontext(
        os.path.join(run.flags.out, runs.NEW))
    with folder as new:
        with together(run):
            doors.require_finite({k: memory.local(v) for k, v in tensors.items()}, new)
        rest = runs.write_parts(new, tensors, settings)
        if first:
            save_tensors(os.path.join(new, runs.STATE), rest, settings)
            run.model.save_pretrained(new, reasoning=reasoning)
        else:
            save_weights(run.model, None)  # its parts of the tensors
        dist.barrier()


@torch.no_grad()
def restore(run):
    """Puts a stopped run's weights and moments into place. Returns the step to go on with."""
    path, settings = runs.read_settings(run.flags.resume)
    for line in runs.differences(run, path, settings):
        run.say(line)
    tensors = runs.read_tensors(run, path, settings)
    run.known = tensors.pop("known", None)
    params = dict(run.model.named_parameters())
    for name, p in params.items():
        if p.requires_grad:
            p.copy_(tensors.pop(f"model.{name}"))
    for entry, value in tensors.items():
        i, key, name = entry.split(".", 2)
        optimiser, _ = run.optimisers[int(i)]
        # Counts of steps, which have no dimension, stay on the CPU.
        optimiser.state[params[name]][key] = value.to(run.device) if value.ndim else value
    return int(settings["step"])


# --------------------------------------------------------------------------------------------------
# The plan


def print_plan(flags):
    """Prints the memory that a step with these flags takes, without taking it (memory.py)."""
    cfg = replace(read_config(flags.init), **seeing(flags)) if flags.init else None
    cfg = cfg or config_from_scratch(flags)
    size = (1080, 1920)  # NVIDIA's cameras
    text = " word" * 38
    if not cfg.max_pixels:  # a model of the world
        texts = [data.sentence(cause, world.LEFT) for cause in data.CAUSES]
        cfg = with_words(cfg, texts)
        size = flags.size
        text = max(texts, key=len)
    arithmetic = "bfloat16" if flags.plan == "gpu" else flags.dtype
    with memory.one_of(flags.shard) as mesh:
        run = Run(flags, arithmetic=arithmetic, world_size=max(flags.shard, 1), mesh=mesh)
        fake = memory.FakeTensorMode(allow_non_fake_inputs=True)
        make = partial(memory.model_without_weights, cfg, fake, getattr(torch, flags.dtype))
        run.model = make()
        prepare(run)
        for optimiser, _ in run.optimisers:
            for group in optimiser.param_groups:
                group["foreach"] = flags.plan == "gpu"  # PyTorch's choice there
        if flags.stage == "rl" and (flags.kl or flags.kl_drive):
            run.reference = run.model if flags.lora else reference_of(run, make())
        scene = memory.made_up_scene(cfg, run.piece, size, text)
        scene["images"] = fake.from_tensor(scene["images"])
        rollouts = f" of {flags.group} rollouts" if flags.stage == "rl" else ""
        each = f", each of {flags.shard} devices" if flags.shard else ""
        print(f"{flags.init or flags.preset}, stage {flags.stage}: {counts(run)}; {run.piece} "
              f"scenes{rollouts} at a time{each}, {run.arithmetic} arithmetic")
        found = memory.peaks(run, phases_of_step(run, scene))
        print(memory.table(memory.with_kernels(found, run, scene)))


def phases_of_step(run, scene):
    """{name: function} of what a step on this Scene does, one after the other."""
    flags = run.flags
    change = partial(update, run, 0)
    insulate = insulated(flags, flags.steps - 1)  # the last step takes most
    if flags.stage != "rl":
        lesson = "action" if flags.stage == "action" else "reason"
        teach = partial(backward, run, scene, lesson, True, None, insulate)
        phases = {"losses": partial(twice, run, teach), "update": change}
        return phases | {"validation": partial(model_to_sample, run)} if run.mesh else phases
    steps = 0 if flags.policy == "tokens" else flags.flow_steps
    out = memory.made_up_rollout(run.model, run.piece, flags.group, flags.max_new_tokens, steps)
    out.eta = 0.0 if flags.objective == "nft" else out.eta

    model_to_sample(run)  # it stays

    def try_out():
        model = model_to_sample(run)
        with run.autocast:
            memory.last_token(model, scene, flags.group, out.tokens.shape[2])

    def losses_of_piece():
        advantage = dict.fromkeys(rl.HEADS, torch.zeros(run.piece, flags.group))
        with run.autocast:
            losses = rl.losses_of(run.model, run.reference, scene, out, advantage, flags,
                                  insulate=insulate)
        return losses.pop("policy"), None

    learn_from_rollouts = partial(learn, run, losses_of_piece)
    phases = {"rollouts": try_out, "losses": partial(twice, run, learn_from_rollouts)}
    if flags.rehearse:
        phases["rehearsal"] = partial(backward, run, scene, "reason", False, None, insulate)
    return phases | {"update": change}


def twice(run, teach):
    """With --accumulate a second piece of the batch finds the gradients of the first."""
    for _ in range(min(2, run.flags.accumulate)):
        teach()


if __name__ == "__main__":
    doors.run(main)
