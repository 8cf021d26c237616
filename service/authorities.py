"""Who vouches for the servers that somebody else named: for `service.api.fetching` and `service.jobs.webhooks`."""

import functools
import ssl

import httpx


@functools.cache
def authorities() -> ssl.SSLContext:
    """The authorities of certificates, read once. Blocks for tens of milliseconds."""
    return httpx.create_ssl_context(trust_env=False)
