"""The Triton kernel of `vae_kernels`; importing it needs Triton."""

import triton
import triton.language as tl


@triton.jit
def activate(  # type: ignore[no-untyped-def]
    x,
    gamma,
    out,
    rows_per_clip,
    out_clip_stride,
    gain,
    num_channels: tl.constexpr,
    padded: tl.constexpr,
    num_rows: tl.constexpr,
):
    """Each program: `num_rows` positions of one clip with all their channels."""
    clip = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * num_rows + tl.arange(0, num_rows)
    channel = tl.arange(0, padded)
    place = row[:, None] * num_channels + channel[None, :]
    inside = (row < rows_per_clip)[:, None] & (channel < num_channels)[None, :]
    value = tl.load(x + clip * rows_per_clip * num_channels + place, mask=inside, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)
    weight = tl.load(gamma + channel, mask=channel < num_channels, other=0.0).to(tl.float32) * gain
    normed = value / length[:, None] * weight[None, :]
    activated = normed * tl.sigmoid(normed)
    tl.store(out + clip * out_clip_stride + place, activated.to(out.dtype.element_ty), mask=inside)
