"""The transformer's structure: names of the official files, precision, the seams that other rooms use."""

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from wanlora.foundation.shapes import LatentShape
from wanlora.models.wan.layers import PatchEmbedding, RMSNorm, pad_texts, sinusoid, unpatchify
from wanlora.models.wan.rope import RopeTables, apply_rope, axis_widths, rope_table
from wanlora.models.wan.spec import TASKS, WanSizes
from wanlora.models.wan.transformer import WanTransformer

GOLDEN = Path(__file__).parents[2] / "golden" / "wan-key-shapes.json"
SIZES = WanSizes(dim=96, ffn_dim=160, num_layers=3, freq_dim=64, text_dim=48, head_dim=32, text_len=24)
CPU = torch.device("cpu")


def random_model(
    compute_dtype: torch.dtype = torch.float32, residual_dtype: torch.dtype = torch.float32, sizes: WanSizes = SIZES
) -> WanTransformer:
    model = WanTransformer(sizes, compute_dtype=compute_dtype, residual_dtype=residual_dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.requires_grad_(False)


def inputs(batch: int = 1, latent: tuple[int, int, int] = (2, 4, 6)) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 16, *latent, generator=generator)
    text = [torch.randn(5 + row, 48, generator=generator) for row in range(batch)]
    return x, torch.linspace(900, 100, batch), text


def shapes_of(sizes: WanSizes) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in WanTransformer(sizes).state_dict().items()}


def test_names_and_shapes_are_the_official_ones_of_the_1_3b_model() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["dit21_t2v_1.3B"]
    shapes = shapes_of(TASKS["t2v-1.3B"].sizes)
    assert shapes == {name: tuple(shape) for name, shape in golden.items()}
    assert sum(map(prod, shapes.values())) == 1_418_996_800


@pytest.mark.parametrize("task", ["t2v-14B", "t2i-14B"])
def test_the_14b_model_has_the_released_number_of_tensors_and_parameters(task: str) -> None:
    shapes = shapes_of(TASKS[task].sizes)
    assert len(shapes) == 1095
    assert sum(map(prod, shapes.values())) == 14_288_491_584


def test_sizes_are_read_off_the_shapes() -> None:
    for spec in TASKS.values():
        assert WanSizes.from_shapes(shapes_of(spec.sizes)) == spec.sizes


def test_rope_splits_a_head_of_128_into_44_42_42_and_turns_pairs() -> None:
    assert axis_widths(128) == (44, 42, 42)
    assert axis_widths(32) == (12, 10, 10)
    latent = LatentShape(frames=3, height=4, width=6)
    table = rope_table(latent, 128, CPU)
    assert table.shape == (2, latent.num_tokens, 64)
    positions = {"time": (2, 0, 1), "height": (1, 22, 1), "width": (2, 43, 1)}  # position, first pair, its frequency
    token = 2 * 6 + 1 * 3 + 2
    for position, pair, frequency in positions.values():
        assert table[0, token, pair] == pytest.approx(torch.cos(torch.tensor(float(position * frequency))).item())
    x = torch.randn(1, latent.num_tokens, 2, 128, generator=torch.Generator().manual_seed(0))
    as_complex = torch.view_as_complex(rearrange(x.double(), "b l n (k two) -> b l n k two", two=2).contiguous())
    angle = rearrange(torch.complex(table[0].double(), table[1].double()), "l k -> l 1 k")
    expected = rearrange(torch.view_as_real(as_complex * angle), "b l n k two -> b l n (k two)")
    torch.testing.assert_close(apply_rope(x, table).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_the_formula_of_compiled_blocks_turns_as_complex_numbers_do_and_so_does_its_gradient() -> None:
    table = rope_table(LatentShape(frames=3, height=4, width=6), 32, CPU)
    x = torch.randn(2, table.shape[1], 3, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    compiled = torch.compile(apply_rope, backend="aot_eager", fullgraph=True)
    turned, expected = compiled(x, table), apply_rope(x, table)
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-6)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found, exact = (torch.autograd.grad(out, x, weights)[0] for out in (turned, expected))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)


def test_rope_tables_are_kept_for_the_latest_sizes_only() -> None:
    tables = RopeTables(32, limit=2)
    sizes = [LatentShape(frames, 4, 4) for frames in (1, 2, 3)]
    first = tables.get(sizes[0], CPU)
    assert tables.get(sizes[0], CPU) is first
    tables.get(sizes[1], CPU)
    tables.get(sizes[0], CPU)
    tables.get(sizes[2], CPU)
    assert tables.get(sizes[0], CPU) is first
    assert len(tables._tables) == 2


def test_the_sinusoid_is_exact_at_large_timesteps() -> None:
    angle = 999.7 * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.cat((angle.cos(), angle.sin())).float()
    found = sinusoid(torch.tensor([999.7], dtype=torch.float64), 256)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_patch_embedding_is_the_convolution_and_unpatchify_has_channels_fastest() -> None:
    layer = PatchEmbedding(16, 24, torch.float32)
    x = torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = rearrange(nn.Conv3d.forward(layer, x), "b d f h w -> b (f h w) d")
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
    tokens = torch.arange(2 * 1 * 8, dtype=torch.float32).reshape(1, 2, 8)  # two tokens, two channels
    latents = unpatchify(tokens, LatentShape(frames=1, height=2, width=4))
    assert latents[0, :, 0].tolist() == [[[0, 2, 8, 10], [4, 6, 12, 14]], [[1, 3, 9, 11], [5, 7, 13, 15]]]


def test_texts_are_padded_with_zeros_and_longer_ones_are_refused() -> None:
    padded = pad_texts([torch.ones(2, 3), torch.ones(4, 3)], 4, CPU, torch.bfloat16)
    assert padded.dtype == torch.bfloat16
    assert padded.sum(dim=(1, 2)).tolist() == [6, 12]
    assert padded[0, 2:].abs().max() == 0
    with pytest.raises(ValueError, match="5 rows"):
        pad_texts([torch.ones(5, 3)], 4, CPU, torch.float32)


def test_a_text_equals_itself_with_its_padding_written_out() -> None:
    model = random_model()
    x, timestep, text = inputs()
    written = torch.cat([text[0], torch.zeros(SIZES.text_len - len(text[0]), 48)])
    assert torch.equal(model(x, timestep, text), model(x, timestep, [written]))


@pytest.mark.parametrize(
    ("lengths", "rows"), [((5, 30), 32), ((31,), 64), ((120,), 128), ((480, 5), 512), ((512,), 512)]
)
def test_padding_beyond_two_rows_is_not_computed_and_counts_all_the_same(lengths: tuple[int, ...], rows: int) -> None:
    model = random_model(sizes=replace(SIZES, text_len=512)).requires_grad_()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(len(lengths), 16, 1, 4, 4, generator=generator)
    timestep = torch.full((len(lengths),), 300.0)
    text = [torch.randn(length, 48, generator=generator) for length in lengths]
    written = [torch.cat([one, torch.zeros(512 - len(one), 48)]) for one in text]
    assert (model.embed_text(text, CPU).shape[1], model.embed_text(written, CPU).shape[1]) == (rows, 512)
    results = []
    for given in (text, written):
        out = model(x, timestep, given)
        results.append((out, *torch.autograd.grad(out.square().mean(), list(model.parameters()))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_rms_norm_rounds_before_the_weight_as_the_official_code_does() -> None:
    norm = RMSNorm(64, 1e-6)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = x.float()
    expected = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16() * norm.weight
    assert norm(x).dtype == torch.float32
    torch.testing.assert_close(norm(x), expected, rtol=8e-3, atol=0)


def test_parameters_are_declared_in_the_dtype_they_compute_in() -> None:
    model = random_model(compute_dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        island = name.startswith(("time_", "head.")) or "norm" in name or name.endswith("modulation")
        assert parameter.dtype == (torch.float32 if island else torch.bfloat16), name


def test_islands_compute_in_float32_even_with_16_bit_weights() -> None:
    model = random_model(compute_dtype=torch.bfloat16)
    rounded = random_model(compute_dtype=torch.bfloat16).to(torch.bfloat16)
    widened = random_model(compute_dtype=torch.bfloat16)
    widened.load_state_dict(rounded.state_dict())
    assert torch.equal(rounded(*inputs()), widened(*inputs()))
    assert model(*inputs()).dtype == torch.float32


def test_the_residual_stream_has_the_dtype_asked_for_and_linears_see_the_compute_dtype() -> None:
    for residual in (torch.float32, torch.bfloat16):
        model = random_model(compute_dtype=torch.bfloat16, residual_dtype=residual)
        seen: set[torch.dtype] = set()
        streams: set[torch.dtype] = set()
        for block in model.blocks:
            block.register_forward_hook(lambda _module, _args, out, streams=streams: streams.add(out.dtype))
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_pre_hook(lambda _module, args, seen=seen: seen.add(args[0].dtype))
        model(*inputs())
        assert streams == {residual}
        assert seen == {torch.bfloat16}


def test_every_block_is_called_through_run_block() -> None:
    model = random_model()
    expected = model(*inputs())
    called: list[nn.Module] = []

    def recording(block: nn.Module, *args: Tensor) -> Tensor:
        called.append(block)
        out: Tensor = block(*args)
        return out

    model.run_block = recording
    assert torch.equal(model(*inputs()), expected)
    assert called == list(model.blocks)


def test_recomputed_blocks_give_the_same_gradient() -> None:
    model = random_model()
    x, timestep, text = inputs()

    def gradient(run: Callable[..., Tensor] | None) -> Tensor:
        if run is not None:
            model.run_block = run
        leaf = x.clone().requires_grad_()
        model(leaf, timestep, text).square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    def recompute(block: nn.Module, *args: Tensor) -> Tensor:
        out: Tensor = torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)
        return out

    assert torch.equal(gradient(None), gradient(recompute))


def test_setting_the_kernel_reaches_every_attention() -> None:
    model = random_model()
    model.attention = "reference"
    assert model.attention == "reference"
    assert {block.self_attn.kernel for block in model.blocks} == {"reference"}  # type: ignore[union-attr]
    assert {block.cross_attn.kernel for block in model.blocks} == {"reference"}  # type: ignore[union-attr]
    reference = model(*inputs())
    model.attention = "sdpa"
    torch.testing.assert_close(model(*inputs()), reference, rtol=0, atol=1e-5)


@pytest.fixture
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
def test_blocks_compile_to_one_whole_graph_for_all_blocks_and_any_number_of_tokens() -> None:
    model = random_model(compute_dtype=torch.bfloat16)
    sizes = [(2, 4, 6), (3, 4, 6), (1, 6, 6), (5, 4, 4)]
    plain = [model(*inputs(latent=size)) for size in sizes]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = {block: torch.compile(block, backend=counter, fullgraph=True) for block in model.blocks}
    model.run_block = lambda block, *args: compiled[block](*args)
    counts = []
    for size, expected in zip(sizes, plain, strict=True):
        torch.testing.assert_close(model(*inputs(latent=size)), expected, rtol=0, atol=2e-2)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2]  # one size, then any size
