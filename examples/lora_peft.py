"""Fine-tunes a transformer of diffusers with LoRA (peft): a fresh adapter is zero, and costs no matmul.

An adapter's second matrix B starts at exactly zero. Until the first optimizer step the accelerated model skips both of
its matmuls; the counters show it, then training makes B dense and they run. At the end the adapter is merged.
"""

import diffusers
import peft
import torch
import torch.nn.functional as F
from _example import Progress, options, pictures, seconds

import zeroblock as zb
from zeroblock.testing import counters, reset_counters

args = options(__doc__, steps=(40, "optimizer steps"), rank=(16, "of the adapter"))
steps, layers = (2, 1) if args.quick else (args.steps, 4)

torch.manual_seed(0)
model = diffusers.DiTTransformer2DModel(
    num_layers=layers, num_attention_heads=4, attention_head_dim=16, in_channels=4, sample_size=16, patch_size=2
)
with torch.no_grad():  # diffusers draws the weights; a trained model's output layer is not zero
    model.proj_out_2.weight.normal_(std=0.02)
config = peft.LoraConfig(r=args.rank, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"])
model = peft.get_peft_model(model, config)
model.print_trainable_parameters()

images = pictures(64, 16, channels=4)
timesteps, labels = torch.randint(0, 1000, (8,)), torch.randint(0, 1000, (8,))


def predict(clean):
    return model(clean, timestep=timesteps, class_labels=labels).sample[:, :4]


model.eval()
with torch.no_grad():
    expected = predict(images[:8])
    before = seconds(lambda: predict(images[:8]), 3)
    print(zb.accelerate(model))
    reset_counters()
    assert torch.allclose(predict(images[:8]), expected, atol=1e-4)
    fresh = counters()
    after = seconds(lambda: predict(images[:8]), 3)
print(f"\nwith a fresh adapter, (executed, skipped): {fresh.get('lora', fresh)}")
print(f"forward: {before * 1e3:.1f} ms, accelerated {after * 1e3:.1f} ms")

model.train()
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
progress = Progress(lines=4)
for number in range(1, steps + 1):
    clean = images[torch.randint(len(images), (8,))]
    noise = torch.randn_like(clean)
    loss = F.mse_loss(predict((clean + noise) / 2**0.5), noise)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    progress("train", number, steps, f"loss {loss.item():.4f}")
progress.close()

model.eval()
with torch.no_grad():
    reset_counters()
    adapted = predict(images[:8])
    print(f"trained, (executed, skipped): {counters().get('lora', counters())}")
    merged = model.merge_and_unload()
    result = merged(images[:8], timestep=timesteps, class_labels=labels).sample[:, :4]
assert torch.allclose(result, adapted, atol=1e-4)
print("merged: the same output without adapters")
