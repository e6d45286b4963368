import sys

from wanlora.cli.entry import run_script

if __name__ == "__main__":
    sys.exit(run_script("wanlora.cli.train_network", uses_card=True))
