"""Keys in URIs: they are never shown, and S3 keys of a command line are moved to the environment.

A key is before a URI's host (`s3://KEY:SECRET@bucket`, `https://user:password@host`) or in its options
(`?X-Amz-Signature=…`, `?sig=…`). Users often do not escape its `/`, `@` and `%`, so the functions remove too much
rather than too little.
"""

import re
from collections.abc import MutableMapping, Sequence
from typing import NamedTuple
from urllib.parse import unquote

from ast_core.errors import ConfigError

KEYS_OF_URI = "AST_RAY_KEYS_OF_URI"
"""Set in the environment of a job whose AWS keys came from its command line."""

_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>[^\s\"'<>`|]*)")
_WEB = {"http", "https", "ftp", "ftps"}
_NAMES_A_KEY = re.compile(
    r"(?i)(?:^|&)[^=&]*(?:sig|token|key|secret|md5|hash|hdne|hdnts|cred|pass|pwd|auth|policy|hmac|session|ticket|jwt|code)[^=&]*="
)
_S3 = re.compile(
    r"(?P<before>(?:[^=\s]*=)?s3://)(?P<keys>[^/?@]+:.*|[^/?]*)@"
    r"(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]+)(?P<rest>(?:[/?].*)?)"
)


def without_secrets(text: str) -> str:
    """`text`, a URI or a message, without the keys of all URIs in it.

    A web address loses its options if the name of one suggests a key. A storage URI loses all options. If they follow
    the bucket, as after `storage.options_first`, the path stays.
    """
    return _URI.sub(_shown, text) if "://" in text else text


def _shown(match: re.Match[str]) -> str:
    scheme, rest = match["scheme"].lower(), match["rest"]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    is_host_and_port = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?", authority) is not None
    if "@" in authority or (not is_host_and_port and "@" in rest):
        rest = rest.rpartition("@")[2]
    rest, _, fragment = rest.partition("#") if scheme in _WEB else (rest, "", "")
    if fragment and not _NAMES_A_KEY.search(fragment):
        rest = f"{rest}#{fragment}"
    place, mark, options = rest.partition("?")
    if mark and scheme in _WEB:
        rest = place if _NAMES_A_KEY.search(options) else rest
    elif mark:
        options_end = options.find("/")
        is_after_bucket = "/" not in place
        rest = place + (options[options_end:] if is_after_bucket and options_end >= 0 else "")
    return f"{match['scheme']}://{rest}"


_SIGNATURE = re.compile(r"(?i)(?:x-(?:amz|goog|oss)-)?signature|sig")
_OF_A_SIGNATURE = re.compile(
    r"(?i)x-(?:amz|goog|oss)-.*|(?:awsaccesskey|googleaccess|ossaccesskey)id|signature|sig|expires|policy|key-pair-id|"
    r"s[etprvs]|spr|srt|sk(?:e|t|s|v|oid|tid)"
)
"""Options that belong to a signature and change with it, at S3, CloudFront, Google, Alibaba and Azure."""


class WebAddress(NamedTuple):
    """What a web address names, whoever signed it. Two addresses of one file are equal."""

    shown: str
    """Without options that may be keys."""
    others: str
    """The options that may be keys by their names. They may also name a file (`?key=audio/dog.wav`), so they tell
    addresses apart, but are never shown."""

    @classmethod
    def of(cls, url: str) -> "WebAddress":
        before, _, fragment = url.partition("#")
        place, _, options = (before if _NAMES_A_KEY.search(fragment) else url).partition("?")
        pairs = [pair for pair in options.split("&") if pair]
        names = [pair.partition("=")[0] for pair in pairs]
        if any(map(_SIGNATURE.fullmatch, names)):
            pairs = [pair for name, pair in zip(names, pairs, strict=True) if not _OF_A_SIGNATURE.fullmatch(name)]
        others = [pair for pair in pairs if _NAMES_A_KEY.match(pair)]
        shown = [pair for pair in pairs if not _NAMES_A_KEY.match(pair)]
        return cls("?".join([without_secrets(place), *(["&".join(shown)] if shown else [])]), "&".join(others))


def without_secrets_of(uri: str, text: str) -> str:
    """`text` without the keys that `uri` contains, also where a library's message quotes only parts of the URI."""
    kept = without_secrets(uri)
    if kept == uri:
        return without_secrets(text)
    text, rest = without_secrets(text), uri.partition("://")[2]
    before_host, options = rest.rpartition("@")[0], rest.partition("?")[2]
    pieces = {before_host, options}.union(*(re.split(f"[{marks}]", rest) for marks in ("?&=", ":@", "/:@?&=#")))
    parts = {part for part in pieces if len(part) > 2 and part not in kept}
    for part in sorted({*parts, *map(unquote, parts)}, key=len, reverse=True):
        text = text.replace(part, "…")
    return text


def take_keys(words: Sequence[str], environment: MutableMapping[str, str]) -> list[str]:
    """Move the keys of the `s3://` URIs in a command line into `environment`. Returns the words without keys.

    All later code, and Ray's workers, then find the keys where a machine's keys usually are. The keys are used for the
    whole command, so they must be valid for every bucket that it names.

    Raises:
        ConfigError: URIs have different keys, or only some have keys while the environment has others, or a key has
            characters that must be escaped.
    """
    found: set[tuple[str, str]] = set()
    clean, num_without = [], 0
    for word in words:
        match = _S3.fullmatch(word) if "s3://" in word else None
        if match is None:
            num_without += word.startswith("s3://")
            clean.append(word)
            continue
        key, colon, secret = match["keys"].partition(":")
        if not colon or not key or not secret or "@" in secret + match["rest"]:
            raise ConfigError(
                f"the keys of {without_secrets(word)} cannot be told from its bucket: write / as %2F and @ as %40 in "
                "them, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and leave them out"
            )
        found.add((unquote(key), unquote(secret)))
        clean.append(f"{match['before']}{match['bucket']}{match['rest']}")
    if not found:
        return clean
    existing = (environment.get("AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY"))
    if len(found) > 1 or (num_without and existing[0] is not None and existing not in found):
        raise ConfigError(
            "the s3:// URIs of one command have different keys; give one key that may use all their buckets, best as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    [(key, secret)] = found
    environment.update({"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, KEYS_OF_URI: "1"})
    environment.pop("AWS_SESSION_TOKEN", None)  # it belongs to the other key
    return clean


def keys_of_uri(environment: MutableMapping[str, str]) -> dict[str, str]:
    """The environment variables with the keys of this job's command line. A cluster's workers need to be sent them.

    A node may have temporary keys, whose session token does not belong to these. An empty token counts as none.
    """
    if KEYS_OF_URI not in environment:
        return {}
    keys = {name: environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    return keys | {"AWS_SESSION_TOKEN": ""}
