"""A line of a batch chooses an adapter by the name of its model, as a request does."""

from pathlib import Path

from openai import OpenAI

from quire.lora.registry import AdapterRegistry
from tests.lora.test_adapter_folder import write
from tests.server.batches.test_batches import answers, request_line, settings_for, submit, wait_for
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine


def test_lines_name_adapters(tmp_path: Path) -> None:
    folder = write(tmp_path / "sql")
    engine = ScriptedEngine(adapters=AdapterRegistry([f"sql={folder}"]))
    lines = [request_line("adapted", model="sql"), request_line("plain"), request_line("none", model="nobody")]
    with RunningServer(engine, settings_for(tmp_path / "batches")) as server:
        client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="-", max_retries=0)
        batch = wait_for(client, submit(client, lines).id)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
        found = {line["custom_id"]: line["response"] for line in answers(client, batch.output_file_id)}
        assert {name: each["body"]["model"] for name, each in found.items()} == {"adapted": "sql", "plain": "scripted"}
    identity = engine.adapters.identify(str(folder))
    assert sorted(str(call.adapter) for call in engine.calls) == sorted([str(identity), "None"])
