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
import csv
import json
import math
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from alpamayo import DT, LOW_SPEED, project, rot_of, unwrap, write_json, yaw_of
from world import (
    COMBINATIONS, FUTURE, HISTORY, LEFT, PAST, RARE, RIG, RIGHT, SEEDS, SITUATIONS, WHEELBASE, WORLD_VERSION, World,
    draw, locate, rays, rig_camera)


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
            self.images[len(self.track)] = world.render(self.camera_ids, self.size)
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

# The release's comfort: what must stay within bounds, in SI units.
COMFORT_BOUNDS = {
    "accel": (-4.05, 2.40), "lateral accel": (-4.89, 4.89), "jerk": (-8.37, 8.37), "longitudinal jerk": (-4.13, 4.13),
    "yaw accel": (-1.93, 1.93), "yaw rate": (-0.95, 0.95)}
GRACE = 1.0             # s: how long after a scenario's end a collision still counts as its


def comfort_of(speed, accel, curvature):
    """Whether each of the quantities of COMFORT_BOUNDS stays within its bounds: {name: (n, T) bool}, of a drive with
    speed (m/s), accel (m/s^2) and curvature (1/m), each (n, T) at 10 Hz. Jerk is the length of the change of the
    acceleration, longitudinal and lateral. The bounds are the release's; this is what a car that really drove felt, while
    `rl.comfort` applies the release's rule to a path."""
    change = lambda x: torch.diff(x, dim=1, prepend=x[:, :1]) / DT
    rate = curvature * speed
    lateral = rate * speed
    values = (accel, lateral, torch.hypot(change(accel), change(lateral)), change(accel), change(rate), rate)
    return {name: (x >= low) & (x <= high) for (name, (low, high)), x in zip(COMFORT_BOUNDS.items(), values)}


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
# Motion in words: meta-actions and key frames (Tables 3 and 5)
#
# What a car did, told from its poses alone: one longitudinal and one lateral meta-action for each tenth of a second,
# and the moments before a change, at which a driver decides. Poses do not know lanes, lights or other cars: which of
# Table 3's scenarios a key frame belongs to, and who caused it, is left to whoever labels it.

LONGITUDINAL_META = ("gentle accelerate", "strong accelerate", "gentle decelerate", "strong decelerate",
                     "maintain speed", "stop", "reverse")
LATERAL_META = ("steer left", "steer right", "sharp steer left", "sharp steer right", "reverse left", "reverse right",
                "go straight")

# The paper states no thresholds: all of these are ours, chosen on KITTI, comma2k19 and Argoverse drives. Of a pair, the
# first number begins and ends a stretch, and the second must be reached somewhere in it.
SMOOTHING = 0.3             # s, standard deviation of the Gaussian window in which a line is fitted
GENTLE = (0.4, 0.6)         # m/s^2, either way
STRONG = (1.5, 2.0)         # m/s^2
STANDING = (0.3, 0.15)      # m/s, slower than this
REVERSING = (0.15, 0.4)     # m/s backwards
STEER = (0.04, 0.06)        # rad/s of turning; from CALM on it takes less, the same lateral acceleration
SHARP = (0.04, 0.06)        # 1/m: an arc of less than 25 m, and of less than 17 m somewhere
CALM = 8.0                  # m/s
SHORTEST = 0.5              # s, a meta-action that ends sooner is not one


def line_fit(y, sigma=SMOOTHING):
    """
    Values and slopes (per s), (..., T) each, of lines fitted to y (..., T) at 10 Hz, in a Gaussian window at each step.

    A window that reaches beyond an end has only what there is in it. The line keeps that from bending the ends.
    """
    reach = math.ceil(3 * sigma / DT)
    k = torch.arange(-reach, reach + 1, dtype=y.dtype, device=y.device)
    w = torch.exp(-0.5 * (k * DT / sigma) ** 2)
    kernels = torch.stack([w, w * k, w * k * k])[:, None]                   # (3, 1, 2 reach + 1)
    rows = torch.stack([torch.ones_like(y), y]).view(2, -1, 1, y.shape[-1])
    sums = torch.nn.functional.conv1d(rows.flatten(0, 1), kernels, padding=reach).view(2, *y.shape[:-1], 3, -1)
    (s0, s1, s2), (b0, b1, _) = [moments.unbind(-2) for moments in sums]
    spread = s0 * s2 - s1 * s1
    return (s2 * b0 - s1 * b1) / spread, (s0 * b1 - s1 * b0) / spread / DT


def smooth_motion(xyz, rot):
    """
    Poses (..., T, 3), (..., T, 3, 3) at 10 Hz in any fixed frame -> speed m/s (negative in reverse), acceleration
    m/s^2, heading rad (without jumps), turn rate rad/s (left is positive), (..., T) float64 each.
    """
    if xyz.shape[-1:] != (3,) or rot.shape != (*xyz.shape, 3) or xyz.shape[-2] < 3:
        raise ValueError(f"poses: expected xyz (..., T, 3) and rot (..., T, 3, 3), T at least 3, "
                         f"not {tuple(xyz.shape)} and {tuple(rot.shape)}")
    xyz, rot = xyz.double(), rot.double()
    velocity = line_fit(xyz.mT, SMOOTHING / 2)[1].mT                        # (..., T, 3), smoothed once more below
    speed, acceleration = line_fit((velocity * rot[..., 0]).sum(-1))        # along the x axis of the car
    yaw, turn_rate = line_fit(unwrap(yaw_of(rot)))
    return speed, acceleration, yaw, turn_rate


def stretches(x, edge, peak):
    """Where x (..., T) is at least `edge`, in stretches that somewhere reach `peak`: hysteresis both ways in time."""
    def since(on, off):                                                     # from an on to the next off
        last = torch.where(on | off, torch.arange(x.shape[-1], device=x.device), -1).cummax(-1).values
        return (last >= 0) & on.gather(-1, last.clamp(min=0))
    on, off = x >= peak, x < edge
    return since(on, off) | since(on.flip(-1), off.flip(-1)).flip(-1)


def without_short(labels, shortest):
    """Labels (..., T), of which those that last less than `shortest` steps become what follows, or else what was."""
    T = labels.shape[-1]
    step = torch.arange(T, device=labels.device).expand(labels.shape)
    new = torch.ones_like(labels, dtype=torch.bool)
    new[..., 1:] = labels[..., 1:] != labels[..., :-1]
    begin = torch.where(new, step, 0).cummax(-1).values
    later = torch.where(new, step, T).flip(-1).cummin(-1).values.flip(-1)   # the first new label at or after a step
    end = torch.cat([later[..., 1:], torch.full_like(later[..., :1], T)], -1)
    long = end - begin >= shortest
    follows = torch.where(long, step, T).flip(-1).cummin(-1).values.flip(-1)
    before = torch.where(long, step, 0).cummax(-1).values
    return labels.gather(-1, torch.where(follows < T, follows, before))


def meta_actions(xyz, rot):
    """
    What a car did at each step: poses (..., T, 3), (..., T, 3, 3) at 10 Hz in any fixed frame -> longitudinal, lateral
    (..., T) long, indices into LONGITUDINAL_META and LATERAL_META (Table 5).

    Offline: a step's meta-action depends on some steps after it too, so a path of a model should have its history in
    front, and its last half second is the least certain. "Stop" is standing still; braking towards it is to
    decelerate. "Reverse left" is the wheel turned left: the tail swings left, the nose right.
    """
    speed, acceleration, _, turn_rate = smooth_motion(xyz, rot)
    name = LONGITUDINAL_META.index
    longitudinal = torch.full_like(speed, name("maintain speed"), dtype=torch.long)
    for word, sign in (("accelerate", 1), ("decelerate", -1)):
        longitudinal[stretches(sign * acceleration, *GENTLE)] = name("gentle " + word)
        longitudinal[stretches(sign * acceleration, *STRONG)] = name("strong " + word)
    longitudinal[stretches(-speed.abs(), *(-v for v in STANDING))] = name("stop")
    longitudinal[stretches(-speed, *REVERSING)] = name("reverse")
    longitudinal = without_short(longitudinal, round(SHORTEST / DT))

    name = LATERAL_META.index
    lateral = torch.full_like(longitudinal, name("go straight"))
    moving = longitudinal != LONGITUDINAL_META.index("stop")
    reverse = longitudinal == LONGITUDINAL_META.index("reverse")
    wheel = torch.where(reverse, -turn_rate, turn_rate) * moving            # sign: where the wheel is turned to
    curvature = wheel / speed.abs().clamp(min=LOW_SPEED)
    for side, sign in (("left", 1), ("right", -1)):
        steer = stretches(sign * wheel * (speed.abs() / CALM).clamp(min=1), *STEER)
        lateral[steer] = name("steer " + side)
        lateral[steer & stretches(sign * curvature, *SHARP)] = name("sharp steer " + side)
        lateral[steer & reverse] = name("reverse " + side)
    return longitudinal, without_short(lateral, round(SHORTEST / DT))


KEY_KINDS = ("slow down", "stop", "start", "speed up", "reverse", "leave lane left", "leave lane right", "turn left",
             "turn right", "bend left", "bend right")
# Table 3 puts a key frame half a second before the change; the rest again is ours.
LEAD = 0.5                  # s
PAUSE = 1.5                 # s, a change that goes on after less than this is one change
SPEED_CHANGE = 1.0          # m/s, a smaller one is no event
TURN_ANGLE = math.radians(45)   # a bigger change of heading is a turn,
BEND_ANGLE = math.radians(15)   # a smaller one a bend of the road, and one smaller than this nothing
OFFSET, RETURN = 0.6, 4.0   # m, s: out of the lane is who heads aside, and as before within this time, so far beside it
SAME = 1.0                  # s, key frames closer than this are one


def segments(labels):
    """Labels (T,) -> [(label, first step, step after the last)]."""
    cuts = [0, *(labels.diff().nonzero().flatten() + 1).tolist(), len(labels)]
    return [(int(labels[a]), a, b) for a, b in zip(cuts, cuts[1:])]


def key_frames(xyz, rot):
    """
    When something begins in a drive: poses (T, 3), (T, 3, 3) at 10 Hz -> [(step, kinds)], half a second before the
    change (Table 3), kinds of KEY_KINDS. Pairs of kinds such as ("slow down", "turn left") began within a second.

    A stop is named where its braking begins. Leaving the lane is what poses can know of a nudge, a lane change or a
    swerve: heading aside, then as before, but OFFSET metres beside the old line; the way back is part of it if it comes
    at once, else of its own. A change that began before the first pose is left out, for its beginning is not known.
    """
    speed, _, yaw, _ = smooth_motion(xyz, rot)
    longitudinal, lateral = meta_actions(xyz, rot)
    events = speed_events(speed, longitudinal) + lateral_events(xyz.double(), yaw, lateral)
    frames = []                                                             # (step, kinds), in order
    for first, kind in sorted(event for event in events if event[0] > 0):
        step = max(0, first - round(LEAD / DT))
        if not frames or step - frames[-1][0] >= round(SAME / DT):
            frames.append((step, set()))
        frames[-1][1].add(kind)
    return [(step, tuple(kind for kind in KEY_KINDS if kind in kinds)) for step, kinds in frames]


def joined(runs):
    """Changes [(label, first, end)] in order; those of one label with less than PAUSE between them become one."""
    out = []
    for label, first, end in runs:
        if out and out[-1][0] == label and first - out[-1][2] < round(PAUSE / DT):
            out[-1] = (label, out[-1][1], end)
        else:
            out.append((label, first, end))
    return out


def speed_events(speed, longitudinal):
    """[(first step, kind)] of a drive's changes of speed: speed (T,), longitudinal (T,)."""
    coarse = torch.tensor([1, 1, -1, -1, 0, 5, 6])[longitudinal.cpu()]      # of LONGITUDINAL_META
    runs, pause = segments(coarse), round(PAUSE / DT)
    stops = [run for run in runs if run[0] == 5]
    events = [(first, "reverse") for label, first, _ in runs if label == 6]
    braked = set()
    for sign, first, end in joined([run for run in runs if run[0] in (1, -1)]):
        change = sign * float(speed[end - 1] - speed[first])
        into = [stop for stop in stops if sign < 0 and -1 <= stop[1] - end < pause]
        out = [stop for stop in stops if sign > 0 and -1 <= first - stop[2] < pause]
        braked.update(into)
        if into:
            events.append((first, "stop"))
        elif out:
            events.append((out[0][2], "start"))
        elif change >= SPEED_CHANGE:
            events.append((first, "speed up" if sign > 0 else "slow down"))
    return events + [(stop[1], "stop") for stop in stops if stop not in braked]     # rolled to a halt


def lateral_events(xyz, yaw, lateral):
    """[(first step, kind)] of a drive's turns, bends and ways out of the lane: xyz (T, 3), yaw (T,), lateral (T,)."""
    side = torch.tensor([1, -1, 1, -1, 0, 0, 0])[lateral.cpu()]             # of LATERAL_META; no reversing
    runs = joined([run for run in segments(side) if run[0]])
    turned = [float(yaw[end - 1] - yaw[first]) for _, first, end in runs]
    events, busy = [], 0
    for i, (sign, first, end) in enumerate(runs):
        word = "left" if sign > 0 else "right"
        if sign * turned[i] >= TURN_ANGLE:
            events.append((first, "turn " + word))
            continue
        if first < busy:                                                    # on the way back
            continue
        after = slice(end, end + round(RETURN / DT))
        back = (sign * (yaw[after] - yaw[first]) <= 0).nonzero().flatten()
        if len(back):
            back = end + int(back[0])
            swing = any(begin < back and -sign * angle >= TURN_ANGLE        # aside, to take a turn in a wider arc
                        for (_, begin, _), angle in zip(runs[i + 1:], turned[i + 1:]))
            move = xyz[back] - xyz[first]
            aside = sign * float(yaw[first].cos() * move[1] - yaw[first].sin() * move[0])
            if aside >= OFFSET and not swing:
                events.append((first, "leave lane " + word))
            busy = back
        elif sign * turned[i] >= BEND_ANGLE:
            events.append((first, "bend " + word))
    return events


# ----------------------------------------------------------------------------------------------------------------------
# Real clips: NVIDIA's PhysicalAI-AV, KITTI raw, a folder of one's own
#
# A reader turns what lies on the disk into Clips: a Motion (poses at their own times), Cameras (images at their own
# times) and texts. From there on all clips are alike, and ClipScenes cuts Scenes out of them.

CAMERAS = {"cross_left_120fov": 0, "front_wide_120fov": 1, "cross_right_120fov": 2, "rear_left_70fov": 3,
           "rear_tele_30fov": 4, "rear_right_70fov": 5, "front_tele_30fov": 6}
USED = (0, 1, 2, 6)     # the cameras that the release looks through
KINEMATICS = ("speed", "acceleration", "steering", "turn_signal")   # the columns of a Scene's ego_kinematics
TICK = 5e-7             # s, half a microsecond of NVIDIA's clock: times closer than this are the same time


class Camera(NamedTuple):
    read: Callable      # times (frames,) in s -> (frames, H, W, 3) uint8, for each the last image at or before it
    first: float        # s, the first image
    last: float
    intrinsics: torch.Tensor | None         # (10,), see `project`; None where unknown
    camera_to_ego: torch.Tensor | None      # (4, 4)


class Clip(NamedTuple):
    name: str
    motion: "Motion"
    cameras: dict       # camera id -> Camera
    reasoning: dict     # time in s -> text
    starts: list        # s, the t0 that the data itself names; empty: every half second


def load_clips(path, t0=None, camera_ids=None, frames=4, frame_dt=0.1, size=None, rig=None, future=True):
    """
    Scenes of the real clips in a folder -> ClipScenes: `len(set)`, `set.batch(indices)` -> Scene, `set.names`.

    path        NVIDIA's layout (it holds features.csv), a drive of KITTI raw (oxts), or a folder of one's own
                (egomotion.csv): see read_nvidia, read_kitti, read_folder
    t0          a time or a list of times in s on the clip's own clock; left out: its key frames, the times that have
                reasoning, or else every half second. There must be more than 1.6 s of poses before t0, as in the
                release, and 6.4 s after it
    camera_ids  left out: those of 0, 1, 2 and 6 that there are
    frames      images of each camera, frame_dt s apart, the last one at t0
    rig, size   RIG or the like, and (H, W): all images are turned into what the cameras of the rig would see, for
                models that know only the world. Left out, images keep their size, which must be one for all
    future      False asks for no poses after t0; the Scenes then have no ego_future_xyz and ego_future_rot

    A Scene has camera_to_ego and intrinsics where all its cameras are calibrated.
    Raises ValueError or FileNotFoundError: one line that names the file and what was expected of it.
    """
    if (rig is None) != (size is None):
        raise ValueError("rig and size go together: without a rig, images keep their own size")
    return ClipScenes(read_clips(path), t0, camera_ids, frames, frame_dt, size, rig, future)


def read_clips(path):
    """The Clips in a folder of one of the three layouts, see load_clips."""
    path = Path(path)
    readers = {"features.csv": read_nvidia, "oxts": read_kitti, "egomotion.csv": read_folder}
    found = [reader for entry, reader in readers.items() if (path / entry).exists()]
    if not found:
        raise FileNotFoundError(f"{path}: no ego motion in it, expected one of {', '.join(readers)}")
    return found[0](path)


class ClipScenes:
    """The Scenes cut out of clips, see load_clips. `names` and `reasoning` have a str for each."""

    def __init__(self, clips, t0, camera_ids, frames, frame_dt, size, rig, future):
        self.camera_ids, self.size, self.rig, self.future = camera_ids, size, rig, future
        self.ages = frame_dt * np.arange(frames - 1, -1, -1)                # (frames,) s before t0, oldest first
        self.cuts, refused = [], []                                         # (clip, t0) of each Scene; reasons
        for clip in clips:
            first, last = clip.motion.times[[0, -1]]
            every_half = np.arange(first + 2, max(last, first + 2.1), 0.5)  # never empty: a short clip is to be told
            for start in (clip.starts or every_half) if t0 is None else np.atleast_1d(t0):
                reason = self.refusal(clip, float(start))
                if reason:
                    refused.append(reason)
                else:
                    self.cuts.append((clip, float(start)))
        if refused and (t0 is not None or not self.cuts):                   # asked for in vain, or nothing left
            raise ValueError(refused[0])
        self.names = [f"{clip.name} at {start:.1f} s" for clip, start in self.cuts]
        self.reasoning = [next((text for at, text in clip.reasoning.items() if abs(at - start) < DT / 2), "")
                          for clip, start in self.cuts]

    def __len__(self):
        return len(self.cuts)

    def batch(self, indices):
        """Scenes number `indices` -> one Scene. ValueError where their cameras or the sizes of their images differ."""
        indices = [int(i) for i in indices]
        scenes = [self.scene(i) for i in indices]
        for i, scene in zip(indices, scenes):
            ours, first = [(*s["camera_ids"].tolist(), *s["images"].shape, *s) for s in (scene, scenes[0])]
            if ours != first:
                raise ValueError(f"{self.names[i]} cannot be batched with {self.names[indices[0]]}: cameras, sizes of "
                                 "images or calibration differ; choose camera_ids or a rig")
        lists = {key: [scene[key] for scene in scenes] for key in scenes[0]}
        return {key: torch.stack(values) if torch.is_tensor(values[0]) else values for key, values in lists.items()}

    def drive_plans(self, indices, plans):
        """What came of it if the car drove otherwise, a clip cannot tell."""
        return {}

    def scene(self, index):
        """Scene number `index`, not batched."""
        clip, t0 = self.cuts[index]
        views = {}                                  # camera id -> images (frames, 3, H, W), intrinsics, camera_to_ego
        for camera_id, camera in self.sources(clip).items():
            images = torch.from_numpy(camera.read(t0 - self.ages)).permute(0, 3, 1, 2)
            width, height = images.shape[3], images.shape[2]
            if camera.intrinsics is not None and camera.intrinsics[1:3].tolist() != [width, height]:
                raise ValueError(f"{clip.name}: images of camera {camera_id} are {width} x {height} pixels, but its "
                                 "intrinsics are for {:g} x {:g}".format(*camera.intrinsics[1:3]))
            views[camera_id] = images, camera.intrinsics, camera.camera_to_ego
        if self.rig:
            views = reproject(self.rig, views, self.camera_ids, self.size)
        images, intrinsics, poses = zip(*views.values())
        sizes = {camera_id: tuple(view.shape[2:]) for camera_id, view in zip(views, images)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{clip.name}: images must be of one size, by camera they are {sizes}; choose camera_ids")
        scene = clip.motion.scene(t0, self.future)
        scene["images"], scene["camera_ids"] = torch.stack(images), torch.tensor(list(views))
        if all(lens is not None for lens in intrinsics):
            scene["intrinsics"], scene["camera_to_ego"] = torch.stack(intrinsics), torch.stack(poses)
        scene["reasoning"], scene["name"] = self.reasoning[index], self.names[index]
        return scene

    def sources(self, clip):
        """The cameras that its Scenes are made of: {id: Camera}, ids ascending."""
        ids = sorted(self.camera_ids) if self.camera_ids and not self.rig else [i for i in USED if i in clip.cameras]
        if not ids or not set(ids) <= set(clip.cameras):
            raise ValueError(f"{clip.name}: has the cameras {sorted(clip.cameras)}, not {ids or list(USED)}")
        unknown = [i for i in ids if clip.cameras[i].intrinsics is None]
        if self.rig and unknown:
            raise ValueError(f"{clip.name}: a rig needs calibrated cameras, camera {unknown[0]} is not")
        return {i: clip.cameras[i] for i in ids}

    def refusal(self, clip, t0):
        """In a line, what the clip is too short for; None if it is not."""
        first, last = clip.motion.times[[0, -1]]
        start, end = t0 - HISTORY * DT, t0 + FUTURE * DT * self.future
        if not first < start - TICK or end > last + TICK:
            hint = f" ({t0:.2f} s with future=False)" if self.future else ""
            return (f"{clip.motion.where}: too short for t0 = {t0:.2f} s, which needs poses from before {start:.2f} s "
                    f"to {end:.2f} s{hint}; there are {first:.2f} to {last:.2f} s")
        for camera_id, camera in self.sources(clip).items():
            start = t0 - self.ages[0]
            if start < camera.first - TICK or t0 > camera.last + TICK:
                return (f"{clip.name}: too short for t0 = {t0:.2f} s, which needs images of camera {camera_id} from "
                        f"{start:.2f} s to {t0:.2f} s; there are {camera.first:.2f} to {camera.last:.2f} s")


def reproject(rig, views, camera_ids, size):
    """
    What the cameras of a rig would see: the images of real cameras, turned but not moved.

    views {id: (images (frames, 3, h, w) uint8, intrinsics, camera_to_ego)} -> the same for the rig's cameras, images
    (frames, 3, *size). A pixel takes its colour from the first real camera that sees in its direction, the one of the
    same id before all others, and is black where none does. To turn a camera takes no depths, to move it would: so
    camera_to_ego has the rig's direction, but the place of the real camera. camera_ids left out: those of the rig whose
    centre is seen.
    """
    turned = {}
    for camera_id in sorted(camera_ids or rig):
        intrinsics, pose = rig_camera(camera_id, *size, rig)
        directions = rays(intrinsics, *size) @ pose[:3, :3].T                               # (H, W, 3), ego axes
        frames = next(iter(views.values()))[0].shape[0]
        picture, unseen = torch.zeros(frames, 3, *size), torch.ones(size, dtype=torch.bool)
        for _, (images, source, source_pose) in sorted(views.items(), key=lambda view: view[0] != camera_id):
            pixels, visible = project(directions @ source_pose[:3, :3], source)
            visible &= unseen
            if not visible.any():
                continue
            if unseen.all():
                pose[:3, 3] = source_pose[:3, 3]
            # Average first, so that no pixel of the source is skipped: by the ratio of pixels per radian on the axis.
            focal = source[6] if source[0] == 0 else source[5]
            small = [max(1, round(n / max(1, float(focal / intrinsics[6])))) for n in images.shape[2:]]
            images = torch.nn.functional.interpolate(images.float(), small, mode="area")
            grid = (2 * pixels / source[1:3] - 1).expand(frames, -1, -1, -1)                # the picture is -1 .. 1
            colours = torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
            picture = torch.where(visible, colours, picture)
            unseen &= ~visible
        if camera_ids or not unseen[size[0] // 2, size[1] // 2]:
            turned[camera_id] = picture.round().byte(), intrinsics, pose
    if not turned:
        raise ValueError(f"no camera of the rig looks where cameras {list(views)} do; choose camera_ids")
    return turned


class Motion:
    """
    Where the rear axle was, at its own times and, by interpolation, between them.

    where: the file to name in errors. times (N,) s; xyz (N, 3) m and rot (N, 3, 3) in any fixed frame with z up;
    measured: those of KINEMATICS that were recorded, each (N,) in the units of a Scene.
    Raises ValueError where there are fewer than 4 poses, a number is not finite or times do not increase.
    """

    def __init__(self, where, times, xyz, rot, **measured):
        if len(times) < 4:
            raise ValueError(f"{where}: {len(times)} poses, expected 4 or more")
        for field, values in dict(time=times, position=xyz, rotation=rot, **measured).items():
            for row in np.argwhere(~np.isfinite(values))[:1, 0]:
                raise ValueError(f"{where}: {field} of pose {row} is not a finite number")
        require_increasing(where, times)
        self.where, self.times, self.xyz, self.rot, self.measured = where, times, xyz, rot, measured
        self.slopes = spline_slopes(times, xyz)                             # (N, 3) m/s

    def pose(self, t):
        """t (T,) s -> xyz (T, 3), rot (T, 3, 3), velocity (T, 3) m/s: cubic spline and slerp, as in NVIDIA's kit."""
        i = np.clip(np.searchsorted(self.times, t, side="right") - 1, 0, len(self.times) - 2)
        seconds = (self.times[i + 1] - self.times[i])[:, None]
        u = (t - self.times[i])[:, None] / seconds                          # 0 at pose i, 1 at pose i + 1
        mean, start, end = (self.xyz[i + 1] - self.xyz[i]) / seconds, self.slopes[i], self.slopes[i + 1]
        a, b = 3 * mean - 2 * start - end, start + end - 2 * mean           # of u^2 and u^3, so that slopes meet
        xyz = self.xyz[i] + seconds * u * (start + u * (a + u * b))
        return xyz, slerp(self.rot[i], self.rot[i + 1], u[:, 0]), start + u * (2 * a + u * 3 * b)

    def speed(self, t):
        """Speed (T,) in m/s at t (T,), negative in reverse."""
        if "speed" in self.measured:
            return np.interp(t, self.times, self.measured["speed"])
        _, rot, velocity = self.pose(t)
        return (velocity * rot[:, :, 0]).sum(-1)

    def kinematics(self, t0):
        """
        The Scene's ego_kinematics (20, 4). What was not measured is derived from the poses, with slopes over 0.6 s that
        end at t0 at the latest: a model reads this. Where a clip starts less than 1.9 s before t0, its first values
        are repeated.
        """
        t = np.maximum(t0 + DT * np.arange(1 - PAST, 1), self.times[0])     # (20,)
        before, after = np.maximum(t - 0.3, self.times[0]), np.minimum(t + 0.3, t0)
        speed, gained = self.speed(t), self.speed(after) - self.speed(before)
        turned = np.swapaxes(self.pose(before)[1], 1, 2) @ self.pose(after)[1]
        yaw_rate = np.arctan2(turned[:, 1, 0], turned[:, 0, 0]) / (after - before)
        derived = {"speed": speed, "acceleration": gained / (after - before),
                   "steering": steering_angle(speed, yaw_rate / np.where(speed == 0, 1, speed)), "turn_signal": 0 * t}
        kinematics = derived | {field: np.interp(t, self.times, values) for field, values in self.measured.items()}
        if "turn_signal" in self.measured:                                  # a switch has no values between
            last = np.searchsorted(self.times, t + TICK, side="right") - 1
            kinematics["turn_signal"] = self.measured["turn_signal"][last]
        return np.stack([kinematics[field] for field in KINEMATICS], -1)

    def scene(self, t0, future):
        """The Scene's entries about motion at t0, in the ego frame at t0; ego_future_* only with `future`."""
        (origin,), (facing,), _ = self.pose(np.array([t0]))

        def local(steps):
            xyz, rot, _ = self.pose(t0 + DT * steps)
            return (xyz - origin) @ facing, facing.T @ rot

        scene = {"ego_kinematics": self.kinematics(t0)}
        scene["ego_history_xyz"], scene["ego_history_rot"] = local(np.arange(1 - HISTORY, 1))
        if future:
            scene["ego_future_xyz"], scene["ego_future_rot"] = local(np.arange(1, FUTURE + 1))
        return {key: torch.from_numpy(value).float() for key, value in scene.items()}


def steering_angle(speed, curvature):
    """rad. A car that hardly moves shows no curvature: below LOW_SPEED the angle is 0."""
    return np.arctan(WHEELBASE * np.where(np.abs(speed) < LOW_SPEED, 0.0, curvature))


def spline_slopes(x, y):
    """
    Slopes (N, D) at its knots x (N,) of the cubic spline through y (N, D), with "not-a-knot" ends; N >= 4.

    A tridiagonal system. Inner rows say that the second derivative is continuous at a knot; the first and the last say
    that the third is too at the knot next to the end, the unknown beyond that knot being eliminated.
    """
    h = np.diff(x)                                                          # (N - 1,)
    chord = np.diff(y, axis=0) / h[:, None]                                 # (N - 1, D)

    def end(h0, h1, chord0, chord1):                                        # right side, seen from that end
        return ((3 * h0 + 2 * h1) * h1 * chord0 + h0 ** 2 * chord1) / (h0 + h1)

    inner = 3 * (h[1:, None] * chord[:-1] + h[:-1, None] * chord[1:])
    right = np.stack([end(h[0], h[1], chord[0], chord[1]), *inner, end(h[-1], h[-2], chord[-1], chord[-2])])
    below = np.array([0, *h[1:], h[-1] + h[-2]])
    diagonal = np.array([h[1], *2 * (h[:-1] + h[1:]), h[-2]])
    above = np.array([h[0] + h[1], *h[:-1], 0])
    for i in range(1, len(x)):                                              # eliminate downwards,
        factor = below[i] / diagonal[i - 1]
        diagonal[i] -= factor * above[i - 1]
        right[i] -= factor * right[i - 1]
    slopes = right / diagonal[:, None]
    for i in reversed(range(len(x) - 1)):                                   # substitute upwards
        slopes[i] -= above[i] / diagonal[i] * slopes[i + 1]
    return slopes


def slerp(first, second, share):
    """Rotations (N, 3, 3) a share (N,) of the way from first to second (N, 3, 3), which are less than 180 deg apart."""
    turn = np.swapaxes(first, 1, 2) @ second
    odd = (turn - np.swapaxes(turn, 1, 2)) / 2                              # sin(angle) [axis]x
    sin = np.sqrt((odd ** 2).sum((1, 2)) / 2)
    angle = share * np.arctan2(sin, (np.trace(turn, axis1=1, axis2=2) - 1) / 2)
    cross = odd / np.maximum(sin, 1e-12)[:, None, None]                     # [axis]x, the cross product as a matrix
    sin, cos = np.sin(angle)[:, None, None], np.cos(angle)[:, None, None]
    return first @ (np.eye(3) + sin * cross + (1 - cos) * cross @ cross)    # Rodrigues


def rotation(yaw, pitch, roll):
    """Rz(yaw) Ry(pitch) Rx(roll): each (N,) rad -> (N, 3, 3). y is left, so a positive pitch is nose down."""
    (cy, sy), (cp, sp), (cr, sr) = [(np.cos(angle), np.sin(angle)) for angle in (yaw, pitch, roll)]
    return np.stack([cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr,
                     sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr,
                     -sp, cp * sr, cp * cr], -1).reshape(-1, 3, 3)


def require_increasing(where, times):
    """ValueError unless times (N,) increase."""
    for i in np.flatnonzero(np.diff(times) <= 0)[:1]:
        raise ValueError(f"{where}: times must increase, but {times[i]} s is followed by {times[i + 1]} s")


# The three readers.

def read_folder(path):
    """
    A folder of one's own -> [Clip].

        egomotion.csv       header time,x,y,yaw: s, m, m, rad of the rear axle in any fixed frame, x forward where
                            yaw = 0; at about 10 Hz or more. Optional columns: z, roll, pitch (rad, nose down is
                            positive), speed, acceleration, steering (rad, left is positive), turn_signal (-1, 0, 1)
        front_wide_120fov/  a folder for each camera there is, with png or jpg images in the order of their names;
                            cross_left_120fov, front_tele_30fov ...: the names in CAMERAS, take the most similar one
            times.csv       header time: s on the clock of egomotion.csv, a line for each image; or header file,time
        cameras.json        optional, a rig needs it: {"front_wide_120fov": {"kind": "pinhole", "width": 1920,
                            "height": 1080, "cx": 960, "cy": 540, "coefficients": [1000, 1000], "camera_to_ego": 4 x 4
                            rows, from x right, y down, z out to the ego frame}}; see `project`, kind may be "ftheta"
        reasoning.json      optional: [{"time": 3.2, "text": "Stop and keep lane since the light ahead is red."}]
    """
    file, names = path / "egomotion.csv", ("time", "x", "y", "yaw")
    columns = read_csv(file, names, ("z", "roll", "pitch", *KINEMATICS))
    times, x, y, yaw = [columns[name] for name in names]
    z, roll, pitch = [columns.get(name, 0 * times) for name in ("z", "roll", "pitch")]
    motion = Motion(file, times, np.stack([x, y, z], -1), rotation(yaw, pitch, roll),
                    **{field: columns[field] for field in KINEMATICS if field in columns})
    calibrations = read_json(path / "cameras.json")
    cameras = {}
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        if folder.name not in CAMERAS:
            raise ValueError(f"{folder}: unknown camera, expected one of {', '.join(CAMERAS)}")
        columns = read_csv(folder / "times.csv", ("time",), ("file",))
        images = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in (".png", ".jpg", ".jpeg"))
        images = [folder / name for name in columns["file"]] if "file" in columns else images
        known = camera_of_json(path / "cameras.json", calibrations, folder.name) if calibrations else (None, None)
        cameras[CAMERAS[folder.name]] = image_camera(folder / "times.csv", images, columns["time"], *known)
    reasoning = read_reasoning(path / "reasoning.json")
    return [Clip(path.name, motion, cameras, reasoning, list(reasoning))]


def read_reasoning(file):
    """{time in s: text} of a reasoning.json, see read_folder; empty where there is no file."""
    reasoning = read_json(file) or []
    if not all(isinstance(entry, dict) and {"time", "text"} <= entry.keys() for entry in reasoning):
        raise ValueError(f'{file}: expected a list of {{"time": s, "text": str}}')
    return {entry["time"]: entry["text"] for entry in reasoning}


def camera_of_json(file, calibrations, name):
    """intrinsics (10,) and camera_to_ego (4, 4) of the camera in cameras.json."""
    entry, kinds = calibrations.get(name, {}), {"ftheta": (0, 5), "pinhole": (1, 2)}    # coefficients of each
    if entry.get("kind") not in kinds:
        raise ValueError(f"{file}: {name} needs kind, one of {', '.join(kinds)}; it has {entry.get('kind')}")
    kind, count = kinds[entry["kind"]]
    shapes = {"width": (1,), "height": (1,), "cx": (1,), "cy": (1,), "coefficients": (count,), "camera_to_ego": (4, 4)}
    numbers = []
    for field, shape in shapes.items():
        try:
            numbers.append(torch.tensor(entry[field], dtype=torch.float32).reshape(shape))
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise ValueError(f"{file}: {name} needs {field}, numbers of shape {shape}") from None
    *lens, camera_to_ego = numbers
    return torch.cat([torch.tensor([kind]), *lens, torch.zeros(5 - count)]), camera_to_ego


def read_kitti(path):
    """
    A drive of KITTI's raw data, synced and rectified -> [Clip]: oxts for motion, image_02 as the front wide camera.

    The ego frame has the axes of the inertial unit. From the unit the camera is 1.08 m ahead, 0.25 m to the right and
    0.73 m up; the ego's origin is 1.60 m behind the camera, 0.06 m to its right (the centre line) and 1.65 m below.
    The calibration is calib_cam_to_cam.txt in the folder or its parent, else that of 2011_09_26. Time 0 is the first
    pose. A reasoning.json may be beside oxts, as in a folder of one's own.
    """
    clock = read_timestamps(path / "oxts" / "timestamps.txt")
    rows = np.array([read_oxts(file) for file in sorted((path / "oxts" / "data").glob("*.txt"))])   # (N, 30)
    if len(rows) != len(clock):
        raise ValueError(f"{path / 'oxts'}: {len(rows)} files in data, but {len(clock)} lines in timestamps.txt")
    latitude, longitude, up, roll, pitch, yaw = rows[:, :6].T
    latitude, longitude = np.radians(latitude), np.radians(longitude)
    scale = 6378137 * np.cos(latitude[0])                                   # Mercator, true to scale at the start
    unit = np.stack([scale * longitude, scale * np.log(np.tan(np.pi / 4 + latitude / 2)), up], -1)
    rot = rotation(yaw, pitch, roll)
    motion = Motion(path / "oxts", (clock - clock[0]) / np.timedelta64(1, "s"),
                    unit - unit[0] + rot @ (-0.52, -0.31, -0.92), rot, speed=rows[:, 8], acceleration=rows[:, 14])
    file = path / "image_02" / "timestamps.txt"
    times = (read_timestamps(file) - clock[0]) / np.timedelta64(1, "s")
    images = sorted((path / "image_02" / "data").glob("*.png"))
    pose = rig_camera(1, 1, 1)[1]                                           # looks ahead, level
    pose[:3, 3] = torch.tensor([1.6, 0.06, 1.65])
    camera = image_camera(file, images, times, None, pose)
    camera = camera._replace(intrinsics=kitti_intrinsics(path, *read_image(images[0]).shape[:2]))
    reasoning = read_reasoning(path / "reasoning.json")
    return [Clip(path.name, motion, {CAMERAS["front_wide_120fov"]: camera}, reasoning, list(reasoning))]


def kitti_intrinsics(path, height, width):
    """The pinhole (10,) of image_02, scaled to images of this size. KITTI's pixel centres are at integers."""
    sizes, projection = (1242, 375), (721.5377, 0, 609.5593, 0, 0, 721.5377, 172.854, 0)
    for file in (path / "calib_cam_to_cam.txt", path.parent / "calib_cam_to_cam.txt"):
        if file.exists():
            lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
            try:
                sizes, projection = [[float(n) for n in lines[key].split()] for key in ("S_rect_02", "P_rect_02")]
            except (KeyError, ValueError):
                raise ValueError(f"{file}: expected lines S_rect_02 and P_rect_02 of numbers") from None
            break
    right, down = width / sizes[0], height / sizes[1]
    fx, cx, fy, cy = [projection[i] for i in (0, 2, 5, 6)]
    return torch.tensor([1, width, height, (cx + 0.5) * right, (cy + 0.5) * down, fx * right, fy * down, 0, 0, 0])


def read_nvidia(path):
    """
    NVIDIA's PhysicalAI-AV data set, as far as its chunks are in the folder, through NVIDIA's kit -> [Clip].

    t0 are the events of reasoning/ood_reasoning.parquet, with their texts, or else event_t0s of clip_index.parquet, or
    else 5.1 s, the release's default. Clips of which there is no egomotion here are left out, as are the invalid ones.
    """
    try:
        import pandas
        from physical_ai_av import PhysicalAIAVDatasetInterface
    except ImportError as error:
        raise ImportError(f"{path}: NVIDIA's layout is read by its kit, pip install physical_ai_av ({error})") from None

    class Kit(PhysicalAIAVDatasetInterface):
        """The kit asks the Hugging Face hub what there is; this one asks the folder."""

        def is_file_cached(self, filename):
            return (path / filename).exists()

        _has_file = is_file_cached

        def download_file(self, filename):
            if not self.is_file_cached(filename):
                raise FileNotFoundError(f"{path / filename}: no such file")
            return path / filename

        def open_file(self, filename, mode="rb", maybe_stream=False):
            return open(self.download_file(filename), mode)

    kit = Kit(revision="local")

    def has(chunk, feature):
        features = kit.features
        return feature in features.ALL and kit.is_file_cached(features.get_chunk_feature_filename(chunk, feature))

    def read(clip, feature):
        try:
            return kit.get_clip_feature(clip, feature)
        except KeyError:
            raise ValueError(f"{path}: clip {clip} has no {feature}") from None

    def video(clip, feature):
        def frames(times):
            try:
                return read(clip, feature).decode_images_from_timestamps(np.round(1e6 * times).astype(np.int64))[0]
            except ValueError as error:                                     # the kit's errors have several lines
                raise ValueError(f"{path}: {feature} of clip {clip}: {' '.join(str(error).split())}") from None
        return frames

    index = kit.clip_index[kit.clip_index["clip_is_valid"]]
    chunks = {chunk for chunk in index["chunk"].unique() if has(chunk, "egomotion")}
    index = index[index["chunk"].isin(chunks)]
    if not len(index):
        raise FileNotFoundError(f"{path}: none of the clips of clip_index.parquet has its egomotion here")
    events, file = {}, path / "reasoning" / "ood_reasoning.parquet"
    if file.exists():
        for clip, entries in pandas.read_parquet(file)["events"].items():
            entries = json.loads(entries) if isinstance(entries, str) else entries
            events[clip] = {entry["event_start_timestamp"] / 1e6: entry["cot"] for entry in entries}
    clips = []
    for clip, row in index.iterrows():
        chunk, ego = row["chunk"], read(clip, "egomotion")
        state, rot = ego.values, ego.values.pose.rotation.as_matrix()
        speed = (state.velocity * rot[:, :, 0]).sum(-1)                     # vectors are in the frame of the poses
        motion = Motion(f"{path}: egomotion of clip {clip}", ego.timestamps / 1e6, state.pose.translation, rot,
                        speed=speed, acceleration=(state.acceleration * rot[:, :, 0]).sum(-1),
                        steering=steering_angle(speed, state.curvature[:, 0]))
        calibrated = has(chunk, "camera_intrinsics") and has(chunk, "sensor_extrinsics")    # the release needs neither
        lenses = read(clip, "camera_intrinsics").camera_models if calibrated else {}
        places = read(clip, "sensor_extrinsics").sensor_poses if calibrated else {}
        cameras = {}
        for name, camera_id in [("camera_" + name, camera_id) for name, camera_id in CAMERAS.items()]:
            if not has(chunk, name):
                continue
            intrinsics = camera_to_ego = None
            if name in lenses and name in places:
                lens, camera_to_ego = lenses[name], torch.tensor(places[name].as_matrix(), dtype=torch.float32)
                numbers = [0, lens.width, lens.height, *lens.principal_point, *lens.th2r.coef]
                intrinsics = torch.tensor(numbers, dtype=torch.float32)
            # The kit knows when its images are from, and refuses times before and after them.
            cameras[camera_id] = Camera(video(clip, name), -math.inf, math.inf, intrinsics, camera_to_ego)
        starts = list(events.get(clip, [])) or [start / 1e6 for start in row.get("event_t0s", [])] or [5.1]
        clips.append(Clip(clip, motion, cameras, events.get(clip, {}), starts))
    return clips


# Files.

def image_camera(file, images, times, intrinsics, camera_to_ego):
    """A Camera whose images (paths, oldest first) were taken at times (N,); file: where the times are from."""
    if len(images) == 0 or len(images) != len(times):
        raise ValueError(f"{file}: {len(times)} times for {len(images)} images, expected one for each")
    require_increasing(file, times)

    def read(t):
        pictures = [read_image(images[i]) for i in np.searchsorted(times, t + TICK, side="right") - 1]
        if len({picture.shape for picture in pictures}) > 1:
            raise ValueError(f"{images[0].parent}: the images of a camera must be of one size")
        return np.stack(pictures)

    return Camera(read, times[0], times[-1], intrinsics, camera_to_ego)


def read_image(file):
    """An image file -> (H, W, 3) uint8."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("images are read by Pillow: pip install pillow") from None
    try:
        with Image.open(file) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{file}: not a readable image ({error})") from None


def read_csv(file, required, optional):
    """A CSV file with a header -> {name: (N,) float}; a column `file` stays a list of str."""
    with open(file, newline="") as lines:
        header, *rows = list(csv.reader(lines)) or [[]]
    header = [name.strip() for name in header]
    if not set(required) <= set(header) <= {*required, *optional}:
        raise ValueError(f"{file}: header is {','.join(header)}; expected {','.join(required)}, "
                         f"optional are {','.join(optional)}")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"{file}: line {number} has {len(row)} fields, the header {len(header)}")
    columns = {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}
    for name in columns.keys() - {"file"}:
        try:
            columns[name] = np.array(columns[name], float)
        except ValueError as error:
            raise ValueError(f"{file}: column {name} must be numbers ({error})") from None
    return columns


def read_json(file):
    """What a JSON file holds; None where there is no file."""
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None


def read_timestamps(file):
    """KITTI's lines of date and time -> (N,) datetime64[ns]."""
    try:
        return np.array(file.read_text().strip().splitlines(), "datetime64[ns]")
    except ValueError as error:
        raise ValueError(f"{file}: expected lines like 2011-09-26 13:02:25.964000000 ({error})") from None


def read_oxts(file):
    """A file of KITTI's oxts -> (30,): latitude, longitude, altitude, roll, pitch, yaw, ..."""
    try:
        return np.array(file.read_text().split(), float).reshape(30)
    except ValueError:
        raise ValueError(f"{file}: expected 30 numbers") from None


# ----------------------------------------------------------------------------------------------------------------------
# Labels of one's own clips: a file to fill in for each key frame, read back into reasoning.json
#
# In two stages, as the paper's annotators work (Sec. 4.3). In the first one sees the two seconds up to the key frame
# and names what matters there. Only in the second one sees what happened then, tells what had been decided, and says
# why, with what the first stage named and nothing else: so no reason rests on what could not be seen in time.

UNCERTAINTY = ("low", "high")
EXCLUDE = ("no", "unsafe", "no decision")       # ours, after the paper's safety exclusion
SEEN, AFTER, LOOK_EVERY = 2.0, 6.0, 0.5         # s: history and future of a labeller (Table 3), images at 2 Hz
# A reason may name only what stage 1 did. These words a rule can look for; they are ours, a row has one meaning.
THINGS = ("lights?", "signs?", "pedestrians?|persons?|people|child|children", "cyclists?|bicycles?|bikes?",
          "cars?|vehicles?|vans?|trucks?|lorry|lorries|bus|buses|taxis?|queue|traffic", "trams?|trains?|rails?",
          "motorcycles?|motorbikes?", "ambulances?|police|firefighters?", "animals?|dogs?",
          "cones?|barriers?|construction|roadworks?", "crosswalks?", "bumps?", "curves?|bends?",
          "junctions?|intersections?|roundabouts?", "ramps?", "rain|snow|fog|ice", "obstacles?|debris", "schools?")

STAGE_1 = (
    "You see the two seconds up to a moment at which the driver decides something, and not what follows: `history` and "
    "the images in this folder, named by camera, number and seconds.",
    "Fill in critical_components: what could directly cause the decision, the most important first, each as "
    '{"component": one of allowed.component, "description": what it is, where and how it moves in a few plain words, '
    '"uncertainty": one of allowed.uncertainty}.',
    "If there is nothing, name the lane or the route that the driver keeps to. Do all this before you look at stage_2, "
    "motion.png or keyframes.json.")
STAGE_2 = (
    "Fill in ../stage_1 first. You see the six seconds after: `future`, `meta_actions` and the images in this folder.",
    'exclude: one of allowed.exclude. "unsafe" is driving that nobody should learn, "no decision" a key frame at which '
    "nothing was decided; leave the other fields of these null.",
    "longitudinal, lateral: the first decision of each kind after the key frame, one of allowed; none if no new one.",
    'reasoning: one sentence "<longitudinal> and <lateral> since <reasons>." with the decisions above; in place of a '
    'none it says "keep speed" or "keep lane". The reasons are components of stage 1, in the words used there, and '
    "nothing that was only seen later.")


def write_labels(path, folder):
    """
    Prepare the labelling of the clips at `path`, any that load_clips reads, in `folder` (with a folder for each clip
    in it, if they are several). Returns [(folder, key frames)] with keyframes.json's list.

        keyframes.json      {"clip", "name", "key_frames": [{"time": s, "kinds", "before", "after": [longitudinal,
                            lateral meta-action], "label": its folder, null where no Scene can be cut, "why" not}]}
        motion.png          speed and turn rate over time, meta-actions as bands, key frames as lines
        0012.3/stage_1/     of the key frame at 12.3 s: label.json to fill in, and images of every camera
        0012.3/stage_2/     the same of what came after

    A label.json that is there already is kept.
    """
    clips, written = read_clips(path), []
    if Path(path).resolve() in (Path(folder).resolve(), *Path(folder).resolve().parents):
        raise ValueError(f"{folder}: labels do not go into the clip's own folder {path}, choose another --out")
    for clip in clips:
        home = Path(folder) / clip.name if len(clips) > 1 else Path(folder)
        home.mkdir(parents=True, exist_ok=True)
        first, last = clip.motion.times[[0, -1]] / DT
        times = DT * np.arange(math.ceil(first - 1e-6), math.floor(last + 1e-6) + 1)    # (T,), whole tenths of a second
        xyz, rot, _ = (torch.from_numpy(values) for values in clip.motion.pose(times))
        meta, frames = meta_actions(xyz, rot), []
        for step, kinds in key_frames(xyz, rot):
            t0 = round(float(times[step]), 1)
            after = min(step + round(2 * LEAD / DT), len(times) - 1)
            frame = {"time": t0, "kinds": kinds, "before": meta_words(meta, step), "after": meta_words(meta, after),
                     "label": f"{t0:06.1f}"}
            try:
                ClipScenes([clip], t0, None, 4, DT, None, None, True)
            except ValueError as error:
                frame.update(label=None, why=str(error))
            else:
                end = step + round(AFTER / DT)
                write_stages(clip, t0, [channel[step:end + 1] for channel in smooth_motion(xyz, rot)],
                             [channel[step:end] for channel in meta], home / frame["label"])
            frames.append(frame)
        listed = {"clip": str(Path(path).resolve()), "name": clip.name, "key_frames": frames}
        write_json(f"{home}/keyframes.json", listed)
        draw_motion(home / "motion.png", clip.name, times, xyz, rot)
        written.append((home, frames))
    return written


def meta_words(meta, step):
    """The names of both meta-actions, each (T,), at a step."""
    return [names[int(labels[step])] for names, labels in zip((LONGITUDINAL_META, LATERAL_META), meta)]


def write_stages(clip, t0, motion, meta, folder):
    """Both stages of the key frame at t0; motion, of smooth_motion, and meta go on from there."""
    from PIL import Image                                                   # matplotlib, which draws too, brings it
    past = list(enumerate(clip.motion.kinematics(t0), start=1 - PAST))[::-5][::-1]          # knows nothing after t0
    history = [f"{DT * step:+.1f} s: speed {v:.1f} m/s, acceleration {a:+.1f} m/s^2, steering {s:+.3f} rad (left +)"
               + f", signal {('off', 'left', 'right')[int(signal)]}" * ("turn_signal" in clip.motion.measured)
               for step, (v, a, s, signal) in past]
    future = [f"{DT * step:+.1f} s: speed {v:.1f} m/s, acceleration {a:+.1f} m/s^2, turn rate {w:+.2f} rad/s (left +)"
              for step, (v, a, _, w) in enumerate(zip(*(channel.tolist() for channel in motion)))][::5]
    told = [[f"{DT * a:.1f} to {DT * b:.1f} s: {names[label]}" for label, a, b in segments(labels)]
            for names, labels in zip((LONGITUDINAL_META, LATERAL_META), meta)]
    told = dict(zip(("longitudinal", "lateral"), told))
    stages = {
        "stage_1": dict(instructions=STAGE_1, allowed=dict(component=COMPONENTS, uncertainty=UNCERTAINTY),
                        clip=clip.name, time=t0, history=history, critical_components=[]),
        "stage_2": dict(instructions=STAGE_2,
                        allowed=dict(longitudinal=(*LONGITUDINAL, "none"), lateral=(*LATERAL, "none"), exclude=EXCLUDE),
                        clip=clip.name, time=t0, future=future, meta_actions=told,
                        exclude=None, longitudinal=None, lateral=None, reasoning=None)}
    first, last = clip.motion.times[[0, -1]]
    for stage, begin, end in (("stage_1", -SEEN, 0), ("stage_2", LOOK_EVERY, AFTER)):
        ages = np.arange(begin, end + DT, LOOK_EVERY)
        (folder / stage).mkdir(parents=True, exist_ok=True)
        for name, camera in ((name, clip.cameras[i]) for name, i in CAMERAS.items() if i in clip.cameras):
            # NVIDIA's cameras do not say when they begin and end: where there are poses, less a tenth of a second.
            there = (t0 + ages >= max(camera.first, first + DT)) & (t0 + ages <= min(camera.last, last - DT))
            for i, image in zip(np.flatnonzero(there), camera.read(t0 + ages[there]) if there.any() else []):
                Image.fromarray(image).save(folder / stage / f"{name}_{i:02d}_{ages[i]:+.1f}s.jpg", quality=92)
        if not (folder / stage / "label.json").exists():
            write_json(f"{folder}/{stage}/label.json", stages[stage])


def draw_motion(file, title, times, xyz, rot):
    """Speed and turn rate over times (T,) of a drive, meta-actions as bands, key frames as lines."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    speed, _, _, turn_rate = smooth_motion(xyz, rot)
    meta, marks = meta_actions(xyz, rot), key_frames(xyz, rot)
    colours = (dict(zip(LONGITUDINAL_META, ("#c3e6c0", "#5fb35a", "#f8cdb0", "#e0703f", "none", "#9a9a9a", "#cda6e0"))),
               dict(zip(LATERAL_META, ("#bcd6f2", "#f3e3a4", "#5f9bdc", "#dcb53f", "#d6b6e6", "#e6b6d6", "none"))))
    rows = math.ceil(len(times) * DT / 60)                                  # a minute in each
    figure, grid = plt.subplots(2 * rows, figsize=(14, 5 * rows), squeeze=False, layout="constrained")
    for row, axes in enumerate(grid.reshape(rows, 2)):
        begin = times[0] + 60 * row
        for ax, values, labels, colour in zip(axes, (speed, turn_rate), meta, colours):
            for label, a, b in segments(labels):
                ax.axvspan(times[a], times[min(b, len(times) - 1)], color=list(colour.values())[label], lw=0)
            for word, fill in colour.items():
                ax.fill_between([], [], color=fill, label=word)
            ax.plot(times, values, "k", lw=1)
            ax.legend(ncols=7, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8, frameon=False)
            ax.set_xlim(begin, min(begin + 60, times[-1]) if rows == 1 else begin + 60)
        axes[0].set_ylabel("speed, m/s")
        axes[1].set(ylabel="turn rate, rad/s (left +)", xlabel=f"{title}: s")
        low, high = axes[1].get_ylim()
        axes[1].set_ylim(min(low, -0.1), max(high, 0.1))                    # a straight road looks straight
        for step, kinds in marks:
            for ax in axes:
                ax.axvline(times[step], color="C3", lw=0.8)
            axes[1].annotate(f"{times[step]:.1f} {', '.join(kinds)}", (times[step], 0.98), rotation=90, ha="right",
                             va="top", xycoords=("data", "axes fraction"), fontsize=7, annotation_clip=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def read_labels(folder):
    """
    Check the labels in `folder`, filled in since write_labels, and put their texts into their clips' reasoning.json.

    An entry there of the same time is replaced, others stay. The clip of NVIDIA's layout has no place for it: its
    reasoning.json is then written beside keyframes.json. Returns a line for each clip on what was done. Raises
    ValueError, a line for each label that is wrong, before anything is written.
    """
    homes = [home for home in (Path(folder), *sorted(Path(folder).glob("*"))) if (home / "keyframes.json").exists()]
    if not homes:
        raise FileNotFoundError(f"{folder}: no keyframes.json in it or in its folders, make it with --keyframes CLIP")
    wrong, jobs, lines = [], [], []
    for home in homes:
        listed, texts, waiting = read_json(home / "keyframes.json"), {}, 0
        if not isinstance(listed, dict) or not {"clip", "key_frames"} <= listed.keys():
            raise ValueError(f"{home / 'keyframes.json'}: expected clip and key_frames, as --keyframes writes them")
        if not Path(listed["clip"]).is_dir():
            raise FileNotFoundError(f"{home / 'keyframes.json'}: clip is {listed['clip']}, where nothing is any more")
        for frame in listed["key_frames"]:
            if frame["label"]:
                try:
                    text = read_label(home / frame["label"])
                except (ValueError, OSError) as error:
                    wrong.append(str(error))
                    continue
                if text is None:
                    waiting += 1
                else:
                    texts[frame["time"]] = text
        jobs.append((home, Path(listed["clip"]), texts, waiting))
    if wrong:
        raise ValueError("\n".join(wrong))
    for home, clip, texts, waiting in jobs:
        file = (home if (clip / "features.csv").exists() else clip) / "reasoning.json"
        kept = {t: text for t, text in read_reasoning(file).items() if all(abs(t - t0) > DT / 2 for t0 in texts)}
        entries = sorted((kept | {t: text for t, text in texts.items() if text}).items())
        if texts:
            write_json(str(file), [{"time": t, "text": text} for t, text in entries])
        told = sum(map(bool, texts.values()))
        lines.append(f"{home}: {told} labels, {len(texts) - told} excluded, {waiting} to be filled in"
                     + (f"; {len(entries)} in {file}" if texts else ""))
    return lines


def read_label(folder):
    """
    The text of a key frame's label, "" if it is excluded, None if one of its stages has not been filled in. ValueError:
    the file, the field and what was expected.
    """
    files = [folder / stage / "label.json" for stage in ("stage_1", "stage_2")]
    first, second = [read_json(file) for file in files]

    def require(valid, file, field, expected, value):
        if not valid:
            raise ValueError(f"{file}: {field} is {json.dumps(value)}, expected {expected}")

    def one_of(allowed, file, field, value):
        require(value in allowed, file, field, "one of " + ", ".join(allowed), value)

    for file, label, fields in zip(files, (first, second), (("critical_components",),
                                                            ("exclude", "longitudinal", "lateral", "reasoning"))):
        require(isinstance(label, dict), file, "it", "an object in braces", label)
        for field in fields:
            require(field in label, file, field, "to be there", None)
    components = first["critical_components"]
    require(isinstance(components, list), files[0], "critical_components", "a list", components)
    for i, entry in enumerate(components):
        name = f"critical_components[{i}]"
        require(isinstance(entry, dict), files[0], name, "an object with component, description, uncertainty", entry)
        one_of(COMPONENTS, files[0], name + ".component", entry.get("component"))
        one_of(UNCERTAINTY, files[0], name + ".uncertainty", entry.get("uncertainty"))
        text = entry.get("description")
        require(isinstance(text, str) and text.strip(), files[0], name + ".description", "a few words", text)
    exclude, longitudinal, lateral, reasoning = [second[field] for field in fields]
    if exclude is None and longitudinal is None and lateral is None and not reasoning:
        return None
    one_of(EXCLUDE, files[1], "exclude", exclude)
    if exclude != "no":
        return ""
    one_of((*LONGITUDINAL, "none"), files[1], "longitudinal", longitudinal)
    one_of((*LATERAL, "none"), files[1], "lateral", lateral)
    require((longitudinal, lateral) != ("none", "none"), files[1], "longitudinal, as lateral,",
            'one decision; where there is none, exclude is "no decision"', "none")
    require(components, files[0], "critical_components", "one or more, as stage_2 is filled in", components)
    pair = longitudinal.replace("none", "keep speed"), lateral.replace("none", "keep lane")
    begin = "{} and {} since ".format(*pair).capitalize()
    reasons = reasoning.partition(" since ")[2].lower() if isinstance(reasoning, str) else ""
    require(reasons.strip(" .") and decisions(reasoning) == pair and "\n" not in reasoning, files[1], "reasoning",
            f'a line "{begin}<reasons>."', reasoning)
    named = " ".join(f"{entry['component']} {entry['description']}" for entry in components).lower()
    for thing in THINGS:
        found = re.search(rf"\b({thing})\b", reasons)
        require(not found or re.search(rf"\b({thing})\b", named), files[1], "reasoning",
                f"only what {files[0]} names, which {found and found[0]!r} is not", reasoning)
    require(set(re.findall(r"\w{4,}", reasons)) & set(re.findall(r"\w{4,}", named)), files[1], "reasoning",
            f"reasons in words of the critical_components of {files[0]}", reasoning)
    return reasoning.strip()


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

def look(path, seeds, size):
    """A contact sheet: a row a scene, the cameras at t0, and the expert's path from above."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    order = (1, 6, 0, 2)
    scene = make_scenes(seeds, size=size, frames=1)
    at = [scene["camera_ids"][0].tolist().index(i) for i in order]
    figure, axes = plt.subplots(len(seeds), 5, figsize=(17, 2.1 * len(seeds)), squeeze=False, layout="constrained")
    for i, row in enumerate(axes):
        for ax, camera in zip(row, at):
            ax.imshow(scene["images"][i, camera, -1].permute(1, 2, 0), interpolation="nearest")
            ax.axis("off")
        row[0].set_title(f"{seeds[i]} {scene['name'][i]}: {scene['reasoning'][i]}", loc="left", fontsize=9)
        x, y, _ = torch.cat([scene["ego_history_xyz"][i], scene["ego_future_xyz"][i]]).unbind(-1)
        row[4].plot(x[:HISTORY], y[:HISTORY], "0.6", x[HISTORY:], y[HISTORY:], "C0.", markersize=3)
        row[4].set(xlim=(-25, 95), ylim=(-30, 30), aspect="equal")
        row[4].grid(alpha=0.3)
        row[4].tick_params(labelsize=6)
    figure.savefig(path, dpi=100)


def splits(scenes):
    """Of what the first scenes of each split are made, as Markdown: how many of each situation and weather."""
    rows = {name: "" for name in SITUATIONS}
    rows |= {name: " + ".join(causes or ("any",)) for name, causes in COMBINATIONS.items()}
    rows |= {name: f"does as a {cause}" if cause == "pedestrian" else f"stands as {cause}"
             for name, cause in RARE.items()}
    weather = {"day": (0, 0, 0), "dusk": (1, 0, 0), "rain": (0, 1, 0), "haze": (0, 0, 1),
               "both dusk and rain": (1, 1, 0)}
    lines = ["| scene | combines | " + " | ".join(SPLITS) + " |", "| --- | --- |" + " ---: |" * len(SPLITS)]
    draws = [[draw(seed) for seed in range(SEEDS[split], SEEDS[split] + scenes)] for split in SPLITS]
    for name, combines in rows.items():
        lines.append([name, combines, *(sum(one.situation == name for one in some) for some in draws)])
    weather_of = lambda one: (one.dusk > 0, one.rain > 0, one.rain == 0 and one.visibility < 150)
    for name, kind in weather.items():
        lines.append([f"*{name}*", "", *(sum(weather_of(one) == kind for one in some) for some in draws)])
    lines.append(["*shown after t0*", "", *(sum(one.late > 0 for one in some) for some in draws)])
    return "\n".join(line if isinstance(line, str) else "| " + " | ".join(map(str, line)) + " |" for line in lines)


def measure(camera_ids, size, pool, workers, scenes=32, frames=4):
    """What a scene of this many frames costs: ms of one core by part, and scenes/s of workers that do nothing else."""
    clock = [time.process_time()]
    world = World(range(scenes))
    for _ in range(PAST + FUTURE):
        world.step(*world.expert())
    clock.append(time.process_time())
    world = World(range(scenes))
    for things in (True, False):                # then with nothing that stands on the ground
        world.things.kind *= things
        world.render(camera_ids, size)          # to warm up
        clock.append(time.process_time())
        for _ in range(frames):
            world.render(camera_ids, size)
        clock.append(time.process_time())
    drive, full, ground = (1000 * (clock[i + 1] - clock[i]) / scenes for i in (0, 2, 4))
    jobs = [dict(seeds=range(i * BATCH, (i + 1) * BATCH), camera_ids=camera_ids, size=size) for i in range(2 * workers)]
    begin = time.perf_counter()
    pool.map(_make_and_forget, jobs, chunksize=2)
    rate = len(jobs) * BATCH / (time.perf_counter() - begin)
    return {"cameras": len(camera_ids), "image": f"{size[0]} x {size[1]}", "drive, ms": round(drive, 2),
            "ground, ms": round(ground, 2), "boxes, ms": round(full - ground, 2),
            "together, ms": round(drive + full, 2), f"scenes/s, {workers} processes": round(rate, 1)}


def _make_and_forget(options):
    make_scenes(**options)


def cost(workers):
    """A table of `measure` in Markdown, and the same as a line of JSON."""
    torch.set_num_threads(1)
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        pool.map(_make_and_forget, [dict(seeds=range(2), size=(32, 64))] * workers, chunksize=1)
        rows = [measure(camera_ids, size, pool, workers)
                for camera_ids in ((1, 6), (0, 1, 2, 6)) for size in ((32, 64), (64, 128), (128, 256))]
    for line in (rows[0], ["---:"] * len(rows[0]), *(row.values() for row in rows)):
        print("|", " | ".join(map(str, line)), "|")
    print(json.dumps(rows))


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
    parser.add_argument("--cost", action="store_true", help="print what a scene costs instead of making a set")
    parser.add_argument("--look", metavar="PNG", help="draw a contact sheet of the seeds instead of making a set")
    parser.add_argument("--splits", type=int, nargs="?", const=2000, metavar="N",
                        help="print of what the first N scenes of each split are made")
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 12), metavar=("FROM", "TO"), help="seeds to look at")
    parser.add_argument("--keyframes", metavar="CLIP", help="find the key frames of clips and prepare their labelling")
    parser.add_argument("--out", default="labels", metavar="FOLDER", help="where --keyframes puts it")
    parser.add_argument("--read-labels", metavar="FOLDER", help="check its labels, make the clips' reasoning.json")
    args = parser.parse_args()
    if args.keyframes or args.read_labels:
        if args.keyframes:
            for home, frames in write_labels(args.keyframes, args.out):
                for f in frames:
                    print(f"{f['time']:7.1f} s  {', '.join(f['kinds']):24}  {f['label'] or f['why']}")
                print(f"{home}: {len(frames)} key frames, {sum(bool(f['label']) for f in frames)} to be labelled")
        if args.read_labels:
            print(*read_labels(args.read_labels), sep="\n")
        return
    if args.look:
        look(args.look, range(*args.seeds), args.size)
        return
    if args.splits is not None:
        print(splits(args.splits))
        return
    if args.cost:
        cost(max(1, args.workers))
        return
    begin = time.perf_counter()
    made = load("world", split=args.split, scenes=args.scenes, camera_ids=args.camera_ids, size=args.size,
                frames=args.frames, frame_dt=args.frame_dt, folder=args.folder, start=args.start, workers=args.workers)
    print(f"{made.folder}: {len(made)} scenes in {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"data.py: {error}") from None
