"""Trains a small video transformer, each frame at a noise level of its own, and writes what it makes as a GIF.

Modulation as video models have it: a row of shifts, scales and gates for each frame, a table of each block added to
all of them inside the kernels, and in sampling two rows, of the given frames and of the others, with an index that says
which token takes which.
"""

import torch
import torch.nn.functional as F
from _example import Progress, options, pictures
from PIL import Image
from torch import nn

import zeroblock as zb

args = options(__doc__, steps=(700, "optimizer steps"), out=("video.gif", "the file to write"))
steps = 2 if args.quick else args.steps
FRAMES, GIVEN, SIZE, PATCH, D, HEADS = 6, 2, 16, 4, 96, 4
TOKENS = (SIZE // PATCH) ** 2  # of a frame


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, D) / D**0.5)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def attend(self, h):
        q, k, v = self.qkv(h).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x, rows, index):
        """rows: [B, FRAMES, 6, D], one of each frame; or [B, K, 6, D] and index [T], the row of each token."""
        (shift1, scale1, gate1, shift2, scale2, gate2), table = rows.unbind(2), self.table
        h = zb.layer_norm_modulate(x, shift1, scale1, shift_table=table[0], scale_table=table[1], index=index)
        x, h = zb.residual_norm_modulate(
            x,
            self.attend(h),
            gate=gate1,
            gate_table=table[2],
            shift=shift2,
            scale=scale2,
            shift_table=table[3],
            scale_table=table[4],
            index=index,
        )
        return zb.gate_residual(x, gate2, self.mlp(h), gate_table=table[5], index=index)


def places():
    """[FRAMES * TOKENS, D]: waves of the frame, the row and the column."""
    side = SIZE // PATCH
    axes = torch.cartesian_prod(torch.arange(FRAMES), torch.arange(side), torch.arange(side)).float()
    angles = axes[:, :, None] * torch.exp2(-torch.linspace(0, 3, D // 6))
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


class VideoDiT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(PATCH**2, D)
        self.register_buffer("place", places())
        self.level = nn.Sequential(nn.Linear(32, D), nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = zb.nn.ZeroLinear(D, PATCH**2)

    def forward(self, video, levels, index=None):
        """video [B, FRAMES, SIZE, SIZE]; levels of noise in [0, 1]: [B, FRAMES], or [B, K] with an index."""
        waves = levels[..., None] * torch.exp2(torch.linspace(0, 8, 16))
        rows = self.level(torch.cat([waves.sin(), waves.cos()], -1)).unflatten(-1, (6, D))
        B, n = len(video), SIZE // PATCH
        x = video.view(B, FRAMES, n, PATCH, n, PATCH).transpose(3, 4).reshape(B, FRAMES * TOKENS, PATCH**2)
        x = self.embed(x) + self.place
        for block in self.blocks:
            x = block(x, rows, index)
        y = self.last(F.layer_norm(x, (D,)))
        return y.view(B, FRAMES, n, n, PATCH, PATCH).transpose(3, 4).reshape(video.shape)


def videos(count):
    """[count, FRAMES, SIZE, SIZE]: soft discs that move by up to two pixels in each frame."""
    pad = 2 * FRAMES
    canvas = F.pad(pictures(count, SIZE, channels=1)[:, 0], (pad, pad, pad, pad), value=-1.0)
    steps = torch.randint(-2, 3, (count, 2))
    found = [
        torch.stack([canvas[i, pad + f * dy :, pad + f * dx :][:SIZE, :SIZE] for f in range(FRAMES)])
        for i, (dy, dx) in enumerate(steps.tolist())
    ]
    return torch.stack(found)


torch.manual_seed(0)
model, data = VideoDiT(), videos(512)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1, pct_start=0.1)
progress, losses = Progress(lines=4), []
for number in range(1, steps + 1):
    clean = data[torch.randint(len(data), (16,))]
    noise, levels = torch.randn_like(clean), torch.rand(16, FRAMES)  # every frame its own
    levels[:8] = levels[:8, -1:]
    levels[:8, :GIVEN] = 0  # of half of them as in sampling
    weight = levels[..., None, None]
    loss = F.mse_loss(model((1 - weight) * clean + weight * noise, levels), clean)  # it predicts the clean video
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    progress("train", number, steps, f"loss {loss.item():.4f}")
progress.close()

# The first frames are given; the others come out of noise, a step at a time towards what the model takes for clean.
model.eval()
given, count = videos(8), 2 if args.quick else 40  # new ones
video = torch.cat([given[:, :GIVEN], torch.randn(8, FRAMES - GIVEN, SIZE, SIZE)], 1)
index = (torch.arange(FRAMES * TOKENS) >= GIVEN * TOKENS).int()  # row 0: the given frames; row 1: all others
with torch.no_grad():
    for number in range(count):
        level = 1 - number / count
        levels = torch.tensor([[0.0, level]]).expand(8, 2)
        clean = model(video, levels, index)
        if number == 0:  # the same as a level for each frame
            each = torch.tensor([0.0] * GIVEN + [level] * (FRAMES - GIVEN)).expand(8, FRAMES)
            assert torch.allclose(clean, model(video, each), atol=1e-4)
        video[:, GIVEN:] += (clean - video)[:, GIVEN:] / (count - number)
error = (video - given)[:, GIVEN:].square().mean() / (given[:, GIVEN:] + 1).square().mean()

frames = ((torch.cat([given, video], 1).clamp(-1, 1) + 1) * 127.5).byte()  # above the real ones, below the sampled
pages = []
for f in range(FRAMES):
    page = torch.cat([frames[:, f].transpose(0, 1).flatten(1), frames[:, FRAMES + f].transpose(0, 1).flatten(1)])
    pages.append(Image.fromarray(page.numpy()).resize((8 * SIZE * 4, 2 * SIZE * 4), Image.Resampling.NEAREST))
pages[0].save(args.out, save_all=True, append_images=pages[1:], duration=200, loop=0)
print(f"loss {losses[0]:.3f} -> {sum(losses[-20:]) / len(losses[-20:]):.3f}; {args.out}: above real, below sampled,")
print(f"of which {GIVEN} frames were given; the others are off by {100 * error:.0f} % of the discs' energy")
