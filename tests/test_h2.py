"""
What a driver without eyes could know: all that a model is given at t0 but images and route.

Nobody reacts before t0, so it should be nothing. Two things cannot but tell: who stands may have to
stay, and who signals will turn.
"""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import data
import world
from world import causes, roads


def history_of(traffic):
    """What is noted up to t0: kinematics (n, 20, 4) and poses (n, 16, 3): x, y (m), yaw (rad)."""
    recorder = data.Recorder(traffic, data.View())
    for _ in range(world.PAST):
        recorder.note(look=False)
        traffic.step(*traffic.expert())
    recorder.note(look=False)
    controls = torch.stack(recorder.controls[-world.PAST :], 1)
    signal = traffic.scene.signal[:, None, None].expand(-1, world.PAST, 1)
    xyz, rot = recorder.local(world.HISTORY, origin=world.PAST)
    yaw = torch.atan2(rot[..., 1, 0], rot[..., 0, 0])
    return torch.cat([controls, signal], -1), torch.cat([xyz[..., :2], yaw[..., None]], -1)


def without_cause(traffic):
    """The same World without what its driver will react to. A bend in the road stays."""
    traffic.things.kind[traffic.things.cause > 0] = causes.NOTHING
    for name, nothing in dict(nudge=(0.0, 0.0, 1.0, 2.0, 3.0), hold=roads.FAR, bump=roads.FAR).items():
        getattr(traffic.scene, name)[:] = torch.tensor(nothing)
    traffic.scene.route = traffic.scene.road
    traffic.held[:] = False
    return traffic


@pytest.mark.parametrize("split", ["train", "val", "tail", "rare"])
def test_until_t0_the_cause_changes_nothing(split):
    """With its cause taken away a scene has the same history, to the bit, in every situation."""
    first = world.SEEDS[split] + int(torch.randint(10**6, ()))
    seeds = [seed for seed in range(first, first + 600) if not world.draw(seed).late]
    for one, other in zip(
        history_of(world.World(seeds)), history_of(without_cause(world.World(seeds)))
    ):
        same = (one == other).flatten(1).all(1).tolist()
        assert all(same), {world.draw(s).situation for s, ok in zip(seeds, same) if not ok}


def test_who_stands_and_who_signals():
    """These two tell, and nothing else does what they do."""
    first = world.SEEDS["val"]
    traffic = world.World(range(first, first + 300))
    names = [one.situation for one in traffic.draws]
    kinematics, _ = history_of(traffic)
    turns = torch.tensor([name == "turn" for name in names])
    signals = kinematics[..., 3].abs().amax(1) > 0
    assert not signals[~turns].any() and 0 < signals[turns].float().mean() < 1
    assert [way != 0 for way in traffic.route()] == turns.tolist()
    stands = kinematics[:, -1, 0] == 0
    assert {names[i] for i in stands.nonzero()[:, 0].tolist()} == {"red light", "resume"}
    assert kinematics[..., 1].abs().max() < 0.8  # m/s^2


def features_of(kinematics, poses):
    """(n, k): both, and how they change, up to their third differences."""
    found = []
    for values in (kinematics, poses):
        for _ in range(4):
            found.append(values.flatten(1))
            values = values.diff(dim=1)
    return torch.cat(found, 1).double()


def learned(features, answers, train):
    """What a network that learned from the first `train` rows answers to the others."""
    seen = features[:train]
    middle = seen.median(0).values
    scale = (seen - middle).abs().median(0).values.clamp(min=1e-9)  # so that small things show
    x = torch.asinh((features - middle) / scale).float()
    net = torch.nn.Sequential(
        torch.nn.Linear(x.shape[1], 64), torch.nn.ReLU(), torch.nn.Dropout(0.5),
        torch.nn.Linear(64, int(answers.max()) + 1),
    )  # fmt: skip
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.1)
    for _ in range(300):
        some = torch.randint(train, (256,))
        F.cross_entropy(net(x[some]), answers[some]).backward()
        optimiser.step()
        optimiser.zero_grad()
    return net.eval()(x[train:]).argmax(1)


def test_a_classifier_learns_nothing_from_the_history():
    """4,000 scenes to learn from, 1,000 others: neither the decisions nor the reason are told
    better than by always saying the commonest. So the bow of a nudge must not begin before the
    driver is aware: it once did, and told 10 points more of the lateral decision."""
    first = world.SEEDS["val"] + int(torch.randint(10**6, ()))
    traffic = world.World(range(first, first + 5700))
    features = features_of(*history_of(traffic))
    labels = data.labels_of(traffic)
    tells = (traffic.scene.standing > 0) | (traffic.scene.signal != 0)
    quiet = (~tells).nonzero()[:5000, 0]
    assert len(quiet) == 5000
    features = features[quiet]
    for name in ("longitudinal", "lateral", "trace"):
        said = [getattr(labels[i], name) for i in quiet.tolist()]
        known = sorted(set(said))
        answers = torch.tensor([known.index(text) for text in said])
        guess = learned(features, answers, 4000)
        commonest = Counter(answers[:4000].tolist()).most_common(1)[0][0]
        truth = answers[4000:]
        gain = (guess == truth).float().mean() - (truth == commonest).float().mean()
        print(name, float((guess == truth).float().mean()), float((truth == commonest).float().mean()))
        print(f"{name}: {gain * 100:+.1f} points")
