"""
Watch a drive: one HTML file with everything in it, no server and no network.

    python -m tools.watch --split tail --seed 3                  a scenario of the built-in world
    python -m tools.watch --split tail --seed 3 --beside out/rl  two checkpoints, side by side
    python -m tools.watch --clip CLIP --t0 3 --look              a real clip, and where it looks
"""
import base64
import io
import json
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import doors
import draw
import world
from alpamayo import DT, HORIZON, resize, roll_out
from clips import ClipScenes, read_clips
from tools.common import Policy, add_checkpoint_flags, load_checkpoint
from world.causes import LIGHT
from world.roads import lane_edges

EVENTS = {"collision": "collision", "close": "close encounter", "off_road": "off the road",
          "ran": "ran a light or sign"}  # fmt: skip
REACH = 90  # m around the ego


class Film:
    """A checkpoint as a policy of data.drive, and `shown`: what watch.html shows of its drive.
    It is asked every 0.1 s, plans every `replan` seconds and else drives on by its last plan."""

    def __init__(self, folder, args):
        self.args = Namespace(**vars(args) | {"checkpoint": folder})
        self.model = load_checkpoint(self.args)
        self.policy = Policy(self.model, self.args)
        self.shown = {"name": Path(folder).name, "frames": [], "plans": [], "events": {}}
        self.waits = False  # at a red light or a stop sign

    def __call__(self, scene):
        age = len(self.shown["frames"]) % data.ticks_of(self.args.replan)
        if age == 0:
            self.plan = self.policy(scene)
        return self.plan[:, age:]  # (1, 64 if it is new, 2)

    def add_tick(self, traffic, scene, plan):
        """The `film` of data.drive."""
        if plan.shape[1] == HORIZON:
            future, _ = data.way_on(traffic)
            self.add_plan(scene, plan, future["ego_future_xyz"][0])
            self.bar.update()
        things = traffic.things
        x, y, _ = traffic.poses_to_ego()
        hue = traffic.signals().where(things.kind == LIGHT, things.cause)
        rows = torch.stack([*traffic.poses(), things.length, things.width, hue], -1)
        rows = rows[(things.kind > 0) & (torch.hypot(x, y) < REACH)].tolist()
        time = round(traffic.time.item(), 1)
        self.add_frame(scene, time, [traffic.x.item(), traffic.y.item(), traffic.yaw.item()], rows)
        beyond = traffic.bumper() >= traffic.scene.stop
        met = traffic.judge() | {"ran": beyond & self.waits}
        events = self.shown["events"]
        for name, text in EVENTS.items():
            if met[name] and text not in str(events):
                at = next((before for before in events if time - before < 1), time)
                events[at] = f"{events[at]}, {text}" if at in events else text
        self.waits = traffic.held & ~beyond
        self.traffic = traffic

    def add_plan(self, scene, plan, truth):
        """What it thinks and would drive, samples from noise on. truth (64, 3), m, to compare."""
        model, args = self.model, self.args
        shown = scene if args.route else data.without_route(scene)
        out = model.sample(shown, args.n, steps=args.steps, seed=args.seed, reason=args.reason)
        actions = model.action_space.restore(out.flow[:, 0])  # (steps + 1, n, 64, 2)
        flow, _ = roll_out(actions, model.speed(scene).expand(actions.shape[:2]))
        path, _ = roll_out(plan, model.speed(scene))
        said, true = self.policy.said[0], scene["reasoning"][0]
        words, seen = look_back(model, shown, said) if args.look and said else ([said], [])
        self.shown["plans"].append({
            "words": [draw.readable(word) for word in words],
            "seen": seen,
            "true": true,
            "verdict": draw.verdict(said, true),
            "samples": [[draw.verdict(one, true), draw.readable(one)] for one in out.reasoning[0]],
            "path": centimetres(path[0]),
            "truth": centimetres(truth),
            "flow": centimetres(flow[:, :, 1::2]),
        })

    def add_frame(self, scene, time, pose, things=()):
        """What the cameras see, side by side, and where all are. pose: x, y (m) and yaw."""
        images = resize(scene["images"], self.model.cfg)[0, :, -1]  # as the model sees them
        image = embedded(torch.cat(list(images), 2).permute(1, 2, 0), "JPEG")
        speed = scene["ego_kinematics"][0, -1, 0].item()
        plan = len(self.shown["plans"]) - 1
        self.shown["frames"].append(
            dict(time=time, pose=pose, speed=speed, things=things, plan=plan, image=image))
        for key in scene.keys() & {"camera_ids", "intrinsics", "camera_to_ego"}:
            self.shown[key] = scene[key][0].tolist()


def look_back(model, scene, said):
    """The tokens of a thought, and where the model looked as it chose each: its attention to image
    tokens in thousandths, mean of layers and heads, lists (T, cameras, h, w)."""
    if model.cfg.vision != "image":
        raise ValueError(f"--look: tokens of {model.cfg.vision} have no place in an image")
    _, _, grids, kept = model.look(scene)
    prompt = model.embed_prompt(scene)
    ids = torch.tensor([model.vocabulary.encode(said)], device=model.device)
    seen = torch.zeros(ids.shape[1], len(grids), *grids[0][0])
    hook = model.vlm.model.language_model.register_forward_pre_hook(  # each layer shall tell
        lambda module, args, options: (args, options | {"n_ask": 1}), with_kwargs=True)
    for i, row in enumerate(seen):
        _, cache = model.read(prompt, ids[:, :i])
        received = torch.stack([salience for _, _, salience in cache]).mean(0)  # (1, P + i)
        row.view(-1)[kept[0].cpu()] = received[0, prompt.image_at[0]].cpu()
    hook.remove()
    seen = 1000 * seen.unflatten(1, (-1, model.cfg.times)).sum(2)
    return [model.vocabulary.decode([token]) for token in ids[0].tolist()], seen.int().tolist()


def centimetres(paths):
    return (100 * paths[..., :2]).round().int().tolist()


def embedded(pixels, kind):
    """An image (H, W, channels) uint8 as text within a page."""
    from PIL import Image  # matplotlib brings it

    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def drive_world(films, args):
    """The films' models drive a scenario: its title, and a map of the world."""
    if args.seed >= world.SEEDS["val"]:
        raise ValueError(f"--seed: the splits have seeds up to {world.SEEDS['val'] - 1}")
    seed = world.SEEDS[args.split] + args.seed
    for film in films:
        view = data.view_of(film.model.cfg, args.size)
        film.bar = tqdm(desc="driving", total=round(args.seconds / args.replan), leave=False)
        data.drive(film, [seed], args.seconds, DT, film.model.device, film.add_tick, **view)
    poses = [frame["pose"] for film in films for frame in film.shown["frames"]]
    title = f"{film.traffic.draws[0].situation}, {args.split} {args.seed}"
    return title, map_of(film.traffic, poses)


def map_of(traffic, poses):
    """Asphalt and lane lines as an image, and its x, y, length and width in the world, m."""
    left, bottom, _ = np.min(poses, 0) - REACH
    right, top, _ = np.max(poses, 0) + REACH
    x, y = torch.arange(left, right, 0.25), torch.arange(bottom, top, 0.25)
    points = x.repeat(len(y))[None].float(), y.repeat_interleave(len(x))[None].float()
    _, d, _ = world.locate(*points, traffic.scene.road)
    low, high = lane_edges(traffic.scene.lanes)
    beside = (d - low + world.LANE / 2) % world.LANE - world.LANE / 2  # m to the next lane line
    line = (1 - beside.abs() / 0.4).clamp(0) * ((d - low > -1) & (d - high < 1))
    opaque = traffic.paved(*points) * (70 + 180 * line)
    pixels = torch.stack([128 + 127 * line, opaque], -1).byte().view(len(y), len(x), 2)
    return {"image": embedded(pixels, "PNG"), "box": [left, bottom, len(x) / 4, len(y) / 4]}


def drive_clip(films, args):
    """They plan along a clip, which goes on as it was driven: its name, and no map."""
    clip = read_clips(args.clip)[0]
    start = clip.motion.first + 2 if args.t0 is None else args.t0
    end = min(start + args.seconds, clip.motion.last - HORIZON * DT)
    times = np.arange(start, max(start, end) + 1e-6, args.replan)
    for film in films:
        cfg = film.model.cfg
        of_world = {} if cfg.max_pixels else {"size": tuple(args.size), "rig": world.RIG}
        scenes = ClipScenes([clip], times, frames=cfg.frames, frame_dt=cfg.frame_dt, **of_world)
        for i, time in enumerate(tqdm(times, desc="driving", leave=False)):
            scene = scenes.batch([i])
            film.add_plan(scene, film.policy(scene), scene["ego_future_xyz"][0])
            film.add_frame(scene, round(time, 1), [0, 0, 0])
    return clip.name, None


def main():
    p = doors.Flags("Write a page that shows how a checkpoint drives.")
    add = p.add_argument
    add("--split", choices=("val", "tail", "rare"), default="val", help="whose scenario to drive")
    add("--clip", metavar="FOLDER", help="plan along a real clip instead")
    add("--t0", type=doors.real(-1e9, 1e9), metavar="SECONDS", help="where in the clip to begin")
    add("--beside", metavar="FOLDER", help="a second checkpoint, shown beside the first")
    add("--n", type=doors.whole(1, 64), default=6, help="samples at each plan")
    add("--look", action="store_true", help="where each word looked; slower")
    add("--out", type=doors.file_to_write(".html"), default="out/watch.html", help="the page")
    add_checkpoint_flags(p)
    args = p.parse_args()
    if not 1 <= data.ticks_of(args.replan) <= HORIZON:
        p.error(f"--replan: expected a multiple of {DT} s")
    films = [Film(folder, args) for folder in (args.checkpoint, args.beside) if folder]
    title, above = (drive_clip if args.clip else drive_world)(films, args)
    shown = {"title": title, "map": above, "drives": [film.shown for film in films]}
    text = json.dumps(shown, separators=(",", ":")).replace("</", "<\\/")  # no tag may end it
    text = re.sub(r"(\.\d{4})\d+", r"\1", text)  # four decimals will do
    page = Path(__file__).with_suffix(".html").read_text("utf-8").replace("{DRIVE}", text)
    doors.write_atomically(args.out, lambda part: Path(part).write_text(page, "utf-8"))
    print(f"page       {args.out}, {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    doors.run(main)
