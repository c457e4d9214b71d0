"""Authentication: API keys, and web pages of other origins. Only raw header bytes are compared, never a rebuilt URL."""

import hashlib
import hmac
import re
from typing import NamedTuple

from quire.server.errors import Refusal
from quire.server.settings import ServerSettings

Headers = list[tuple[bytes, bytes]]

DEFAULT_ORIGINS = re.compile(
    r"https?://(?:localhost|[\w-]+\.localhost|127(?:\.\d{1,3}){3}|0\.0\.0\.0|\[::1\])(?::\d{1,5})?"
    r"|(?:app|file|tauri|vscode-[a-z]+)://[\w.:-]*"
    r"|(?:capacitor|electron|ionic)://(?:localhost|-)"
)
"""Origins that may always call: pages of this machine, and programs, whose origins no web site can have."""
_SHOWN_DIGITS = 8
_JSON = b"application/json"


class Client(NamedTuple):
    """The sender of a request, as its API key identifies it."""

    account: str = ""
    """A name for the holder of the key; "" if the server has no keys."""
    salt: str = ""
    """Goes into the hashes of its prefix blocks, so that other keys do not share them."""
    background: bool = False
    """Its requests wait for those of all others."""
    name: str = ""
    """The name of its key, as the log shows it; the begin of the key's digest where it has none."""


class Authenticator:
    """Checks the API key and the origin of requests, and derives each tenant's account and cache salt from its key."""

    def __init__(self, settings: ServerSettings) -> None:
        self._keys = {key.digest: key for key in settings.keys}
        self._origins = frozenset(origin.encode() for origin in settings.allow_origins)
        self._salted = not settings.share_prefix_cache

    @property
    def salts(self) -> tuple[str, ...]:
        """Every salt that `check_key` can return."""
        if not (self._keys and self._salted):
            return ("",)
        return tuple(_salt(digest) for digest in self._keys)

    def check_key(self, headers: Headers) -> Client:
        """The client that holds the key. Raises `Refusal` (401) without a valid key. A server without keys has one."""
        if not self._keys:
            return Client()
        found = dict(headers)
        scheme, _, sent = found.get(b"authorization", b"").partition(b" ")
        if b"x-api-key" in found and not sent:  # Anthropic's clients
            scheme, sent = b"bearer", found[b"x-api-key"]
        digest = hashlib.sha256(sent.strip()).digest()
        # Compare with every key, each in constant time, so that the time taken reveals nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise Refusal(
                401,
                "a valid API key is needed: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers=((b"www-authenticate", b"Bearer"),),
            )
        key = self._keys[digest]
        salt = _salt(digest) if self._salted else ""
        return Client(key.account, salt, name=key.name or key.account[:_SHOWN_DIGITS])

    def check_origin(self, headers: Headers) -> None:
        """Refuse (403) a web page of another site that calls a server without keys through its visitor's browser.

        CORS hides only the response from such a page: the server would still do the work. And a page whose name
        resolves to this machine (DNS rebinding) is not bound by CORS at all.

        The origin null belongs to desktop programs and to any page that hides its own origin. It may send JSON: for
        that a browser asks first, and gets no permission unless `allow_origins` names null.
        """
        if self._keys or b"*" in self._origins:
            return
        found = dict(headers)
        origin = found.get(b"origin")
        if origin is None or origin in self._origins or DEFAULT_ORIGINS.fullmatch(origin.decode("latin-1")):
            return
        if origin == b"null" and found.get(b"content-type", b"").split(b";")[0].strip().lower() == _JSON:
            return
        raise Refusal(
            403,
            f"pages of {origin.decode('latin-1')[:200]} may not call this server; --allow-origins names those that may",
            code="origin_not_allowed",
        )


def _salt(digest: bytes) -> str:
    return hashlib.sha256(b"quire cache salt" + digest).hexdigest()[:32]
