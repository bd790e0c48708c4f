"""
The release, number by number: a tiny checkpoint in its format, against what the official code computed with it.

    python -m pytest tests/test_golden.py

golden/README.md says where the numbers come from. Tokens agree exactly, tensors to 1e-4 relative or better, paths to
1 mm.

One thing cannot agree, whoever computes it: the ten free-running Euler steps with these made-up weights. The controls
enter through sines of up to 100 turns a unit, and a difference in the last bit of the noise is a quarter of the answer
ten steps later (test_the_free_run_is_chaotic). So each step is checked from where the release's own began, the path
behind the release's last step, and all ten in a row with the frequencies lowered, against transformers' own modules.
"""
import copy
import json
import os
from unittest import mock

import pytest
import torch
from conftest import GOLDEN

import alpamayo
from alpamayo import Alpamayo, fit_actions, from_bins, initial_speed, patchify, roll_out, to_bins

P = 277  # prompt tokens of the golden scene
ACTION_TAIL = 131  # <|traj_future_start|>, 128 actions, <|traj_future_end|>, <|im_end|>


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def read_json(name):
    with open(os.path.join(GOLDEN, name)) as f:
        return json.load(f)


@pytest.fixture(scope="module")
def model(release_folder):
    return Alpamayo.from_pretrained(str(release_folder))


def drive(model, golden, noise=None):
    return model.sample(golden["scene"], n=1, temperature=0, noise=golden["noise"] if noise is None else noise)


@pytest.fixture(scope="module")
def rollout(model, golden):
    return drive(model, golden)


# ----------------------------------------------------------------------------------------- prompt, seeing, reading


@torch.no_grad()
def test_prompt_and_its_positions(model, golden):
    prompt = model.embed_prompt(golden["scene"])
    assert torch.equal(prompt.ids, golden["input_ids"])
    assert torch.equal(prompt.positions, golden["position_ids"])
    assert prompt.positions.max() + 1 - P == golden["rope_deltas"]


def test_patches(model, golden):
    images = golden["images"][0][:, None].expand(-1, 2, -1, -1, -1)  # (4, 2, 3, H, W): each frame twice
    torch.testing.assert_close(patchify(images, model.cfg).flatten(0, 1), golden["pixel_values"])


@torch.no_grad()
def test_vision_tokens_and_deepstack(model, golden):
    tokens, deep, images, _ = model.look(golden["scene"])
    assert images == [[(2, 3)]] * 4  # rows and columns of each frame
    assert relative_error(tokens[0], golden["vision_tokens"]) < 1e-5
    assert relative_error(torch.cat(deep), golden["deepstack"]) < 1e-5


@torch.no_grad()
def test_logits_after_the_prompt(model, golden):
    x = model.prefill(model.embed_prompt(golden["scene"])).x
    assert relative_error(model.vlm.lm_head(x[:, -1]), golden["prompt_logits_last"]) < 1e-5


def test_greedy_reasoning(rollout, golden):
    assert torch.equal(rollout.tokens[:, 0], golden["greedy_sequence"][:, P:-1])  # the release decodes one token more


# ------------------------------------------------------------------------------------------------------- driving


@pytest.fixture(scope="module")
def forced(model, golden):
    """model.sample made to follow the release's path: every step is computed from where the release's began, and then
    corrected to where it ended. Returns the rollout and the ten ends before the correction, (10, 64, 2)."""
    velocity, path, ends = model.velocity, golden["flow_steps"][0], []

    def velocity_on_the_path(x, *rest):
        here, there = path[len(ends)], path[len(ends) + 1]
        ends.append(here + 0.1 * velocity(here[None], *rest)[0])
        return 10 * (there - x)

    plain_loop = mock.patch.object(alpamayo, "by_hand", lambda *_, **__: False)  # one velocity at a time
    with mock.patch.object(model, "velocity", velocity_on_the_path), plain_loop:
        return drive(model, golden), torch.stack(ends)


@pytest.mark.parametrize("step", range(10))
def test_euler_step(forced, golden, step):
    _, ends = forced
    assert relative_error(ends[step], golden["flow_steps"][0, step + 1]) < 1e-6


def test_path_of_the_last_step(forced, golden):
    rollout, _ = forced
    torch.testing.assert_close(rollout.xyz[0], golden["pred_xyz"][0, 0], atol=1e-3, rtol=0)
    torch.testing.assert_close(rollout.rot[0], golden["pred_rot"][0, 0], atol=1e-4, rtol=0)


def test_free_run_starts_as_the_release(rollout, golden):
    assert torch.equal(rollout.flow[0, :, 0], golden["noise"])
    assert relative_error(rollout.flow[1, :, 0], golden["flow_steps"][:, 1]) < 1e-5


def test_path_is_the_roll_out_of_the_actions(rollout, golden):
    v0 = initial_speed(golden["scene"]["ego_history_xyz"], golden["scene"]["ego_history_rot"])
    xyz, rot = roll_out(rollout.actions[:, 0], v0)
    torch.testing.assert_close(rollout.xyz[:, 0], xyz)
    torch.testing.assert_close(rollout.rot[:, 0], rot)


def test_same_noise_same_drive(model, golden, rollout):
    again = drive(model, golden)
    assert torch.equal(again.flow, rollout.flow) and torch.equal(again.xyz, rollout.xyz)


def test_the_free_run_is_chaotic(model, golden, rollout):
    """Why the ten steps in a row are not compared with the release's: the last bit of the noise decides."""
    nudge = 1e-7 * torch.randn(1, 64, 2, generator=torch.Generator().manual_seed(0))
    nudged = drive(model, golden, golden["noise"] + nudge)
    assert relative_error(nudged.flow[1], rollout.flow[1]) < 1e-5
    assert relative_error(nudged.flow[-1], rollout.flow[-1]) > 1e-2


@torch.no_grad()
def flow_by_transformers(model, golden):
    """The sampler written plainly on transformers' modules: one pass over the whole sequence, then at every step the
    expert on a copy of that cache. Returns the controls after ten steps (1, 64, 2), normalised."""
    qwen = pytest.importorskip("transformers.models.qwen3_vl")
    spec = read_json("spec.json")
    config = spec["vlm/config.json"]
    config["text_config"]["vocab_size"] = spec["config.json"]["vocab_size"]
    backbone = qwen.Qwen3VLForConditionalGeneration(qwen.Qwen3VLConfig(**config))
    backbone.load_state_dict(model.vlm.state_dict())
    expert_config = {**config["text_config"], **spec["config.json"]["expert_cfg"]}
    expert = qwen.Qwen3VLTextModel(qwen.Qwen3VLTextConfig(**expert_config))
    del expert.embed_tokens  # the release's expert reads no text
    expert.load_state_dict(model.expert.state_dict())

    ids = golden["greedy_sequence"][:, :-1]
    read = backbone(ids, pixel_values=golden["pixel_values"], image_grid_thw=golden["image_grid_thw"], use_cache=True)
    start = ids.shape[1] + read.rope_deltas.item()
    positions = torch.arange(start, start + 64).expand(3, 1, -1)
    all_seen = torch.zeros(1, 1, 64, ids.shape[1] + 64)
    x = golden["noise"]
    for i in range(10):
        embedded = model.action_in_proj(x, torch.tensor([i / 10]))
        cache = copy.deepcopy(read.past_key_values)
        y = expert(inputs_embeds=embedded, position_ids=positions, past_key_values=cache, attention_mask=all_seen)
        x = x + 0.1 * model.action_out_proj(y.last_hidden_state)
    return x


def test_ten_steps_in_a_row_with_low_frequencies(model, golden):
    """The whole sampler, end to end, where the answer does not hang on the last bit: at most one turn a unit."""
    tame = copy.deepcopy(model)
    for name, buffer in tame.named_buffers():
        if name.endswith("freqs"):
            buffer.copy_(torch.logspace(-2, 0, buffer.shape[-1]))
    theirs = tame.action_space.restore(flow_by_transformers(tame, golden))
    scene = golden["scene"]
    xyz, rot = roll_out(theirs, initial_speed(scene["ego_history_xyz"], scene["ego_history_rot"]))
    ours = drive(tame, golden)
    torch.testing.assert_close(ours.xyz[:, 0], xyz, atol=1e-3, rtol=0)
    torch.testing.assert_close(ours.rot[:, 0], rot, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------- the action space


def test_initial_speed(golden):
    v0 = initial_speed(golden["scene"]["ego_history_xyz"], golden["scene"]["ego_history_rot"])
    torch.testing.assert_close(v0, golden["v0"][0], atol=1e-4, rtol=0)


def test_fitted_actions(model, golden):
    """To 1e-4: the release solves in float32, this code in float64."""
    assert relative_error(model.target_actions(golden["scene"]), golden["action_target"]) < 1e-4


def test_fit_then_roll_out(golden):
    scene = golden["scene"]
    motion = [scene[k] for k in ("ego_history_xyz", "ego_history_rot", "ego_future_xyz", "ego_future_rot")]
    xyz, rot = roll_out(fit_actions(*motion), initial_speed(*motion[:2]))
    torch.testing.assert_close(xyz, golden["action_roundtrip_xyz"][0], atol=1e-3, rtol=0)
    torch.testing.assert_close(rot, golden["action_roundtrip_rot"][0], atol=1e-4, rtol=0)


def test_action_tokens(model, golden):
    cfg = model.cfg
    bins = to_bins(model.target_actions(golden["scene"]), -cfg.bin_range, cfg.bin_range, cfg.bins)
    assert torch.equal(bins.flatten(1), golden["future_tokens"])  # a0 k0 a1 k1 ...


def test_path_of_the_action_tokens(model, golden):
    cfg = model.cfg
    actions = from_bins(golden["future_tokens"], -cfg.bin_range, cfg.bin_range, cfg.bins).view(1, 64, 2)
    xyz, _ = roll_out(model.action_space.restore(actions), golden["v0"][0])
    torch.testing.assert_close(xyz, golden["future_tokens_decoded_xyz"], atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------------------------ the losses


def training_scene(model, golden):
    """The golden scene with its reasoning, read off train_ids, and with the controls that the release fitted: ours
    differ by 1e-4, which the expert's high frequencies would amplify."""
    reasoning = model.vocabulary.decode(golden["train_ids"][0, P:-ACTION_TAIL].tolist())
    actions = model.action_space.restore(golden["action_target"])
    return {**golden["scene"], "reasoning": [reasoning], "actions": actions}


def losses_and_gradients(model, golden):
    """The language model's loss, where the release adds text and action, and the expert's. Of each also the gradient
    norms: parameter name -> norm, of the parameters that it reaches."""
    loss = model(training_scene(model, golden), flow_t=golden["flow_t"], flow_noise=golden["flow_noise"])
    loss = {"vlm_loss": loss["text"] + loss["action"], "flow_loss": loss["flow"]}
    names, parameters = zip(*model.named_parameters())
    norms = {}
    for key, value in loss.items():
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        norms[key] = {name: g.norm().item() for name, g in zip(names, grads) if g is not None}
    return loss, norms


@pytest.fixture(scope="module")
def learned(model, golden):
    return losses_and_gradients(model, golden)


@pytest.fixture(scope="module")
def learned_causally(model, golden):
    """The same with action tokens that see only those before them.

    The official training code passes no attention mask to the expert, which leaves it causal, though the official
    sampler runs it non-causal. Ours is non-causal in both; the release's loss is met only with its mask."""
    attend = alpamayo.prefix_attention

    def causal(q, k0, v0, k1, v1, mask0=None, mask1=None):
        return attend(q, k0, v0, k1, v1, mask0, torch.ones(1, 64, 64, dtype=torch.bool).tril())

    with mock.patch.object(alpamayo, "prefix_attention", causal):
        return losses_and_gradients(model, golden)


def test_training_sequence(model, golden):
    scene = training_scene(model, golden)
    ids, ends = model.response_ids(scene, golden["action_target"], reason=True, action_tokens=True)
    assert torch.equal(ids, golden["train_ids"][:, P:])
    assert ends.tolist() == [ids.shape[1] - ACTION_TAIL + 1]  # the expert reads up to <|traj_future_start|>


def test_language_model_loss(learned, golden):
    assert learned[0]["vlm_loss"].item() == pytest.approx(golden["vlm_loss"].item(), rel=1e-6)


def test_language_model_gradients(learned):
    assert learned[1]["vlm_loss"] == pytest.approx(read_json("grad_norms.json")["vlm_loss"], rel=1e-5)


def test_no_gradient_of_the_expert_reaches_the_language_model(learned):
    """Knowledge insulation (Sec. 5.1). Every other parameter learns."""
    _, norms = learned
    assert not [name for name in norms["flow_loss"] if name.startswith("vlm.")]
    assert norms["flow_loss"].keys() == read_json("grad_norms.json")["flow_loss"].keys()


def test_flow_loss(learned_causally, golden):
    assert learned_causally[0]["flow_loss"].item() == pytest.approx(golden["flow_loss"].item(), rel=1e-6)


def test_flow_gradients(learned_causally):
    assert learned_causally[1]["flow_loss"] == pytest.approx(read_json("grad_norms.json")["flow_loss"], rel=1e-5)
