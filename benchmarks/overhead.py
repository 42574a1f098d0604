"""Compare what calls cost in two installations of zeroblock: `python benchmarks/overhead.py --against PYTHON`.

PYTHON is an interpreter that imports the other zeroblock, such as the one of a virtual environment in another checkout.
Both time the same calls on tiny tensors, where arithmetic hardly counts, in processes that take turns: a slow spell of
the machine hits both. Printed is how many times as long a call takes here, with its 95 % interval. Without --against
the table has this installation alone. Against eager and torch.compile: `run.py --group overhead`.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import zeroblock as zb

SAMPLE_SECONDS = 1e-3  # calls are repeated inside one sample for so long, which makes the clock's resolution small
SLOWER = 1.02  # named is a call whose interval lies above this: it takes more than 2 % longer


def _training(function: Callable[..., object], inputs: tuple[Tensor | None, ...], wrt: list[Tensor]) -> Callable:
    """The forward and the gradients of `wrt`."""
    with torch.enable_grad():
        result = function(*inputs)
    outputs = result if isinstance(result, tuple) else (result,)
    grads = [torch.ones_like(y) for y in outputs]

    def step() -> None:
        with torch.enable_grad():
            result = function(*inputs)
            torch.autograd.grad(result, wrt, grads)

    return step


def ops() -> dict[str, tuple[Callable[..., object], tuple[Tensor | None, ...]]]:
    """{op: (function, inputs)}. Only public names, so that any two versions can be compared."""
    x, weight, bias = torch.randn(1, 32, 4, 4), torch.randn(32), torch.randn(32)
    conv, linear = torch.randn(32, 32, 3, 3), torch.randn(64, 64)
    tokens, branch, vector = torch.randn(1, 4, 64), torch.randn(1, 4, 64), torch.randn(64)
    shift, scale, gate = torch.randn(1, 192).chunk(3, dim=1)
    return {
        "group_norm_silu": (lambda x, w, b: zb.group_norm_silu(x, 32, w, b), (x, weight, bias)),
        "group_norm_silu_conv_residual": (
            lambda x, nw, nb, w, b, r: zb.group_norm_silu_conv_residual(x, 32, nw, nb, w, b, r),
            (x, weight, bias, conv, bias.clone(), x.clone()),
        ),
        "conv_residual": (zb.conv_residual, (x, conv, bias, x.clone())),
        "conv_residual, zero": (zb.conv_residual, (x, torch.zeros_like(conv), torch.zeros(32), x.clone())),
        "layer_norm_modulate": (zb.layer_norm_modulate, (tokens, shift, scale)),
        "rms_norm_modulate": (zb.rms_norm_modulate, (tokens, shift, scale)),
        "gate_residual": (zb.gate_residual, (tokens, gate, branch)),
        "gate_residual_layer_norm_modulate": (
            zb.gate_residual_layer_norm_modulate,
            (tokens, gate, branch, shift, scale),
        ),
        "layer_norm_modulate_linear": (zb.layer_norm_modulate_linear, (tokens, shift, scale, linear, vector)),
        "linear_gate_residual": (zb.linear_gate_residual, (tokens, linear, vector, gate, branch)),
    }


def blocks() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """{block: (module, inputs)}, while its branches are zero and when they are not."""
    found: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {}
    for state in ("zero", "dense"):
        resblock = zb.nn.ResBlock(32, 64, 0.0, use_scale_shift_norm=True)
        dit_block = zb.nn.DiTBlock(64, 1)
        found[f"ResBlock, {state}"] = resblock, (torch.randn(1, 32, 4, 4), torch.randn(1, 64))
        found[f"DiTBlock, {state}"] = dit_block, (torch.randn(1, 4, 64), torch.randn(1, 64))
        if state == "dense":
            for tail in (resblock.out_layers[-1], dit_block.adaLN_modulation[-1]):
                for parameter in tail.parameters():
                    nn.init.normal_(parameter, std=0.02)
    return found


def frozen() -> dict[str, tuple[nn.Module, Tensor]]:
    """{layer: (module, input)} after `zb.freeze`."""
    layers = {
        "Linear, frozen": (nn.Linear(64, 64), torch.randn(4, 64)),
        "Conv2d, frozen": (nn.Conv2d(32, 32, 3, padding=1), torch.randn(1, 32, 4, 4)),
    }
    for layer, _ in layers.values():
        zb.freeze(layer.eval())
    return layers


def calls() -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    found: dict[str, Callable[[], object]] = {}
    for name, (function, tensors) in {**ops(), **blocks()}.items():
        parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
        leaves = tuple(t.detach().requires_grad_() for t in tensors)
        found[f"{name}, inference"] = lambda function=function, tensors=tensors: function(*tensors)
        found[f"{name}, training"] = _training(function, leaves, [*leaves, *parameters])
    for name, (layer, x) in frozen().items():
        found[f"{name}, inference"] = lambda layer=layer, x=x: layer(x)
    return found


def measure(seconds: float) -> dict[str, float]:
    """The least microseconds of every call, each measured for so long."""
    found = {}
    with torch.no_grad():
        everything = calls()
        names = list(everything)
        random.shuffle(names)
        for name in names:
            call = everything[name]
            for _ in range(3):  # warm
                call()
            start = time.perf_counter()
            call()
            repeats = max(1, int(SAMPLE_SECONDS / (time.perf_counter() - start)))
            samples: list[float] = []
            end = time.perf_counter() + seconds
            while not samples or time.perf_counter() < end:
                start = time.perf_counter()
                for _ in range(repeats):
                    call()
                samples.append((time.perf_counter() - start) / repeats * 1e6)
            found[name] = min(samples)
    return {name: found[name] for name in everything}


def in_process(python: str, options: argparse.Namespace) -> dict[str, float]:
    """`measure` by this interpreter, in a process of its own."""
    command = [python, __file__, "--once", "--seconds", str(options.seconds), "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{python}: {done.stderr.strip() or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> None:
    from zeroblock.testing.timing import paired_ratio  # not in the child: the other zeroblock may be without it

    before: list[dict[str, float]] = []
    after: list[dict[str, float]] = []
    turns = [(options.against, before), (sys.executable, after)]
    for i in range(options.rounds):
        for python, times in turns if i % 2 else reversed(turns):
            times.append(in_process(python, options))
        print(f"\rround {i + 1} of {options.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"{'us per call':<46}{'there':>9}{'here':>9}   here / there (95 %)")
    slower = []
    for name in after[0]:
        there, here = [row[name] for row in before], [row[name] for row in after]
        ratio = paired_ratio(here, there)
        if ratio.lo > SLOWER:
            slower.append(name)
        interval = f"{ratio.median:.3f} [{ratio.lo:.3f}, {ratio.hi:.3f}]"
        print(f"{name:<46}{min(there):>9.2f}{min(here):>9.2f}   {interval}{'  SLOWER' if ratio.lo > SLOWER else ''}")
    print(f"more than {SLOWER - 1:.0%} slower: {', '.join(slower) or 'none'}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="PYTHON", help="an interpreter that imports another zeroblock")
    parser.add_argument("--rounds", type=int, default=10, help="processes of each (default 10)")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each call in each process (default 0.1)")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--once", action="store_true", help="one process alone; prints its microseconds as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    if options.once:
        print(json.dumps(measure(options.seconds)))
    elif options.against:
        compare(options)
    else:
        for name, us in measure(options.seconds).items():
            print(f"{name:<46}{us:>9.2f} us")
