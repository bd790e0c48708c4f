"""
Labels of one's own clips: a file to fill in for each key frame, read back into reasoning.json.
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch

from alpamayo import DT
from release import write_json
from clips import CAMERAS, ClipScenes, read_clips, read_json, read_reasoning
from data import COMPONENTS, LATERAL, LONGITUDINAL, decisions
from motion import LATERAL_META, LEAD, LONGITUDINAL_META, key_frames, meta_actions, segments, smooth_motion
from world import PAST

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


def main():
    parser = argparse.ArgumentParser(description="Find the key frames of clips and prepare their labelling.")
    parser.add_argument("clip", nargs="?", metavar="CLIP", help="clips in any layout that data.py reads")
    parser.add_argument("--out", default="labels", metavar="FOLDER", help="where the labels go")
    parser.add_argument("--read", metavar="FOLDER", help="check its labels, make the clips' reasoning.json")
    args = parser.parse_args()
    if not args.clip and not args.read:
        parser.error("expected CLIP to prepare, or --read FOLDER")
    if args.clip:
        for home, frames in write_labels(args.clip, args.out):
            for f in frames:
                print(f"{f['time']:7.1f} s  {', '.join(f['kinds']):24}  {f['label'] or f['why']}")
            print(f"{home}: {len(frames)} key frames, {sum(bool(f['label']) for f in frames)} to be labelled")
    if args.read:
        print(*read_labels(args.read), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"tools.label: {error}")
