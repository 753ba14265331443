"""Settings of the judge of captions: a section of `vcr1_fast.settings.config`, to be imported from there.

The string under a field is its help text on the command line. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from vcr1_fast.settings.error import require, require_above_0, require_least


def _is_http_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isprintable()
    except ValueError:  # a port that is no number, brackets that do not close
        return False


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The language model that compares captions, behind any OpenAI-compatible server. Asked only for captioning."""

    url: str = "http://127.0.0.1:8000/v1"
    """Address up to and including /v1; /chat/completions is added."""
    model: str = "Qwen/Qwen2.5-72B-Instruct"
    """Name under which the server knows the model. Default: the judge of VideoChat-R1."""
    api_key_env: str = "VCR1_JUDGE_API_KEY"
    """Environment variable that holds the API key; unset: no key is sent. The key itself is never stored."""
    timeout_s: float = 60.0
    """Longest time of one request, from connecting to the last byte."""
    total_timeout_s: float = 300.0
    """Longest time for all captions of one call together, retries and pauses included."""
    max_retries: int = 4
    """Further attempts after a failed request or an unreadable answer."""
    backoff_s: float = 0.5
    """Pause before the first retry; doubles each time up to 30 s, a random half of it is left out."""
    max_concurrency: int = 16
    """Requests in flight at once, per process."""
    cache: str | None = "~/.cache/vcr1-fast/judge.sqlite"
    """File of answers already given, shared by runs and processes; null: in memory only."""
    on_failure: Literal["drop", "zero"] = "drop"
    """Where the judge gives no verdict. drop: that group is left out of the step. zero: its judged parts are 0 for all
    answers, so only the others teach."""

    def __post_init__(self) -> None:
        require(
            _is_http_url(self.url),
            "judge.url is not http:// or https:// with a server, wanted for example http://127.0.0.1:8000/v1",
        )
        require(
            "@" not in urlsplit(self.url).netloc,
            "judge.url holds a user or password, which would be saved with the settings: put the key into the "
            "environment variable that judge.api_key_env names",
        )
        require_above_0(self, "judge", "timeout_s", "total_timeout_s", "max_concurrency")
        require_least(self, "judge", 0, "max_retries", "backoff_s")
