"""The UMT5 encoder against the one in transformers, on small random weights."""

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from wanlora.models.wan.umt5 import UMT5Encoder, UMT5Sizes, position_buckets
from wanlora.models.wan.umt5_keys import official_name

Pair = tuple[UMT5Encoder, UMT5EncoderModel]
SIZES = UMT5Sizes(vocab=300, dim=64, attention_dim=48, ffn_dim=112, num_heads=4, num_layers=3)


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Both models with the same weights, none of them at its initial zero or one."""
    config = UMT5Config(
        vocab_size=300, d_model=64, d_kv=12, d_ff=112, num_heads=4, num_layers=3, attn_implementation="eager"
    )
    peer = UMT5EncoderModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.3 * noise)
    ours = UMT5Encoder(SIZES).eval()
    ours.load_state_dict({str(official_name(name)): tensor for name, tensor in peer.state_dict().items()}, strict=True)
    return ours, peer


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(300, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [1, 9, 200])
def test_features_equal_transformers(pair: Pair, length: int) -> None:
    ours, peer = pair
    ids = random_ids(2, length)
    with torch.no_grad():
        expected = peer(ids).last_hidden_state
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(ids), expected, atol=5e-5, rtol=1e-4)


def test_masked_features_equal_transformers(pair: Pair) -> None:
    ours, peer = pair
    ids, mask = random_ids(3, 12), torch.arange(12) < torch.tensor([[12], [7], [1]])
    with torch.no_grad():
        expected = peer(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours(ids, mask)[mask], expected[mask], atol=5e-5, rtol=1e-4)


def test_position_buckets_equal_transformers(pair: Pair) -> None:
    _, peer = pair
    attention = peer.encoder.block[0].layer[0].SelfAttention
    position = torch.arange(600)
    expected = attention._relative_position_bucket(position[None, :] - position[:, None])
    assert torch.equal(position_buckets(600, 32), expected)
