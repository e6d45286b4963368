"""wanlora trains LoRAs for the Wan 2.1 and 2.2 video models on hardware people own."""

__version__ = "0.1.0"
