"""How accelerate() takes over a block: the contract between the core and the families.

A family is one kind of block in other people's models. It is a subclass of `Family`, registered by `@register`, in a
file of its own in `families/`; it never imports the package whose blocks it knows. What it says:

    name       its key in reports and in `python -m zeroblock info NAME`; also the name of its counter
    classes    the names of the classes it may know (of the block's class or one of its bases)
    method     the method that accelerate replaces, "forward" unless the class has an inner one ("_forward"; `entry`,
               where it is one or the other)
    inner      whether it leaves blocks alone that belong to an outer block (see below)
    only_skips  whether its forward is the original unless it skips: the original runs what is not zero, and under
               torch.compile, where no branch is skipped as a whole, everything
    eager_rounding  whether its forward computes with PyTorch's operators, one after another, where it is asked to
               (plan/mode.py): only then accelerate(rounding="eager") takes it, and proves that too
    remakes    whether, with prefer="memory", a training step makes again what norms and activations return instead of
               keeping it (ops/remade.py)
    docstring  what the user reads: the formula, the source, then what is skipped while zero in inference, in training
               forward and in training backward (three lines of use)

and four methods, `block` being the foreign module:

    match(block, path, root)     None when the block has this family's structure, else why it has not
    forward(block, *a, **kw)     the method's replacement, built of zeroblock.functional and the forwards in
                                 zeroblock.blocks, obeying self.zero_skip. It looks at the block anew at each call:
                                 layers that are replaced, hooked, parametrised or quantised by then, and arguments
                                 it does not know, go to `return self.eager(block, *a, **kw)`, the original
    branches(block)              {name of a residual branch: the tensors that hold it at zero together}
    example(block, side)         positional arguments of the method, small CPU tensors in float32 with two samples, for
                                 images of side x side pixels or side ** 2 tokens
    options(block)               {name: values} to try: what else the family's forward takes (the method's optional
                                 arguments), beside example(block, SMALL)

Nobody can tell by its name whether a block computes what its namesake does, so `accelerate` proves it: a copy of the
block with random parameters runs both forwards, and their results and the gradients of their inputs must agree
(`proof.py`). A family that needs no proof, because it calls the original and only skips, returns None from `example`.
The proof makes subclasses and modified forwards safe: they fit or are left alone. At a call, what the proof has not
seen goes to the original: an argument that is neither in `example` nor in `options`, or about which the block's own
forward does not agree with the family's, unless it has its default value. So does a call for which the original is
faster (`choice.py`).

Nested blocks are all visited, outer first. `inner` families (single zero layers, attention of any block) leave those in
`inner_modules(block)` (default: all submodules) to the block, which may need to find them unchanged.

An accelerated block changes nothing but its class: to a subclass of its own class, created once for each family and
set of options, which holds the replaced method. Its attributes, parameters, hooks and `isinstance` relations stay;
pickle and torch.save write the original class; copy and deepcopy stay accelerated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .report import Obstacle, Reason

FAMILIES: dict[str, type[Family]] = {}

# In `Family.branches`: nothing holds the branch at zero.
NEVER_ZERO = torch.ones(1)

# The side of an example of few pixels or tokens.
SMALL = 2


class Family:
    """One kind of block (see above). An instance holds the options of one call of accelerate."""

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    method: ClassVar[str] = "forward"
    inner: ClassVar[bool] = False
    only_skips: ClassVar[bool] = False
    eager_rounding: ClassVar[bool] = False
    remakes: ClassVar[bool] = False

    def __init__(
        self,
        zero_skip: str = "auto",
        backend: str = "auto",
        precision: str = "strict",
        prefer: str = "",
        rounding: str = "once",
    ):
        self.zero_skip, self.backend, self.precision, self.prefer = zero_skip, backend, precision, prefer
        self.rounding = rounding

    def options_key(self) -> tuple[str, ...]:
        return self.zero_skip, self.backend, self.precision, self.prefer, self.rounding

    def knows(self, block: nn.Module) -> bool:
        """Whether the block could be one of this family's, by the names of its class and bases."""
        return any(c.__name__ in self.classes for c in type(block).__mro__)

    def match(self, block: nn.Module, path: str, root: nn.Module) -> Obstacle | None:
        raise NotImplementedError

    def forward(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        raise NotImplementedError

    def example(self, block: Any, side: int) -> tuple | None:
        raise NotImplementedError

    def options(self, block: Any) -> dict[str, tuple]:
        return {}

    def entry(self, kind: type[nn.Module]) -> str:
        """The name of the method that is replaced in blocks of this class."""
        return self.method

    def proof_target(self, block: nn.Module) -> nn.Module:
        """What the proof copies: the block, or less of it where the rest proves nothing."""
        return block

    def forget(self, block: nn.Module) -> None:
        """Takes from a copy of the block what it keeps from call to call, before each run of the proof."""

    def inner_modules(self, block: nn.Module) -> Iterable[nn.Module]:
        return block.modules()

    def on_class_created(self, kind: type[nn.Module]) -> None:
        """Called once for every subclass that `accelerated_class` creates for this family."""

    def eager(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        """The method the block had before accelerate."""
        return type(block)._zeroblock.method(block, *args, **kwargs)


def register(family: type[Family]) -> type[Family]:
    """Decorator: accelerate knows this family. TypeError when its name is taken, or it lacks a docstring."""
    has_docstring = family.__doc__ or sys.flags.optimize >= 2  # which strips them
    if not has_docstring or family.name in FAMILIES:
        raise TypeError(f"register: {family.__name__} needs a docstring and a name of its own")
    FAMILIES[family.name] = family
    return family


def lacks(block: nn.Module, *paths: str) -> Obstacle | None:
    """Why a block does not have a family's structure: the first of these attributes ("a.0.b") it lacks."""
    for path in paths:
        found: Any = block
        for name in path.split("."):
            found = found[int(name)] if name.isdigit() and _has_item(found, int(name)) else getattr(found, name, None)
            if found is None:
                return Obstacle(Reason.NAMESAKE, f"it has no {path}")
    return None


def _has_item(m: Any, i: int) -> bool:
    return isinstance(m, (nn.Sequential, nn.ModuleList)) and i < len(m)
