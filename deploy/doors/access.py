"""Who may come in, at any door, and on which terms: API keys, and the one who asks. Imports the terms of prompts and the door's
errors."""

import hashlib
import hmac
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from deploy.config.serve import ServeConfig
from deploy.frontend.errors import Fault, RequestError
from deploy.text.prompts import MOST_URGENT, Terms

ACCOUNT_DIGITS = 16

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class ApiKeys:
    """Keys that open the endpoint; without any, it is open. Only their digests are kept.

    priorities: of some keys, the most urgent priority that each may ask for. operators: those that may change the cluster.
    """

    def __init__(
        self, keys: Iterable[str] = (), priorities: Mapping[str, int] = MappingProxyType({}), operators: Iterable[str] = ()
    ) -> None:
        self._digests = tuple(_digest(key) for key in keys)
        self._operators = frozenset(account(key) for key in operators)
        self._priorities = {account(key): priority for key, priority in priorities.items()}

    def __bool__(self) -> bool:
        return bool(self._digests)

    def open(self, key: str) -> bool:
        """Whether the key is one of them. Takes the same time whichever it is, and however much of it is right."""
        given = _digest(key)
        return sum(hmac.compare_digest(given, known) for known in self._digests) > 0

    def check(self, authorization: str | None, api_key: str | None = None) -> str:
        """authorization: the header's value; api_key: of Anthropic's header, which counts where there is no other. Returns the
        key's account, "" where there are no keys.

        Errors: RequestError UNAUTHENTICATED.
        """
        if not self:
            return ""
        way = "Authorization: Bearer KEY"
        if authorization is None and api_key is not None:
            authorization, way = f"Bearer {api_key}", "x-api-key: KEY"
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not self.open(key.strip()):
            said = "this API key is not known here" if key else "no API key was given"
            raise RequestError(Fault.UNAUTHENTICATED, f"{said}: send one as `{way}`", code="invalid_api_key")
        return account(key.strip())

    def may_operate(self, account: str) -> bool:
        """Whether the key of this account may change the cluster. Where there are no keys, everybody may who reaches it."""
        return not self or account in self._operators

    def best_priority(self, account: str, default: int) -> int:
        """The most urgent priority (the lowest number) that the key of this account may ask for."""
        return self._priorities.get(account, default)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. request_id: the door's. traceparent: of W3C's trace context, if there is one. account: of the API key.
    best_priority: the most urgent one that it may ask for. patience_s: the time that it gives the call as a whole. operator:
    whether it may change the cluster."""

    request_id: str
    traceparent: str | None = None
    account: str = ""
    best_priority: int = MOST_URGENT
    patience_s: float = math.inf
    operator: bool = False

    def terms(
        self, config: ServeConfig, salt: str, priority: int, timeout_s: float | None = None, user: str | None = None
    ) -> Terms:
        """salt, priority, timeout_s: as the request asks for them; it may ask for an earlier deadline than the server's.
        user: on whose account it is where there are no keys. KV is found by the same tenant with the same salt alone, whatever
        salts others choose, unless the server shares it: the length in front makes two different pairs two different salts.
        Errors: RequestError for a priority that goes before others' just by asking."""
        if priority < self.best_priority:
            raise RequestError.invalid(
                f"priority={priority} goes before what may be asked for here, which is {self.best_priority} or more: send "
                "that, or let the server allow it (best_priority for all, `priority=` behind the key in the file of keys)",
                "priority",
            )
        tenant = self.account or account(user or "")
        own = f"{len(tenant)}:{tenant}{salt}" if tenant or salt else ""
        deadline_s = min(config.request_timeout_s, self.patience_s, timeout_s or math.inf)
        return Terms(salt if config.share_prefix_cache else own, tenant, priority, deadline_s)


def account(name: str) -> str:
    """What the scheduler calls whoever has this key, or this name: it tells them apart and says no more."""
    return _digest(name).hex()[:ACCOUNT_DIGITS] if name else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
