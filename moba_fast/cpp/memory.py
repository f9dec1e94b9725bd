"""Make tensors in memory that comes fast, and use it again."""

import math

import torch

from moba_fast.cpp.build import call


def empty(*shape):
    """Return a float32 tensor with anything in it, on large pages where there are any.

    Their first touch is three times as fast, and the processor's table of addresses
    (TLB) has room for all of them.
    """
    x = torch.empty(shape, dtype=torch.float32, device="cpu")
    call("use_large_pages", x, x.nbytes)
    return x


class Scratch:
    """Hand out float32 tensors; a name gets the same memory whenever that is enough.

    Example:
        >>> scratch = Scratch()
        >>> scratch.take("keys", 2, 3).shape
        torch.Size([2, 3])
    """

    def __init__(self):
        self.held = {}

    def take(self, name, *shape):
        """Return a tensor of a shape with anything in it.

        It holds until the name is taken again.
        """
        size = math.prod(shape)
        if name not in self.held or len(self.held[name]) < size:
            self.held[name] = empty(size)
        return self.held[name][:size].view(shape)
