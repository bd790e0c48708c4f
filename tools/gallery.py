"""
Pictures of the built-in world: a scene of every kind on a sheet, and a film of a drive.

    python -m tools.gallery out/gallery                      gallery.png and drive.gif
    python -m tools.gallery out/gallery --situation deer     another drive
"""
import math
import os
import textwrap

import numpy as np
import torch

import data
import doors
import draw
import world
from alpamayo import roll_out
from draw import GREY, MODEL, TRUTH, DrawnPath, Look, Photo
from tools.common import Policy, add_checkpoint_flags, load_checkpoint

SHOWN = (*world.SITUATIONS, *world.COMBINATIONS, *world.RARE)
ACROSS = 3  # of the sheet
EXPERT = Look({}, ((0.5, "white", 0.9), (0.25, MODEL, 1)))
PLAN = Look({}, ((1.8, MODEL, 0.5),))

# --------------------------------------------------------------------------------------------------
# The sheet


def chosen_seeds():
    """A seed for every kind of scene, in order: three of four in plain daylight."""
    seeds = {}
    for split in ("val", "tail", "rare"):
        first = world.SEEDS[split]
        for seed in range(first, first + 1000):
            if seeds.keys() >= set(world.KINDS[split]):
                break
            one = world.draw(seed)
            kind = one.situation
            plain = one.dusk == one.rain == 0 and one.visibility == 150
            if plain == (SHOWN.index(kind) % 4 < 3 and kind != "dusk and rain"):
                seeds.setdefault(kind, seed)
    return [seeds[kind] for kind in SHOWN]


def draw_sheet(file):
    """One scene of every situation, combination and rare object: what the front wide and the front
    tele camera see at t0, the label, and the path that the expert will drive."""
    plt = draw.pyplot()
    scene = data.make_scenes(chosen_seeds(), camera_ids=(1, 6), size=(128, 256), frames=1)
    rows = math.ceil(len(SHOWN) / ACROSS)
    with plt.rc_context(draw.STYLE):
        figure = plt.figure(figsize=(5.4 * ACROSS, 1.83 * rows), dpi=75)
        margins = dict(left=0.005, right=0.995, top=0.978, bottom=0.004)
        grid = figure.add_gridspec(rows, ACROSS, wspace=0.03, hspace=0.38, **margins)
        for i, kind in enumerate(SHOWN):
            path = DrawnPath(scene["ego_future_xyz"][i], scene["ego_future_rot"][i], None, EXPERT)
            photos = draw.photos_of(scene, i)
            wide, tele = grid[i].subgridspec(1, 2, wspace=0.01).subplots()
            draw.draw_photo(wide, 1, photos[1], [path])
            draw.draw_photo(tele, 6, photos[6], [path])
            title(wide, kind, scene["reasoning"][i])
        draw.save_figure(figure, file)


def title(ax, kind, label):
    """The kind of a scene, whether training shows it, and its label, above its first image."""
    known = kind in world.SITUATIONS
    text = kind if known else f"{kind}   (never in training)"
    colour = TRUTH if known else MODEL
    label = textwrap.shorten(label, 82, placeholder=" ...")
    ax.text(0, 1.17, text, transform=ax.transAxes, weight="bold", color=colour)
    ax.text(0, 1.045, label, transform=ax.transAxes, size=8.5, color=GREY)


# --------------------------------------------------------------------------------------------------
# The film


def draw_film(file, seed, model, args, size=(192, 384)):
    """Let the model drive a scenario, and film it, a picture at every plan: the road ahead with the
    plan on it, what the model says, and the scene from above. Returns what data.drive does."""
    plt = draw.pyplot()
    from PIL import Image  # matplotlib brings it

    policy = Policy(model, args)
    pictures = []

    def film(traffic, scene, plan):
        figure.clear()
        ahead = figure.add_axes([0, 0, 0.66, 0.87])
        above = figure.add_axes([0.69, 0.02, 0.3, 0.83])
        image = world.images_of(traffic, (1,), size)[0, 0].permute(1, 2, 0).numpy()
        photo = Photo(image, *world.rig_camera(1, *size))
        xyz, rot = roll_out(plan[:1], traffic.speed[:1])
        draw.draw_photo(ahead, 1, photo, [DrawnPath(xyz[0], rot[0], None, PLAN)])
        draw_traffic(above, traffic, xyz[0])
        said = draw.readable(policy.said[0]) or "drives without reasoning"
        figure.text(0.012, 0.925, said, weight="bold", color=TRUTH)
        time = traffic.time[0].item()
        speed = traffic.speed[0].item()
        below = f"{args.situation}   {time:4.1f} s   {speed:4.1f} m/s"
        figure.text(0.99, 0.885, below, size=9, color=GREY, ha="right")
        figure.canvas.draw()
        pixels = np.array(figure.canvas.buffer_rgba())
        pictures.append(Image.fromarray(pixels).convert("RGB"))

    with plt.rc_context(draw.STYLE):
        figure = plt.figure(figsize=(9.6, 3.9), dpi=75)
        view = data.view_of(model.cfg, args.size)
        met = data.drive(policy, [seed], args.seconds, args.replan, film=film, **view)
        plt.close(figure)
    first, *others = pictures
    pace = dict(duration=round(1000 * args.replan), loop=0)  # ms
    doors.write_atomically(
        file,
        lambda part: first.save(part, "GIF", save_all=True, append_images=others, **pace))
    return met


def draw_traffic(ax, traffic, plan):
    """Scene 0 of a World from above, the ego at the origin and looking up: lane lines, what stands
    or moves, and the plan (64, 3)."""
    road = traffic.scene.road
    here = world.locate(traffic.x, traffic.y, road)[0]
    s = here + torch.linspace(-60, 160, 111)  # arc length, m
    left, oncoming, right = traffic.scene.lanes[0].tolist()
    for lane in range(int(-right), int(left + oncoming) + 2):
        x, y, _ = world.place(s, torch.full_like(s, (lane - 0.5) * world.LANE), road)
        x, y = traffic.to_ego(x, y)
        ax.plot(-y[0], x[0], color="white", linewidth=1.5, zorder=0)
    things = traffic.things
    shown = traffic.solid(things.kind)[0] | (things.kind[0] == world.BUMP)
    poses = torch.stack(traffic.poses_to_ego(), -1)[0].tolist()  # of each thing: x, y, yaw
    for j in shown.nonzero()[:, 0].tolist():
        colour = TRUTH if things.cause[0, j] else GREY
        draw_box(ax, poses[j], things.size[0, j].tolist(), colour)
    draw_box(ax, (world.FRONT - world.LENGTH / 2, 0, 0), (world.LENGTH, world.WIDTH), MODEL)
    ax.plot(-plan[:, 1], plan[:, 0], color=MODEL, linewidth=2, alpha=0.7)
    ax.set_facecolor("#eceff3")
    ax.set(xlim=(-17, 17), ylim=(-12, 60), xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(False)


def draw_box(ax, pose, size, colour):
    """A box from above. pose: x, y, yaw; size: length, width and so on."""
    from matplotlib.patches import Rectangle

    x, y, yaw = pose
    length, width = size[:2]
    corner = -y - width / 2, x - length / 2  # left is left, ahead is up
    turn = dict(angle=math.degrees(yaw), rotation_point="center")
    ax.add_patch(Rectangle(corner, width, length, facecolor=colour, **turn))


# --------------------------------------------------------------------------------------------------
# The command line


def first_seed(situation, start):
    """The first seed of a situation, in whichever held-out split has it."""
    for split in ("val", "tail", "rare"):
        if situation in world.KINDS[split]:
            return world.find(situation, split, start)
    raise ValueError(
        f"--situation {situation!r}: unknown; python -m tools.world --splits lists them")


def main():
    p = doors.Flags("Draw a sheet of the world's situations and a film of a drive.")
    p.add_argument(
        "folder", type=doors.folder_to_write, metavar="FOLDER",
        help="where gallery.png and drive.gif go")
    p.add_argument("--situation", default="double-parked car", metavar="NAME", help="of the drive")
    add_checkpoint_flags(p)
    args = p.parse_args()
    draw.pyplot()  # or say at once that there is none
    seed = first_seed(args.situation, args.seed)
    model = load_checkpoint(args)
    file = os.path.join(args.folder, "drive.gif")
    met = draw_film(file, seed, model, args)
    numbers = [f"{name} {value.item():.2g}" for name, value in met.items()]
    print(f"drive      {args.situation}, seed {seed}: " + ", ".join(numbers))
    print(f"film       {file}")
    file = os.path.join(args.folder, "gallery.png")
    draw_sheet(file)
    print(f"picture    {file}")


if __name__ == "__main__":
    doors.run(main)
