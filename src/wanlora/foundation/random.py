"""Randomness as a pure function of (seed, stream name, position).

The usual way keeps generators and saves their states. Here nothing is kept: whoever needs random numbers for sample 17
of epoch 3 asks for exactly those. A resumed run therefore draws what an unbroken one would have drawn, in any process,
with any number of loader workers and on any number of devices, and one stream never shifts another.
"""

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Streams:
    """The named random streams of one run."""

    seed_value: int

    def seed(self, stream: str, *position: int) -> int:
        """A 63-bit seed for `position` of `stream`."""
        text = ":".join([str(self.seed_value), stream, *map(str, position)])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def generator(self, stream: str, *position: int) -> torch.Generator:
        """A CPU generator seeded for `position` of `stream`."""
        return torch.Generator().manual_seed(self.seed(stream, *position))
