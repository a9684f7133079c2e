"""The arithmetic of blocks: sizes, how many fit, and which sizes are refused."""

import pytest

from kvcache.layout import BlockLayout, KVScales, LayerKinds, PoolSizes, divide


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


KINDS = LayerKinds((True, False, True, True, False))


def test_each_layer_has_its_place_among_those_of_its_kind() -> None:
    assert (KINDS.layers(False), KINDS.layers(True)) == ([1, 4], [0, 2, 3])
    assert KINDS.places == [0, 0, 1, 2, 1]
    assert [layout(layers=5).of_kind(KINDS, narrow).layers for narrow in (False, True)] == [2, 3]
    assert KVScales((1.0, 2.0, 3.0, 4.0, 5.0), (6.0, 7.0, 8.0, 9.0, 10.0)).of([1, 4]) == KVScales((2.0, 5.0), (7.0, 10.0))


@pytest.mark.parametrize(("block", "narrow"), [(10, 52), (18, 18), (1, 400)])
@pytest.mark.parametrize("memory", [1, 2, 7, 40, 300, 5000])
@pytest.mark.parametrize(("longest", "at_once"), [(1, 6), (40, 6), (512, 101)])
def test_memory_is_divided_and_not_exceeded(memory: int, block: int, narrow: int, longest: int, at_once: int) -> None:
    """memory: in blocks of all layers."""
    room = memory * (block + narrow)
    sizes = divide(room, block, narrow, longest=longest, rows=256, at_rest=3, at_once=at_once)
    assert sizes.blocks * block + sizes.narrow * narrow <= room
    assert 0 < sizes.narrow <= sizes.blocks <= 256 * longest
    assert sizes.narrow >= min(memory, longest, at_once), "one sequence fits, where it would if there were one kind"
    assert sizes.blocks >= min(memory, 256 * longest)
    assert sizes.narrow >= min(longest, at_once, sizes.blocks), "whoever fits the one pool fits the other"


def test_what_is_left_over_makes_none_longer_than_narrow_blocks_reach() -> None:
    """Three of the others beside nine would be a sequence of nine blocks, that needs eight narrow ones."""
    assert divide(39, 1, 5, longest=8, rows=256, at_rest=7, at_once=10) == PoolSizes(6, 6)


def test_the_longest_sequence_has_room_where_that_is_cheap() -> None:
    """Gemma 3 27B on 80 GiB, in MiB: 10 GiB and the window for 131,072 tokens, of 21.7, and 125,696 were served at most."""
    assert divide(22_210, 20, 104, longest=512, rows=256, at_rest=6, at_once=29) == PoolSizes(512, 115)


def test_what_narrow_layers_do_not_need_is_for_the_others() -> None:
    assert divide(6_200, 10, 52, longest=512, rows=256, at_rest=6, at_once=16) == PoolSizes(256, 70)
    assert divide(6_200, 10, 52, longest=2, rows=3, at_rest=6, at_once=16) == PoolSizes(6, 6), "more could not be used"
    with pytest.raises(ValueError, match=r"61 bytes of KV memory hold no block: one takes 62 bytes"):
        divide(61, 10, 52, longest=512, rows=256, at_rest=6, at_once=16)
