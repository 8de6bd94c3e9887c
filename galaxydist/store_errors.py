"""Errors of object stores and web servers: a ``TransientError`` may pass, a ``MissingError`` or any other ``UserError`` will not.

The exceptions of botocore, aiohttp, gcsfs and google-auth are recognised by HTTP status and class name, so that no library is
imported that the store does not use.
"""

import errno

from galaxydist.errors import UserError

# HTTP: timeout, too early, too many requests; all 5xx are transient too.
TRANSIENT_STATUS = {408, 425, 429}
MISSING_STATUS = {404, 410}
FORBIDDEN_STATUS = {401, 403, 407}

# Network errors of botocore, aiohttp, google-auth and gcsfs, and of Python; subclasses count too.
TRANSIENT_CLASSES = {
    "ChecksumError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionClosedError",
    "ConnectionError",
    "EndpointConnectionError",
    "FSTimeoutError",
    "HTTPClientError",
    "IncompleteRead",
    "ProxyError",
    "ResponseParserError",
    "ServerDisconnectedError",
    "TimeoutError",
    "TransportError",
}
# Subclasses of these for which another attempt does not help.
LASTING_CLASSES = {"ClientConnectorCertificateError"}
CREDENTIAL_CLASSES = {
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "RefreshError",
    "SSOError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
LOCAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}

WHAT_TO_SET = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket FSSPEC_S3_ANON=true; for a "
    "server other than Amazon's also AWS_ENDPOINT_URL",
    "gs": "log in with `gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS; for a public bucket "
    "FSSPEC_GS_TOKEN=anon",
    "http": "give the server's password or token through fsspec, for example "
    """FSSPEC_HTTPS='{"headers": {"Authorization": "Bearer ..."}}'; for hf:// log in with `hf auth login` or set HF_TOKEN""",
    "file": "check its permissions",
}


class TransientError(Exception):
    """A failed attempt whose cause may not affect the next one."""


class MissingError(UserError):
    """The store has no such file."""


def classify_error(error: Exception, url: str, kind: str) -> Exception:
    """Return the exception to raise for an error of a filesystem.

    Args:
        error: the original exception.
        url: URL of the file, for the message.
        kind: ``s3``, ``gs``, ``http`` or ``file``: selects the advice in the message.

    Returns:
        ``TransientError``, ``MissingError``, another ``UserError``, or the error itself if the local disk is the cause.
    """
    names = {base.__name__ for base in type(error).__mro__}
    status = _status(error)
    reason = " ".join(f"{error}".split())[:300] or type(error).__name__
    if isinstance(error, OSError) and error.errno in LOCAL_ERRORS and status is None:
        return error
    if status in MISSING_STATUS or isinstance(error, FileNotFoundError | NotADirectoryError):
        return MissingError(f"{url} does not exist")
    if names & CREDENTIAL_CLASSES:
        return UserError(f"no credentials for {url} ({reason}): {WHAT_TO_SET[kind]}")
    if status in FORBIDDEN_STATUS or isinstance(error, PermissionError) or reason.startswith("Forbidden"):
        return UserError(f"access to {url} is denied ({reason}): {WHAT_TO_SET[kind]}")
    if status is not None:
        is_transient = status in TRANSIENT_STATUS or status >= 500
    else:
        is_transient = bool(names & TRANSIENT_CLASSES) and not names & LASTING_CLASSES
    if is_transient:
        return TransientError(f"{type(error).__name__}: {reason}")
    return UserError(f"{url} cannot be read ({type(error).__name__}: {reason})")


def _status(error: BaseException) -> int | None:
    """Return the HTTP status behind an exception, or None if there was no response."""
    for name in ("status", "code"):  # aiohttp's; gcsfs's
        found = getattr(error, name, None)
        if isinstance(found, int | str) and str(found).isdecimal():
            return int(found)
    for one in (error, error.__cause__):  # botocore's; s3fs wraps it in a built-in exception
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return int(found) if found else None
        if isinstance(found := getattr(response, "status_code", None), int):  # huggingface_hub's
            return found
    return None
