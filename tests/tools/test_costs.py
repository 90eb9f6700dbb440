"""What answers cost, by day."""

from pathlib import Path

import pytest

from fieldmark import store
from fieldmark.command import UserError
from tests.fieldmark.llm.workspace import row_with
from tools import costs


def write(path: str, *rows: dict[str, object]) -> None:
    table = store.make_table("llm.answers/1", rows)
    store.write_table(table, path, "llm.answers/1", {}, "mark")


def test_each_paid_question_counts_once_on_its_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["costs"])
    with pytest.raises(UserError, match="holds no answers"):
        costs.main()
    first = row_with(item_key="a", cost_usd=0.5, created_at="2026-11-20T23:59:59Z")
    batch = row_with(item_key="b", cost_usd=0.25, source="batch", subject_id="x")
    unpriced = row_with(item_key="c", subject_id="y")
    write("data/concepts/answers.parquet", first, row_with(item_key="d", source="replay", subject_id="z"))
    write("data/descriptions/answers.parquet", batch, unpriced)
    write("data/asked/guess/answers.parquet", batch)
    costs.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["2026-11-20", "tiny", "live", "1", "0", "100", "50", "0.5000"],
        ["2026-11-21", "tiny", "batch", "1", "0", "100", "50", "0.2500"],
        ["2026-11-21", "tiny", "live", "1", "1", "100", "50", "0.0000"],
        ["in", "sum", "3", "1", "300", "150", "0.7500"],
    ]
