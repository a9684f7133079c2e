"""The arithmetic of blocks: sizes, how many fit, and which sizes are refused."""

import pytest

from kvcache.layout import BlockLayout


def layout(**change: object) -> BlockLayout:
    sizes: dict[str, object] = {"block_size": 256, "layers": 28, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    return BlockLayout(**(sizes | change))  # type: ignore[arg-type]


def test_bytes_count_keys_and_values_of_all_layers() -> None:
    assert layout().token_bytes == 28 * 2 * 8 * 128 * 2
    assert layout().block_bytes == 256 * layout().token_bytes
    assert layout(dtype="float64").block_bytes == 4 * layout().block_bytes


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (255, 1), (256, 1), (257, 2)])
def test_blocks_for_tokens(tokens: int, blocks: int) -> None:
    assert layout().blocks_for(tokens) == blocks


def test_blocks_in_memory_are_whole() -> None:
    block = layout().block_bytes
    assert layout().blocks_in(block) == 1
    assert layout().blocks_in(3 * block - 1) == 2
    with pytest.raises(ValueError, match=f"{block - 1:,} bytes .* one block of 256 tokens takes {block:,} bytes"):
        layout().blocks_in(block - 1)


def test_a_dtype_without_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match="float16"):
        layout(dtype="int8")
