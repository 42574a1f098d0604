"""Will this initialisation learn? `zb.doctor` on what people ask about zero layers, in small models.

Each model is built as in the question, examined, and its verdict compared with the one that is known to be right. What
the doctor predicts from the zeros alone it checks with SGD steps, and every weight is put back.
"""

import torch
from _example import Progress, options
from torch import nn

import zeroblock as zb
from zeroblock.testing import eager
from zeroblock.tools import models


def zeroed(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ZeroConvolutions(nn.Module):
    """ControlNet's: a trainable copy joins a frozen network through 1x1 convolutions that are zero."""

    def __init__(self):
        super().__init__()
        self.network, self.copy = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.zero_in, self.zero_out = zeroed(nn.Conv2d(4, 4, 1)), zeroed(nn.Conv2d(8, 8, 1))
        self.network.requires_grad_(False)

    def forward(self, x, hint):
        return self.network(x) + self.zero_out(torch.relu(self.copy(x + self.zero_in(hint))))


class LanguageGate(nn.Module):
    """Two linear layers around a ReLU, without biases and both zero, as a gate on what language adds to an image."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.gate = nn.Sequential(
            zeroed(nn.Linear(8, 8, bias=False)), nn.ReLU(), zeroed(nn.Linear(8, 8, bias=False)), nn.Tanh()
        )

    def forward(self, x):
        mixed = self.mix(x)
        return x + self.gate(mixed) * mixed


class LastBlock(nn.Module):
    """A last block that projects queries of the text, and never uses them: only the image's tokens are returned."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.add_q_proj, self.add_k_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, image, text):
        queries = torch.cat([self.to_q(image), self.add_q_proj(text)], 1)
        keys = torch.cat([self.to_k(image), self.add_k_proj(text)], 1)
        return torch.nn.functional.scaled_dot_product_attention(queries, keys, keys)[:, : image.shape[1]]


class Fixup(nn.Module):
    """No normalisation; the last convolution of each branch and the classifier are zero."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.Sequential(eager.FixupBasicBlock(8, 8), eager.FixupBasicBlock(8, 8))
        self.classifier = zeroed(nn.Linear(8, 10))

    def forward(self, x):
        return self.classifier(torch.relu(self.layers(self.first(x))).mean((2, 3)))


def dit(zero: bool = True):
    model = models.DiT(eager, hidden_size=32, depth=1, num_heads=2)
    if not zero:
        for p in model.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.02)
    return model, (torch.randn(2, 1, 16, 16), torch.randint(0, 1000, (2,)), torch.randint(0, 10, (2,)))


def image_and_text():
    return LastBlock(), (torch.randn(2, 6, 8), torch.randn(2, 3, 8))


# Question, model and batch, what is known of it: the kinds of parameters that must be found, in full.
QUESTIONS = {
    "DiT #82: the final layer is zero, so how does anything before it learn?": (dit, set()),
    "ControlNet #510, #540: a zero convolution has zero output; is its gradient zero too?": (
        lambda: (ZeroConvolutions(), (torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8))),
        set(),
    ),
    "LAVT-RIS #25: two zero linear layers around a ReLU": (lambda: (LanguageGate(), torch.randn(4, 8)), {"dead"}),
    "F5-TTS #793: the zero initialisation was forgotten": (lambda: dit(zero=False), set()),
    "diffusers #9835: parameters of the last block never get a gradient": (image_and_text, {"dead"}),
    "Fixup: with a zero last layer, do all units stay the same?": (lambda: (Fixup(), torch.randn(4, 3, 12, 12)), set()),
    "improved-diffusion: why does zero_module zero the parameters out?": (
        lambda: (eager.ResBlock(32, 16, 0.0), (torch.randn(2, 32, 8, 8), torch.randn(2, 16))),
        set(),
    ),
}

args, progress = options(__doc__), Progress()
for question, (build, wrong) in QUESTIONS.items():
    torch.manual_seed(0)
    model, batch = build()
    diagnosis = zb.doctor(model, batch, steps=2 if args.quick else 4, progress=progress)
    progress.close()
    print(f"\n{'=' * 100}\n{question}\n{'=' * 100}\n{diagnosis}")
    found = {p.kind for p in diagnosis.of_kind("dead", "symmetric")}
    assert found == wrong, (question, found)
    assert diagnosis.healthy == (not wrong)
print(f"\n{len(QUESTIONS)} questions; in {sum(bool(w) for _, w in QUESTIONS.values())} something is dead, as is known")
