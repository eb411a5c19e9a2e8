"""URLs that hold secrets: masks of their tokens and credentials for logs and files, and a check of web addresses."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

MASK = "***"
#: Scheme of a URL, user information, host and the rest. A secret key of a storage service may contain slashes.
_URL = re.compile(r"([A-Za-z][\w+.-]*://)([^\s/@:'\"]*:[^\s'\"]*@|[^\s/@'\"]*@)?([^\s/?#'\"]*)([^\s'\"]*)")


def is_web_address(text: str) -> bool:
    """Return whether ``text`` is a well-formed http or https URL."""
    if not text.isascii() or not text.isprintable() or " " in text:
        return False
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # brackets without an IPv6 address, or a port that is no number
        return False


def mask_url(text: str) -> str:
    """Keep only scheme and host of a URL whose path may hold a token: ``https://host/***``.

    Text without a scheme is masked as a whole.
    """
    return mask_urls_in(text) if _URL.match(text) and not re.search(r"\s", text) else MASK


def mask_urls_in(text: str) -> str:
    """Keep only scheme and host of each URL in ``text``."""
    return _URL.sub(lambda url: f"{url[1]}{_user(url[2])}{url[3]}{_rest(url[4])}", text)


def mask_credentials(text: str) -> str:
    """Mask user information and query of the URLs in a path, and keep the rest: ``s3://***@bucket/folder``."""
    return _URL.sub(lambda url: f"{url[1]}{_user(url[2])}{url[3]}{re.sub(r'[?].*', f'?{MASK}', url[4])}", text)


def _user(user: str | None) -> str:
    return f"{MASK}@" if user else ""


def _rest(rest: str) -> str:
    return rest if rest in ("", "/") else f"/{MASK}"
