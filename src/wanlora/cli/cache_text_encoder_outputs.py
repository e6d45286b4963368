"""wan_cache_text_encoder_outputs.py: encodes captions with UMT5."""

import sys
from collections.abc import Sequence

from wanlora.caching.text import cache_text
from wanlora.cli.entry import run_command
from wanlora.config.flags import parse_text_cache


def command(argv: Sequence[str]) -> int:
    """Cache text as the arguments say."""
    cache_text(parse_text_cache(argv))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The script."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
