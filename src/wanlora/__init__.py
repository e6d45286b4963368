"""wanlora trains LoRAs for the Wan 2.1 and 2.2 video models on hardware people own."""

import time

__version__ = "0.1.0"
STARTED = time.perf_counter()
"""When the package was imported, which a script does before anything that takes time."""
