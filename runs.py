"""
A run's folder, as train.py keeps it: whose it is, what it holds, whether a stopped run can go on.

    train.lock               held while a run lives: own_folder
    log.jsonl                a line a step: begin_log
    model.safetensors, ...   the checkpoint to use; it replaces an older one when it is whole and
                             finite: new_checkpoint
    training.safetensors     moved there with it, to go on from: what learns, the optimisers'
                             moments and, as text, the settings: flags, step, number of tensors, and
                             the signs, by which a resumed run knows whether all is as it was
    training-STEP/           with --shard: the parts of these tensors, a file from each process
                             (torch.distributed.checkpoint); any number of processes can read them

What cannot work is a ValueError of one line. What changes the losses is said.
"""
import hashlib
import json
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

import doors
import memory

FORMAT = "3"  # of training.safetensors
STATE = "training.safetensors"
PARTS = "training-{}"
NEW = "saving"  # where a checkpoint is written, before it is moved
SHARDS = ("model.safetensors.index.json", "model.safetensors", "model-*-of-*.safetensors")
OF_CHECKPOINT = (STATE, "config.json", "tokenizer.json", "vlm/config.json", *SHARDS)
NOT_KEPT = ("resume", "out", "overwrite", "plan")  # of the flags

# --------------------------------------------------------------------------------------------------
# One run at a time


@contextmanager
def own_folder(flags):
    """--out is this run's alone. ValueError where another run writes it, or files would be lost."""
    lock = os.path.join(flags.out, "train.lock")
    if not flags.resume and not flags.overwrite:
        losses = OF_CHECKPOINT
        if not os.path.exists(lock):  # a run that has saved nothing leaves a log, and its lock
            losses += ("log.jsonl", "curves.png")
        there = [file.name for name in losses for file in Path(flags.out).glob(name)]
        if there:
            resume = "--resume goes on with that run, " * (STATE in there)
            raise ValueError(f"--out {flags.out}: has {there[0]}; {resume}--overwrite writes over "
                             "what is there")
    with doors.locked(lock, f"{flags.out}: another run writes it"):
        for half in Path(flags.out).glob("*.part"):  # of a killed run
            shutil.rmtree(half, ignore_errors=True)
        yield


def begin_log(folder, steps, say):
    """The open log, in which the lines of the first steps are left.

    From here on --resume finds no older run. What is missing is said: say(line)."""
    path = os.path.join(folder, "log.jsonl")
    lines = []
    if not steps:
        with suppress(FileNotFoundError):
            os.remove(os.path.join(folder, STATE))
        older = ("own-*", "best", PARTS.format("*"))
        for old in [path for name in older for path in Path(folder).glob(name)]:
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
    elif os.path.exists(path):
        lines = [line for line in doors.read_json_lines(path) if line.number("step") <= steps]
        for line in lines:
            require_numbers(line)
    if len(lines) < steps:
        say(f"{path}: has {len(lines)} of {steps} steps; the run goes on without the others")
    doors.write_json_lines(path, lines)
    return open(path, "a")


def require_numbers(line):
    """ValueError unless a line of the log has numbers, its stage, and validations of numbers."""
    for name, value in line.items():
        if name in ("val", "before"):
            require_numbers(line.object(name))
        elif not (name == "stage" or value is None or doors.finite(value)):
            raise line.wrong(name, "a number")


@contextmanager
def new_checkpoint(folder):
    """An empty folder to write a checkpoint to. Its files move to `folder` if the block ends well:
    all of them or, on any error, none."""
    new = Path(folder, NEW)
    shutil.rmtree(new, ignore_errors=True)  # of a killed run
    try:
        yield str(new)
        files = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
        files.sort(key=lambda file: file.name == STATE)  # it comes last: it needs the others
        for name in SHARDS:  # of an older checkpoint, in more or fewer files
            for old in Path(folder).glob(name):
                if old.relative_to(folder) not in files:
                    old.unlink()
        for file in files:
            os.makedirs(Path(folder, file).parent, exist_ok=True)
            os.replace(Path(new, file), Path(folder, file))
        for parts in Path(folder).glob(PARTS.format("*")):
            if parts.is_dir() and not any(file.parts[0] == parts.name for file in files):
                shutil.rmtree(parts, ignore_errors=True)  # of an older checkpoint
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def telling_what_is_saved(folder):
    """An error in here says, too, which checkpoint is intact."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(saved_in(folder)) from None
    except (FloatingPointError, OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        kind = next(k for k in (FloatingPointError, OSError, ValueError) if isinstance(error, k))
        raise kind(f"{error}; {saved_in(folder)}") from None


def saved_in(folder):
    """Which checkpoint a run's folder has, in words."""
    with suppress(OSError, SafetensorError), safe_open(os.path.join(folder, STATE), "pt") as f:
        return f"the checkpoint of step {f.metadata()['step']} in {folder} is intact"
    return "no checkpoint was saved"


# --------------------------------------------------------------------------------------------------
# Settings: flags and signs


def kept(flags):
    """What is kept of the flags, {name: value} as JSON has them. Folders are absolute."""
    found = {k: v for k, v in vars(flags).items() if k not in NOT_KEPT}
    for name in ("init", "data", "cache"):
        if found[name] not in (None, "world"):
            found[name] = os.path.abspath(found[name])
    return json.loads(json.dumps(found, default=str))


def signs_of(run):
    """What a run's losses depend on beside its flags and its device, {name: text}."""
    frozen = [p for p in run.model.parameters() if not p.requires_grad]
    if run.reference and run.reference is not run.model:
        frozen += run.reference.parameters()
    told = []
    for some in (run.scenes, run.val, *filter(None, [run.ordinary])):
        told.append(json.dumps([some.names, some.reasoning]).encode())
        for i in range(0, len(some), -(-len(some) // 8)):  # up to eight, spread over all
            shown = some.batch([i]).values()
            told += [v.numpy().tobytes() for v in shown if torch.is_tensor(v)]
    return {
        "sources": sources(),
        "scenes": f"{len(run.scenes)}, {short_hash(told)}",
        "config": short_hash([repr(replace(run.model.cfg, reasoning="on")).encode()]),
        "base": str(sum_of_bits(frozen)),
        "threads": str(torch.get_num_threads()),
        "PyTorch": torch.__version__,
    }


def sum_of_bits(tensors):
    """Of tensors whole or sharded: the same however they are."""
    here = sum(memory.local(p.detach()).view(torch.int16).sum().item() for p in tensors)
    if not any(map(memory.is_sharded, tensors)):
        return here
    total = torch.tensor(here, device=tensors[0].device)
    dist.all_reduce(total)
    return total.item()


@lru_cache
def sources():
    """A short hash of the project's own Python: its rooms, the world and the kernels."""
    root = Path(__file__).parent
    files = [file for folder in (".", "world", "kernels") for file in (root / folder).glob("*.py")]
    return short_hash(file.read_bytes() for file in sorted(files))


def short_hash(parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()[:8]


def read_settings(folder):
    """(path, settings) of the file to go on from; ValueError where there is none of this format.

    settings: {name: text}, but the flags are a dictionary, as `kept` returns it."""
    path = os.path.join(folder, STATE)
    if not os.path.isfile(path):
        raise ValueError(f"--resume {folder}: no run to resume, there is no file {path}")
    try:
        with safe_open(path, "pt") as f:
            settings = f.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: no run to resume ({error})") from None
    if settings.get("format") != FORMAT:
        raise ValueError(f"{path}: written by an earlier train.py, format "
                         f"{settings.get('format')} and not {FORMAT}; go on from it with --init")
    for name in ("flags", "step", "tensors"):
        if name not in settings:
            raise ValueError(f"{path}: {name} is missing")
    flags = doors.parse_json(settings["flags"], f"{path}: flags")
    if not isinstance(flags, dict):
        raise ValueError(f"{path}: flags must be an object of named fields")
    return path, settings | {"flags": flags}


def flags_of_stopped_run(folder, parser):
    """Its flags, read as if they were typed again: what is wrong with them is refused as there."""
    if len(sys.argv) != (2 if "=" in sys.argv[1] else 3):
        parser.error("--resume takes no other flag: the run's own settings hold")
    path, settings = read_settings(folder)
    stopped = settings["flags"]

    def refuse(message):
        raise ValueError(f"{path}: flags: {message}")

    known = {action.dest for action in parser._actions} - {"help", *NOT_KEPT}
    words = []
    for name, value in stopped.items():
        if name not in known:
            refuse(f"{name} is none that this train.py knows")
        flag = "--" + name.replace("_", "-")
        if isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            words.append(flag if value is True else f"{flag}={value}")
    parser.error = refuse
    flags = parser.parse_args(words)
    typed = kept(flags)
    for name, value in stopped.items():
        if typed.get(name) != value:
            refuse(f"{name} is {value!r}")
    step = settings["step"][:20]
    if not (step.isdecimal() and 1 <= int(step) <= flags.steps):
        raise ValueError(f"{path}: step is {step!r}, expected 1 to {flags.steps}")
    flags.resume = flags.out = folder
    return flags


def share_anew(flags, world_size):
    """Changes --accumulate and --shard of a stopped run as its number of processes wants it.

    The pieces of a batch, to which noise and means belong, stay as they are where they can be
    shared equally among the processes; else they become more."""
    _, settings = read_settings(flags.resume)
    pieces = settings.get("pieces", "")[:9]
    pieces = int(pieces) if pieces.isdecimal() else flags.accumulate
    most = flags.batch // world_size
    wanted = -(-pieces // world_size)
    fits = [n for n in range(wanted, most + 1) if flags.batch % (n * world_size) == 0]
    if fits:  # else Run says what is wrong
        flags.accumulate = fits[0]
    flags.shard = int(flags.shard > 0 and world_size > 1)


def differences(run, path, settings):
    """Lines to say of what is not as the stopped run had it.

    ValueError where it cannot go on like this."""
    if settings.get("base") != run.signs.get("base"):
        raise ValueError(f"{run.flags.init or run.flags.resume}: other weights than those that "
                         "this run began with; what it has learned does not fit")
    new = sorted(kept(run.flags).keys() - settings["flags"].keys())
    lines = [f"{path}: has no flag {name}: its default holds" for name in new]
    for name, now in run.signs.items():
        if settings.get(name) != now and name == "processes":
            lines.append(f"{path}: {settings.get(name)} processes when it was saved, {now} now; "
                         "the losses are the same but for rounding, if the pieces are")
        elif settings.get(name) != now:
            lines.append(f"{path}: {name}: {settings.get(name)} when it was saved, {now} now; the "
                         "losses will not be those of an unbroken run")
    return lines


# --------------------------------------------------------------------------------------------------
# Tensors

MOMENTS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}


def write_parts(folder, tensors, settings):
    """Writes this process's parts of the sharded tensors into a new checkpoint's folder; all
    processes must. Returns the other tensors."""
    import torch.distributed.checkpoint as dcp  # slow to import

    parts = {name: t for name, t in tensors.items() if memory.is_sharded(t)}
    place = os.path.join(folder, PARTS.format(settings["step"]))
    settings["parts"] = str(len(parts))
    dcp.save(parts, storage_writer=dcp.HuggingFaceStorageWriter(place, save_distributed=True))
    return {name: t for name, t in tensors.items() if name not in parts}


def read_parts(path, settings, likes):
    """{name: tensor} of the parts beside the file to go on from, sharded as `likes` are: {name:
    a tensor}, and of those all that there are."""
    import torch.distributed.checkpoint as dcp

    place = os.path.join(os.path.dirname(path), PARTS.format(settings["step"]))
    try:
        reader = dcp.HuggingFaceStorageReader(place)
        found = reader.read_metadata().state_dict_metadata
        wrong = sorted(name for name in found if name not in likes
                       or found[name].size != likes[name].shape
                       or found[name].properties.dtype != torch.float32)
        if wrong or settings["parts"] != str(len(found)):
            raise ValueError(f"has {len(found)} tensors, expected {settings['parts']}"
                             + f"; unexpected, or of another shape: {', '.join(wrong[:3])}"
                             * bool(wrong))
        tensors = {name: torch.empty_like(likes[name].detach(), dtype=torch.float32)
                   for name in found}
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (Exception, dcp.api.CheckpointException) as error:
        line = str(error).strip().rpartition("\n")[2][:300]
        raise ValueError(f"{place}: no whole parts of a run to resume ({line})") from None
    return tensors


def read_tensors(run, path, settings):
    """{name: tensor} of the file to go on from: all that it should hold, in shape, finite.

    A weight that has had no gradient yet has no moments. So the file says how many tensors there
    are."""
    names = {p: name for name, p in run.model.named_parameters()}
    likes = {f"model.{names[p]}": p for p in run.params}
    if run.known is not None:
        likes["known"] = run.known
    needed = set(likes)
    for i, (optimiser, _) in enumerate(run.optimisers):
        for p in [p for group in optimiser.param_groups for p in group["params"]]:
            for key in MOMENTS[type(optimiser).__name__]:
                likes[f"{i}.{key}.{names[p]}"] = torch.empty(()) if key == "step" else p
    try:
        with safe_open(path, "pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    for name, tensor in tensors.items():
        if name in likes:
            shape = likes[name].shape
            if tensor.shape != shape or tensor.dtype != torch.float32:
                raise ValueError(f"{path}: tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                                 f"expected torch.float32 {tuple(shape)}")
            tensors[name] = memory.part_of(tensor, likes[name])
    if "parts" in settings:
        tensors |= read_parts(path, settings, likes)
    wrong = sorted((tensors.keys() - likes.keys()) | (needed - tensors.keys()))
    if wrong or settings["tensors"] != str(len(tensors)):
        raise ValueError(f"{path}: has {len(tensors)} tensors, expected {settings['tensors']}"
                         + f"; missing or unexpected: {', '.join(wrong[:3])}" * bool(wrong))
    doors.require_finite({name: memory.local(t) for name, t in tensors.items()}, path)
    return tensors
