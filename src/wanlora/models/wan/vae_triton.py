"""The Triton kernel of `vae_kernels`; importing it needs Triton."""

import triton
import triton.language as tl


@triton.jit
def activate(  # type: ignore[no-untyped-def]
    x,
    gamma,
    out,
    all_rows,
    rows_per_clip,
    out_clip_stride,
    gain,
    num_channels: tl.constexpr,
    padded: tl.constexpr,
    num_rows: tl.constexpr,
):
    """Each program: `num_rows` positions with all their channels."""
    row = tl.program_id(0).to(tl.int64) * num_rows + tl.arange(0, num_rows)
    channel = tl.arange(0, padded)
    inside = (row < all_rows)[:, None] & (channel < num_channels)[None, :]
    value = tl.load(x + row[:, None] * num_channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)
    weight = tl.load(gamma + channel, mask=channel < num_channels, other=0.0).to(tl.float32) * gain
    normed = value / length[:, None] * weight[None, :]
    activated = normed * tl.sigmoid(normed)
    clip = row // rows_per_clip
    start = clip * out_clip_stride + (row - clip * rows_per_clip) * num_channels
    tl.store(out + start[:, None] + channel[None, :], activated.to(out.dtype.element_ty), mask=inside)
