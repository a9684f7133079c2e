"""What a model's name is taken for."""

from pathlib import Path

import pytest

from workers.model.sources.naming import kind_of, wherever


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("Qwen/Qwen3-8B", "id"), ("org/name.v1_2-x", "id"),
        ("s3://bucket/name", "url"), ("gs://bucket/a/b", "url"), ("https://host/name", "url"), ("memory://x", "url"),
        ("file:///models/x", "folder"), ("/models/x", "folder"), ("./models", "folder"), ("../x", "folder"), ("~/x", "folder"),
        ("models/", "folder"), ("a/b/c", "folder"), ("gpt2", "folder"),
        ("org/.name", "folder"), ("", "folder"), ("C:\\models", "folder"),
    ],
)  # fmt: skip
def test_what_it_looks_like_where_nothing_of_that_name_lies(
    model: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert kind_of(model) == kind


def test_a_folder_that_is_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "file").touch()
    assert (kind_of("org/name"), kind_of("org/file")) == ("folder", "id")


def test_a_process_in_another_folder_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert wherever("here") == wherever("./here") == str(tmp_path / "here")
    assert [wherever(each) for each in ("org/name", "s3://b/x", "/abs")] == ["org/name", "s3://b/x", "/abs"]
