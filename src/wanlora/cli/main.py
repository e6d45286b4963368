"""The console command `wanlora`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import wanlora
from wanlora.cli.entry import run_command
from wanlora.cli.plan import command as plan_command
from wanlora.cli.train_network import choices
from wanlora.config.options_doc import options_markdown
from wanlora.quickstart.run import quickstart


def command(argv: Sequence[str]) -> int:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(prog="wanlora", description=wanlora.__doc__)
    parser.add_argument("--version", action="version", version=f"wanlora {wanlora.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    quick = commands.add_parser("quickstart", help="train a LoRA on a tiny Wan and made-up clips, on any machine")
    quick.add_argument("--out", type=Path, default=Path("quickstart"), help="folder to write to (default: quickstart)")
    quick.add_argument("--seed", type=int, default=2025, help="of everything random in the training (default: 2025)")
    quick.add_argument("--debug", action="store_true", help="show tracebacks")
    commands.add_parser("options", help="print every flag and dataset key as Markdown (docs/options.md)")
    plan = "say what a training run will need, on this card or a named one; takes the trainer's flags"
    commands.add_parser("plan", help=plan, add_help=False)
    if argv[:1] == ["plan"]:
        return plan_command(argv[1:])
    arguments = parser.parse_args(argv)
    if arguments.command == "quickstart":
        return quickstart(arguments.out, arguments.seed)
    sys.stdout.write(options_markdown(choices()))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The console command."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
