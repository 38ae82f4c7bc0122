"""The secret of a run. Who starts its processes on a cluster puts it into their environment as TORL_SECRET; then every server
and sandbox refuses callers that do not show it (HTTP 401). It stands on no command line, in no file and in no log.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping


def authorization() -> dict[str, str]:
    """The HTTP headers that show it; none where there is no secret."""
    secret = os.environ.get("TORL_SECRET")
    return {"Authorization": f"Bearer {secret}"} if secret else {}


def shows(headers: Mapping[str, str]) -> bool:
    """Whether a caller with these headers may enter."""
    wanted, shown = authorization().get("Authorization", ""), headers.get("Authorization", "")
    return not wanted or hmac.compare_digest(shown.encode(errors="surrogateescape"), wanted.encode())
