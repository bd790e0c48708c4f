"""
Look, think, drive: what a model says and does in one scene, printed and drawn.

    python sample.py                           the shipped nano in the built-in world; see out/
    python sample.py --situation pedestrian    the first held-out scene of that kind
    python sample.py --clip FOLDER --t0 3      a real clip, in any layout that clips.py reads
    python sample.py --keep 0.5                half of the image tokens; no retraining
    python sample.py --say "Stop and keep lane since the light ahead is red."
    python sample.py --json out/sample.json    what was said and driven, in numbers

Each sample is compared with the truth: "right"; "other reason", for the same decisions; "wrong".
The page reads: the story in `main`, the flags, a scene of the world or of a clip, the report.
For tables over many scenes and for driving in closed loop see `python -m tools.evaluate`.
"""
import numpy as np

import data
import doors
import rl
import world
from alpamayo import NANO, ade, load_model
from doors import real, whole
from draw import Photo, draw_scene, photos_of, picture, readable, verdict
from motion import baselines

FIRST_SEEN = "parked car"  # the situation where nothing else is asked for


def main():
    args = parse_flags()
    model = load_model(args.checkpoint, args.device, **args.switches)
    if model.cfg.reasoning != "on":
        args.reason = False  # after stage action a model cannot think yet
    if args.clip:
        scene, photos = clip_scene(model.cfg, args)
    else:
        scene, photos = world_scene(model.cfg, args)
    if not args.route:
        scene = data.without_route(scene)
    options = dict(
        n=args.n, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
        max_new_tokens=256)
    choose = None if args.say is None else rl.saying(model, [args.say], **options)
    out = model.sample(scene, steps=args.steps, reason=args.reason, choose=choose, **options)
    report_samples(scene, out)
    if args.json:
        doors.write_json(args.json, record_of(scene, out, args))
        print(f"numbers    {args.json}")
    draw_scene(args.out, scene, out, photos)
    print(f"picture    {args.out}")


# --------------------------------------------------------------------------------------------------
# The command line


def parse_flags():
    p = doors.Flags("Sample a model on one scene and draw it.")
    add = p.add_argument
    add("--checkpoint", metavar="FOLDER", default=NANO, help="the model, ours or the release's")
    add("--device", type=doors.device_of, help="cpu, cuda or mps (default: a GPU if there is one)")
    add("--seed", type=whole(), default=0, help="of the sampling")
    add("--scene", type=whole(most=world.SEEDS["val"] - 1), metavar="NUMBER",
        help="which held-out scene of the world, or which of the clip's")
    add("--split", choices=("val", "tail", "rare"),
        help="scenes like training's (the default) | combinations it never shows | objects it "
             "never shows")
    add("--situation", metavar="NAME",
        help="the first such scene of the split, from --scene on; python -m tools.world --splits "
             f"lists them (default: {FIRST_SEEN}, where neither --scene nor --split is given)")
    add("--clip", metavar="FOLDER", help="a real clip instead of the world")
    add("--t0", type=real(-1e9, 1e9), metavar="SECONDS",
        help="now, on the clip's clock (default: the first that the clip names)")
    add("--cameras", type=whole(most=6), nargs="+", metavar="ID",
        help="of the clip, or for a model of the world of its rig, to look through (default: "
             "those of 0, 1, 2 and 6 that there are)")
    add("--size", type=whole(1, 4096), nargs=2, default=(64, 128), metavar=("H", "W"),
        help="pixels of the world's images")
    add("--n", type=whole(1, 10_000), default=6, help="samples, each with its own reasoning")
    add("--temperature", type=real(0), default=0.6, help="of the reasoning; 0 is greedy")
    add("--top-p", type=real(most=1, above=0), default=0.98,
        help="reason with the likeliest words that together have this probability")
    add("--steps", type=whole(1, 1000), default=10,
        help="Euler steps of the flow from noise to controls")
    add("--say", metavar="TEXT", help="thought in place of its own: does it drive as it thinks?")
    add("--no-reasoning", dest="reason", action="store_false", help="drive without thinking")
    add("--no-route", dest="route", action="store_false", help="hide where the route goes")
    add("--keep", type=real(most=1, above=0), metavar="SHARE",
        help="of the image tokens to keep (default: the checkpoint's)")
    add("--retrieve", type=real(most=1, above=0), metavar="SHARE",
        help="of the prompt's image tokens for the reasoning to read (default: the checkpoint's)")
    add("--out", type=picture, metavar="PNG", default="out/sample.png", help="the picture")
    add("--json", type=doors.file_to_write(), metavar="FILE",
        help="also write reasoning, path (m) and controls (m/s^2, 1/m) of each sample")
    args = p.parse_args()
    for name in ("split", "situation") if args.clip else ("t0", "cameras"):
        if getattr(args, name) is not None:
            p.error(f"--{name}: expected {'without' if args.clip else 'with'} --clip")
    if args.say is not None and not args.reason:
        p.error("--say: expected without --no-reasoning")
    if all(one is None for one in (args.scene, args.split, args.situation, args.clip)):
        args.situation = FIRST_SEEN
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
    split = args.split or "val"
    first = world.SEEDS[split]
    number = args.scene or 0
    if args.situation:
        number = world.find(args.situation, split, number) - first
    scene = data.make_scenes([first + number], **data.view_of(cfg, args.size))
    scene["name"] = [f"{scene['name'][0]}, held-out scene {number} of the world"]
    return scene, photos_of(scene)


def clip_scene(cfg, args):
    """A Scene of a real clip, a batch of one, and its Photos: the images as they were taken."""
    options = dict(t0=args.t0, frames=cfg.frames, frame_dt=cfg.frame_dt, camera_ids=args.cameras)
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
    number = args.scene or 0
    if number >= len(clips):
        raise ValueError(f"--scene {number}: {args.clip} has scenes 0 to {len(clips) - 1}")
    clip, t0 = clips.cuts[number]
    photos = {}
    for i, camera in clip.cameras.items():
        seen = i in clips.sources(clip)
        if seen or camera.first <= t0 <= camera.last:
            (image,) = camera.read(np.array([t0]))
            photos[i] = Photo(image, camera.intrinsics, camera.camera_to_ego, seen)
    return clips.batch([number]), photos


# --------------------------------------------------------------------------------------------------
# The report


def report_samples(scene, out):
    """Print what the model thought and where it would go, beside the truth where it is known."""
    true = scene["reasoning"][0]
    future = scene.get("ego_future_xyz")  # (1, 64, 3), or None
    print(f"scene      {scene['name'][0]}")
    if true:
        print(f"truth      {true}")
    if future is not None:
        errors = ade(out.xyz[0].cpu(), future[0]).tolist()  # m, one a sample
    said = out.reasoning[0]
    verdicts = [verdict(text, true) for text in said]
    width = max(map(len, verdicts))
    for i, text in enumerate(said):
        says = readable(text) or "(no reasoning)"
        error = "" if future is None else f"  ADE {errors[i]:.2f} m"
        print(f"sample {i + 1:<2}  {verdicts[i]:{width}}  {says}{error}")
    if future is not None:
        ctrv = ade(baselines(scene)["CTRV"], future).item()
        print(f"minADE     {min(errors):.2f} m, best of {len(said)}; "
              f"constant turn rate and velocity: {ctrv:.2f} m")
    times = [f"{stage} {1000 * seconds:.0f} ms" for stage, seconds in out.seconds.items()]
    print("time       " + ", ".join(times))


def record_of(scene, out, args):
    """What --json writes of a batch of one. Lists of samples: xyz (64, 3), actions (64, 2)."""
    return {
        "checkpoint": args.checkpoint,
        "scene": scene["name"][0],
        "seed": args.seed,
        "truth": scene["reasoning"][0],
        "reasoning": out.reasoning[0],
        "xyz": out.xyz[0].tolist(),
        "actions": out.actions[0].tolist(),
        "seconds": out.seconds,
    }


if __name__ == "__main__":
    doors.run(main)
