"""Trains a small video transformer on moving digits, each frame at a noise level of its own, and writes a GIF.

Modulation as video models have it: a row of shifts, scales and gates for each frame, a table of each block added to
all of them inside the kernels, and in sampling two rows, of the given frames and of the others, with an index that says
which token takes which.
"""

import torch
import torch.nn.functional as F
from _example import Progress, options
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import zeroblock as zb

args = options(__doc__, steps=(1200, "optimizer steps"), out=("video.gif", "the file to write"))
steps, samplings = (2, 2) if args.quick else (args.steps, 40)
FRAMES, GIVEN, HEIGHT, WIDTH, PATCH = 8, 2, 8, 16, 4
D, HEADS, DEPTH, BATCH, RATE = 128, 4, 3, 48, 2e-3
TOKENS = WIDTH // PATCH  # of a frame: strips of PATCH columns
GLYPHS = """
01110 00100 01110 11110 00010 11111 00110 11111 01110 01110
10001 01100 10001 00001 00110 10000 01000 00001 10001 10001
10001 00100 00001 00001 01010 11110 10000 00010 10001 10001
10001 00100 00010 01110 10010 00001 11110 00100 01110 01111
10001 00100 00100 00001 11111 00001 10001 01000 10001 00001
10001 00100 01000 00001 00010 10001 10001 01000 10001 00010
01110 01110 11111 11110 00010 01110 01110 01000 01110 01100
"""  # of the digits 0 to 9


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.tensor([0.0, 0, 1, 0, 0, 1])[:, None].repeat(1, D))  # gates begin at 1
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


def waves(values, count, highest):
    """[..., 2 * count]: sines and cosines of 1 to 2**highest times the values."""
    angles = values[..., None] * torch.exp2(torch.linspace(0, highest, count))
    return torch.cat([angles.sin(), angles.cos()], -1)


class VideoDiT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.digit = nn.Linear(HEIGHT * PATCH, D), nn.Embedding(10, D)
        self.place = nn.ParameterList(0.3 * torch.randn(n, D) for n in (FRAMES, TOKENS))
        self.level = nn.Sequential(nn.Linear(32, D), nn.SiLU(), nn.Linear(D, D))
        self.rows = nn.Linear(D, 6 * D)
        nn.init.zeros_(self.rows.weight)
        nn.init.zeros_(self.rows.bias)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.last = zb.nn.ZeroLinear(D, HEIGHT * PATCH)

    def forward(self, video, digits, levels, index=None):
        """video [B, FRAMES, HEIGHT, WIDTH]; levels of noise in [0, 1]: [B, FRAMES], or [B, K] with an index."""
        condition = self.level(waves(levels, 16, 6)) + self.digit(digits)[:, None]
        rows = self.rows(F.silu(condition)).unflatten(-1, (6, D))
        strips = video.unflatten(3, (TOKENS, PATCH)).transpose(2, 3).flatten(3).flatten(1, 2)
        frame, place = self.place
        x = self.embed(strips) + (frame[:, None] + place).flatten(0, 1)
        for block in self.blocks:
            x = block(x, rows, index)
        y = self.last(F.layer_norm(x, (D,)))
        return y.view(-1, FRAMES, TOKENS, HEIGHT, PATCH).transpose(2, 3).flatten(3)


def noisier(u):
    """Levels of noise from uniform numbers: most of them high, where it is decided what moves where."""
    return 4 * u / (1 + 3 * u)


def pictures():
    """[10, places, HEIGHT, WIDTH], 1 on 0: every digit in every place."""
    pixels = torch.tensor([[int(c) for c in word] for word in GLYPHS.split()], dtype=torch.float)
    found = torch.zeros(10, WIDTH - 4, HEIGHT, WIDTH)
    for x in range(WIDTH - 4):
        found[:, x, 1:8, x : x + 5] = pixels.view(7, 10, 5).transpose(0, 1)
    return found


def videos(digits):
    """[len(digits), FRAMES, HEIGHT, WIDTH]: digits that move a pixel or two a frame and turn at the edges."""
    room, count = WIDTH - 5, (len(digits), 1)
    at = torch.randint(2 * room, count) + torch.tensor([-2, -1, 1, 2])[torch.randint(4, count)] * torch.arange(FRAMES)
    return pictures()[digits[:, None], room - (at % (2 * room) - room).abs()]


torch.manual_seed(0)
labels = torch.arange(4096) % 10
data = videos(labels)
MEAN, STD = data.mean(), data.std()
data = (data - MEAN) / STD
model = VideoDiT()
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.1)
progress, losses = Progress(lines=4), []
for number in range(1, steps + 1):
    which = torch.randint(len(data), (BATCH,))
    clean, noise = data[which], torch.randn(BATCH, FRAMES, HEIGHT, WIDTH)
    levels = noisier(torch.rand(BATCH, FRAMES))  # every frame its own
    levels[BATCH // 3 :] = levels[BATCH // 3 :, -1:]  # of two thirds as in sampling: one for all
    levels[2 * BATCH // 3 :, :GIVEN] = 0  # but for frames that are given
    weight = levels[..., None, None]
    predicted = model((1 - weight) * clean + weight * noise, labels[which], levels)  # the clean video
    loss = F.mse_loss(predicted, clean)
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    average.update_parameters(model)
    losses.append(loss.item())
    progress("train", number, steps, f"loss {loss.item():.4f}")
progress.close()


@torch.no_grad()
def sample(start, digits):
    """Videos that begin with the frames of `start`: out of noise, in steps towards what the model takes for clean."""
    given = start.shape[1]
    video = torch.cat([start, torch.randn(len(start), FRAMES - given, HEIGHT, WIDTH)], 1)
    index = (torch.arange(FRAMES * TOKENS) >= given * TOKENS).int()  # row 0: the given frames; row 1: all others
    schedule = noisier(torch.linspace(1, 0, samplings + 1)).tolist()
    for number, (level, lower) in enumerate(zip(schedule, schedule[1:], strict=False)):
        levels = torch.tensor([[0.0, level]]).expand(len(start), 2)
        clean = average(video, digits, levels, index)
        if number == 0:  # the same as a level for each frame
            each = torch.tensor([0.0] * given + [level] * (FRAMES - given)).expand(len(start), FRAMES)
            assert torch.allclose(clean, average(video, digits, each), atol=1e-4)
        video[:, given:] += (clean - video)[:, given:] * (1 - lower / level)
    return video


digits = torch.arange(10)
real = (videos(digits) - MEAN) / STD
continued, made = sample(real[:, :GIVEN], digits), sample(real[:, :0], digits)
rows = torch.stack([real, continued, made]) * STD + MEAN  # [3, 10, FRAMES, HEIGHT, WIDTH], from above to below
nearest = torch.cdist(rows.flatten(0, 2).flatten(1), pictures().flatten(0, 1).flatten(1)).argmin(1)
right = (nearest // (WIDTH - 4)).view(3, 10, FRAMES) == digits[:, None]
sheets = F.pad(1 - rows.clamp(0, 1), (1, 1, 1, 1), value=0.8).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
pages = [Image.fromarray((255 * sheet).byte().numpy()) for sheet in sheets]
pages = [page.resize((4 * page.width, 4 * page.height), Image.Resampling.NEAREST) for page in pages]
pages[0].save(args.out, save_all=True, append_images=pages[1:], duration=200, loop=0)
print(f"loss {losses[0]:.3f} -> {sum(losses[-20:]) / len(losses[-20:]):.3f}")
print(f"{args.out}: real digits; their first {GIVEN} frames, continued; made from noise alone")
print(
    f"the digit asked for is the one most like {right[1, :, GIVEN:].sum()} of {10 * (FRAMES - GIVEN)} continued frames,"
)
print(f"and like {right[2].sum()} of the {10 * FRAMES} that were made from noise alone")
