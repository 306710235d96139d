"""Large files over an unreliable connection: no request hangs, and a broken transfer resumes where it stopped.

They use huggingface_hub's HTTP client, which supports proxies and passes no token on to the host that stores a file.
"""

from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any

REACH_SECONDS = 5.0  # to the first answer, with name server, connections and redirects
STALL_SECONDS = 20.0  # without a byte in the middle of a transfer
AGAIN = "run the command again to resume"


class HubUnreachable(ValueError):
    """The hub does not answer, or no longer."""


def refusal(place: str, response: Any) -> ValueError:
    """The exception for an answer of a status that is an error: HubUnreachable where a later try may succeed."""
    status, said = response.status_code, f"{place} answers {response.status_code} {response.reason_phrase}"
    if response.headers.get("X-Error-Code") == "GatedRepo":
        return ValueError(f"{said}: accept the model's terms on its page, then `hf auth login`")
    if status in (401, 403):
        return ValueError(f"{said}; `hf auth login` with a token that may read this model")
    if status in (408, 429) or status >= 500:
        return HubUnreachable(f"{said}; try later")
    return ValueError(f"{said}; check the address, and HF_ENDPOINT where it is set")


def reach(ask: Callable[[], Any]) -> Any:
    """`ask()`'s answer or exception; TimeoutError when there is none within REACH_SECONDS.

    Name resolution has no time-out of its own, so a thread waits for the answer, and this function for the thread.
    """
    answer = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    Thread(target=run, daemon=True).start()
    if not wait([answer], REACH_SECONDS).done:
        raise TimeoutError(f"no answer within {REACH_SECONDS:.0f} s")
    return answer.result()


def transfer(url: str, headers: dict[str, str], part: Path, size: int, report: Callable[[int], object]) -> None:
    """Appends to `part` the missing rest of a file of `size` bytes, or starts over where the server can't resume.

    `report` gets the number of bytes so far. HubUnreachable: the connection broke, and the next call resumes from what
    arrived. ValueError: the server's answer is not what was requested, and `part` is unchanged.
    """
    from huggingface_hub import get_session

    have = part.stat().st_size if part.exists() else 0
    have = have if have <= size else 0
    report(have)
    if 0 < have == size:
        return
    headers = headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    request = get_session().build_request("GET", url, headers=headers, timeout=STALL_SECONDS)
    try:
        response = reach(lambda: get_session().send(request, stream=True))
    except Exception as error:  # the HTTP library's classes, whether names, sockets or TLS failed
        raise HubUnreachable(f"{url}: can't be reached ({error}); {AGAIN}") from None
    with closing(response):
        if response.is_error:
            raise refusal(f"{url}: the server", response)
        if response.status_code != 206:
            have = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise ValueError(f"{url}: the server sends another range than the one requested; delete {part}")
        stated = response.headers.get("Content-Length", str(size - have))
        if stated != str(size - have):
            raise ValueError(f"{url}: this file has {size:,} bytes, but the server sends {stated} from {have:,} on")
        with part.open("ab" if have else "wb") as file:
            try:
                for piece in response.iter_bytes():
                    have += file.write(piece[: size - have])
                    report(have)
                    if have == size:
                        break
            except OSError:  # the disk's
                raise
            except Exception:  # the HTTP library's classes: the connection broke
                pass
    if have < size:
        raise HubUnreachable(f"{url}: {have:,} of {size:,} bytes arrived; {AGAIN}")


def read_range(url: str, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start` on. HubUnreachable, or ValueError where the answer is not that."""
    status, data = _read(url, {"Range": f"bytes={start}-{start + size - 1}"}, size)
    if status != 206 and start:
        raise ValueError(f"{url}: the server does not send parts of files; --deep downloads them whole")
    if len(data) < size:
        raise HubUnreachable(f"{url}: {len(data):,} of {size:,} bytes arrived; {AGAIN}")
    return data


def read_document(url: str, limit: int) -> bytes:
    """A whole document of at most `limit` bytes. HubUnreachable, or ValueError."""
    data = _read(url, {}, limit + 1)[1]
    if len(data) > limit:
        raise ValueError(f"{url}: more than {limit:,} bytes")
    return data


def _read(url: str, headers: dict[str, str], most: int) -> tuple[int, bytes]:
    """The status and at most `most` bytes of an answer."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers() | {"Accept-Encoding": "identity"} | headers
    request = get_session().build_request("GET", url, headers=headers, timeout=STALL_SECONDS)
    try:
        response = reach(lambda: get_session().send(request, stream=True, follow_redirects=True))
    except Exception as error:  # the HTTP library's classes, whether names, sockets or TLS failed
        raise HubUnreachable(f"{url}: can't be reached ({error}); {AGAIN}") from None
    with closing(response):
        if response.is_error:
            raise refusal(f"{url}: the server", response)
        data = bytearray()
        try:
            for piece in response.iter_bytes():
                data += piece[: most - len(data)]
                if len(data) == most:
                    break
        except Exception as error:
            raise HubUnreachable(f"{url}: the connection broke ({error}); {AGAIN}") from None
    return response.status_code, bytes(data)
