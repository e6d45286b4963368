"""Pictures and clips: finding, measuring, decoding, caching, ordering and loading them."""
