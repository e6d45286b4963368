import sys

from wanlora.cli.cache_text_encoder_outputs import main

if __name__ == "__main__":
    sys.exit(main())
