"""
Look, think, drive: what a model says and does in one scene, printed and drawn.

    python sample.py                           the shipped nano in the built-in world; see out/
    python sample.py --situation pedestrian    the first held-out scene of that kind
    python sample.py --clip FOLDER --t0 3      a real clip, in any layout that clips.py reads
    python sample.py --keep 0.5                half of the image tokens; no retraining

The page reads: the story in `main`, the flags, a scene of the world or of a clip, the report.
For tables over many scenes and for driving in closed loop see `python -m tools.evaluate`.
"""
import argparse

import numpy as np

import data
import doors
import world
from alpamayo import NANO, ade, load_model
from draw import Photo, draw_scene, photos_of, readable
from motion import baselines


def main():
    args = parse_flags()
    model = load_model(args.checkpoint, **args.switches)
    if model.cfg.reasoning != "on":
        args.reason = False  # after stage action a model cannot think yet
    if args.clip:
        scene, photos = clip_scene(model.cfg, args)
    else:
        scene, photos = world_scene(model.cfg, args)
    if not args.route:
        scene = data.without_route(scene)
    out = model.sample(
        scene, args.n, args.temperature, args.top_p, args.steps, seed=args.seed, reason=args.reason)
    report_samples(scene, out, args)
    draw_scene(args.out, scene, out, photos)
    print(f"picture    {args.out}")


# --------------------------------------------------------------------------------------------------
# The command line


def parse_flags():
    p = argparse.ArgumentParser(
        description="Sample a model on one scene and draw it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--checkpoint", metavar="FOLDER", default=NANO, help="the model, ours or the release's")
    add("--seed", type=int, default=0,
        help="which held-out scene of the world; also the seed of the sampling")
    add("--split", choices=("val", "tail", "rare"), default="val",
        help="scenes like training's | combinations it never shows | objects it never shows")
    add("--situation", metavar="NAME",
        help="the first such scene of the split, from --seed on; python -m tools.world --splits "
             "lists them")
    add("--clip", metavar="FOLDER", help="a real clip instead of the world")
    add("--t0", type=float, metavar="SECONDS",
        help="now, on the clip's clock (default: the first that the clip names)")
    add("--size", type=int, nargs=2, default=(64, 128), metavar=("H", "W"),
        help="pixels of the world's images")
    add("--n", type=int, default=6, help="samples, each with its own reasoning")
    add("--temperature", type=float, default=0.6, help="of the reasoning; 0 is greedy")
    add("--top-p", type=float, default=0.98,
        help="reason with the likeliest words that together have this probability")
    add("--steps", type=int, default=10, help="Euler steps of the flow from noise to controls")
    add("--no-reasoning", dest="reason", action="store_false", help="drive without thinking")
    add("--no-route", dest="route", action="store_false", help="hide where the route goes")
    add("--keep", type=float, metavar="SHARE",
        help="of the image tokens to keep (default: the checkpoint's)")
    add("--retrieve", type=float, metavar="SHARE",
        help="of the prompt's image tokens for the reasoning to read (default: the checkpoint's)")
    add("--out", metavar="PNG", default="out/sample.png", help="the picture")
    args = p.parse_args()
    for flag, least in {"seed": 0, "n": 1, "steps": 1}.items():
        value = getattr(args, flag)
        if value < least:
            raise ValueError(f"--{flag} {value}: expected {least} or more")
    args.switches = {}  # of the checkpoint's config, where the command line says something else
    for switch in ("keep", "retrieve"):
        value = getattr(args, switch)
        if value is not None:
            args.switches[switch] = value
    return args


# --------------------------------------------------------------------------------------------------
# The scene


def world_scene(cfg, args):
    """A held-out Scene of the built-in world, a batch of one, and its Photos."""
    first = world.SEEDS[args.split]
    seed = first + args.seed
    if args.situation:
        seed = world.find(args.situation, args.split, args.seed)
    scene = data.make_scenes([seed], **data.view_of(cfg, args.size))
    situation = scene["name"][0]
    scene["name"] = [f"{situation}, held-out scene {seed - first} of the world"]
    return scene, photos_of(scene)


def clip_scene(cfg, args):
    """A Scene of a real clip, a batch of one, and its Photos: the images as they were taken."""
    options = dict(t0=args.t0, frames=cfg.frames, frame_dt=cfg.frame_dt)
    of_world = cfg.max_pixels == 0  # it knows only the world's cameras
    if of_world:
        options |= dict(size=tuple(args.size), rig=world.RIG)
    try:
        clips = data.load(args.clip, **options)
    except ValueError:
        # Perhaps the clip ends within 6.4 s. Then there is no truth to compare with.
        clips = data.load(args.clip, future=False, **options)
    if of_world:
        print("note       images are re-projected to the world's cameras; "
              "the shipped nano never saw a real street")
    clip, t0 = clips.cuts[0]
    photos = {}
    for i, camera in clips.sources(clip).items():
        (image,) = camera.read(np.array([t0]))
        photos[i] = Photo(image, camera.intrinsics, camera.camera_to_ego)
    return clips.batch([0]), photos


# --------------------------------------------------------------------------------------------------
# The report


def report_samples(scene, out, args):
    """Print what the model thought and where it would go, beside the truth where it is known."""
    true = scene["reasoning"][0]
    future = scene.get("ego_future_xyz")  # (1, 64, 3), or None
    print(f"scene      {scene['name'][0]}")
    if true:
        print(f"truth      {true}")
    if future is not None:
        errors = ade(out.xyz[0].cpu(), future[0]).tolist()  # m, one a sample
    for i, said in enumerate(out.reasoning[0]):
        mark = ""
        if args.reason and data.decisions(true):
            mark = "✓" if data.decisions(said) == data.decisions(true) else "✗"
        error = "" if future is None else f"  ADE {errors[i]:.2f} m"
        print(f"sample {i + 1:<2} {mark:1}  {readable(said) or '(no reasoning)'}{error}")
    if future is not None:
        ctrv = ade(baselines(scene)["CTRV"], future).item()
        print(f"minADE     {min(errors):.2f} m, best of {args.n}; "
              f"constant turn rate and velocity: {ctrv:.2f} m")
    times = [f"{stage} {1000 * seconds:.0f} ms" for stage, seconds in out.seconds.items()]
    print("time       " + ", ".join(times))


if __name__ == "__main__":
    doors.run(main)
