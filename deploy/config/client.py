"""HTTP clients of an endpoint: its address, its key, and the proxies of the environment, none before an endpoint on this
machine. Imports httpx when one is opened.
"""

import ipaddress
from typing import TYPE_CHECKING, Any, TypeVar

from deploy.config.load import ConfigError

if TYPE_CHECKING:
    import httpx

C = TypeVar("C", "httpx.Client", "httpx.AsyncClient")

EXAMPLE = "http://127.0.0.1:8000"


def open_client(kind: type[C], url: str, api_key: str | None, **options: Any) -> C:
    """A client whose paths are below `url`, which may leave out its http://, and may have the /v1 at its end that clients of
    OpenAI's API are told. options: of httpx's clients.

    Errors: ConfigError for what is no address, and for proxies in the environment that httpx cannot use.
    """
    import httpx

    address = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    try:
        base = httpx.URL(address)
        if base.scheme not in ("http", "https") or not base.host:
            raise httpx.InvalidURL("it names no host to ask by http or https")
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url} is no address of an endpoint ({error}): give one like {EXAMPLE}") from error
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        return kind(base_url=base, headers=headers, trust_env=not on_this_machine(base.host), **options)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"the proxies that the environment names for {url} cannot be used ({error}): correct HTTP_PROXY, HTTPS_PROXY, "
            "ALL_PROXY and NO_PROXY, or unset them"
        ) from error


def on_this_machine(host: str) -> bool:
    """A loopback address, or a name that stands for one: no proxy leads there."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        name = host.lower().rstrip(".")
        return name == "localhost" or name.endswith(".localhost")
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified
