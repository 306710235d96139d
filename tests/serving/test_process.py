"""serve.py itself: its arguments, the line that says where it listens, and how it ends."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

import serve


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "::"], "--api-key"),
        (["--port", "70000"], "--port 70000"),
        (["--max-batch", "0"], "--max-batch 0"),
        (["--memory", "0"], "--memory 0"),
        (["--context", "1"], "--context 1"),
        (["--temperature", "-1"], "--temperature"),
        (["--api-key", "k", "--no-api-key"], "--no-api-key"),
        (["--api-key", ""], "--api-key"),
        (["--api-key", "é"], "--api-key"),
        (["--bach"], "there is no option --bach"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, monkeypatch):
    monkeypatch.delenv("NANOQWEN_API_KEY", raising=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        serve.parse_arguments(arguments)


def test_the_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("NANOQWEN_API_KEY", "secret")
    assert serve.parse_arguments(["--host", "0.0.0.0"]).api_key == "secret"
    assert serve.parse_arguments(["--api-key", "other"]).api_key == "other"
    monkeypatch.delenv("NANOQWEN_API_KEY")
    assert serve.parse_arguments([]).api_key is None and serve.parse_arguments(["--host", "127.0.0.2"]).host
    assert serve.parse_arguments(["--host", "0.0.0.0", "--no-api-key"]).api_key is None


def test_it_serves_and_sigterm_lets_replies_end():
    command = [sys.executable, "serve.py", "--model", "models/tiny", "--port", "0", "--api-key", "k"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stderr.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        assert "serves models/tiny: 479,264 parameters" in line
        headers, got = {"Authorization": "Bearer k"}, {}
        body = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 80, "seed": 1}
        body |= {"temperature": 1.0, "logit_bias": {"734": -100, "732": -100}, "stream": True}

        def read():
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60) as reply:
                for chunk in reply.iter_text():
                    got["text"] = got.get("text", "") + chunk

        reader = threading.Thread(target=read)
        reader.start()
        while len(got.get("text", "")) < 2000:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        reader.join(30)
        assert process.wait(30) == 0
        assert got["text"].endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in got["text"]
        rest = process.stderr.read()
        assert "ending" in rest and "story" not in rest and "/v1/chat/completions 200" in rest
        assert process.stdout.read() == ""
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    finally:
        process.kill()
        process.wait()


def test_a_port_that_is_taken_is_one_line():
    from serving.run import bind

    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(OSError, match="is another server there"):
            bind("127.0.0.1", taken.getsockname()[1])
