from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fieldmark.llm.workspace import KEY
from tests.openai_server import OpenAIServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[OpenAIServer]:
    """A server that says back what it is asked, in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FIELDMARK_TEST_KEY", KEY)
    monkeypatch.delenv("FIELDMARK_CACHE", raising=False)
    monkeypatch.setattr("fieldmark.llm.client.FIRST_PAUSE_S", 0.01)
    with OpenAIServer(lambda request: {"x": request["messages"][0]["content"]}) as server:
        yield server
