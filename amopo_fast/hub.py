"""Names of the Hugging Face Hub: where it cannot be reached, its libraries answer from their cache at once.

Left alone they try every file again with growing pauses, for minutes.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

SECONDS = 5.0  # for one answer of the Hub; a name server that does not answer counts too


def prefer_cache_if_unreachable(name: str) -> None:
    """Before a library is given `name`: where it is no local path and the Hub does not answer, switch Hub libraries to
    their offline mode for this process and say so in one line. Asks the Hub once a process, for at most SECONDS."""
    if Path(name).exists() or _is_offline() or _answers():
        return
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    try:
        import datasets.config

        datasets.config.HF_HUB_OFFLINE = True
    except ImportError:  # an installation without it reads no data sets
        pass
    logger.warning("%s does not answer: names are looked up in the local cache alone", constants.ENDPOINT)


def remedy(name: str) -> str:
    """What to do about a name that could not be loaded: its broken file, or a Hub that does not answer; "" for what
    the library itself has to say."""
    if Path(name).is_dir():
        return _broken_file(Path(name))
    if Path(name).exists() or not _is_offline():
        return ""
    from huggingface_hub import constants

    return (
        f"it is no folder and not in the local cache, and the Hub ({constants.ENDPOINT}) is not asked or cannot be "
        "reached: give the path of a folder that you have, or run where the Hub or a mirror (HF_ENDPOINT) answers"
    )


def _broken_file(folder: Path) -> str:
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            return f"its {path.name} cannot be read ({error}): copy it again"
        if not isinstance(content, dict):
            return f"its {path.name} holds a {type(content).__name__}, not a JSON object: copy it again"
    return ""


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@functools.cache
def _answers() -> bool:
    from huggingface_hub import constants, get_session

    answered = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            answered.append(True)
        except Exception:  # of a transport that differs between versions: any of them is no answer
            pass

    thread = threading.Thread(target=ask, daemon=True)  # looking up a host name knows no time limit
    thread.start()
    thread.join(SECONDS + 1)
    return bool(answered)
