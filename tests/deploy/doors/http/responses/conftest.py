"""Models that say what a test wants, for the tests of `/v1/responses`."""

import functools
import shutil
from collections.abc import Callable, Iterator

import pytest

from deploy.config.load import EMBEDDED_MODEL
from deploy.frontend.service.model import ServedModel
from tests.deploy.doors.http.conftest import MODEL, Host
from tests.deploy.doors.http.responses.responding import Model, Saying, make_saying


@pytest.fixture(scope="session")
def templated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ServedModel]:
    """The model that ships with Manta, with a chat template."""

    @functools.cache
    def read(template: str) -> ServedModel:
        folder = tmp_path_factory.mktemp("models") / "model"
        shutil.copytree(EMBEDDED_MODEL, folder)
        (folder / "chat_template.jinja").write_text(template)
        return ServedModel.read(MODEL, folder, None)

    return read


@pytest.fixture
def saying(host: Host, templated: Callable[[str], ServedModel]) -> Iterator[Saying]:
    """Makes models that say a text, whatever they are asked."""
    opened: list[Model] = []
    yield make_saying(host, templated, opened)
    for each in opened:
        each.engine.released.set()
