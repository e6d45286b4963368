import sys

from wanlora.cli.cache_latents import main

if __name__ == "__main__":
    sys.exit(main())
