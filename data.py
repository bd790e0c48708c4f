"""
Scenes, and where they come from.

A Scene is the one thing that crosses between data and model: a dictionary, batched first.

    images            (B, cameras, frames, 3, H, W) uint8, oldest frame first
    camera_ids        (B, cameras) long, ascending: 0 cross left, 1 front wide, 2 cross right, 6 front tele
    ego_history_xyz   (B, 16, 3)       10 Hz, in the ego frame at t0; the last one is t0: origin and identity
    ego_history_rot   (B, 16, 3, 3)
    ego_kinematics    (B, 20, 4)       t0-1.9 .. t0: speed m/s, acceleration m/s^2, steering angle rad,
                                       turn signal (-1 right, 0 off, 1 left)
    ego_future_xyz    (B, 64, 3)       t0+0.1 .. t0+6.4 s
    ego_future_rot    (B, 64, 3, 3)
    reasoning, name   lists of B str:  why the driver does what it does; the situation, or the clip and its time
    route             list of B str:   turn left, turn right, go straight; the world's scenes have it, clips need not
    camera_to_ego     (B, cameras, 4, 4)
    intrinsics        (B, cameras, 10) see `project`

Ego frame: origin at the rear axle on the ground, x forward, y left, z up; metres, seconds, yaw left-positive.
Camera axes: z out of the lens, x right, y down. All numbers are float32 unless said.

The world (world.py) is our own traffic: it needs no download, and because we made the cause of every scene we know its
label. The page reads: the words, scenes of the world, driving in it, its scenes on disk; motion in words; real clips,
of NVIDIA, of KITTI and of one's own (see `read_folder`), and their labelling.

    python data.py --scenes 16000 --size 64 128             # make a training set
    python data.py --cost                                   # what a scene costs, by part
    python data.py --splits                                 # of what the splits are made
    python data.py --look sheet.png --seeds 0 12            # look at twelve scenes
    python data.py --keyframes CLIP --out labels            # find the key frames of a clip, prepare their labels
    python data.py --read-labels labels                     # check what was filled in, make CLIP/reasoning.json
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import time
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from alpamayo import DT, rot_of
from clips import load_clips
from motion import comfort_of
from world import (
    FUTURE, HISTORY, LEFT, PAST, RIGHT, SEEDS, WHEELBASE, WORLD_VERSION, World,
    images_of, locate, rig_camera)


# ----------------------------------------------------------------------------------------------------------------------
# The words: closed sets of decisions (Table 1 of the paper), components (Table 2), an open reason

# Table 1 calls them: set speed tracking, lead obstacle following, speed adaptation (road events), gap-searching,
# acceleration for passing, yield (agent right-of-way), stop for static constraints. The more urgent come first: where
# causes meet, the first one decides.
LONGITUDINAL = ("yield", "stop", "follow", "search a gap", "adapt speed", "pass", "keep speed")
# And: lane keeping, merge / split, out-of-lane nudge (here: straddle), in-lane nudge, lane change, pull-over, turn,
# lateral manoeuvre abort. The world uses keep lane, nudge, straddle, change lane and turn.
LATERAL = ("keep lane", "merge left", "merge right", "straddle left", "straddle right", "nudge left", "nudge right",
           "change lane left", "change lane right", "pull over", "turn left", "turn right", "abort")
COMPONENTS = ("critical object", "traffic light", "yield or stop control", "road event", "lane or lane lines",
              "routing intent", "ODD constraint")

# cause -> longitudinal decision, lateral decision, what its critical component is, reason. {side} is the side of the
# cause, {other} the other one.
CAUSES = {
    "free": ("keep speed", "keep lane", "lane or lane lines", "the road ahead is free"),
    "curve": ("adapt speed", "keep lane", "road event", "the road bends {side} ahead"),
    "slower lead": ("follow", "keep lane", "critical object", "the car ahead is slower"),
    "braking lead": ("follow", "keep lane", "critical object", "the car ahead is braking"),
    "stopped lead": ("follow", "keep lane", "critical object", "the car ahead has stopped"),
    "red light": ("stop", "keep lane", "traffic light", "the light ahead is red"),
    "resume": ("keep speed", "keep lane", "traffic light", "the light ahead has turned green"),
    "green light": ("keep speed", "keep lane", "traffic light", "the light ahead is green"),
    "stop sign": ("stop", "keep lane", "yield or stop control", "a stop sign stands ahead"),
    "pedestrian": ("yield", "keep lane", "critical object", "a pedestrian crosses from the {side}"),
    "waiting pedestrian": ("keep speed", "keep lane", "critical object", "the pedestrian on the {side} waits"),
    "cut-in": ("yield", "keep lane", "critical object", "a car cuts in from the {side}"),
    "cones": ("keep speed", "straddle {other}", "critical object", "cones block the {side} side of the lane"),
    "parked car": ("keep speed", "nudge {other}", "critical object",
                   "a parked car reaches into the lane from the {side}"),
    "double-parked car": ("keep speed", "straddle {other}", "critical object",
                          "a parked car blocks the {side} side of the lane"),
    "oncoming car": ("yield", "keep lane", "critical object", "an oncoming car blocks the way around the parked car"),
    "lane closed": ("keep speed", "change lane {side}", "critical object", "barriers close the lane"),
    "gap search": ("search a gap", "keep lane", "critical object",
                   "a car on the {side} blocks the way around the barriers"),
    "speed bump": ("adapt speed", "keep lane", "road event", "a speed bump lies ahead"),
    "swerving car": ("yield", "nudge {other}", "critical object", "an oncoming car leaves its lane"),
    "turn": ("adapt speed", "turn {side}", "routing intent", "the route turns {side} at the crossing"),
    "aside": ("keep speed", "keep lane", "lane or lane lines", "the car is on the {side} side of the lane"),
    "deer": ("yield", "keep lane", "critical object", "a deer crosses from the {side}"),
    "cyclist": ("yield", "keep lane", "critical object", "a cyclist crosses from the {side}"),
    "debris": ("keep speed", "straddle {other}", "critical object", "debris blocks the {side} side of the lane"),
}
ROUTES = {LEFT: "turn left", RIGHT: "turn right", 0: "go straight"}     # the text of a route


class Label(NamedTuple):
    """A Chain of Causation as the paper structures it (Sec. 4): a decision a channel, what it rests on, the trace."""
    longitudinal: str
    lateral: str
    components: list        # of dictionaries: component (of COMPONENTS), what, x, y (m, ego), uncertainty (low, high)
    trace: str


def compose(causes):
    """(longitudinal, lateral, trace, which) of causes [(name, side)]. The most urgent longitudinal decision wins, and
    any lateral one but keeping the lane; the trace names only `which` (list of int) causes the decisions that are taken
    (Table 4: proximate cause)."""
    rows = []
    for name, side in causes:
        words = dict(zip(("side", "other"), ("left", "right")[::side]))
        rows.append([text.format(**words) for text in CAUSES[name]])
    longitudinal = min((row[0] for row in rows), key=LONGITUDINAL.index)
    lateral = next((row[1] for row in rows if row[1] != "keep lane"), "keep lane")
    which = [i for i, (a, b, _, _) in enumerate(rows)
             if (a == longitudinal and a != "keep speed") or (b == lateral and b != "keep lane")]
    which = which or list(range(len(rows)))                         # all say: go on
    reasons = " and ".join(rows[i][3] for i in which)
    return longitudinal, lateral, f"{longitudinal} and {lateral} since {reasons}.".capitalize(), which


def sentence(situation, side):
    """The reasoning of a situation whose cause is at `side` (LEFT or RIGHT)."""
    return compose([(situation, side)])[2]


def decisions(text):
    """The (longitudinal, lateral) decisions of a reasoning text, names of the closed sets; None if it has none."""
    longitudinal, _, lateral = text.partition(" since ")[0].strip().lower().partition(" and ")
    return (longitudinal, lateral) if longitudinal in LONGITUDINAL and lateral in LATERAL else None


def labels_of(world):
    """
    The Label of each scene of a World at this moment, from what is there now and nothing of the future. Components are
    the causes of what is decided, and no others (Table 2). Uncertainty is high where haze or distance hides more than
    half: our rule, the paper gives none.
    """
    x, y, _ = (value.tolist() for value in world.poses_to_ego())
    labels = []
    for i, causes in enumerate(world.causes()):
        longitudinal, lateral, trace, which = compose([(cause.name, cause.side) for cause in causes])
        components = []
        for cause in (causes[k] for k in which):
            component = dict(component=CAUSES[cause.name][2], what=cause.name)
            if cause.thing >= 0:
                at = x[i][cause.thing], y[i][cause.thing]
                seen = math.exp(-math.hypot(*at) / (8 / 3 * world.draws[i].visibility))
                component |= dict(x=round(at[0], 1), y=round(at[1], 1), uncertainty="low" if seen > 0.5 else "high")
            components.append(component)
        labels.append(Label(longitudinal, lateral, components, trace))
    return labels


# ----------------------------------------------------------------------------------------------------------------------
# Scenes of the world: two seconds of history, the present, 6.4 seconds of the expert's future

class Recorder:
    """What a car in a World has seen and done, as a Scene of any moment: call `note` at every tick, then `scene`."""

    def __init__(self, world, camera_ids=(0, 1, 2, 6), size=(64, 128), frames=4, frame_dt=0.5):
        self.camera_ids, self.every = sorted(camera_ids), round(frame_dt / DT)
        if not self.camera_ids:
            raise ValueError("camera_ids: expected one camera or more")
        if size[0] < 2 or size[0] % 2 or size[1] < 1:
            raise ValueError(f"size: expected an even height, as the horizon lies between two rows, not {tuple(size)}")
        if frames < 1 or self.every < 1 or abs(self.every * DT - frame_dt) > 1e-6 or (frames - 1) * self.every > PAST:
            raise ValueError(
                f"frames, frame_dt: expected steps of {DT} s in {PAST * DT:g} s, not {frames} of {frame_dt} s")
        self.world, self.size, self.frames = world, tuple(size), frames
        self.track, self.controls, self.images = [], [], {}                             # images by tick

    def note(self, look):
        """Write down where the ego is; look: also what the cameras see."""
        world = self.world
        if look:
            self.images[len(self.track)] = images_of(world, self.camera_ids, self.size)
            for tick in [tick for tick in self.images if tick < len(self.track) - PAST]:
                del self.images[tick]
        self.track.append(torch.stack([world.x, world.y, world.yaw]))
        self.controls.append(torch.stack([world.speed, world.accel, torch.atan(WHEELBASE * world.curvature)], -1))

    def local(self, first, last, origin):
        """Poses of the ticks [first, last) in the ego frame of the tick `origin`: xyz (n, T, 3), rot (n, T, 3, 3)."""
        x, y, yaw = torch.stack(self.track[first:last], -1)                             # (n, T) each, world frame
        x0, y0, turn = self.track[origin][..., None]
        x, y, cos, sin = x - x0, y - y0, torch.cos(turn), torch.sin(turn)
        xyz = torch.stack([cos * x + sin * y, cos * y - sin * x, torch.zeros_like(x)], -1)
        return xyz, rot_of(yaw - turn)

    def scene(self):
        """The batched Scene of the last tick, without its future."""
        world, now = self.world, len(self.track) - 1
        xyz, rot = self.local(now + 1 - HISTORY, now + 1, now)
        signal = world.scene.signal[:, None, None].expand(-1, PAST, 1)
        labels = labels_of(world)
        intrinsics, pose = (torch.stack(value) for value in zip(*(rig_camera(i, *self.size) for i in self.camera_ids)))
        many = lambda value: value.to(world.device).expand(len(world.x), *value.shape)  # all scenes have the same rig
        return dict(
            images=torch.stack([self.images[now - k * self.every] for k in reversed(range(self.frames))], 2),
            camera_ids=many(torch.tensor(self.camera_ids)), ego_history_xyz=xyz, ego_history_rot=rot,
            ego_kinematics=torch.cat([torch.stack(self.controls[now + 1 - PAST:now + 1], 1), signal], -1),
            camera_to_ego=many(pose), intrinsics=many(intrinsics), reasoning=[label.trace for label in labels],
            route=[ROUTES[way] for way in world.route()], name=[one.situation for one in world.draws])


def make_scenes(seeds, camera_ids=(0, 1, 2, 6), size=(64, 128), frames=4, frame_dt=0.5, device="cpu"):
    """A batched Scene of these seeds; frames at t0 - k frame_dt, which must be steps of 0.1 s within the last 2 s."""
    world = World(seeds, device)
    recorder = Recorder(world, camera_ids, size, frames, frame_dt)
    world.catch_up()
    for tick in range(PAST + 1):
        recorder.note(look=(PAST - tick) % recorder.every == 0 and (PAST - tick) // recorder.every < frames)
        if tick < PAST:
            world.step(*world.expert())
    scene = recorder.scene()
    for _ in range(FUTURE):
        world.step(*world.expert())
        recorder.note(look=False)
    scene["ego_future_xyz"], scene["ego_future_rot"] = recorder.local(PAST + 1, PAST + 1 + FUTURE, PAST)
    return scene


@torch.no_grad()
def drive_plans(seeds, plans, device="cpu"):
    """
    What comes of it if the cars of these scenes of the world drive so from t0 on: plans (n, m, T, 2) in m/s^2 and 1/m,
    m of each scene. The others react to the car, see World.step.
    Returns {name: (n, m)}: collision, close, off_road (bool; up to when the plan ends, see World.judge), and beside
    (n, m, T), metres to the left of the line that the car should drive on.
    """
    world = World(seeds, device)
    world.catch_up()
    for _ in range(PAST):
        world.step(*world.expert())
    world, beside, met = world.repeat(plans.shape[1]), [], {}
    for controls in plans.to(device).flatten(0, 1).unbind(1):                           # (n * m, 2), tick by tick
        world.step(*controls.unbind(-1))
        beside.append(locate(world.x, world.y, world.scene.route)[1])
        for name, value in world.judge().items():
            met[name] = met.get(name, torch.zeros_like(value)) | value
    met = {name: value.view(plans.shape[:2]) for name, value in met.items()}
    return met | {"beside": torch.stack(beside, -1).view(plans.shape[:3])}


# ----------------------------------------------------------------------------------------------------------------------
# Closed loop: a policy drives in the world, and is judged

GRACE = 1.0             # s: how long after a scenario's end a collision still counts as its


@torch.no_grad()
def drive(policy, seeds, seconds=20.0, replan=0.5, camera_ids=(0, 1, 2, 6), size=(64, 128), frames=4, frame_dt=0.5,
          device="cpu", film=None):
    """
    Let a policy drive n scenes of the world in closed loop, and judge it.

    policy: a function of a batched Scene (without a future) that returns controls (n, T, 2) in m/s^2 and 1/m, of which
    those of the next `replan` seconds are driven before it is asked again, with fresh images; or None, the expert. Up
    to t0 the expert drives, who does not yet know the cause. The other cars react, see World.step. A scenario ends at
    its first close encounter or when the ego leaves the road (as AlpaSim's do), else after `seconds`; whether it comes
    to a collision is watched for GRACE seconds more.
    film: a function that is given the world, the Scene and the controls at every replanning.

    Returns {name: (n,)}: collision, close, at_fault, off_road (bool; see World.judge); ran, whether it crossed a stop
    line at a red light or a sign at which it had not stood (no event: nobody comes from the side); km driven until the
    end; progress, the metres as a share, at most 1, of those that the expert makes in the same time; comfort, the share
    of the six COMFORT_BOUNDS that held to the end; seconds, when it ended. ValueError where steps do not fit.
    """
    every, ticks = round(replan / DT), round(seconds / DT)
    if not 1 <= every <= FUTURE or abs(every * DT - replan) > 1e-6 or ticks < 1:
        raise ValueError(f"seconds, replan: expected steps of {DT} s, replan at most {FUTURE * DT:g} s, "
                         f"not {seconds} and {replan}")
    world, expert = World(seeds, device), World(seeds, device)
    recorder, n = Recorder(world, camera_ids, size, frames, frame_dt), len(world.x)
    tick_of_look = math.gcd(every, recorder.every)                  # every image that some Scene will show
    alive, met = torch.ones(n, dtype=torch.bool, device=device), {}
    metres, ideal, driven = torch.zeros(n, device=device), torch.zeros(n, device=device), []
    ended = torch.full((n,), float(seconds), device=device)
    for tick in range(PAST + ticks):
        left = tick - PAST
        recorder.note(look=policy is not None and left % tick_of_look == 0)
        if left >= 0 and policy is not None:
            if left % every == 0:
                scene = recorder.scene()
                plan = policy(scene).to(device)
                if plan.shape[:1] != (n,) or plan.shape[1] < every:
                    raise ValueError(f"policy: expected controls ({n}, {every} or more, 2), not {tuple(plan.shape)}")
                if film:
                    film(world, scene, plan)
            controls = plan[:, left % every].unbind(-1)
        else:
            controls = world.expert()
        held, before = world.held, world.bumper() < world.scene.stop
        world.step(*controls)
        expert.step(*expert.expert())
        if left < 0:
            continue
        now = world.judge() | {"ran": held & before & (world.bumper() >= world.scene.stop)}
        for name, value in now.items():
            watched = alive | (left * DT < ended + GRACE) if name == "collision" else alive
            met[name] = met.get(name, torch.zeros_like(alive)) | (value & watched)
        metres, ideal = metres + DT * world.speed * alive, ideal + DT * expert.speed * alive
        driven.append(torch.stack([world.speed, world.accel, world.curvature, alive.float()], -1))
        over = alive & (now["close"] | now["off_road"])
        ended, alive = torch.where(over, (left + 1) * DT, ended), alive & ~over
        if (left * DT >= ended + GRACE).all():
            break
    speed, accel, curvature, was_alive = torch.stack(driven, 1).unbind(-1)              # (n, T) each
    comfort = torch.stack([(ok | (was_alive == 0)).all(1) for ok in comfort_of(speed, accel, curvature).values()])
    return dict(met, km=metres / 1000, progress=(metres / ideal.clamp(min=1)).clamp(max=1),
                comfort=comfort.float().mean(0), seconds=ended)


# ----------------------------------------------------------------------------------------------------------------------
# The world on disk: made once, memory-mapped ever after

SPLITS = tuple(SEEDS)[:-1]                      # train, val, and what training never shows: tail, rare
TEXTS = ("reasoning", "route", "name")          # the entries of a Scene that are lists of str
BATCH = 32                                      # scenes that a worker makes at a time


def _make_part(job):
    """Make scenes [first, last) of a set and write them where they belong."""
    folder, first, last, start, options = job
    scene = make_scenes(range(start + first, start + last), **options)
    for key, value in scene.items():
        if torch.is_tensor(value):
            np.load(f"{folder}/{key}.npy", mmap_mode="r+")[first:last] = value.numpy()
    return first, {key: scene[key] for key in TEXTS}


class WorldSet:
    """Scenes of the world on disk: `len(set)`, `set.batch(indices)` -> Scene, `set.reasoning` and `set.names`."""

    def __init__(self, folder):
        with open(f"{folder}/set.json") as file:
            about = json.load(file)
        self.folder, self.texts, self.first_seed = folder, about["texts"], about["first_seed"]
        self.reasoning, self.names = self.texts["reasoning"], self.texts["name"]
        self.arrays = {name[:-4]: np.load(f"{folder}/{name}", mmap_mode="r")
                       for name in sorted(os.listdir(folder)) if name.endswith(".npy")}

    def __len__(self):
        return len(self.names)

    def batch(self, indices):
        indices = [int(i) for i in indices]
        # Indexing a memory map reads these rows and no others.
        scene = {key: torch.from_numpy(np.asarray(array[indices])) for key, array in self.arrays.items()}
        return scene | {key: [values[i] for i in indices] for key, values in self.texts.items()}

    def drive_plans(self, indices, plans):
        """See `drive_plans`, of scenes number `indices`."""
        return drive_plans([self.first_seed + int(i) for i in indices], plans)


class Together:
    """Several WorldSets as one: the scenes of the first, then those of the second, and so on."""

    def __init__(self, sets):
        self.places = [(one, i) for one in sets for i in range(len(one))]
        self.reasoning = [text for one in sets for text in one.reasoning]
        self.names = [name for one in sets for name in one.names]

    def __len__(self):
        return len(self.places)

    def batch(self, indices):
        scenes = [one.batch([i]) for one, i in (self.places[int(k)] for k in indices)]
        join = lambda values: torch.cat(values) if torch.is_tensor(values[0]) else sum(values, [])
        return {key: join([scene[key] for scene in scenes]) for key in scenes[0]}

    def drive_plans(self, indices, plans):
        places = [self.places[int(k)] for k in indices]
        return drive_plans([one.first_seed + i for one, i in places], plans)


def load_world(split="train", scenes=16000, camera_ids=(0, 1, 2, 6), size=(64, 128), frames=4, frame_dt=0.5,
               folder="data", start=0, workers=2):
    """
    The built-in world's scenes [start, start + scenes) of a split, as a WorldSet. The first call makes them (393 KB a
    scene of 16 images of 64 x 128), later ones read them from `folder`; all that they depend on is in the set's name.
    An interrupted making starts anew and never leaves half a set. workers = 0 makes it in this process.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, not {split!r}")
    if scenes < 1 or start < 0 or start + scenes > SEEDS["val"]:
        raise ValueError(f"scenes, start: expected scenes within 0 .. {SEEDS['val']}, not {scenes} from {start} on")
    options = dict(camera_ids=tuple(sorted(camera_ids)), size=tuple(size), frames=frames, frame_dt=frame_dt)
    cameras = "".join(map(str, options["camera_ids"]))
    name = f"world{WORLD_VERSION}-{split}-{start}+{scenes}-{size[0]}x{size[1]}-c{cameras}-f{frames}x{frame_dt:g}"
    done = os.path.join(folder, name)
    if not os.path.exists(done):
        _make_set(done, SEEDS[split] + start, scenes, options, workers)
    return WorldSet(done)


def _make_set(done, first_seed, scenes, options, workers):
    making = f"{done}.making-{os.getpid()}"
    os.makedirs(making)
    # Processes of one thread each: threads that share cores with other threads are many times slower.
    pool = multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) if workers else None
    try:
        for key, value in make_scenes([first_seed], **options).items():      # one scene tells shapes and types
            if torch.is_tensor(value):
                np.lib.format.open_memmap(f"{making}/{key}.npy", "w+", value.numpy().dtype, (scenes, *value.shape[1:]))
        jobs = [(making, i, min(i + BATCH, scenes), first_seed, options) for i in range(0, scenes, BATCH)]
        texts = {key: [""] * scenes for key in TEXTS}
        parts = pool.imap_unordered(_make_part, jobs) if pool else map(_make_part, jobs)
        with pool or nullcontext(), tqdm(total=scenes, desc=f"making {os.path.basename(done)}", unit="scene") as bar:
            for first, part in parts:
                for key, values in part.items():
                    texts[key][first:first + BATCH] = values
                bar.update(len(part["name"]))
        with open(f"{making}/set.json", "w") as file:
            json.dump({"options": options, "first_seed": first_seed, "texts": texts}, file)
        if not os.path.exists(done):            # else another process was quicker
            os.rename(making, done)             # a set appears whole or not at all
    finally:
        shutil.rmtree(making, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------
# One door

def load(source, **options):
    """
    Scenes of a source: "world" is the built-in one, with the options of `load_world`; any other is the folder of real
    clips, with those of `load_clips`. Either way: len(set), set.batch(indices) -> Scene, set.names, set.reasoning.
    """
    return load_world(**options) if source == "world" else load_clips(source, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = argparse.ArgumentParser(description="Make scenes of the built-in world, or look at them.")
    parser.add_argument("--split", default="train", choices=SPLITS, help="whose seeds to use")
    parser.add_argument("--scenes", type=int, default=16000, help="how many scenes to make")
    parser.add_argument("--start", type=int, default=0, help="the first scene of the split")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 128), metavar=("H", "W"), help="pixels of an image")
    parser.add_argument("--camera-ids", type=int, nargs="+", default=(0, 1, 2, 6), help="cameras of the rig")
    parser.add_argument("--frames", type=int, default=4, help="frames a camera")
    parser.add_argument("--frame-dt", type=float, default=0.5, help="seconds between frames")
    parser.add_argument("--folder", default="data", help="where sets are kept")
    parser.add_argument("--workers", type=int, default=2, help="processes that make scenes, 0 for none but this one")
    args = parser.parse_args()
    begin = time.perf_counter()
    made = load("world", split=args.split, scenes=args.scenes, camera_ids=args.camera_ids, size=args.size,
                frames=args.frames, frame_dt=args.frame_dt, folder=args.folder, start=args.start, workers=args.workers)
    print(f"{made.folder}: {len(made)} scenes in {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"data.py: {error}") from None

