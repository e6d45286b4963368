"""The networks: transformer, VAE and text encoder of Wan, and the attention kernels that they share."""
