"""Low-rank adapters: the layer, where it goes, the files it lives in."""
