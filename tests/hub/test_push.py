"""python -m pytest tests/hub/test_push.py

`python -m nanoalign.hub push`, against a local server that answers as the Hub does.
"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from conftest import tiny_llama

from nanoalign.checkpoints.card import CARD_MARK
from nanoalign.checkpoints.write import write_model
from nanoalign.errors import RunError
from nanoalign.hub.__main__ import main
from nanoalign.model import Policy

TOKEN = "hf_test"


class Hub(BaseHTTPRequestHandler):
    """Keeps the files of commits; refuses other tokens, and models that are not of `me`."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        path, asked = self.path.partition("?")[0], self.server.asked
        answer, status = {}, 200
        if self.headers["Authorization"] != f"Bearer {TOKEN}" or "/other/" in path:
            answer, status = {"error": "Forbidden: you can't write to other/model"}, 403
        elif path == "/api/repos/create":
            asked.append(("create", json.loads(body)))
            answer = {"url": f"{self.server.url}/me/model"}
        elif "/branch/" in path:
            asked.append(("branch", path.rpartition("/")[2]))
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file["path"]} | mode for file in files]}
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            asked.append(("commit", path.rpartition("/")[2]))
            answer = {"commitUrl": f"{self.server.url}/me/model/commit/1", "commitOid": "1"}
        else:
            assert path == "/api/validate-yaml", path
            answer = {"errors": [], "warnings": []}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.asked = f"http://127.0.0.1:{server.server_port}", {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.HfApi, "__init__", init_at(server.url))
    yield server
    server.shutdown()
    server.server_close()


def is_private(hub) -> bool:
    """As huggingface_hub 1 and 2 say it."""
    asked = hub.asked[0][1]
    return asked.get("private") is True or asked.get("visibility") == "private"


def init_at(url: str):
    """HfApi reads $HF_ENDPOINT when it is imported, which was before this test."""
    init = huggingface_hub.HfApi.__init__
    return lambda self, **options: init(self, **{"endpoint": url} | options)


@pytest.fixture
def result(tmp_path, tokenizer) -> Path:
    """The folder of a run that has finished, with more than the model in it."""
    folder = tmp_path / "dpo"
    write_model(Policy(tiny_llama()), tokenizer, folder, template="pku")
    files = {
        "args.json": '{"out": "runs/dpo"}', "metrics.jsonl": "{}\n", "curves.png": "png",
        "records.npz": "-", "notes.txt": "-", "checkpoints/step_000001/state.pt": "-",
        "adapter/adapter_config.json": "{}",
        "README.md": f'{CARD_MARK}\nAutoTokenizer.from_pretrained("runs/dpo")\n',
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_what_belongs_to_the_model_is_uploaded(hub, result, capsys):
    main(["push", "me/model", str(result)])
    assert sorted(hub.files) == [
        "README.md", "adapter/adapter_config.json", "args.json", "chat_template.jinja",
        "config.json", "curves.png", "generation_config.json", "metrics.jsonl",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert hub.files["model.safetensors"] == (result / "model.safetensors").read_bytes()
    assert [word for word, _ in hub.asked] == ["create", "commit"]
    assert not is_private(hub) and hub.asked[1][1] == "main"
    assert capsys.readouterr().out == f"pushed      {result} to {hub.url}/me/model/commit/1\n"


def test_the_card_loads_the_model_from_the_hub(hub, result):
    main(["push", "me/model", str(result)])
    assert b'from_pretrained("me/model")' in hub.files["README.md"]
    (result / "README.md").write_text('from_pretrained("runs/dpo")')  # someone's own
    main(["push", "me/model", str(result)])
    assert hub.files["README.md"] == b'from_pretrained("runs/dpo")'


def test_a_private_model_and_a_branch(hub, result):
    main(["push", "me/model", str(result), "--private", "--revision", "v2"])
    assert is_private(hub)
    assert hub.asked[1:] == [("branch", "v2"), ("commit", "v2")]


def test_no_token_is_an_error(hub, result, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(RunError, match=r"no token for the Hub; run `hf auth login`, or set HF_TOK"):
        main(["push", "me/model", str(result)])
    assert not hub.asked


@pytest.mark.parametrize(
    ("name", "message"),
    [("other/model", "'other/model' could not be pushed: .*403"), ("a b", "'a b' is no name of a")],
)
def test_what_the_hub_refuses_is_one_line(hub, result, name, message):
    with pytest.raises(RunError, match=message) as error:
        main(["push", name, str(result)])
    assert "\n" not in str(error.value)


def test_no_server_is_an_error(result, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.HfApi, "__init__", init_at("http://127.0.0.1:9"))
    with pytest.raises(RunError, match="'me/model' could not be pushed: "):
        main(["push", "me/model", str(result)])


def test_a_folder_without_a_result_is_an_error(hub, result, tmp_path):
    with pytest.raises(RunError, match="there is no folder '.*nothing'; give the --out of a run"):
        main(["push", "me/model", str(tmp_path / "nothing")])
    (result / "args.json").write_text('{"lr": 1, "argv": ["train_dpo.py"]}')
    (result / "config.json").unlink()
    with pytest.raises(RunError, match="has not finished; continue it: python train_dpo.py"):
        main(["push", "me/model", str(result)])
    assert not hub.asked
