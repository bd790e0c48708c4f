"""
The plan of memory: what it says before a run is what the run takes.

    python -m pytest tests/test_memory.py
"""
import re
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import data
import memory
import train
import world
from alpamayo import PRESETS, Alpamayo, Vocabulary, with_words
from kernels import one_launch

pytestmark = pytest.mark.in_pytorch("planned, and counted, is what PyTorch's lines allocate")
TEXTS = [data.sentence(cause, world.LEFT) for cause in data.CAUSES]


def planned(monkeypatch, capsys, flags):
    """The table that `train.py --plan` prints: {row: [GiB of each phase]}."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--plan", *flags.split()])
    train.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [re.split(r" {2,}", line) for line in lines[1:]]
    table = {name: [float(cell) for cell in cells] for name, *cells in rows[1:]}
    return table | {"phases": rows[0][1:]}


def nano():
    cfg = with_words(PRESETS["nano"], TEXTS + list(data.ROUTES.values()))
    model = Alpamayo(cfg, Vocabulary(cfg))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_a_planned_step_takes_what_pytorch_allocates(monkeypatch, capsys):
    """Real tensors, counted by PyTorch's allocator and not by us. Within 10 %; it was 2 %."""
    total = max(planned(monkeypatch, capsys, "cpu --batch 16")["total"])
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch", "16"])
    run = train.Run(train.parse_flags(), model=nano())
    train.prepare(run)
    scene = memory.made_up_scene(run.model.cfg, 16, (64, 128), max(TEXTS, key=len))
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            train.backward(run, scene, "reason", True, torch.Generator().manual_seed(0))
        train.update(run, 0)
        states = [state for optimiser, _ in run.optimisers for state in optimiser.state.values()]
        moments = [value for state in states for value in state.values()]
    now = most = sum(t.nbytes for t in [*run.params, *run.model.buffers(), *moments])
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert total == pytest.approx(most / 2**30, rel=0.1)


OF_RL = (
    "--kl 0.1",
    "--objective clip",
    "--policy tokens --train vlm --lora 4 --kl 0.1",
    "--policy tokens --checkpointing",
)


@pytest.mark.parametrize("more", OF_RL)
def test_a_planned_step_of_rl_is_that_of_real_tensors(monkeypatch, capsys, more):
    """The same phases on tensors that have contents."""
    more = f"--stage rl --batch 2 --group 3 --max-new-tokens 12 {more}"
    table = planned(monkeypatch, capsys, "cpu " + more)
    assert table["phases"] == ["rollouts", "losses", "update"]
    assert ("reference model" in table) == ("--kl" in more and "--lora" not in more)
    monkeypatch.setattr(sys, "argv", ["train.py", *more.split()])
    run = train.Run(train.parse_flags(), model=nano())
    train.prepare(run)
    if run.flags.kl:
        run.reference = run.model if run.flags.lora else nano().requires_grad_(False)
    scene = memory.made_up_scene(run.model.cfg, 2, (64, 128), "")
    found = memory.peaks(run, train.phases_of_step(run, scene))
    for i, phase in enumerate(("rollouts", "losses")):
        assert table["total"][i] == pytest.approx(found[phase].total() / 2**30, rel=0.02, abs=6e-4)


def test_an_expert_that_teaches_in_rl_is_planned_so(monkeypatch, capsys):
    asked = []
    for name in ("expert_past", "flow_losses"):
        plain = getattr(Alpamayo, name)
        monkeypatch.setattr(Alpamayo, name, lambda self, *given, plain=plain: asked.append(given[-1]) or plain(self, *given))
    for share in ("1", "0.5"):
        planned(monkeypatch, capsys, f"cpu --stage rl --batch 1 --group 2 --rehearse 1 --objective nft --expert-teaches {share}")
        assert asked == [share == "1"] * len(asked) and len(asked) == 2
        asked.clear()


def test_what_saves_memory_saves_it(monkeypatch, capsys):
    plain = planned(monkeypatch, capsys, "gpu --batch 16")
    thrifty = planned(monkeypatch, capsys, "gpu --batch 16 --checkpointing --lora 8 --train vlm")
    assert thrifty["activations"][0] < 0.6 * plain["activations"][0]
    assert thrifty["optimiser"][0] < 0.5 * plain["optimiser"][0]


def test_the_largest_preset_is_planned_and_nothing_is_allocated():
    def resident():
        """GiB of this process."""
        lines = open("/proc/self/status").readlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 2**20

    before = resident()
    fake = memory.FakeTensorMode(allow_non_fake_inputs=True)
    model = memory.model_without_weights(PRESETS["alpamayo-r1-10b"], fake)
    gib = sum(p.nbytes for p in model.parameters()) / 2**30
    assert 40 < gib < 43 and resident() - before < 0.5
    prompt = model.prompt_ids([0, 1, 2, 6], [[(10, 18)]] * 16, reason=True)
    assert 2880 + 48 < len(prompt) < 3100


def test_gradients_and_kernels_are_planned(monkeypatch, capsys):
    """A second piece of the batch finds the first one's gradients; an expert that learns, and is too
    large for one launch, has a 16-bit copy for rollouts."""
    monkeypatch.setattr(one_launch, "MOST_BYTES", 0)
    flags = "gpu --stage rl --train expert --group 2"
    whole = planned(monkeypatch, capsys, f"{flags} --batch 1")
    parts = planned(monkeypatch, capsys, f"{flags} --batch 2 --accumulate 2")
    learn = whole["weights that learn"][0]
    assert parts["total"][1] > whole["total"][1] + 0.3 * learn
    assert parts["kernels"] == whole["kernels"] and 0.5 * learn < whole["kernels"][0] < 4 * learn
