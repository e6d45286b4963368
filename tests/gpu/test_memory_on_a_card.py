"""What only a card can show: copies that run beside the computation, page-locked memory, compiled kernels."""

import gc
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from wanlora.lora.layers import LoRALinear
from wanlora.memory.checkpointing import Kept, Recompute
from wanlora.memory.compile import compile_blocks, missing_compiler, missing_cpp_compiler
from wanlora.memory.keeping import Keeping
from wanlora.memory.limit import limit_card
from wanlora.memory.measure import GIB, CudaMeter, is_out_of_memory, memory_figures
from wanlora.memory.pinned import is_page_locked, pinned_buffer, unpin
from wanlora.memory.streaming import BlockStream
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer
from wanlora.quantization.blockwise import dequantize, quantize_blockwise, relative_error
from wanlora.quantization.linear import Fp8Linear

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda", 0)
WIDTH = 1024
NUM_BLOCKS = 8
BLOCK_BYTES = 4 * WIDTH * WIDTH
"""About what one block's fp8 weights take."""


@pytest.fixture(autouse=True)
def _clean_card() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


class FeedForward(nn.Module):
    """A residual block of two fp8 linears, one of them adapted: matmuls only, so that every run gives the same bits."""

    def __init__(self) -> None:
        super().__init__()
        base = Fp8Linear.quantized(nn.Linear(WIDTH, 2 * WIDTH, dtype=torch.bfloat16))
        self.up = LoRALinear(base, rank=8, scale=1.0, generator=torch.Generator().manual_seed(0))
        nn.init.normal_(self.up.lora_up.weight, std=0.02)
        self.down = Fp8Linear.quantized(nn.Linear(2 * WIDTH, WIDTH, dtype=torch.bfloat16))
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.up(self.norm(x).bfloat16()))
        return x + self.down(hidden)


class Tower(nn.Module):
    """Blocks called through `run_block`, as the transformer calls its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([FeedForward() for _ in range(NUM_BLOCKS)])
        self.run_block = Recompute(list(self.blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run_block(block, x)
        return x


def train(model: Tower, *, steps: int = 4, num_tokens: int = 512) -> tuple[list[float], list[Tensor]]:
    """Losses of several steps and the last gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for step in range(steps):
        x = torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(step)).to(CARD)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = [parameter.grad.clone() for parameter in trained if parameter.grad is not None]
    assert len(gradients) == len(trained)
    return [loss.item() for loss in losses], gradients


def assert_same(ours: tuple[list[float], list[Tensor]], theirs: tuple[list[float], list[Tensor]]) -> None:
    assert ours[0] == theirs[0]
    assert all(map(torch.equal, ours[1], theirs[1]))


@pytest.mark.parametrize(
    ("num_streamed", "ring_size", "pin"), [(3, 2, True), (8, 2, True), (8, 3, True), (8, 2, False)]
)
def test_streaming_changes_no_bit(num_streamed: int, ring_size: int, pin: bool) -> None:
    expected = train(Tower().to(CARD))
    model = Tower()
    stream = BlockStream(list(model.blocks), num_streamed, CARD, ring_size, pin)
    stream.attach()
    assert stream.page_locked == pin
    assert_same(train(model), expected)
    assert stream.misses <= 1
    stream.detach()
    with torch.no_grad():
        assert torch.equal(model(torch.ones(4, WIDTH, device=CARD)), model(torch.ones(4, WIDTH, device=CARD)))
    assert {parameter.device for parameter in model.parameters()} == {CARD}


@pytest.mark.parametrize(("num_tokens", "passing"), [(4, 0), (512, 0), (4, 5), (512, 5)])
def test_resizing_the_ring_while_steps_before_are_under_way_changes_no_bit(num_tokens: int, passing: int) -> None:
    """Freed buffers become activations at once, also in the middle of forward, and activations buffers."""
    rings = [2, NUM_BLOCKS, 5, 2, NUM_BLOCKS, 1, 3] * 5

    def steps(model: Tower, resize: Callable[[int], None]) -> list[Tensor]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        torch.manual_seed(1)
        inputs = [torch.randn(num_tokens, WIDTH, device=CARD) for _ in range(7)]
        losses = []
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)  # half a second of the card's time: the host gets far ahead
        for number, ring in enumerate(rings):
            resize(ring)
            optimizer.zero_grad()
            loss = model(inputs[number % 7]).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    expected = [loss.item() for loss in steps(Tower().to(CARD), lambda ring: None)]
    model = Tower()
    stream = BlockStream(list(model.blocks), NUM_BLOCKS, CARD)
    stream.attach()
    resize = partial(stream.resize, passing=passing * stream._slot_bytes)
    assert [loss.item() for loss in steps(model, resize)] == expected


def test_a_ring_that_shrinks_gives_its_memory_back() -> None:
    model = Tower()
    stream = BlockStream(list(model.blocks), NUM_BLOCKS, CARD)
    stream.attach()
    least = torch.cuda.memory_allocated(CARD)
    stream.resize(NUM_BLOCKS)
    grown = torch.cuda.memory_allocated(CARD) - least
    more = (NUM_BLOCKS - 2) * BLOCK_BYTES
    assert more < grown < 1.25 * more
    train(model, steps=2)
    copies = stream.copies
    train(model, steps=2)
    assert stream.copies == copies
    held = torch.cuda.memory_allocated(CARD)
    stream.resize(2)
    assert more < held - torch.cuda.memory_allocated(CARD) < 1.25 * more


def test_resizing_the_ring_does_not_wait_for_the_card() -> None:
    model = Tower()
    stream = BlockStream(list(model.blocks), NUM_BLOCKS, CARD)
    stream.attach()
    x = torch.randn(512, WIDTH, device=CARD)
    for ring in (NUM_BLOCKS, 2):  # so that the allocator has the memory
        stream.resize(ring)
        model(x).square().mean().backward()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    for ring in (NUM_BLOCKS, 2):
        stream.resize(ring)
        model(x).square().mean().backward()
    queued = torch.cuda.Event()
    queued.record()
    assert not queued.query()
    torch.cuda.synchronize()


def test_many_short_passes_in_a_row_never_read_a_block_that_is_still_on_its_way() -> None:
    """With few tokens computation is far faster than copies, so every order that events do not keep would show."""
    expected = train(Tower().to(CARD), steps=40, num_tokens=4)
    model = Tower()
    stream = BlockStream(list(model.blocks), NUM_BLOCKS, CARD)
    stream.attach()
    assert_same(train(model, steps=40, num_tokens=4), expected)
    assert stream.copies == 2 + 2 * (NUM_BLOCKS - 2) * 40  # the ring is empty only once
    x = torch.randn(4, WIDTH, device=CARD)
    with torch.no_grad():
        outputs = [model(x) for _ in range(10)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_the_card_holds_the_ring_and_not_the_streamed_blocks() -> None:
    before = torch.cuda.memory_allocated(CARD)
    model = Tower()
    stream = BlockStream(list(model.blocks), NUM_BLOCKS, CARD)
    stream.attach()
    held = torch.cuda.memory_allocated(CARD) - before
    assert 2 * BLOCK_BYTES < held < 3 * BLOCK_BYTES
    stream.detach(torch.device("cpu"))
    assert all(parameter.device.type == "cpu" for parameter in model.parameters() if not parameter.requires_grad)


def test_queueing_a_step_does_not_wait_for_the_card() -> None:
    model = Tower()
    stream = BlockStream(list(model.blocks), NUM_BLOCKS, CARD)
    stream.attach()
    train(model, steps=1)
    x = torch.randn(512, WIDTH, device=CARD)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # half a second of the card's time
    queued = torch.cuda.Event()
    model(x).square().mean().backward()
    queued.record()
    assert not queued.query()
    torch.cuda.synchronize()


def copy_rate(pin: bool) -> float:
    """GB/s of blocks of 256 MiB that take longer to arrive than to use."""
    model = nn.ModuleList([nn.Linear(8192, 16384, bias=False, dtype=torch.bfloat16) for _ in range(3)])
    stream = BlockStream(list(model.requires_grad_(False)), 3, CARD, ring_size=2, pin=pin)
    stream.attach()
    x = torch.randn(64, 8192, dtype=torch.bfloat16, device=CARD)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.no_grad():
        for block in model:
            block(x)
        torch.cuda.synchronize()
        start.record()
        for _ in range(3):
            for block in model:
                block(x)
        end.record()
        torch.cuda.synchronize()
    stream.detach(torch.device("cpu"))
    return 8 * 2**28 / (start.elapsed_time(end) / 1000) / 1e9  # the first of nine was there before


def test_page_locked_masters_arrive_several_times_faster() -> None:
    locked, pageable = copy_rate(pin=True), copy_rate(pin=False)
    assert locked > 2 * pageable, f"{locked:.1f} and {pageable:.1f} GB/s"


def test_inputs_kept_on_the_host_change_no_bit_and_free_the_card() -> None:
    expected = train(Tower().to(CARD), num_tokens=8192)
    torch.cuda.empty_cache()
    peaks = []
    for offload in (False, True):
        model = Tower().to(CARD)
        model.run_block = Recompute(list(model.blocks), offload=offload)
        meter = CudaMeter(CARD)
        meter.reset()
        assert_same(train(model, num_tokens=8192), expected)
        peaks.append(meter.peak() / GIB)
        del model
        gc.collect()
    input_gib = 8192 * WIDTH * 4 / 2**30
    assert peaks[1] < peaks[0] - (NUM_BLOCKS - 5) * input_gib


def test_a_meter_reads_the_allocator_and_remembers_the_highest_peak() -> None:
    meter = CudaMeter(CARD)
    meter.take_highest()
    before = meter.allocated()
    tensor = torch.empty(2**28, dtype=torch.uint8, device=CARD)
    del tensor
    meter.reset()
    assert meter.allocated() == before and meter.peak() == before
    assert meter.take_highest() >= before + 2**28
    assert meter.take_highest() < before + 2**28
    assert meter.retries() >= 0 and 0 < meter.free() < memory_figures(CARD).total * GIB


def passes(model: Tower, keeping: Keeping, *, count: int, num_tokens: int = 8192) -> list[tuple[int, int]]:
    """Kept blocks and peak of each of several guarded passes."""
    assert keeping.meter is not None
    seen = []
    for _ in range(count):
        x = torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(0)).to(CARD)
        with keeping.step(), keeping.batch("a size"):
            model(x).square().mean().backward()
            seen.append((keeping.kept.blocks, keeping.meter.peak()))
        model.zero_grad(set_to_none=True)
    return seen


def test_as_many_blocks_are_kept_as_stay_below_the_limit() -> None:
    model = Tower().to(CARD)
    meter = CudaMeter(CARD)

    def tried(limit: int) -> list[tuple[int, int]]:
        model.run_block.keep = keeping = Keeping(NUM_BLOCKS, NUM_BLOCKS, meter=meter, limit=limit)
        return passes(model, keeping, count=5)

    free = tried(2**40)
    assert [kept for kept, _ in free][-3:] == [NUM_BLOCKS] * 3
    recomputed, everything = free[0][1], free[-1][1]
    assert everything > recomputed
    limit = (recomputed + everything) // 2
    seen = tried(limit)
    assert seen[0][0] == 0 < seen[-1][0] < NUM_BLOCKS
    assert all(peak <= limit for _, peak in seen)
    each = (everything - recomputed) // NUM_BLOCKS
    assert limit - seen[-1][1] < 3 * each


def test_what_is_kept_changes_no_bit_on_the_card() -> None:
    expected = train(Tower().to(CARD))
    for count in (3, NUM_BLOCKS):
        model = Tower().to(CARD)
        model.run_block = Recompute(list(model.blocks), keep=lambda x, count=count: Kept(count))  # type: ignore[misc]
        assert_same(train(model), expected)


def test_the_allocator_is_held_below_the_limit_and_the_error_is_one_that_is_handled() -> None:
    limit = limit_card(CARD, reserve=0.5, at_most=2.0)
    assert limit is not None and limit.reserved == 2 * GIB
    try:
        kept = torch.empty(GIB, dtype=torch.uint8, device=CARD)
        with pytest.raises(torch.OutOfMemoryError) as error:
            torch.empty(2 * GIB, dtype=torch.uint8, device=CARD)
        assert is_out_of_memory(error.value)
        del kept, error
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CARD)
    if limit.expandable:
        assert any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())


def test_blocks_that_leave_the_card_between_steps_free_it_and_change_no_bit() -> None:
    resident, model = Tower().to(CARD), Tower()
    stream = BlockStream(list(model.blocks), 0, CARD)
    stream.attach()
    before = torch.cuda.memory_allocated(CARD)
    assert stream.stream_more(NUM_BLOCKS - 2) == NUM_BLOCKS - 2
    assert before - torch.cuda.memory_allocated(CARD) > (NUM_BLOCKS - 5) * BLOCK_BYTES
    assert_same(train(model), train(resident))
    assert stream.stream_more(NUM_BLOCKS) == 2
    assert_same(train(model), train(resident))  # both go on from where they stood
    stream.detach(torch.device("cpu"))


def test_fp8_is_the_same_on_the_card_and_on_the_host() -> None:
    weight = (torch.randn(1024, 2048) * 0.02).to(torch.bfloat16)
    here, there = quantize_blockwise(weight), quantize_blockwise(weight.to(CARD))
    assert torch.equal(there[1].cpu(), here[1])
    assert torch.equal(there[0].view(torch.uint8).cpu(), here[0].view(torch.uint8))
    assert torch.equal(dequantize(*there, torch.bfloat16).cpu(), dequantize(*here, torch.bfloat16))
    assert 0.02 < relative_error(weight.to(CARD), *there) < 0.03


def test_no_value_becomes_nan_however_large_on_this_version_of_torch() -> None:
    weight = torch.randn(256, 256, device=CARD) * 1e30
    fp8, scale = quantize_blockwise(weight)
    assert dequantize(fp8, scale, torch.float32).isfinite().all()


def test_page_locked_memory_takes_what_it_holds_and_is_seen_as_locked() -> None:
    buffer = pinned_buffer(3 * 2**20 + 5, device=CARD)
    assert is_page_locked(buffer) and buffer.is_pinned()
    buffer.fill_(7)
    assert torch.equal(buffer.to(CARD, non_blocking=True).cpu(), buffer)
    unpin(buffer)
    assert not is_page_locked(buffer) and not buffer.is_pinned()
    assert int(buffer[-1]) == 7


def test_memory_that_the_system_does_not_lock_serves_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    first = pinned_buffer(2**20, device=CARD)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: first)
    second = pinned_buffer(2**20, device=CARD)  # locking the same memory twice is refused
    monkeypatch.undo()
    assert torch.ones(3, device=CARD).sum().item() == 3
    second.fill_(2)
    assert second.to(CARD).float().mean().item() == 2
    unpin(first)


def test_running_out_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device=CARD)
    assert is_out_of_memory(caught.value)
    figures = memory_figures(CARD)
    assert figures.total > 1 and figures.slack >= 0


KEPT = (Kept(), Kept(4), Kept(2, attention=2), Kept(4, everything=True), Kept(0, attention=3))


@pytest.mark.parametrize(("num_streamed", "cpp"), [(0, False), (4, False), (4, True)])
def test_compiled_blocks_agree_with_plain_ones_streamed_or_not_whatever_they_keep(num_streamed: int, cpp: bool) -> None:
    assert missing_compiler(CARD) is None
    assert not cpp or missing_cpp_compiler(CARD) is None
    sizes = WanSizes(
        dim=256, ffn_dim=512, num_layers=4, in_channels=16, out_channels=16, text_dim=64, freq_dim=64, text_len=32
    )
    arguments = (torch.randn(1, 16, 3, 8, 12, device=CARD), torch.tensor([400.0], device=CARD), [torch.randn(9, 64)])

    def build() -> WanTransformer:
        torch.manual_seed(5)
        model = WanTransformer(sizes).requires_grad_(False)
        generator = torch.Generator().manual_seed(6)
        for name, linear in [*model.blocks.named_modules()]:
            if isinstance(linear, nn.Linear):
                layer = LoRALinear(Fp8Linear.quantized(linear), rank=4, scale=1.0, generator=generator)
                nn.init.normal_(layer.lora_up.weight, std=0.02, generator=generator)
                model.blocks.set_submodule(name, layer)
        return model

    def run(model: WanTransformer) -> tuple[Tensor, Tensor]:
        loss = model(*arguments).square().mean()
        loss.backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        return loss.detach(), torch.cat(gradients)

    loss, gradient = run(build().to(CARD))
    model = build()
    blocks = list(model.blocks)
    stream = BlockStream(blocks, num_streamed, CARD)
    stream.attach()
    for part in (model.patch_embedding, model.text_embedding, model.time_embedding, model.time_projection, model.head):
        part.to(CARD)
    counters.clear()
    compile_blocks(blocks, fullgraph=True, cpp_wrapper=cpp)
    model.run_block = runner = Recompute(blocks, stream=stream)
    assert len(runner.optional) == len(blocks)
    tried = KEPT[2:3] if cpp else KEPT  # a C++ compiler takes more than a minute for a way of keeping
    for kept in tried:
        runner.keep = lambda x, kept=kept: kept  # type: ignore[misc]
        model.zero_grad()
        ours, our_gradient = run(model)
        torch.testing.assert_close(ours, loss, rtol=1e-3, atol=0)
        assert (our_gradient - gradient).norm() < 1e-3 * gradient.norm()
    products, attention = sum(kept.blocks for kept in tried), sum(kept.attention for kept in tried)
    left = len(tried) * len(blocks) - products - attention
    assert (runner.kept, runner.recomputed, runner.attention_kept) == (products, left, attention)
    assert stream.misses <= 1
    graphs = counters["aot_autograd"]
    assert graphs["autograd_cache_saved"] + graphs["autograd_cache_hit"] > 0  # they are kept for later starts
    assert not graphs["autograd_cache_bypass"]
