"""
The backbone against its origin: transformers' Qwen3-VL with the same made-up weights, at another geometry than golden.

    python -m pytest tests/test_qwen3vl.py          needs: pip install transformers==4.57.1 pillow

Odd on purpose: six heads over three key-value heads of dimension 24, M-RoPE sections (5, 4, 3), images wider than high,
a position grid of 5 x 5 under patches of 6 x 10, DeepStack from three tower blocks that are not evenly spaced. Then
what transformers has no word for: a prompt that many samples share, and reasonings of different length side by side.
"""
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, made_up

import alpamayo
from alpamayo import Alpamayo, Config, Prompt, Vocabulary, image_positions, resize, rope
from release import backbone_json

image = pytest.importorskip("PIL.Image")
qwen = pytest.importorskip("transformers.models.qwen3_vl")
processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl")

SCENES, CAMERAS, FRAMES, H, W = 2, 2, 2, 48, 80
CONFIG = Config(
    n_layer=4, n_embd=72, n_head=6, n_kv_head=3, head_dim=24, n_mlp=112, rope_theta=1e4, mrope_section=(5, 4, 3),
    v_layer=5, v_embd=48, v_head=3, v_mlp=80, v_grid=5, patch=8, deepstack=(0, 1, 4), e_embd=40, e_head=3, e_mlp=64,
    a_embd=32, a_max_freq=1.0, bins=50, history_bins=20, text_vocab=264, cameras=(0, 1), frames=FRAMES,
    min_pixels=0, max_pixels=0,
)  # fmt: skip


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(scope="module")
def model():
    model = Alpamayo(CONFIG, Vocabulary(CONFIG, GOLDEN))  # golden's text tokenizer: 256 bytes and Qwen's own tokens
    model.load_state_dict({name: made_up(name, p.shape) for name, p in model.named_parameters()}, strict=False)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def oracle(model):
    config = qwen.Qwen3VLConfig(**backbone_json(vars(model.cfg)))
    oracle = qwen.Qwen3VLForConditionalGeneration(config)
    oracle.load_state_dict(model.vlm.state_dict())
    return oracle.requires_grad_(False)


@pytest.fixture(scope="module")
def scene():
    generator = torch.Generator().manual_seed(0)
    shape = SCENES, CAMERAS, FRAMES, 3, H, W
    return {
        "images": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        "camera_ids": torch.tensor([[0, 1]]).repeat(SCENES, 1),
        "ego_history_xyz": torch.randn(SCENES, 16, 3, generator=generator).cumsum(1).sub_(4),
        "ego_history_rot": torch.eye(3).expand(SCENES, 16, 3, 3),
        "ego_future_xyz": torch.randn(SCENES, 64, 3, generator=generator),
        "actions": torch.randn(SCENES, 64, 2, generator=generator) * torch.tensor([1.0, 0.03]),
    }


@pytest.fixture(scope="module")
def pixels(model, scene):
    """What transformers' own processor makes of the images: patches of all of them, and their grids (images, 3)."""
    cfg = model.cfg
    processor = processing.Qwen2VLImageProcessor(
        do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, patch_size=cfg.patch, merge_size=cfg.merge,
        temporal_patch_size=cfg.temporal_patch)  # fmt: skip
    out = processor(list(scene["images"].flatten(0, 2).numpy()), return_tensors="pt")
    return {"pixel_values": out["pixel_values"], "image_grid_thw": out["image_grid_thw"]}


# ------------------------------------------------------------------------------------------------------ seeing


def test_vision_tokens_and_deepstack(model, oracle, scene, pixels):
    tokens, deep, images, _ = model.look(scene)
    theirs, their_deep = oracle.model.visual(pixels["pixel_values"], pixels["image_grid_thw"])
    assert images == [[(3, 5)]] * (CAMERAS * FRAMES)
    assert relative_error(tokens.flatten(0, 1), theirs) < 1e-5
    assert len(deep) == len(their_deep) == 3
    for ours, theirs in zip(deep, their_deep):
        assert relative_error(ours.flatten(0, 1), theirs) < 1e-5


def test_two_frames_in_a_patch(model):
    """With pair_frames a patch spans two different frames; the release's 3D convolution says in which order."""
    tower = model.vlm.model.visual
    images = torch.randint(0, 256, (3, 2, 3, H, W), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    conv = tower.patch_embed.proj(images.transpose(1, 2) / 127.5 - 1)[:, :, 0]  # (3, C, 6, 10)
    in_groups = torch.stack([tower.by_group(grid) for grid in conv.permute(0, 2, 3, 1)])
    assert relative_error(tower.patch_embed(alpamayo.patchify(images, model.cfg)), in_groups) < 1e-5


@pytest.mark.parametrize("size", [(1080, 1920), (375, 1242), (480, 640), (2160, 3840), (800, 600), (64, 96), (9, 900)])
def test_size_after_resizing(size):
    """The release's rule and limits, on camera pictures and on oddities."""
    cfg = Config()
    h, w = processing.smart_resize(*size, factor=32, min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels)
    assert resize(torch.zeros(1, 3, *size, dtype=torch.uint8), cfg).shape == (1, 3, h, w)


def test_size_of_the_release_cameras():
    assert resize(torch.zeros(1, 3, 1080, 1920, dtype=torch.uint8), Config()).shape == (1, 3, 320, 576)


def test_resized_pixels():
    """Bicubic with antialiasing, as Pillow's to one grey level."""
    noise = torch.randint(0, 256, (1, 3, 90, 160), generator=torch.Generator().manual_seed(0)).float()
    picture = F.avg_pool2d(noise, 5, stride=1, padding=2).to(torch.uint8)
    ours = resize(picture, Config(min_pixels=32 * 32, max_pixels=64 * 96))[0]
    theirs = image.fromarray(picture[0].permute(1, 2, 0).numpy()).resize((ours.shape[2], ours.shape[1]), image.BICUBIC)
    theirs = torch.frombuffer(bytearray(theirs.tobytes()), dtype=torch.uint8).view(*ours.shape[1:], 3).permute(2, 0, 1)
    assert (ours.int() - theirs.int()).abs().max() <= 1


# ------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("images, h, w", [(1, 2, 3), (3, 5, 2), (2, 1, 7), (4, 4, 4)])
def test_positions(model, oracle, images, h, w):
    vocab = model.vocabulary
    text = "Yield" + f"<|vision_start|>{'<|image_pad|>' * h * w}<|vision_end|>" * images + " to the pedestrian"
    ids = torch.tensor(vocab.encode(text))
    grids = torch.tensor([[1, h * model.cfg.merge, w * model.cfg.merge]] * images)
    theirs, _ = oracle.model.get_rope_index(ids[None], grids)
    assert torch.equal(image_positions(ids, vocab["image_pad"], [(h, w)] * images), theirs[:, 0])


def test_positions_of_images_side_by_side():
    """Without the release's words between them (chat=False), the second image starts where the first one ends."""
    positions = image_positions(torch.tensor([9, 9, 9, 9, 9, 9, 1]), image_pad=9, grids=[(1, 3)] * 2)
    assert positions.tolist() == [[0, 0, 0, 3, 3, 3, 6], [0, 0, 0, 3, 3, 3, 6], [0, 1, 2, 3, 4, 5, 6]]


def read(model, x, positions, **how):
    """Embeddings x (N, T, C) at positions (3, N or 1, T) through the language model: logits (N, T, vocab), keys and values."""
    x, cache = model.vlm.model.language_model(x, *rope(positions, model.cfg, x.dtype), **how)
    return model.vlm.lm_head(x), cache


def test_logits(model, oracle, scene, pixels):
    prompt = model.embed_prompt(scene)
    logits, _ = read(model, prompt.x, prompt.positions, prompt=prompt)
    theirs = oracle(input_ids=prompt.ids, **pixels).logits
    assert relative_error(logits, theirs) < 1e-5


def test_cached_samples_are_separate_uncached_runs(model, scene):
    """Five random tokens for each of three samples of two scenes: read one by one behind the scene's shared prompt, and
    each sample's whole sequence by itself."""
    n, T = 3, 5
    lm = model.vlm.model.language_model
    said = lm.embed_tokens(torch.randint(0, 256, (SCENES * n, T), generator=torch.Generator().manual_seed(0)))
    prompt = model.embed_prompt(scene)
    x, positions, image_at, deep, _ = prompt
    after = (positions.max() + 1 + torch.arange(T)).expand(3, SCENES * n, -1)

    _, prefix = read(model, x, positions, prompt=prompt)
    tail, cached = [None] * model.cfg.n_layer, []
    for t in range(T):
        past = [alpamayo.Past(kv, own) for kv, own in zip(prefix, tail)]
        logits, tail = read(model, said[:, t : t + 1], after[..., t : t + 1], past=past)
        cached.append(logits)

    whole = torch.cat([x.repeat_interleave(n, 0), said], 1)
    positions = torch.cat([positions.repeat_interleave(n, 1), after], 2)
    deep = [d.repeat_interleave(n, 0) for d in deep]
    together = Prompt(whole, positions, image_at.repeat_interleave(n, 0), deep, None)
    uncached, _ = read(model, whole, positions, prompt=together)
    assert relative_error(torch.cat(cached, 1), uncached[:, -T:]) < 1e-5


def test_greedy_reasoning(model, oracle, scene, pixels):
    """Eight tokens as transformers' generate decodes them from the same prompt, action tokens barred; the last of ours
    is always <|traj_future_start|>."""
    vocab, one = model.vocabulary, {k: v[:1] for k, v in scene.items()}
    barred = list(range(vocab.first_action, vocab.first_history + model.cfg.history_bins))
    ids = model.embed_prompt(one)[-1]
    pixels = {k: v[: len(v) // SCENES] for k, v in pixels.items()}
    theirs = oracle.generate(ids, **pixels, max_new_tokens=8, do_sample=False, suppress_tokens=barred)[0]
    ours = model.sample(one, n=1, temperature=0, max_new_tokens=9).tokens[0, 0]
    assert ours.tolist() == theirs[ids.shape[1] :].tolist() + [vocab["traj_future_start"]]


def test_samples_of_different_length_are_separate_runs(model, scene, monkeypatch):
    """Three samples of two scenes think for 1 to 6 tokens. None sees another's thoughts, or its own padding."""
    n, stop = 3, model.vocabulary["traj_future_start"]
    generator = torch.Generator().manual_seed(0)
    script = torch.randint(0, 256, (SCENES * n, 8), generator=generator)  # what each of them will say
    for row, length in zip(script, (2, 5, 1, 6, 3, 4)):
        row[length:] = stop
    noise = torch.randn(SCENES * n, 64, 2, generator=generator)

    def sample(scene, n, rows):
        said = iter(script[rows].T)
        monkeypatch.setattr(alpamayo, "pick", lambda *_, **__: (t := next(said), torch.zeros(t.shape)))
        return model.sample(scene, n=n, steps=2, noise=noise[rows])

    together = sample(scene, n, slice(None))
    for row in range(SCENES * n):
        alone = sample({k: v[row // n][None] for k, v in scene.items()}, 1, slice(row, row + 1))
        assert together.reasoning[row // n][row % n] == alone.reasoning[0][0]
        torch.testing.assert_close(together.actions[row // n, row % n], alone.actions[0, 0], rtol=1e-4, atol=1e-5)


def test_losses_of_a_batch_are_those_of_its_scenes(model, scene):
    """Two scenes whose reasonings differ in length, two noise levels each: neither the one's padding nor the other's
    text changes anything. Text counts by token, the rest by scene."""
    said = ["Yield", "Yield to the pedestrian and to everybody else"]
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(SCENES * 2, generator=generator)
    noise = torch.randn(SCENES * 2, 64, 2, generator=generator)
    together = model({**scene, "reasoning": said}, flow_samples=2, flow_t=t, flow_noise=noise)

    alone = []
    for i in range(SCENES):
        one = {**{k: v[i : i + 1] for k, v in scene.items()}, "reasoning": said[i : i + 1]}
        rows = slice(2 * i, 2 * i + 2)
        alone.append(model(one, flow_samples=2, flow_t=t[rows], flow_noise=noise[rows]))
    length = torch.tensor([len(model.vocabulary.encode(text)) + 2.0 for text in said])  # + <|cot_end|>, <|im_end|>
    texts = torch.stack([loss["text"] for loss in alone])
    torch.testing.assert_close(together["text"], (texts * length).sum() / length.sum())
    for kind in ("action", "flow"):
        torch.testing.assert_close(together[kind], torch.stack([loss[kind] for loss in alone]).mean())
