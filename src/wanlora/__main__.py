"""`python -m wanlora` is the console command `wanlora`."""

import sys

from wanlora.cli.main import main

sys.exit(main())
