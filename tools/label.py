"""
Labels of one's own clips: a file to fill in for each key frame, read back into reasoning.json.

    python -m tools.label CLIP --out labels     # find the key frames, prepare their labels
    python -m tools.label --read labels         # check them, write CLIP/reasoning.json

There are two stages, as for the paper's annotators (Sec. 4.3). The first shows two seconds up to
the key frame and asks what matters there. The second shows six seconds after it and asks what was
decided and why. A reason may name only what the first stage did, so that no reason rests on what
could not be seen in time.
"""
import math
import re
from pathlib import Path

import numpy as np
import torch

import doors
from alpamayo import DT
from clips import CAMERAS, ClipScenes, read_clips, read_reasoning
from data import COMPONENTS, LATERAL, LONGITUDINAL, decisions
from doors import inside, read_json, write_json
from draw import pyplot, save_figure
from motion import (
    LATERAL_META,
    LEAD,
    LONGITUDINAL_META,
    key_frames,
    meta_actions,
    segments,
    smooth_motion,
)

BEFORE = np.arange(-2, 0.1, 0.5)  # s from a key frame to what a labeller sees in stage 1 (Table 3)
AFTER = np.arange(0.5, 6.1, 0.5)  # and in stage 2
EVERY = 5  # tenths of a second between lines about the motion
SEEN = {  # what a critical component may be
    "component": COMPONENTS,
    "uncertainty": ("low", "high"),
}
DECIDED = {  # what may have been decided
    "longitudinal": (*LONGITUDINAL, "none"),
    "lateral": (*LATERAL, "none"),
    "exclude": ("no", "unsafe", "no decision"),  # ours, after the paper's safety exclusion
}
# A reason may name only what stage 1 did. A rule looks for these words (ours; a row is one thing).
# Of two rows that begin at one word the first wins: a "traffic light" is no traffic.
THINGS = {
    "rain": r"(?:light |heavy )?(?:rain|snow|fog|ice|hail)",
    "a car's lamps": r"(?:brake|tail|head|hazard|indicator|flashing|blue|street)[- ]?lights?|"
                     r"headlamps?|turn signals?|indicators?|blinkers?",
    "light": r"(?:traffic|tram) (?:light|signal)s?|lights?(?! traffic)",
    "stop sign": r"stop signs?",
    "yield sign": r"(?:yield|give[- ]way) signs?",
    "speed sign": r"speed(?: limit)? signs?|speed limits?",
    "sign": r"(?:traffic |road )?signs?",
    "stop line": r"stop lines?",
    "bus stop": r"bus (?:stop|lane)s?",
    "school": r"schools?(?! bus)",
    "crosswalk": r"crosswalks?|zebras?|pedestrian crossings?(?! from| the| our| over)",
    "worker": r"(?:construction |road )?workers?|flaggers?|firefighters?",
    "roadworks": r"construction(?: site| zone)?s?|road ?works?",
    "child": r"child|children|kids?|boys?|girls?",
    "cyclist": r"cyclists?|bicycles?|bikes?",
    "pedestrian": r"pedestrians?|persons?|people|m[ae]n|wom[ae]n",
    "ambulance": r"ambulances?|police(?: car)?s?|fire (?:engine|truck)s?|emergency vehicles?",
    "motorcycle": r"motorcycles?|motorbikes?|scooters?",
    "tram": r"trams?|trains?|streetcars?",
    "rails": r"rails?|level crossings?",
    "bus": r"(?:school )?bus(?:es)?",
    "truck": r"trucks?|lorry|lorries|trailers?|tractors?|excavators?",
    "van": r"vans?",
    "taxi": r"taxis?|cabs?",
    "car": r"cars?|suvs?",
    "traffic": r"(?:light |heavy )?traffic|vehicles?|queues?|jams?",
    "animal": r"animals?|dogs?|cats?|deer|cows?|horses?|birds?",
    "cone": r"cones?",
    "barrier": r"barriers?|fences?|gates?",
    "bump": r"(?:speed )?(?:bump|hump)s?|potholes?",
    "debris": r"debris|tyres?|boxes|branch(?:es)?|trees?",
    "obstacle": r"obstacles?|objects?|things?",
    "curve": r"curves?|bends?",
    "roundabout": r"roundabouts?",
    "junction": r"junctions?|intersections?|crossroads?",
    "ramp": r"ramps?|exits?",
    "tunnel": r"tunnels?|bridges?",
    "route": r"routes?|destinations?|navigation",
}
A_THING = re.compile(r"\b(?:" + "|".join(f"({words})" for words in THINGS.values()) + r")\b")
VEHICLES = {"bus", "truck", "van", "taxi", "car", "motorcycle", "ambulance", "tram"}
GENERAL = {  # a word that any of these things may go by
    "traffic": VEHICLES,
    "sign": {"stop sign", "yield sign", "speed sign"},
    "pedestrian": {"child", "worker"},
    "obstacle": {"cone", "barrier", "debris", "animal", *VEHICLES},
}
NAMED = {  # by a component itself, without a word of description
    "traffic light": "light",
    "yield or stop control": "sign",
    "routing intent": "route",
}
# Words that say where something is or what it does, but not what it is.
PLACES = set("""
ahead left right side front behind beside before after near next from into onto over with that this
there then here lane lanes road street path line lines middle centre center edge
must need needs have been being turn turns turned turning stop stops stopped stopping stand stands
keep keeps move moves moving drive drives slow slows slower speed wait waits waiting come comes
coming block blocks blocked blocking cross crosses crossing crossed
""".split())
STAGE_1 = (
    "You see the two seconds up to a moment at which the driver decides something, and not what "
    "follows: `history` and the images in this folder, named by camera, number and seconds.",
    "Fill in critical_components: what could directly cause the decision, the most important "
    'first, each as {"component": one of allowed.component, "description": what it is, where and '
    'how it moves in a few plain words, "uncertainty": one of allowed.uncertainty}.',
    "If there is nothing, name the lane or the route that the driver keeps to. Do all this before "
    "you look at stage_2, motion.png or keyframes.json.",
)
STAGE_2 = (
    "Fill in ../stage_1 first. You see the six seconds after: `future`, `meta_actions` and the "
    "images in this folder.",
    'exclude: one of allowed.exclude. "unsafe" is driving that nobody should learn, "no decision" '
    "a key frame at which nothing was decided; leave the other fields of these null.",
    "longitudinal, lateral: the first decision of each kind after the key frame, one of allowed; "
    "none if no new one.",
    'reasoning: one sentence "<longitudinal> and <lateral> since <reasons>." with the decisions '
    'above; in place of a none it says "keep speed" or "keep lane". The reasons are components of '
    "stage 1, in the words used there, and nothing that was only seen later.",
)
LAYOUTS = ("egomotion.csv", "oxts", "features.csv")  # what a clip's folder has one of
META = {"longitudinal": LONGITUDINAL_META, "lateral": LATERAL_META}
COLOURS = {
    "longitudinal": "#c3e6c0 #5fb35a #f8cdb0 #e0703f none #9a9a9a #cda6e0".split(),
    "lateral": "#bcd6f2 #f3e3a4 #5f9bdc #dcb53f #d6b6e6 #e6b6d6 none".split(),
}


# --------------------------------------------------------------------------------------------------
# Preparing


class Drive:
    """A clip's motion at whole tenths of a second: times in s, speed, ..., (T,) each."""

    def __init__(self, motion):
        first = math.ceil(motion.first / DT - 1e-6)
        last = math.floor(motion.last / DT + 1e-6)
        self.times = DT * np.arange(first, last + 1)
        xyz, rot, _ = map(torch.from_numpy, motion.pose(self.times))
        self.speed, self.acceleration, _, self.turn_rate = smooth_motion(xyz, rot)
        self.meta = dict(zip(META, meta_actions(xyz, rot)))  # indices into META
        self.key_frames = key_frames(xyz, rot)  # [(step, kinds)]

    def words(self, step):
        """The longitudinal and the lateral meta-action at a step."""
        return [META[kind][labels[step]] for kind, labels in self.meta.items()]


def write_labels(path, folder):
    """
    Prepare the labelling of the clips at `path`, in any layout, in `folder`, with a folder for each
    clip in it if they are several. Returns [(folder, key frames)] with keyframes.json's list.

        keyframes.json      {"clip", "name", "key_frames": [{"time": s, "kinds", "before", "after":
                            [longitudinal, lateral meta-action], "label": its folder, null where no
                            Scene can be cut, "why" not}]}
        motion.png          speed and turn rate, meta-actions as bands, key frames as lines
        0012.3/stage_1/     of the key frame at 12.3 s: label.json to fill in, images of all cameras
        0012.3/stage_2/     the same of what came after

    A label.json that is there already is kept.
    """
    pyplot()  # or say at once that there is none
    clips = read_clips(path)
    folder = Path(folder)
    source = Path(path).resolve()
    if folder.resolve().is_relative_to(source):
        raise ValueError(
            f"{folder}: labels do not go into the clip's own folder {path}, choose another --out")
    written = []
    for clip in clips:
        home = folder
        if len(clips) > 1:
            home = Path(inside(folder, clip.name, f"{path}: the name of a clip"))
        home.mkdir(parents=True, exist_ok=True)
        drive = Drive(clip.motion)
        frames = [write_frame(home, clip, drive, *frame) for frame in drive.key_frames]
        write_json(
            f"{home}/keyframes.json",
            {"clip": str(source), "name": clip.name, "key_frames": frames})
        draw_motion(home / "motion.png", clip.name, drive)
        written.append((home, frames))
    return written


def write_frame(home, clip, drive, step, kinds):
    """A key frame's entry in keyframes.json. Its label is written if a Scene can be cut there."""
    t0 = round(float(drive.times[step]), 1)
    after = min(step + round(2 * LEAD / DT), len(drive.times) - 1)
    frame = {
        "time": t0, "kinds": kinds, "before": drive.words(step), "after": drive.words(after),
        "label": f"{t0:06.1f}"}
    try:
        ClipScenes([clip], t0)
    except ValueError as error:
        return frame | {"label": None, "why": str(error)}
    folder = home / frame["label"]
    write_stage(folder / "stage_1", clip, t0 + BEFORE, stage_1(clip, t0))
    write_stage(folder / "stage_2", clip, t0 + AFTER, stage_2(clip, t0, drive, step))
    return frame


def stage_1(clip, t0):
    """The fields of stage 1's label.json: what led to the key frame at t0."""
    history = []
    kinematics = clip.motion.kinematics(t0)  # (20, 4), the last row at t0; knows nothing after it
    for step in range(-15, 1, EVERY):
        speed, acceleration, steering, signal = kinematics[step - 1]
        line = (f"{DT * step:+.1f} s: speed {speed:.1f} m/s, acceleration "
                f"{acceleration:+.1f} m/s^2, steering {steering:+.3f} rad (left +)")
        if "turn_signal" in clip.motion.measured:
            line += f", signal {('off', 'left', 'right')[int(signal)]}"
        history.append(line)
    return dict(
        instructions=STAGE_1, allowed=SEEN, clip=clip.name, time=t0, history=history,
        critical_components=[])


def stage_2(clip, t0, drive, step):
    """The fields of stage 2's label.json: what came after the key frame at this step."""
    end = step + round(AFTER[-1] / DT)
    future = [
        f"{DT * (i - step):+.1f} s: speed {drive.speed[i]:.1f} m/s, acceleration "
        f"{drive.acceleration[i]:+.1f} m/s^2, turn rate {drive.turn_rate[i]:+.2f} rad/s (left +)"
        for i in range(step, end + 1, EVERY)
    ]
    meta = {}
    for kind, labels in drive.meta.items():
        runs = segments(labels[step:end])
        meta[kind] = [f"{DT * a:.1f} to {DT * b:.1f} s: {META[kind][i]}" for i, a, b in runs]
    return dict(
        instructions=STAGE_2, allowed=DECIDED, clip=clip.name, time=t0, future=future,
        meta_actions=meta, exclude=None, longitudinal=None, lateral=None, reasoning=None)


def write_stage(folder, clip, times, label):
    """A stage's folder: label.json, unless there is one, and all cameras' images at times in s."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "label.json").exists():
        write_json(f"{folder}/label.json", label)
    for camera_id, camera in clip.cameras.items():
        # NVIDIA's cameras do not say when they begin and end: where there are poses, less 0.1 s.
        begin = max(camera.first, clip.motion.first + DT)
        end = min(camera.last, clip.motion.last - DT)
        there = np.flatnonzero((begin <= times) & (times <= end))
        for i, image in zip(there, camera.read(times[there]) if len(there) else ()):
            name = f"{CAMERAS[camera_id]}_{i:02d}_{times[i] - label['time']:+.1f}s.jpg"
            write_image(folder / name, image)


def write_image(file, image):
    """Write an image (H, W, 3) uint8 as a JPEG."""
    from PIL import Image  # matplotlib, which draws too, brings it

    picture = Image.fromarray(image)
    doors.write_atomically(file, lambda part: picture.save(part, "JPEG", quality=92))


def draw_motion(file, title, drive):
    """Speed and turn rate of a Drive over time, a minute in each row."""
    plt = pyplot()
    rows = math.ceil(len(drive.times) * DT / 60)
    figure = plt.figure(figsize=(14, 5 * rows), dpi=100, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2 * rows).reshape(rows, 2)
    for row, (top, bottom) in enumerate(axes):
        draw_channel(top, drive, row, "longitudinal", drive.speed, "speed, m/s")
        draw_channel(bottom, drive, row, "lateral", drive.turn_rate, "turn rate, rad/s (left +)")
    save_figure(figure, file)


def draw_channel(ax, drive, row, kind, values, label):
    """Values (T,) in this row's minute, meta-actions of a kind as bands, key frames as lines."""
    times = drive.times
    for i, first, end in segments(drive.meta[kind]):
        end = min(end, len(times) - 1)
        ax.axvspan(times[first], times[end], color=COLOURS[kind][i], lw=0)
    for word, colour in zip(META[kind], COLOURS[kind]):
        ax.fill_between([], [], color=colour, label=word)
    ax.legend(ncols=7, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8, frameon=False)
    ax.plot(times, values, "k", lw=1)
    begin = times[0] + 60 * row
    end = begin + min(60, times[-1] - times[0])
    low, high = ax.get_ylim()
    high = max(high, 0.1)  # a straight road looks straight
    ax.set(xlim=(begin, end), ylim=(min(low, -0.1), high), xlabel="s", ylabel=label)
    for step, kinds in drive.key_frames:
        time = times[step]
        ax.axvline(time, color="C3", lw=0.8)
        words = f"{time:.1f} {', '.join(kinds)}"
        ax.text(time, high, words, rotation=90, ha="right", va="top", fontsize=7, clip_on=True)


# --------------------------------------------------------------------------------------------------
# Reading back


def read_labels(folder):
    """
    Check the labels in `folder`, filled in since write_labels, and put their texts into their
    clips' reasoning.json.

    An entry there of the same time is replaced, others stay. A clip in NVIDIA's layout has no place
    for it: its reasoning.json is written beside keyframes.json. Returns a line for each clip: what
    was done. Raises ValueError, a line for each wrong label, before anything is written.
    """
    files = sorted(Path(folder).rglob("keyframes.json"))
    if not files:
        raise FileNotFoundError(
            f"{folder}: no keyframes.json in it or in its folders, python -m tools.label makes it")
    wrong = []
    clips = []
    for file in files:
        listed = read_json(file)
        clip = Path(listed.text("clip"))
        if not clip.is_absolute():
            raise listed.wrong("clip", "the absolute path of a clip")
        if not any((clip / known).exists() for known in LAYOUTS):
            raise FileNotFoundError(f"{file}: clip is {clip}, where no clip is any more")
        texts = {}
        for frame in listed.objects("key_frames"):
            time = frame.number("time")
            if frame.get("label") is None:  # no Scene can be cut there
                continue
            label = inside(file.parent, frame.text("label"), f"{file}: field {frame.where}label")
            try:
                texts[time] = read_label(Path(label))
            except (ValueError, OSError) as error:
                wrong.append(str(error))
        clips.append((file.parent, clip, texts))
    if wrong:
        raise ValueError("\n".join(wrong))
    for home, clip, _ in clips:
        read_reasoning(reasoning_file(home, clip))  # or say, before any is written, what is wrong
    return [write_reasoning(*clip) for clip in clips]


def reasoning_file(home, clip):
    """Where a clip's texts go. NVIDIA's layout has no place for them."""
    return (home if (clip / "features.csv").exists() else clip) / "reasoning.json"


def write_reasoning(home, clip, texts):
    """Put texts {time in s: read_label} into the clip's reasoning.json. Returns a line about it."""
    file = reasoning_file(home, clip)
    done = {time: text for time, text in texts.items() if text is not None}
    entries = {time: text for time, text in done.items() if text}
    line = (f"{home}: {len(entries)} labels, {len(done) - len(entries)} excluded, "
            f"{len(texts) - len(done)} to be filled in")
    if not done:
        return line
    for old, text in read_reasoning(file).items():
        if all(abs(old - time) > DT / 2 for time in done):
            entries[old] = text
    write_json(file, [{"time": time, "text": text} for time, text in sorted(entries.items())])
    return f"{line}; {len(entries)} in {file}"


def read_label(folder):
    """
    The text of a key frame's label, "" if it is excluded, None if stage 2 has not been filled in.

    ValueError: the file, the field and what was expected.
    """
    first = read_json(folder / "stage_1/label.json")
    second = read_json(folder / "stage_2/label.json")
    check_components(first)
    fields = (*DECIDED, "reasoning")
    for field in fields:
        if field not in second:
            raise second.wrong(field, "to be there")
    if not any(second.get(field) for field in fields):
        return None
    require_one_of(second, {"exclude": DECIDED["exclude"]})
    if second["exclude"] != "no":
        return ""
    require_one_of(second, DECIDED)
    longitudinal, lateral = second["longitudinal"], second["lateral"]
    if longitudinal == lateral == "none":
        raise second.wrong("lateral", 'one decision; where there is none, exclude is "no decision"')
    if not first["critical_components"]:
        raise first.wrong("critical_components", "one or more, as stage_2 is filled in")
    pair = longitudinal.replace("none", "keep speed"), lateral.replace("none", "keep lane")
    check_reasoning(second, pair, first)
    return second["reasoning"].strip()


def check_components(first):
    """Each has a component and an uncertainty of a closed set, and a description."""
    for entry in first.objects("critical_components"):
        require_one_of(entry, SEEN)
        if not entry.text("description").strip():
            raise entry.wrong("description", "a few words")


def check_reasoning(second, pair, first):
    """It is a line "<decisions> since <reasons>."; the reasons are components of stage 1."""
    reasoning = str(second.get("reasoning"))
    reasons = reasoning.lower().partition(" since ")[2]
    if decisions(reasoning) != pair or "\n" in reasoning or not reasons.strip(" ."):
        begin = f"{pair[0]} and {pair[1]} since ".capitalize()
        raise second.wrong("reasoning", f'a line "{begin}<reasons>."')
    components = first["critical_components"]
    described = " ".join(entry["description"] for entry in components).lower()
    named = things_in(described) | {NAMED.get(entry["component"]) for entry in components}
    told = things_in(reasons)
    for thing in sorted(told):
        if not {thing, *GENERAL.get(thing, ())} & named:
            raise second.wrong("reasoning", f"only what {first.path} names, not {thing!r}")
    shared = set(re.findall(r"\w{4,}", reasons)) & set(re.findall(r"\w{4,}", described)) - PLACES
    if not told and not shared:
        raise second.wrong("reasoning", f"words of the critical_components of {first.path}")


def things_in(text):
    """Which of THINGS a text names."""
    names = list(THINGS)
    return {names[found.lastindex - 1] for found in A_THING.finditer(text)}


def require_one_of(label, allowed):
    """Each field of `allowed` must be one of its names."""
    for field, names in allowed.items():
        if label.get(field) not in names:
            raise label.wrong(field, "one of " + ", ".join(names))


def main():
    parser = doors.Flags(
        "Find the key frames of clips and prepare their labelling, or read it back.")
    parser.add_argument("folder", help="clips in any layout of clips.py; with --read, their labels")
    parser.add_argument(
        "--out", type=doors.folder_to_write, default="labels", metavar="LABELS",
        help="where the labels go")
    parser.add_argument(
        "--read", action="store_true", help="check labels, write their clips' reasoning.json")
    args = parser.parse_args()
    if args.read:
        print(*read_labels(args.folder), sep="\n")
        return
    for home, frames in write_labels(args.folder, args.out):
        for f in frames:
            print(f"{f['time']:7.1f} s  {', '.join(f['kinds']):24}  {f['label'] or f['why']}")
        ready = sum(bool(f["label"]) for f in frames)
        print(f"{home}: {len(frames)} key frames, {ready} to be labelled")


if __name__ == "__main__":
    doors.run(main)
