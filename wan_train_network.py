import sys

from wanlora.cli.train_network import main

if __name__ == "__main__":
    sys.exit(main())
