"""What tests of the stages that ask a model share."""

from pathlib import Path

import pytest

from tests.fieldmark.llm.workspace import Workspace
from tests.openai_server import OpenAIServer


@pytest.fixture
def workspace(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Workspace:
    """A folder, the working directory of the test, whose parameters name the server; failures are not waited out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fieldmark.llm.client.FIRST_PAUSE_S", 0.01)
    workspace = Workspace(monkeypatch, server.base_url)
    workspace.write()
    return workspace
