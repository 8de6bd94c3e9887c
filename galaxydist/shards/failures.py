"""What an object store or a web server answers instead of a file: worth another attempt, or something the user must mend.

The libraries have their own exceptions (botocore's, aiohttp's, gcsfs's, google-auth's); they are told apart here by HTTP status
and by class name, so that nothing is imported that the store does not use.
"""

import errno

from galaxydist.errors import UserError

# HTTP: too slow, too early, too many requests; and all 5xx.
TRANSIENT_STATUS = {408, 425, 429}
MISSING_STATUS = {404, 410}
FORBIDDEN_STATUS = {401, 403, 407}

# botocore's, aiohttp's, google-auth's and gcsfs's words for a network that failed; base classes count.
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
# A subclass of these that another attempt does not mend.
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
    "file": "see to its permissions",
}


class TransientError(Exception):
    """An attempt that failed for a reason that may be gone at the next one."""


class MissingError(UserError):
    """The store has no such file."""


def explain(error: Exception, url: str, kind: str) -> Exception:
    """What an exception of a filesystem means.

    Args:
        error: as it came.
        url: of the file, for the message.
        kind: ``s3``, ``gs``, ``http`` or ``file``: what the user can set.

    Returns:
        ``TransientError``, ``MissingError``, another ``UserError``, or the error itself where the local disk is the reason.
    """
    names = {base.__name__ for base in type(error).__mro__}
    status = _status(error)
    reason = " ".join(f"{error}".split())[:300] or type(error).__name__
    if isinstance(error, OSError) and error.errno in LOCAL_ERRORS and status is None:
        return error
    if status in MISSING_STATUS or isinstance(error, FileNotFoundError | NotADirectoryError):
        return MissingError(f"{url} is not there")
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
    """The HTTP status behind an exception, where there was an answer."""
    for name in ("status", "code"):  # aiohttp's; gcsfs's
        found = getattr(error, name, None)
        if isinstance(found, int | str) and str(found).isdecimal():
            return int(found)
    for one in (error, error.__cause__):  # botocore's; s3fs wraps it in one of Python's
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return int(found) if found else None
    return None
