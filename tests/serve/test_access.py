"""Who may use the server: keys, names, origins, addresses."""

import os
import socket
from pathlib import Path

import pytest
from live import CLIENT, serving
from stand_in import ScriptedEngine

from command import invoke
from kangaroo.errors import ConfigError
from kangaroo.serve.app import Access
from kangaroo.serve.guard import LOCAL
from kangaroo.serve.run import open_socket, read_key


def test_a_key_guards_everything_but_health() -> None:
    with serving(lambda: ScriptedEngine(["a"]), Access(key="s3cret")) as live:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere", "/v1/models/tiny"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"X-Key": "s3cret"}):
                answer = CLIENT.get(live.url + path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
            right = CLIENT.get(live.url + path, headers={"Authorization": "Bearer s3cret"})
            assert right.status_code in (200, 404)
        assert CLIENT.post(live.url + "/v1/completions", json={"prompt": "x"}).status_code == 401
        assert CLIENT.get(live.url + "/health").status_code == 200
        odd = CLIENT.get(live.url + "/v1/models", headers={"Authorization": "Bearer é".encode("latin-1")})
        assert odd.status_code == 401


def test_pages_of_other_origins_and_names_are_kept_out_unless_allowed() -> None:
    asked = {"prompt": "x"}
    with serving(lambda: ScriptedEngine(["a"]), Access(hosts=LOCAL, origins=["https://good.example"])) as live:
        port = live.url.rpartition(":")[2]
        for origin, status in (
            (None, 200),
            (live.url, 200),
            ("https://good.example", 200),
            ("https://evil.example", 403),
            ("null", 403),
        ):
            headers = {} if origin is None else {"Origin": origin}
            answer = CLIENT.post(live.url + "/v1/completions", json=asked, headers=headers)
            assert answer.status_code == status, origin
            allowed = answer.headers.get("Access-Control-Allow-Origin")
            assert allowed == (origin if origin == "https://good.example" else None)
        preflight = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
        preflight["Access-Control-Request-Headers"] = "authorization,content-type"
        assert CLIENT.options(live.url + "/v1/completions", headers=preflight).status_code == 200
        assert CLIENT.options(
            live.url + "/v1/completions", headers=preflight | {"Origin": "https://evil.example"}
        ).is_client_error
        for host, status in (
            (f"localhost:{port}", 200),
            (f"LOCALHOST:{port}", 200),
            (f"[::1]:{port}", 200),
            ("rebound.example", 403),
            ("localhost.evil.example", 403),
            ("[", 403),
        ):
            assert CLIENT.get(live.url + "/v1/models", headers={"Host": host}).status_code == status, host


def test_without_allowed_origins_no_page_is_told_anything() -> None:
    with serving(lambda: ScriptedEngine(["a"])) as live:
        answer = CLIENT.get(live.url + "/health", headers={"Origin": live.url})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("  s3cret\n")
    os.chmod(path, 0o600)
    assert read_key(path) == "s3cret"
    for mode in (0o640, 0o604, 0o644):
        os.chmod(path, mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            read_key(path)
    os.chmod(path, 0o600)
    for wrong in ("", "two words", "kéy"):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match="API key"):
            read_key(path)


def test_mistakes_on_the_command_line_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_socket("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        for options, said in (
            (("--port", port), port),
            (("--port", "70000"), "70000"),
            (("--host", "no such host"), "no such host"),
            (("--drain", "-1"), "drain"),
            (("--api-key-file", str(tmp_path / "none")), "none"),
            (("--port", "0", "--drafter", "nonsense"), "nonsense"),
            (("--port", "0", "--model", str(tmp_path / "nothing")), "nothing"),
        ):
            assert invoke("serve", *options) == 2, options
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith("error: ")
            assert said in error
        monkeypatch.setenv("KANGAROO_API_KEY", "two words")
        assert invoke("serve", "--port", "0") == 2
        assert "KANGAROO_API_KEY" in capsys.readouterr().err


def test_the_socket_is_closed_after_a_mistake() -> None:
    with open_socket("127.0.0.1", 0) as taken:
        address = taken.getsockname()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(address)
