"""wan_cache_latents.py: encodes pictures and clips with the Wan VAE."""

import sys
from collections.abc import Sequence

from wanlora.caching.latents import cache_latents
from wanlora.cli.entry import run_command
from wanlora.config.flags import parse_latent_cache


def command(argv: Sequence[str]) -> int:
    """Cache latents as the arguments say."""
    cache_latents(parse_latent_cache(argv))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The script."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
