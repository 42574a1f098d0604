"""A model of diffusers from its configuration alone, and inputs for it: `zeroblock doctor diffusers:Class | folder`.

No weight is read: the model is as its class initialises it. One that is too large for a quick look is built with one
layer of each kind, then with fewer heads or channels too; what was changed is said. Inputs are made by the names of the
arguments of its forward and by its configuration, in the first layout of the latents that the model takes.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LIMIT = 40_000_000  # parameters; an examination holds three copies of them
TEXT, SIDE, FRAMES, BATCH = 8, 8, 5, 2
_DEPTH = re.compile(r"(num_|n_)?([a-z]+_)*(layers|depth|blocks)(_per_block)?$")
_HEADS = ("num_attention_heads", "num_heads", "n_heads")
_TEXT: tuple[str, ...] = (
    "joint_attention_dim",
    "caption_channels",
    "text_dim",
    "text_embed_dim",
    "cap_feat_dim",
    "context_in_dim",
)
_TEXT += ("text_embedding_dim", "encoder_hid_dim", "cross_attention_dim", "in_text_dim")
_ROPE = ("axes_dims_rope", "axes_dim_rope")


class Made(NamedTuple):
    model: nn.Module
    batch: dict[str, Any]
    changed: dict[str, Any]  # {key of the configuration: value in place of the one that was given}

    def __str__(self) -> str:
        return f"a {'small ' * bool(self.changed)}{type(self.model).__name__}: {_words(self.changed)}"


def is_class(found: Any) -> bool:
    """Whether it is a class of diffusers' models, or of others that are made from a configuration as these are."""
    return isinstance(found, type) and issubclass(found, nn.Module) and callable(getattr(found, "from_config", None))


def of_folder(folder: Path) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class and the configuration of a checkpoint, or of the U-Net or transformer of a pipeline.

    Raises ValueError where there is no config.json of a model of diffusers.
    """
    inner = [folder / name for name in ("transformer", "unet") if (folder / name / "config.json").exists()]
    path = (folder if (folder / "config.json").exists() or not inner else inner[0]) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no config.json, nor has it a folder transformer or unet that does")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    import diffusers

    name = config.get("_class_name") if isinstance(config, dict) else None
    found: Any = getattr(diffusers, str(name), None)
    if not is_class(found):
        raise ValueError(f"{path} names no model of diffusers (_class_name: {name}): write a factory")
    return found, {k: v for k, v in config.items() if not k.startswith("_")}


def make(cls: type[nn.Module], config: dict[str, Any], limit: float = LIMIT) -> Made:
    """The model, smaller where it has more than `limit` parameters, and what it can be called with.

    cls: a class of diffusers' models.
    config: arguments of it; the others have its defaults.

    Raises ValueError where the class refuses the configuration, where it needs an argument that nothing is known of,
    or where it runs in no layout of the latents.
    """
    arguments = inspect.signature(cls.__init__).parameters.values()
    full = {p.name: p.default for p in arguments if p.default is not p.empty} | config
    config = {k: v for k, v in full.items() if k in {p.name for p in arguments}}
    small = dict(config)
    for shrink in (_shallow, _narrow):
        if _size(cls, small) > limit:
            small = shrink(small)
    model = _built(cls, small)
    batch = _batch(model, {**small, **getattr(model, "config", {})})  # its own has what the class derived
    return Made(model, batch, {k: v for k, v in small.items() if v != config[k]})


def _built(cls: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    try:
        return cls(**config)
    except Exception as error:
        raise ValueError(f"{cls.__name__} refuses {_words(config)}: {type(error).__name__}: {error}") from error


def _size(cls: type[nn.Module], config: dict[str, Any]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in _built(cls, config).parameters())


def _each(value: Any, change: Any) -> Any:
    """change(n) of a number, or of every number in a list or tuple, or of one in it."""
    if isinstance(value, (list, tuple)):
        return type(value)(_each(v, change) for v in value)
    return change(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _shallow(config: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind; and where the latents' size is a table of positions, a small one."""
    extents = {k: 16 for k in ("sample_height", "sample_width") if isinstance(config.get(k), int)}
    extents |= {"sample_frames": 17} if isinstance(config.get("sample_frames"), int) else {}
    return {k: _each(v, lambda n: min(n, 1)) if _DEPTH.fullmatch(k) else v for k, v in config.items()} | extents


def _narrow(config: dict[str, Any]) -> dict[str, Any]:
    """Two heads, wherever the width of all heads stands; a U-Net of few channels."""
    if "block_out_channels" in config:
        groups = config.get("norm_num_groups") or 32
        changed = {"block_out_channels": _each(config["block_out_channels"], lambda n: min(n, 2 * groups))}
        heads = config.get("attention_head_dim")
        return config | changed | ({"attention_head_dim": _each(heads, lambda n: 8)} if heads else {})
    key = next((k for k in _HEADS if isinstance(config.get(k), int)), None)
    if key is None:
        return config
    heads = config[key]
    one = config.get("attention_head_dim") or config.get("head_dim")
    width = heads * one if one else config.get("hidden_size") or config.get("dim")
    few = {heads: 2, width: 2 * (width // heads) if width else None}
    whole = {"hidden_size", "dim", "caption_projection_dim", "cross_attention_dim", "inner_dim", *_HEADS}
    whole |= {"num_cross_attention_heads"}
    shared = {k: 1 for k in ("num_kv_heads", "n_kv_heads", "num_key_value_heads") if isinstance(config.get(k), int)}
    return {k: few.get(v, v) if k in whole and isinstance(v, int) else v for k, v in config.items()} | shared


def _batch(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the model's forward: of the layouts that its latents may have, those of the first that runs."""
    forward = inspect.signature(model.forward).parameters
    latents = next((name for name in ("hidden_states", "sample") if name in forward), None)
    if latents is None:
        raise ValueError(f"{type(model).__name__} takes neither hidden_states nor sample: write a factory")
    failed = []
    for layout in _layouts(config, forward):
        batch = {latents: torch.randn(layout), **_known(config, forward, layout)}
        missing = [p.name for p in forward.values() if p.default is p.empty and p.name not in batch and p.kind < 2]
        if missing:
            raise ValueError(f"{type(model).__name__} also takes {', '.join(missing)}: write a factory")
        try:
            with torch.no_grad():
                model(**batch)
            return batch
        except Exception as error:
            failed.append(f"{list(layout)}: {type(error).__name__}: {error}")
    words = "; ".join(failed)
    raise ValueError(f"{type(model).__name__} runs on none of the inputs made for it: write a factory ({words})")


def _layouts(config: dict[str, Any], forward: Any) -> list[tuple[int, ...]]:
    """Of latents: pixels, tokens, and of video, channels before frames or after."""
    channels = config.get("in_channels") or config.get("io_channels") or 4
    given = config.get("sample_size") or config.get("sample_height")
    side = min(given, 64) if isinstance(given, int) else 4 * SIDE
    image, tokens = (BATCH, channels, side, side), (BATCH, SIDE * SIDE, channels)
    video = [(BATCH, channels, FRAMES, side, side), (BATCH, FRAMES, channels, side, side)]
    packed = {"img_ids", "img_shapes", "num_frames"} & set(forward)
    return [tokens, image, *video] if packed else [image, *video, tokens]


def _known(config: dict[str, Any], forward: Any, layout: tuple[int, ...]) -> dict[str, Any]:
    """The arguments by their names: those that must be given, and those that an option of the model asks for."""
    width = next((config[k] for k in _TEXT if isinstance(config.get(k), int)), 32)
    axes = next((len(config[k]) for k in _ROPE if config.get(k)), 3)
    rows, ones = layout[1] if len(layout) == 3 else SIDE * SIDE, torch.ones(BATCH, TEXT, dtype=torch.long)
    sizes = torch.full((BATCH, 2), 8 * SIDE)
    made: dict[str, Any] = {
        "timestep": torch.tensor([44, 239]),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, width),
        "encoder_attention_mask": ones,
        "encoder_hidden_states_mask": ones,
        "img_ids": torch.cartesian_prod(*[torch.arange(n) for n in (1, SIDE, SIDE, 1, 1)])[:rows, :axes].float(),
        "txt_ids": torch.zeros(TEXT, axes),
        "img_shapes": [[(1, SIDE, SIDE)]] * BATCH,
        "num_frames": 1,
        "height": SIDE,
        "width": SIDE,
        "original_size": sizes,
        "target_size": sizes,
        "crop_coords": 0 * sizes,
        "added_time_ids": torch.ones(BATCH, 3),
        "fps": torch.full((BATCH,), 8),
        "controlnet_cond": torch.randn(BATCH, config.get("conditioning_channels") or 3, 8 * layout[-2], 8 * layout[-1]),
    }
    asked = {
        "pooled_projections": (config.get("pooled_projection_dim"), lambda n: torch.randn(BATCH, n)),
        "class_labels": (config.get("num_embeds_ada_norm") or config.get("num_class_embeds"), _labels),
        "guidance": (config.get("guidance_embeds"), lambda n: torch.ones(BATCH)),
        "added_cond_kwargs": (_conditions(config), lambda given: given),
    }
    made |= {name: make(value) for name, (value, make) in asked.items() if value}
    always = {"timestep", "encoder_hidden_states", "encoder_hidden_states_mask", "img_ids", "txt_ids", "img_shapes"}
    always |= {"num_frames", "height", "width", *asked}
    if not any(isinstance(config.get(k), int) for k in _TEXT):
        always -= {"encoder_hidden_states"}
    return {
        name: made[name] for name, p in forward.items() if name in made and (name in always or p.default is p.empty)
    }


def _labels(count: int) -> Tensor:
    return torch.arange(BATCH) % count


def _conditions(config: dict[str, Any]) -> dict[str, Any] | None:
    if config.get("addition_embed_type") == "text_time":  # Stable Diffusion XL
        times = 6 * config["addition_time_embed_dim"]
        text = config["projection_class_embeddings_input_dim"] - times
        return {"text_embeds": torch.randn(BATCH, text), "time_ids": torch.ones(BATCH, 6)}
    if "use_additional_conditions" in config or config.get("norm_type") == "ada_norm_single":  # PixArt
        return {"resolution": torch.full((BATCH, 2), 64.0), "aspect_ratio": torch.ones(BATCH, 1)}
    return None


def _words(config: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in config.items())
