"""
Motion, actions and tokens: the unicycle, its fit, bins, words and ids.

    python -m pytest tests/test_actions.py
"""
import math
from dataclasses import replace

import pytest
import torch

import alpamayo
from alpamayo import (
    CURVATURE_BOUND,
    LOW_SPEED,
    PRESETS,
    ActionSpace,
    Config,
    Vocabulary,
    fit_actions,
    from_bins,
    in_float64,
    initial_speed,
    pick,
    roll_out,
    rot_of,
    to_bins,
    unwrap,
    with_words,
    yaw_of,
)  # fmt: skip
from release import TEXT_TOKENS, WordTokenizer, release_json

STEPS = 15 + 64  # of a drive: history, future
TIME = 0.1 * torch.arange(STEPS)  # s


def drive(accel, curvature, v0):
    """Drive 79 steps (accel, curvature: (79,) or a number) from v0 m/s, and look at it from the 16th pose: history and
    future as fit_actions takes them, and the controls (64, 2) that were driven in the future."""
    actions = torch.stack([torch.zeros(STEPS) + accel, torch.zeros(STEPS) + curvature], -1).double()
    xyz, rot = roll_out(actions, torch.tensor(v0).double())
    xyz, rot = torch.cat([torch.zeros(1, 3), xyz]), torch.cat([torch.eye(3)[None], rot])
    xyz, rot = (xyz - xyz[15]) @ rot[15], rot[15].T @ rot
    motion = xyz[:16], rot[:16], xyz[16:], rot[16:]
    return [m.float() for m in motion], actions[15:].float()


def standing(cars, noise):
    """Cars that stand, seen by a noisy sensor: position off by some `noise` m, heading by some `noise` rad."""
    pose = noise * torch.randn(cars, 80, 3, generator=torch.Generator().manual_seed(0))  # x, y, yaw
    pose[:, 15] = 0
    xyz, rot = pose * torch.tensor([1.0, 1.0, 0.0]), rot_of(pose[..., 2])
    return xyz[:, :16], rot[:, :16], xyz[:, 16:], rot[:, 16:]


@pytest.fixture
def unguarded(monkeypatch):
    """fit_actions without its two guards, the bound on curvature and the one against low speed."""

    def fit(*motion):
        with monkeypatch.context() as m:
            m.setattr(alpamayo, "LOW_SPEED", 0.0)
            m.setattr(alpamayo, "CURVATURE_BOUND", math.inf)
            return fit_actions(*motion)

    return fit


# --------------------------------------------------------------------------------------------------- the unicycle


@pytest.mark.parametrize("curvature", [0.05, -0.2])
def test_constant_curvature_drives_a_circle(curvature):
    """Left for a positive curvature; 64 Euler steps of 0.4 m are within 1 cm of the true arc."""
    xyz, rot = roll_out(torch.tensor([[0.0, curvature]]).repeat(64, 1), torch.tensor(4.0))
    angle = curvature * 0.4 * torch.arange(1, 65)
    circle = torch.stack([angle.sin(), 1 - angle.cos(), 0 * angle], -1) / curvature
    torch.testing.assert_close(xyz, circle, atol=1e-2, rtol=0)
    torch.testing.assert_close(rot, rot_of(angle), atol=1e-5, rtol=0)


def test_braking_stops_where_physics_says():
    """From 12.8 m/s at -2 m/s^2 the car stands after 6.4 s and v0^2 / 2a = 40.96 m."""
    xyz, _ = roll_out(torch.tensor([[-2.0, 0.0]]).repeat(64, 1), torch.tensor(12.8))
    assert xyz[-1].tolist() == pytest.approx([40.96, 0, 0], abs=1e-4)


def test_gradient_of_roll_out():
    """Against finite differences in float64: rewards of a path are differentiated through it."""
    generator = torch.Generator().manual_seed(0)
    actions = torch.randn(64, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 0.05])
    v0 = torch.tensor(8.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(roll_out, (actions.requires_grad_(), v0.requires_grad_()))


# --------------------------------------------------------------------------------------------------------- the fit

STOP_AND_GO = -4 * torch.sin(TIME * 2 * math.pi / 7.8)  # m/s^2: from 10 m/s nearly to 0 and back
DRIVES = {  # acceleration m/s^2, curvature 1/m, speed at the start m/s, and how far off the round trip may be in mm
    "straight": (0, 0, 15.0, 5),
    "fast": (0, 0, 35.0, 10),
    "arc": (0, 0.02, 10.0, 5),
    "tight right turn through +-pi": (0, -0.2, 7.0, 10),
    "full circle": (0, 0.1, 15.0, 5),
    "brake in a bend": (-1.5, 0.01, 15.0, 5),
    "reverse": (-0.2, 0.05, -2.0, 15),
    "weave": (1.5 * torch.sin(TIME), 0.05 * torch.cos(1.3 * TIME), 12.0, 10),
    "stop and go": (STOP_AND_GO, 0, 10.0, 5),
    "stop and go in a bend": (STOP_AND_GO, 0.02, 10.0, 200),  # the guard costs some heading
}


@pytest.mark.parametrize("accel, curvature, v0, mm", DRIVES.values(), ids=DRIVES.keys())
def test_fit_then_roll_out(accel, curvature, v0, mm):
    motion, _ = drive(accel, curvature, v0)
    xyz, _ = roll_out(fit_actions(*motion), initial_speed(*motion[:2]))
    assert (xyz - motion[2]).norm(dim=-1).max() < mm / 1000


@pytest.mark.parametrize("name", ["arc", "brake in a bend", "weave"])
def test_fit_finds_the_controls(name):
    accel, curvature, v0, _ = DRIVES[name]
    motion, driven = drive(accel, curvature, v0)
    fitted = fit_actions(*motion)
    torch.testing.assert_close(fitted[:, 0], driven[:, 0], atol=0.05, rtol=0)
    torch.testing.assert_close(fitted[:, 1], driven[:, 1], atol=1e-3, rtol=0)


def test_fit_takes_any_leading_shape():
    drives = [drive(a, k, v)[0] for a, k, v, _ in DRIVES.values()]
    together = fit_actions(*[torch.stack(m).unflatten(0, (2, -1)) for m in zip(*drives)])
    one_by_one = torch.stack([fit_actions(*motion) for motion in drives])
    torch.testing.assert_close(together.flatten(0, 1), one_by_one, atol=1e-4, rtol=1e-4)


def test_a_standing_car_has_no_curvature(unguarded):
    """What the guard is for: from 3 cm and 0.03 rad of noise the plain fit reads turns that no car can drive."""
    motion = standing(cars=32, noise=0.03)
    assert unguarded(*motion)[..., 1].abs().max() > CURVATURE_BOUND
    assert (fit_actions(*motion)[..., 1] == 0).all()


@pytest.mark.parametrize("name", [name for name in DRIVES if "stop" not in name])
def test_guard_leaves_moving_cars_alone(name, unguarded):
    accel, curvature, v0, _ = DRIVES[name]
    motion, _ = drive(accel, curvature, v0)
    assert torch.equal(fit_actions(*motion), unguarded(*motion))


def test_guard_changes_only_slow_steps(unguarded):
    accel, curvature, v0, _ = DRIVES["stop and go in a bend"]
    motion, _ = drive(accel, curvature, v0)
    speed = v0 + 0.1 * torch.cumsum(accel, 0)[14:]  # m/s at both ends of the 64 future steps
    slower = torch.minimum(speed[:-1], speed[1:])
    slow, fast = slower < LOW_SPEED - 0.05, slower > LOW_SPEED + 0.05  # between them the fit's own speed decides
    guarded, plain = fit_actions(*motion), unguarded(*motion)
    assert torch.equal(guarded[:, 0], plain[:, 0])
    assert torch.equal(guarded[fast, 1], plain[fast, 1])
    assert slow.sum() > 5 and (guarded[slow, 1] == 0).all()


def test_curvature_is_clamped(unguarded):
    motion, _ = drive(0, 0.5, 3.0)  # a 2 m turning radius
    assert unguarded(*motion)[:, 1].min() > CURVATURE_BOUND
    torch.testing.assert_close(fit_actions(*motion)[:, 1], torch.full((64,), CURVATURE_BOUND))


def test_float64_where_the_device_has_none():
    """Apple's GPUs: the solves run on the CPU, and the answer goes back to where the path is."""

    class OnMps(torch.Tensor):
        device = torch.device("mps")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    motion, _ = drive(0.5, 0.01, 5.0)
    on_mps = in_float64(motion[0].as_subclass(OnMps))
    assert type(on_mps) is torch.Tensor and on_mps.device.type == "cpu" and on_mps.dtype == torch.float64
    assert torch.equal(on_mps, in_float64(motion[0]))


def test_unwrap():
    yaw = torch.linspace(-20, 20, 65).double()
    wrapped = yaw_of(rot_of(yaw))
    assert wrapped.abs().max() <= math.pi
    torch.testing.assert_close(unwrap(wrapped) - wrapped[0], yaw - yaw[0])


# ---------------------------------------------------------------------------------------------------- numbers to ids


def test_normalised_actions_come_back():
    space, actions = ActionSpace(Config()), torch.tensor([[-3.0, 0.2], [1.0, -0.01]])
    torch.testing.assert_close(space.restore(space.normalise(actions)), actions)


@pytest.mark.parametrize("bins", [128, 3000])
def test_bins_are_off_by_at_most_half_a_bin(bins):
    x = torch.linspace(-10, 10, 10001)
    assert (from_bins(to_bins(x, -10, 10, bins), -10, 10, bins) - x).abs().max() <= 20 / (bins - 1) / 2 + 1e-5


@pytest.mark.parametrize("bins", [128, 3000])
def test_every_bin_comes_back(bins):
    assert torch.equal(to_bins(from_bins(torch.arange(bins), -4, 4, bins), -4, 4, bins), torch.arange(bins))


def test_out_of_range_goes_to_the_end_bins():
    assert to_bins(torch.tensor([-torch.inf, -11, 11, torch.inf]), -10, 10, 100).tolist() == [0, 0, 99, 99]


@pytest.mark.parametrize("text", ["", "Stop at 3 m!", "  two  spaces\n\ttab", "Straße, 停车, 🚦", "<|no", "\x00"])
def test_words_and_bytes_bring_back_any_text(text):
    tokenizer = WordTokenizer(["Stop", " at", " spaces"])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_unicode_comes_back():
    tokenizer = WordTokenizer(["Stop", " at"])
    codes = torch.randint(0, 0x110000, (5000,), generator=torch.Generator().manual_seed(0)).tolist()
    text = "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)  # surrogates are no characters
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_known_word_is_one_token():
    cfg = with_words(PRESETS["nano"], ["Yield to the pedestrian", "Stop at the line"])
    assert len(Vocabulary(cfg).encode("Yield to the line")) == 4


def test_special_tokens_in_text():
    vocab = Vocabulary(with_words(PRESETS["nano"], ["Stop"]))
    ids = vocab.encode("Stop<|cot_end|><|traj_future_start|>")
    assert ids == [256, vocab["cot_end"], vocab["traj_future_start"]]
    assert vocab.decode(ids + [vocab.first_action, vocab.first_history]) == "Stop"


def test_pick():
    """From probabilities 0.5, 0.3, 0.15, 0.05, in a thousand draws: greedy, the likeliest that reach top_p, all."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().repeat(1000, 1)

    def picked(temperature, top_p):
        return set(pick(logits, temperature, top_p, torch.Generator().manual_seed(0))[0].tolist())

    assert picked(0, 1) == {1}
    assert picked(1, 0.4) == {1}
    assert picked(1, 0.7) == {1, 3}
    assert picked(1, 1) == {0, 1, 2, 3}


# -------------------------------------------------------------------------------------------- the release's numbers

RELEASE_IDS = {
    "traj_history_start": 155674, "traj_history_end": 155676, "traj_future_start": 155681, "traj_future_end": 155683,
    "traj_history": 155684, "traj_future": 155685,
}  # fmt: skip


def test_ids_of_the_release():
    """Read off the released weights. Any text vocabulary of the release's size puts the tokens behind it there."""
    cfg = Config()
    words = map(str, range(cfg.text_vocab - 256 - len(TEXT_TOKENS)))  # with the bytes and Qwen's own tokens: 151,669
    vocab = Vocabulary(replace(cfg, words=tuple(words), chat=False))
    assert {name: vocab[name] for name in RELEASE_IDS} == RELEASE_IDS
    assert (vocab.first_action, vocab.first_history, cfg.vocab) == (151669, 154669, 155697)


def test_ids_in_the_config_that_we_write():
    config = release_json(vars(Config()), vars(Config()))
    assert {f"traj_{name}": i for name, i in config["traj_token_ids"].items()} == RELEASE_IDS
    assert (config["traj_token_start_idx"], config["vocab_size"], config["traj_vocab_size"]) == (151669, 155697, 4000)
