"""The arithmetic of pages: sizes, how many fit, and which sizes are refused."""

import pytest

from kvcache.layout import PageLayout


def layout(**change: object) -> PageLayout:
    sizes: dict[str, object] = {"page_size": 256, "layers": 28, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    return PageLayout(**(sizes | change))  # type: ignore[arg-type]


def test_bytes_count_keys_and_values_of_all_layers() -> None:
    assert layout().token_bytes == 28 * 2 * 8 * 128 * 2
    assert layout().page_bytes == 256 * layout().token_bytes
    assert layout(dtype="float64").page_bytes == 4 * layout().page_bytes


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (255, 1), (256, 1), (257, 2)])
def test_pages_for_tokens(tokens: int, pages: int) -> None:
    assert layout().pages_for(tokens) == pages


def test_pages_in_memory_are_whole() -> None:
    page = layout().page_bytes
    assert layout().pages_in(page) == 1
    assert layout().pages_in(3 * page - 1) == 2
    with pytest.raises(ValueError, match=f"{page - 1:,} bytes .* one page of 256 tokens takes {page:,} bytes"):
        layout().pages_in(page - 1)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256, 4096])
def test_every_power_of_two_from_16_is_a_page_size(page_size: int) -> None:
    assert layout(page_size=page_size).shape == (28, 2, page_size, 8, 128)


@pytest.mark.parametrize("page_size", [-16, 0, 1, 8, 17, 48, 255])
def test_other_page_sizes_name_the_legal_ones(page_size: int) -> None:
    with pytest.raises(ValueError, match=r"power of two from 16 up \(16, 32, 64, 128, 256"):
        layout(page_size=page_size)


@pytest.mark.parametrize("change", [{"dtype": "int8"}, {"layers": 0}, {"kv_heads": 0}, {"head_dim": 0}])
def test_impossible_shapes_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change)) if "dtype" not in change else "float16"):
        layout(**change)
