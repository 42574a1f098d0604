"""Models of diffusers from their configuration: what `zeroblock doctor` is given in place of a factory."""

import json

import pytest
import torch

from zeroblock import cli
from zeroblock.tools import configured

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "num_embeds_ada_norm": 10}
UNET = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
UNET |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 12, "sample_size": 8}
UNET |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
FLUX = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4}
FLUX |= {"joint_attention_dim": 12, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4), "guidance_embeds": True}
WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 1}
WAN |= {"text_dim": 16, "ffn_dim": 32}


@pytest.mark.parametrize(
    "name, config, inputs",
    [
        ("DiTTransformer2DModel", DIT, {"hidden_states": [2, 4, 8, 8], "timestep": [2], "class_labels": [2]}),
        ("UNet2DConditionModel", UNET, {"sample": [2, 4, 8, 8], "encoder_hidden_states": [2, 8, 12]}),
        ("FluxTransformer2DModel", FLUX, {"hidden_states": [2, 64, 4], "guidance": [2], "img_ids": [64, 3]}),
        ("WanTransformer3DModel", WAN, {"hidden_states": [2, 4, 5, 32, 32], "encoder_hidden_states": [2, 8, 16]}),
    ],
)
def test_inputs_are_made_for_the_model(name, config, inputs):
    made = configured.make(getattr(diffusers, name), config)
    assert made.changed == {}
    assert {k: list(made.batch[k].shape) for k in inputs} == inputs
    made.model(**made.batch)


def test_a_large_model_is_made_smaller_and_says_so():
    large = FLUX | {"num_layers": 3, "num_single_layers": 7, "num_attention_heads": 16}
    shallow = configured.make(diffusers.FluxTransformer2DModel, large, limit=10**6)
    assert shallow.changed == {"num_layers": 1, "num_single_layers": 1}
    narrow = configured.make(diffusers.FluxTransformer2DModel, large, limit=10**4)
    assert narrow.changed == {**shallow.changed, "num_attention_heads": 2}
    assert str(narrow) == "a small FluxTransformer2DModel: num_layers=1, num_single_layers=1, num_attention_heads=2"
    unet = configured.make(diffusers.UNet2DConditionModel, UNET | {"block_out_channels": (64, 128)}, limit=10**4)
    assert unet.changed["block_out_channels"] == (8, 8)
    kept = configured.make(diffusers.FluxTransformer2DModel, large, limit=float("inf"))
    assert kept.changed == {} and len(kept.model.transformer_blocks) == 3


@pytest.fixture
def checkpoint(tmp_path):
    """A folder of a pipeline, whose transformer's last layer would be healthy, and holds no weights."""
    (tmp_path / "transformer").mkdir()
    text = json.dumps({"_class_name": "DiTTransformer2DModel", "_diffusers_version": "0.40.0", **DIT})
    (tmp_path / "transformer" / "config.json").write_text(text)
    return tmp_path


def test_doctor_takes_a_class_and_a_folder(checkpoint, capsys, monkeypatch):
    assert cli.main(["doctor", str(checkpoint), "--json", str(checkpoint / "found.json")]) == 0
    found = json.loads((checkpoint / "found.json").read_text())
    assert found["model"] == "DiTTransformer2DModel" and found["healthy"]
    assert cli.main(["doctor", str(checkpoint / "transformer"), "--quiet"]) == 0
    monkeypatch.setattr(configured, "LIMIT", 10**5)
    capsys.readouterr()
    assert cli.main(["doctor", "diffusers:UNet2DModel", "--steps", "1"]) == 0
    printed = capsys.readouterr()
    assert "a small UNet2DModel: block_out_channels=" in printed.err and "healthy" in printed.out


def test_a_dead_initialisation_of_a_class_has_exit_status_1(monkeypatch):
    class Dead(diffusers.DiTTransformer2DModel):
        def __init__(self, num_layers: int = 1, **options):
            super().__init__(**DIT)
            torch.nn.init.zeros_(self.proj_out_2.weight)
            torch.nn.init.zeros_(self.proj_out_1.weight), torch.nn.init.zeros_(self.proj_out_1.bias)
            self.proj_out_2.bias.requires_grad_(False), self.proj_out_2.weight.requires_grad_(False)

    monkeypatch.setattr(diffusers, "DeadModel", Dead, raising=False)
    assert cli.main(["doctor", "diffusers:DeadModel", "--quiet"]) == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "holds no config.json"),
        ("{", "is no JSON"),
        ('{"architectures": ["T5EncoderModel"]}', "names no model of diffusers (_class_name: None): write a factory"),
        ('{"_class_name": "Krea2Transformer2DModel", "num_layers": 1}', "also takes position_ids: write a factory"),
        ('{"_class_name": "DiTTransformer2DModel", "norm_type": "x"}', "DiTTransformer2DModel refuses"),
    ],
)
def test_what_cannot_be_made_is_one_clear_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert cli.main(["doctor", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert (
        printed.out == "" and printed.err.splitlines()[-1].startswith("zeroblock doctor: ") and message in printed.err
    )
