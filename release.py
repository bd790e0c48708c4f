"""
The release's file format: names, special tokens, config, shards. It knows no other room but the
doors.

A checkpoint is a folder with `config.json` (the driving model), `vlm/config.json` (the backbone,
Qwen3-VL's own), one or more `*.safetensors`, and beside them the backbone's `tokenizer.json`. The
tables RELEASE and BACKBONE below are the two JSON files, leaf by leaf. One function reads a file by
its table and another writes it, so each field is spelt once:

    Field("n_layer")    a field of `Config` (alpamayo.py)
    Only(True)          this code knows one value, and refuses another
    Follows(rule)       follows from the fields, and must agree where a file has it
    all else            is written for the official code, not read; a function is given the fields

What is wrong with a file is one line that names the file, the field and what was expected. Files
are written whole or not at all.
"""
import contextlib
import itertools
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import doors
from doors import Json, finite, read_json

# --------------------------------------------------------------------------------------------------
# Words: one vocabulary of text, action bins, history bins and special tokens, in this order.

TEXT_TOKENS = [  # special tokens that the text tokenizer has
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
SPECIAL_TOKENS = [  # this order decides the ids of those that are not TEXT_TOKENS
    f"<|{name}|>"
    for name in """
    prompt_start prompt_end image_start image_pre_tkn image_end
    traj_history_start traj_history_pre_tkn traj_history_end cot_start cot_end
    meta_action_start meta_action_end traj_future_start traj_future_pre_tkn traj_future_end
    traj_history traj_future image_pad
    vectorized_wm vectorized_wm_start vectorized_wm_end vectorized_wm_pre_tkn
    route_start route_pad route_end question_start question_end answer_start answer_end
    """.split()
]
NEW_TOKENS = [token for token in SPECIAL_TOKENS if token not in TEXT_TOKENS]
EGO_TOKENS = {"deltas": 48, "kinematics": 4}  # tokens of the ego history
PROBE = "Yield to the pedestrian, 10 m ahead."  # a tokenizer must give it back
QWEN3_VL_8B = ("Qwen3-VL-8B", "Cosmos-Reason2-8B")  # backbones whose numbers we know


def vocab_size(c):
    """Tokens in all, of a dictionary of Config's fields."""
    return c["text_vocab"] + c["bins"] + c["history_bins"] + len(NEW_TOKENS)


def trajectory_ids(c):
    """The ids of the trajectory's special tokens, as config.json names them."""
    first = c["text_vocab"] + c["bins"] + c["history_bins"]
    names = "history", "future", "history_start", "future_start", "history_end", "future_end"
    return {name: first + NEW_TOKENS.index(f"<|traj_{name}|>") for name in names}


def text_token_id(name):
    """A rule: the id of one of the text tokenizer's last five special tokens."""

    def rule(c):
        # Qwen's own tokenizer has tool tokens behind them.
        first = 151652 if c["text_vocab"] == 151669 else c["text_vocab"] - 5
        return first + TEXT_TOKENS[3:].index(name)

    return rule


def split_words(text):
    """Words with the space before them, and all else by the character: "Stop at 3" becomes
    "Stop", " at", " ", "3"."""
    return re.findall(r" ?[A-Za-z]+|.", text, flags=re.DOTALL)


class WordTokenizer:
    """256 bytes and a list of words. Any text goes in and comes back; a known word is one token."""

    def __init__(self, words):
        self.words = list(words)
        self.id_of = {word: 256 + i for i, word in enumerate(self.words)}

    def __len__(self):
        return 256 + len(self.words)

    def encode(self, text):
        ids = []
        for word in split_words(text):
            ids += [self.id_of[word]] if word in self.id_of else list(word.encode())
        return ids

    def decode(self, ids):
        pieces = [bytes([i]) if i < 256 else self.words[i - 256].encode() for i in ids]
        return b"".join(pieces).decode(errors="replace")


class FileTokenizer:
    """The backbone's own tokenizer.json, read by the `tokenizers` package."""

    def __init__(self, path):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ImportError(
                f"{path}: reading it needs one more package: pip install tokenizers"
            ) from None
        text = doors.read_text(path)
        try:
            self.tokenizer = Tokenizer.from_str(text)
            again = self.decode(self.encode(PROBE))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # the package raises bare Exceptions, and Rust's panics are none
            why = " ".join(str(e).split())
            raise ValueError(f"{path}: not a tokenizer.json: {why}") from None
        if again != PROBE:
            raise ValueError(f"{path}: makes {again[:60]!r} of {PROBE!r}")

    def __len__(self):
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids)


class Vocabulary:
    """Text <-> ids of the whole model, of a Config and, where it has one, its folder's
    tokenizer.json. `ids` maps every special token to its number."""

    def __init__(self, cfg, folder=None):
        path = os.path.join(folder or "", "tokenizer.json")
        if folder and os.path.exists(path):
            self.text = FileTokenizer(path)
            self.path = path
            self.ids = {token: self.text.tokenizer.token_to_id(token) for token in TEXT_TOKENS}
            if len(self.text) != cfg.text_vocab:
                raise ValueError(f"{path}: {len(self.text)} tokens, "
                                 f"traj_token_start_idx in config.json is {cfg.text_vocab}")
            for token in TEXT_TOKENS[3:]:
                if self.ids[token] != text_token_id(token)(vars(cfg)):
                    raise ValueError(f"{path}: {token} is {self.ids[token]}, expected "
                                     f"{text_token_id(token)(vars(cfg))}")
        elif not cfg.chat:  # a model from scratch needs no words but its own
            self.text = WordTokenizer(cfg.words)
            self.path = None
            self.ids = {token: len(self.text) + i for i, token in enumerate(TEXT_TOKENS)}
        else:
            raise FileNotFoundError(f"{path}: missing; copy the backbone's there "
                                    "(Qwen3-VL-8B's for the release)")
        self.first_action = cfg.text_vocab
        self.first_history = self.first_action + cfg.bins
        first_new = self.first_history + cfg.history_bins
        self.ids |= {token: first_new + i for i, token in enumerate(NEW_TOKENS)}

    def __getitem__(self, name):
        return self.ids[f"<|{name}|>"]

    def encode(self, text):
        """Text, possibly with <|special|> tokens in it, to a list of ids."""
        ids = []
        for piece in re.split(r"(<\|[a-z_]+\|>)", text):
            if piece in self.ids:
                ids.append(self.ids[piece])
            elif piece:
                ids += self.text.encode(piece)
        return ids

    def decode(self, ids):
        """The text of a list of ids; trajectory and special tokens are left out."""
        special = set(self.ids.values())
        return self.text.decode([i for i in ids if i < self.first_action and i not in special])


CAMERA_NAMES = (  # by camera id, as Alpamayo-1.5 calls them
    "Front left camera", "Front camera", "Front right camera", "Rear left camera", "Rear camera",
    "Rear right camera", "Front telephoto camera",
)  # fmt: skip


def named_frames(pads, camera_ids):
    """The images' placeholders with Alpamayo-1.5's words: "Front camera: frame 0 " and so on."""
    times = len(pads) // len(camera_ids)
    named = []
    for i, pad in enumerate(pads):
        camera, frame = divmod(i, times)
        name = f"{CAMERA_NAMES[camera_ids[camera]]}: " if frame == 0 else ""
        named.append(f"{name}frame {frame} {pad}")
    return named


def chat(pads, camera_ids, history, route, reason):
    """The words that the release puts around the placeholders of images, ego history and route.

    camera_ids: names the images, as Alpamayo-1.5 does, where given; reason: ask for reasoning."""
    pads = [f"<|vision_start|>{pad}<|vision_end|>" for pad in pads]
    if camera_ids:
        pads = named_frames(pads, camera_ids)
    task = "output the future trajectory."  # Alpamayo-1.5's words without reasoning
    if reason:
        task = f"output the chain-of-thought reasoning of the driving process, then {task}"
    return (
        "<|im_start|>system\n"
        "You are a driving assistant that generates safe and accurate actions.<|im_end|>\n"
        f"<|im_start|>user\n{''.join(pads)}<|traj_history_start|>{history}<|traj_history_end|>"
        f"{route}{task}<|im_end|>\n<|im_start|>assistant\n"
    )


# --------------------------------------------------------------------------------------------------
# Images


def resize(images, cfg):
    """The release's resizing of (..., 3, H, W) uint8: both sides to multiples of 32 pixels, the
    area within min_pixels and max_pixels, bicubic, antialiased. 1080 x 1920 becomes 320 x 576."""
    H, W = images.shape[-2:]
    unit = cfg.patch * cfg.merge
    if not cfg.max_pixels:
        if H % unit or W % unit:
            raise ValueError(f"images: {H} x {W} pixels; height and width must be multiples of "
                             f"{unit}, patch x merge")
        return images
    h = max(1, round(H / unit)) * unit
    w = max(1, round(W / unit)) * unit
    if h * w > cfg.max_pixels:
        shrink = math.sqrt(H * W / cfg.max_pixels)
        h = max(unit, math.floor(H / shrink / unit) * unit)
        w = max(unit, math.floor(W / shrink / unit) * unit)
    elif h * w < cfg.min_pixels:
        grow = math.sqrt(cfg.min_pixels / (H * W))
        h = math.ceil(H * grow / unit) * unit
        w = math.ceil(W * grow / unit) * unit
    if (h, w) == (H, W):
        return images
    flat = images.flatten(0, -4).float()
    flat = F.interpolate(flat, (h, w), mode="bicubic", antialias=True, align_corners=False)
    return flat.round().clamp(0, 255).to(torch.uint8).view(*images.shape[:-2], h, w)


# --------------------------------------------------------------------------------------------------
# The two files


@dataclass
class Field:
    name: str
    write: Callable = lambda value: value  # to what stands in the file
    read: Callable = lambda value: value  # and back
    fallback: str = ""  # the field whose value it has where the file lacks it
    optional: bool = False  # may be missing: then Config's default; not written where it is 0


@dataclass
class Only:
    value: object


@dataclass
class Follows:
    rule: Callable  # from a dictionary of Config's fields


BACKBONE = {
    "model_type": "qwen3_vl",
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "tie_word_embeddings": Only(False),
    "image_token_id": text_token_id("<|image_pad|>"),
    "video_token_id": text_token_id("<|video_pad|>"),
    "vision_start_token_id": text_token_id("<|vision_start|>"),
    "vision_end_token_id": text_token_id("<|vision_end|>"),
    "text_config": {
        "model_type": Only("qwen3_vl_text"),
        "attention_bias": Only(False),
        "head_dim": Field("head_dim"),
        "hidden_act": Only("silu"),
        "hidden_size": Field("n_embd"),
        "intermediate_size": Field("n_mlp"),
        "max_position_embeddings": 262144,
        "num_attention_heads": Field("n_head"),
        "num_hidden_layers": Field("n_layer"),
        "num_key_value_heads": Field("n_kv_head"),
        "rms_norm_eps": Only(1e-6),
        "rope_theta": Field("rope_theta"),
        "vocab_size": vocab_size,  # of all tokens, as the weights; the official code sets it, too
        "rope_scaling": {
            "mrope_interleaved": Only(True),
            "mrope_section": Field("mrope_section"),
            "rope_type": "default",
        },
    },
    "vision_config": {
        "model_type": Only("qwen3_vl"),
        "depth": Field("v_layer"),
        "hidden_size": Field("v_embd"),
        "num_heads": Field("v_head"),
        "intermediate_size": Field("v_mlp"),
        "hidden_act": Only("gelu_pytorch_tanh"),
        "in_channels": Only(3),
        "deepstack_visual_indexes": Field("deepstack"),
        "num_position_embeddings": Field("v_grid", lambda side: side**2, math.isqrt),
        "out_hidden_size": Follows(lambda c: c["n_embd"]),
        "patch_size": Field("patch"),
        "spatial_merge_size": Field("merge"),
        "temporal_patch_size": Field("temporal_patch"),
    },
}
ACTION_SPACE = {
    "_target_": "alpamayo_r1.action_space.UnicycleAccelCurvatureActionSpace",
    "accel_bounds": [-9.8, 9.8],
    "curvature_bounds": [-0.33, 0.33],
    "a_lambda": Only(1e-4),  # the fit of the controls, see `fit_actions`
    "a_ridge": Only(1e-4),
    "kappa_lambda": Only(1e-4),
    "kappa_ridge": Only(1e-4),
    "theta_lambda": Only(1e-6),
    "theta_ridge": Only(1e-8),
    "v_lambda": Only(1e-6),
    "v_ridge": Only(1e-4),
    "n_waypoints": Only(64),
    "dt": Only(0.1),
    "accel_mean": Field("accel_mean"),
    "accel_std": Field("accel_std"),
    "curvature_mean": Field("curvature_mean"),
    "curvature_std": Field("curvature_std"),
}
RELEASE = {
    "model_type": "alpamayo_r1",
    "architectures": ["AlpamayoR1"],
    "vlm_backend": "qwenvl3",
    "vlm_name_or_path": "vlm",
    "model_dtype": "bfloat16",
    "attn_implementation": "sdpa",
    "add_special_tokens": Only(True),
    "keep_same_dtype": True,
    "expert_non_causal_attention": Only(True),
    "vocab_size": Follows(vocab_size),
    "traj_vocab_size": Follows(lambda c: c["bins"] + c["history_bins"]),
    "tokens_per_history_traj": Follows(lambda c: EGO_TOKENS[c["ego"]]),
    "tokens_per_future_traj": Only(128),
    "traj_token_start_idx": Field("text_vocab"),
    "traj_token_ids": Follows(trajectory_ids),
    "traj_tokenizer_cfg": {
        "_target_": "alpamayo_r1.action_space.discrete_action_space.DiscreteTrajectoryTokenizer",
        "_recursive_": False,
        "action_space_cfg": ACTION_SPACE,
        "num_bins": Field("bins"),
        "dims_min": Follows(lambda c: [-c["bin_range"]] * 2),
        "dims_max": Field("bin_range", lambda most: [most] * 2, lambda both: both[0]),
    },
    "hist_traj_tokenizer_cfg": {
        "_target_": "alpamayo_r1.models.delta_tokenizer.DeltaTrajectoryTokenizer",
        "num_bins": Field("history_bins"),
    },
    "diffusion_cfg": {
        "_target_": "alpamayo_r1.diffusion.flow_matching.FlowMatching",
        "int_method": "euler",
        "num_inference_steps": 10,
    },
    "action_space_cfg": ACTION_SPACE,
    "action_in_proj_cfg": {
        "_target_": "alpamayo_r1.models.action_in_proj.PerWaypointActionInProjV2",
        "hidden_size": Field("a_embd"),
        "max_freq": Field("a_max_freq"),
        "num_enc_layers": Field("a_layer"),
        "num_fourier_feats": Field("a_fourier"),
    },
    "action_out_proj_cfg": {"_target_": "torch.nn.Linear"},
    "expert_cfg": {  # what the expert does not share with the backbone
        "hidden_size": Field("e_embd", fallback="n_embd"),
        "intermediate_size": Field("e_mlp", fallback="n_mlp"),
        "num_attention_heads": Field("e_head", fallback="n_head"),
        "num_key_value_heads": Follows(lambda c: c["n_kv_head"]),  # it reads the backbone's cache
        "head_dim": Follows(lambda c: c["head_dim"]),
    },
    "min_pixels": Field("min_pixels", optional=True),
    "max_pixels": Field("max_pixels", optional=True),
    "include_camera_ids": Field("name_cameras", optional=True),  # of Alpamayo-1.5; both or neither
    "include_frame_nums": Field("name_cameras", optional=True),
}
# What the release lacks stands under "extra", where it is not Config's default.
EXTRA = """
words cameras frames frame_dt ego chat pair_frames view_embed route reasoning
vision keep keep_at retrieve
planes planes_patch planes_reach planes_embd flex_tokens flex_layer
""".split()


def write_table(table, c):
    """The JSON object of a table for a dictionary of Config's fields."""
    out = {}
    for key, leaf in table.items():
        if isinstance(leaf, Field):
            value = leaf.write(c[leaf.name])
            if value or not leaf.optional:
                out[key] = list(value) if isinstance(value, tuple) else value
        elif isinstance(leaf, dict):
            out[key] = write_table(leaf, c)
        elif isinstance(leaf, Only):
            out[key] = leaf.value
        elif isinstance(leaf, Follows):
            out[key] = leaf.rule(c)
        else:
            out[key] = leaf(c) if callable(leaf) else leaf
    return out


def read_table(table, data, c, defaults):
    """Put the Fields of a table into c, from a Json."""
    for key, leaf in table.items():
        if isinstance(leaf, dict):
            read_table(leaf, data.part(key), c, defaults)
        elif isinstance(leaf, Field):
            if leaf.optional and data.get(key) is None:
                value = defaults[leaf.name]
            elif leaf.fallback and key not in data:
                value = leaf.write(c[leaf.fallback])
            else:
                value = data[key]
            value = as_field(data, key, leaf, value, defaults[leaf.name])
            if c.setdefault(leaf.name, value) != value:
                raise data.wrong(key, f"{c[leaf.name]}, as another field has {leaf.name}")


def as_field(data, key, field, value, default):
    """The value at a key of a Json as Config has it, within bounds."""
    read = None
    if isinstance(default, bool) or not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, LookupError):
            read = field.read(value)
    read = tuple(read) if isinstance(read, list) else read
    words = lacks(field.name, read, default)
    if words:
        raise data.wrong(key, f"{field.name}, {words}")
    return read


def check_table(table, data, ours):
    """Refuse what this code does not know, by the JSON that it would write."""
    for key, leaf in table.items():
        if isinstance(leaf, dict):
            check_table(leaf, data.part(key), ours[key])
        elif isinstance(leaf, (Only, Follows)) or (isinstance(leaf, Field) and not leaf.optional):
            data.expect(key, ours[key])


def backbone_json(c):
    """vlm/config.json of a dictionary of Config's fields."""
    return write_table(BACKBONE, c)


def release_json(c, defaults):
    """config.json of a dictionary of Config's fields; under "extra" only what is no default."""
    out = write_table(RELEASE, c)
    extra = {name: c[name] for name in EXTRA if c[name] != defaults[name]}
    if not c["max_pixels"]:  # images come as they should be
        extra["max_pixels"] = 0
    return out | ({"extra": extra} if extra else {})


def write_config(folder, c, defaults):
    """Write both files of a checkpoint folder."""
    doors.write_json(os.path.join(folder, "vlm", "config.json"), backbone_json(c))
    doors.write_json(os.path.join(folder, "config.json"), release_json(c, defaults))


def read_config(folder, defaults):
    """The fields of Config, a dictionary, of a checkpoint folder, ours or the release's.

    The backbone's file is vlm/config.json. Where it is missing and the release names an 8B backbone
    that we know, its numbers are `defaults`. FileNotFoundError or ValueError: one line."""
    folder = folder_of(folder)
    release = read_json(os.path.join(folder, "config.json"))
    backbone = read_backbone(folder, release.text("vlm_name_or_path"), defaults)
    c = {}
    read_table(BACKBONE, backbone, c, defaults)
    read_table(RELEASE, release, c, defaults)
    read_extra(release, c, defaults)
    c = defaults | c
    with doors.expecting(f"{folder}: config.json and vlm/config.json do not fit"):
        require_config(c, defaults)
    release.part("expert_cfg").expect("num_hidden_layers", c["n_layer"])
    backbone.part("text_config").expect("tie_word_embeddings", False)
    check_table(BACKBONE, backbone, backbone_json(c))
    check_table(RELEASE, release, write_table(RELEASE, c))
    return c


def folder_of(path):
    """A checkpoint's folder as str. FileNotFoundError or ValueError, one line, where it is none."""
    folder = os.fsdecode(path)
    if not os.path.isdir(folder):
        if os.path.lexists(folder):
            raise ValueError(f"{folder}: expected a checkpoint's folder, not a file")
        raise FileNotFoundError(f"{folder}: missing, expected a checkpoint's folder")
    return folder


def read_backbone(folder, name, defaults):
    """vlm/config.json as Qwen3-VL first wrote it, or that of the 8B backbone of this name."""
    path = os.path.join(folder, "vlm", "config.json")
    if not os.path.exists(path):
        if any(known in name for known in QWEN3_VL_8B):
            return Json("built-in Qwen3-VL-8B", backbone_json(defaults))
        raise FileNotFoundError(
            f"{path}: missing, and config.json's vlm_name_or_path {name!r} is not "
            + " or ".join(QWEN3_VL_8B)
        )
    backbone = read_json(path)
    text = backbone.object("text_config")
    if text.get("rope_scaling") is None:  # newer files have all of RoPE in one object
        layout = text.object("rope_parameters")
        theta = (layout if text.get("rope_theta") is None else text)["rope_theta"]
        backbone["text_config"] = text | {"rope_scaling": layout, "rope_theta": theta}
    return backbone


def read_extra(release, c, defaults):
    """Put what stands under "extra" into c."""
    extra = release.part("extra")
    for name, value in extra.items():
        if name == "max_pixels":
            if type(value) is not int or value != 0:
                raise extra.wrong(name, "0, for images that are taken as they are")
            for size in ("min_pixels", "max_pixels"):
                if release.get(size) is not None:
                    raise release.wrong(size, "none, as extra.max_pixels is 0")
            c |= {"min_pixels": 0, "max_pixels": 0}
        elif name not in EXTRA:
            known = ", ".join(EXTRA)
            raise ValueError(
                f"{release.path}: field {extra.field(name)} is unknown; known are {known}")
        else:
            c[name] = as_field(extra, name, Field(name), value, defaults[name])


# --------------------------------------------------------------------------------------------------
# What a Config may hold

DEFAULT_BOUNDS = {int: (1, 2**20), float: (-1e4, 1e4)}
BOUNDS = {  # least and most of a number, or of each number of a list, where the default's are not
    "n_layer": (1, 512), "v_layer": (1, 512), "a_layer": (1, 512), "flex_layer": (1, 512),
    "n_head": (1, 4096), "n_kv_head": (1, 4096), "v_head": (1, 4096), "e_head": (1, 4096),
    "head_dim": (2, 4096), "v_grid": (1, 1024), "patch": (1, 256), "merge": (1, 16),
    "temporal_patch": (1, 16), "frames": (1, 1024), "bins": (2, 2**20), "history_bins": (0, 2**20),
    "min_pixels": (0, 2**28), "max_pixels": (0, 2**28),
    "rope_theta": (1, 1e12), "a_max_freq": (1, 1e6), "accel_std": (1e-4, 1e4),
    "curvature_std": (1e-4, 1e4), "bin_range": (1e-3, 1e4), "frame_dt": (1e-3, 1e3),
    "keep": (1e-6, 1), "keep_at": (0, 0.999), "retrieve": (1e-6, 1),
    "mrope_section": (0, 2048), "deepstack": (0, 511), "cameras": (0, 6), "planes": (1, 4096),
    "planes_patch": (1, 256),
}  # fmt: skip
LENGTHS = {"mrope_section": 3, "planes": 3, "planes_patch": 3, "planes_reach": 6}
CHOICES = {
    "ego": tuple(EGO_TOKENS),
    "vision": ("image", "triplane", "flex"),
    "reasoning": ("on", "off"),
}


def lacks(name, value, default):
    """What a field of Config must be, in words, where this value is not that; else None."""
    if name in CHOICES:
        words = " or ".join(CHOICES[name])
        right = value in CHOICES[name]
    elif name == "words":
        words = "distinct words"
        right = isinstance(value, tuple) and all(isinstance(w, str) and w for w in value)
        right = right and all(map(str.isprintable, value)) and len(set(value)) == len(value)
    elif isinstance(default, bool):
        words = "true or false"
        right = isinstance(value, bool)
    else:
        many = isinstance(default, tuple)
        kind = type(default[0] if many else default)
        least, most = BOUNDS.get(name, DEFAULT_BOUNDS[kind])
        length = LENGTHS.get(name, "")
        count = f"{length} ".lstrip() if many else "a "
        words = f"{count}{'whole ' * (kind is int)}number{'s' * many} from {least} to {most}"
        numbers = value if many else (value,)
        right = isinstance(numbers, tuple) and length in ("", len(numbers))
        right = right and all(is_number(one, kind, least, most) for one in numbers)
    return None if right else words


def is_number(value, kind, least, most):
    """Whether a value is a finite number of that type, int or float, within bounds."""
    right = type(value) is int if kind is int else finite(value)
    return right and least <= value <= most


def statements(c):
    """What must hold between the fields of Config, in words -> whether it does."""
    rising = all(a < b for a, b in itertools.pairwise((*c["deepstack"], c["v_layer"])))
    cut = any(cells % patch for cells, patch in zip(c["planes"], c["planes_patch"]))
    reach = c["planes_reach"]
    known_words = 256 + len(c["words"]) + len(TEXT_TOKENS)
    heads = c["n_head"] % c["n_kv_head"] + c["e_head"] % c["n_kv_head"]
    return {
        "head_dim must be even": c["head_dim"] % 2 == 0,
        "mrope_section must add up to head_dim / 2": sum(c["mrope_section"]) == c["head_dim"] // 2,
        "n_head and e_head must be multiples of n_kv_head": heads == 0,
        "v_embd must be a multiple of 4 v_head": c["v_embd"] % (4 * c["v_head"]) == 0,
        "deepstack must increase, below v_layer": rising,
        "a_fourier must be even": c["a_fourier"] % 2 == 0,
        "ego deltas needs 2 history_bins or more": c["ego"] != "deltas" or c["history_bins"] >= 2,
        "cameras must be one or more, each once": len(set(c["cameras"])) == len(c["cameras"]) > 0,
        "frames must be a multiple of temporal_patch, as they are paired": (
            not c["pair_frames"] or c["frames"] % c["temporal_patch"] == 0),
        "min_pixels must not exceed max_pixels": c["min_pixels"] <= c["max_pixels"],
        f"planes {c['planes']} must be whole patches of {c['planes_patch']}": (
            c["vision"] != "triplane" or not cut),
        "planes_reach must be from and to, three times": (
            all(low < high for low, high in zip(reach[::2], reach[1::2]))),
        f"text_vocab must be {known_words}, by the number of words": (
            not c["words"] or c["text_vocab"] == known_words),
    }  # fmt: skip


def require_config(c, defaults):
    """ValueError, one line, unless a model can be built of a dictionary of Config's fields."""
    for name, value in c.items():
        words = lacks(name, value, defaults[name])
        if words:
            raise ValueError(f"{name} is {doors.SHOWN.repr(value)}, expected {words}")
    for statement, holds in statements(c).items():
        if not holds:
            raise ValueError(statement)


# --------------------------------------------------------------------------------------------------
# Weights

SINGLE = "model.safetensors"
SHARD = r"model(-\d+)?(-\d{5}-of-\d{5})?\.safetensors"  # of any save of ours
INDEX = "model.safetensors.index.json"


def files_of(folder):
    """Where a folder's tensors are: name -> path. The index decides where there is one; what a file
    holds besides is not read."""
    index = os.path.join(folder, INDEX)
    single = os.path.join(folder, SINGLE)
    if not os.path.exists(index):
        if not os.path.exists(single):
            raise FileNotFoundError(f"{single}: missing (and no {INDEX})")
        with doors.open_tensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    weight_map = read_json(index).object("weight_map")
    paths = {}
    for name in weight_map:
        file = weight_map.text(name)
        paths[name] = doors.inside(folder, file, f"{index}: field {weight_map.field(name)}")
        if not os.path.exists(paths[name]):
            raise FileNotFoundError(f"{folder}: {file!r} is missing, though {INDEX} names it")
    return paths


def load_weights(model, folder, dtype, device):
    """Fill a model that was built on the meta device with a folder's tensors, on the device.

    The names are the release's, so nothing is renamed. The weights are in memory once. Any tensor
    missing, unexpected, of another shape or type, or not finite ends it with one line."""
    if dtype not in doors.FLOATS.values() or dtype.itemsize == 1:
        raise ValueError(f"dtype: expected float32, bfloat16, float16 or float64, not {dtype}")
    buffers = dict(model.named_buffers())
    wanted = dict(model.named_parameters()) | buffers
    paths = files_of(folder)
    for name in paths:
        if name not in wanted:
            raise ValueError(f"{paths[name]}: tensor {name[:200]!r} is unexpected; the config "
                             "describes no such part")
    missing = sorted(wanted.keys() - paths.keys())
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing from its safetensors: "
                         + ", ".join(missing[:3]))
    tensors = {}
    for path in sorted(set(paths.values())):
        with doors.open_tensors(path, device) as file:
            for name in sorted(name for name in paths if paths[name] == path):
                # Frequencies and moments stay float32: in bfloat16 sin(2 pi 60 x) is up to
                # 1/8 turn off at x = 1.
                kind = torch.float32 if name in buffers else dtype
                tensors[name] = doors.read_tensor(file, path, name, wanted[name].shape, kind)
                if name in buffers:
                    require_agreement(path, name, tensors[name], vars(model.cfg))
    model.load_state_dict(tensors, strict=False, assign=True)


def require_agreement(path, name, tensor, c):
    """ValueError unless a moment, or a frequency at its largest, is the Config's as far as bfloat16
    can tell: the release stores both."""
    field = name.split(".")[-1]
    field = "a_max_freq" if field == "freqs" else field
    value = float(tensor.max())
    if not math.isclose(value, c[field], rel_tol=0.01, abs_tol=1e-6):
        raise ValueError(f"{path}: tensor {name} is {value:g}, expected {c[field]:g}, which "
                         f"config.json has")


def save_weights(model, folder, dtype=None, shard_bytes=5 * 2**30):
    """Write the model's tensors as one safetensors file, or as several and an index.

    dtype: of the parameters on disk, as they are where not given; buffers stay as they are.
    ValueError, before a byte is written, where a number is not finite. Killed or without room on
    the disk it leaves the earlier checkpoint or this one, never a mixture: shards take names that
    no file has, then the index that names them replaces the earlier one, then earlier files go.
    A model sharded over processes is gathered a file at a time: all call this, all but one with
    folder None."""
    buffers = dict(model.named_buffers())
    state = model.state_dict()

    def type_of(name):
        return dtype if dtype and name not in buffers else state[name].dtype

    shards = [[]]
    room = shard_bytes
    for name, tensor in state.items():
        here = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        doors.require_finite({name: here.to(type_of(name))}, folder)
        size = tensor.numel() * type_of(name).itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size

    def save(file, names):
        tensors = {}
        for name in names:
            tensor = state[name]
            if hasattr(tensor, "full_tensor"):
                tensor = tensor.full_tensor()  # all processes take part
                tensor = tensor.cpu() if folder else None
            if folder:
                tensors[name] = tensor.to(type_of(name)).contiguous()
        if folder:
            doors.save_tensors(os.path.join(folder, file), tensors, {"format": "pt"})

    index = os.path.join(folder or "", INDEX)
    if len(shards) == 1:
        files = [SINGLE]
        save(SINGLE, shards[0])
        if folder:
            with contextlib.suppress(FileNotFoundError):
                os.remove(index)
    else:
        files = new_names(folder or "", len(shards))
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        try:
            for file, names in zip(files, shards):
                save(file, names)
            if folder:
                doors.write_json(index, {"metadata": {}, "weight_map": weight_map})
        except OSError:  # no room on the disk
            remove(folder, files)
            raise
    if folder:
        there = {file for file in os.listdir(folder) if re.fullmatch(SHARD, file)}
        remove(folder, there - {*files})


def new_names(folder, count):
    """Names of that many shards, none of which the folder has: model-00001-of-00002.safetensors,
    where an earlier save is in the way model-1-00001-of-00002.safetensors, and so on."""
    for save in itertools.count():
        stem = f"model-{save}" if save else "model"
        files = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if not any(os.path.exists(os.path.join(folder, file)) for file in files):
            return files


def remove(folder, files):
    """Remove these files of a folder, as far as they are there."""
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, file))
