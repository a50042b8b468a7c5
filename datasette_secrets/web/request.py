"""Reads what a request sent: JSON or a form.

A body that cannot be read or parsed raises `Refused`, without the frames that hold what
was sent. A `Body` hides it: its `repr` shows nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote

from datasette.utils import tilde_decode
from datasette.utils.asgi import PayloadTooLarge, Request

from .. import schema
from ..errors import InvalidSecret, without_frames


class Refused(Exception):
    """A request that is answered with this status and this sentence."""

    def __init__(
        self, status: int, sentence: str, headers: dict[str, str] | None = None
    ) -> None:
        self.status = status
        self.headers = headers
        super().__init__(sentence)


def method(request: Request) -> str:
    return "GET" if request.method == "HEAD" else str(request.method)


def wants_json(request: Request) -> bool:
    return (
        request.path.endswith(".json")
        or media_type(request) == "application/json"
        or "application/json" in (request.headers.get("accept") or "")
        or (request.headers.get("authorization") or "").lower().startswith("bearer ")
    )


def actor_id(request: Request) -> str | None:
    actor_id = (request.actor or {}).get("id")
    return str(actor_id) if actor_id else None


def secret_name(request: Request) -> str:
    """The secret's name: tilde-encoded as Datasette's links are, or percent-encoded."""
    return str(tilde_decode(unquote(request.url_vars["name"])))


async def read_fields(request: Request, *fields: str) -> Body:
    """What was sent. Raises Refused for what cannot be read, or has another key."""
    sent = await read(request)
    if not sent.is_form and sent.unknown(*fields):
        known = ", ".join(fields) or "none"
        raise Refused(400, f"The object has an unknown key; known: {known}")
    return sent


def number(sent: Body, field: str) -> int | None:
    """A version number that was sent, None without one. Raises InvalidSecret."""
    number = sent.first(field)
    if number is None or number == "":
        return None
    if sent.is_form and number.isascii() and number.isdigit() and len(number) < 17:
        number = int(number)
    if not is_number(number):
        raise InvalidSecret(f"{field} must be a whole number")
    return int(number)


def flag(sent: Body, field: str) -> bool:
    """Whether this was asked for: a box that is ticked, or true. Raises InvalidSecret."""
    flag = sent.first(field)
    if sent.is_form:
        return bool(flag)
    if flag is not None and not isinstance(flag, bool):
        raise InvalidSecret(f"{field} must be true or false")
    return bool(flag)


def renew_by(sent: Body) -> Any:
    """The date that was sent, for the service to judge; None for none."""
    date = sent.first("renew_by")
    return (date.strip() or None) if isinstance(date, str) and sent.is_form else date


def is_number(number: object) -> bool:
    return type(number) is int and 0 <= number <= schema.VERSION_MAX


_FORM = "application/x-www-form-urlencoded"


_JSON = "application/json"


_FIELDS_MAX = 20_000


class Body:
    """What was sent, by field. Neither `repr` nor `str` shows it.

    `is_form`: a web form sent it, so line ends are CRLF, and white space at the ends of a
    value is an accident.
    """

    __slots__ = ("_fields", "is_form")

    def __init__(
        self, fields: Mapping[str, list[Any]] | None = None, *, is_form: bool = False
    ) -> None:
        self._fields = dict(fields or {})
        self.is_form = is_form

    def __repr__(self) -> str:
        return "<Body>"

    def unknown(self, *known: str) -> bool:
        """Whether it has a field that is none of these. Their names may be anything."""
        return not self._fields.keys() <= set(known)

    def has(self, name: str) -> bool:
        """Whether the field was sent, and not as null."""
        return any(value is not None for value in self._fields.get(name, ()))

    def first(self, name: str) -> Any:
        """A field that holds no secret, as it was sent; None without it."""
        return next(iter(self._fields.get(name, ())), None)

    def all(self, name: str) -> list[Any]:
        """Every value of a field that holds no secret."""
        return list(self._fields.get(name, ()))

    def typed(self, name: str) -> str:
        """A field to show in the form again; empty where it holds the value."""
        text = self.first(name)
        if not isinstance(text, str) or (
            self.has_value("secret") and self.take_value("secret") in text
        ):
            return ""
        return text

    def has_value(self, name: str) -> bool:
        """Whether there is a value to store: in a form, one that is not blank."""
        return self.has(name) and not (self.is_form and not self.take_value(name))

    def take_value(self, name: str) -> Any:
        """The value to store. Pass it on within the same expression; never name it."""
        if self.is_form:
            return str(self.first(name) or "").replace("\r\n", "\n").strip()
        return self.first(name)


def media_type(request: Request) -> str:
    """The request's media type in lower case, without parameters; empty if unsaid."""
    header: str = request.headers.get("content-type") or ""
    return header.partition(";")[0].strip().lower()


async def read(request: Request) -> Body:
    """What `request` sent. An empty body without a media type is an empty object.

    Raises Refused.
    """
    return _parse(media_type(request), await _read(request))


async def _read(request: Request) -> bytes:
    try:
        return await request.post_body()  # type: ignore[no-any-return]
    except PayloadTooLarge:
        raise Refused(413, "The body is larger than this server accepts") from None
    except Exception:  # the client went away, or spoke no HTTP: it cannot be told apart
        raise Refused(400, "The body could not be read") from None


@without_frames
def _parse(kind: str, raw: bytes) -> Body:
    if kind == _JSON:
        return _parse_json(raw)
    if kind == _FORM:
        return _parse_form(raw)
    if not raw and not kind:
        return Body()
    raise Refused(400, f"The body must be {_JSON} or {_FORM}")


def _parse_json(raw: bytes) -> Body:
    try:
        sent = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise Refused(400, "The body is not valid UTF-8") from None
    except (ValueError, RecursionError):
        raise Refused(400, "The body is not valid JSON") from None
    if not isinstance(sent, dict):
        raise Refused(400, "The body must be a JSON object")
    return Body(
        {
            name: value if name == "versions" and isinstance(value, list) else [value]
            for name, value in sent.items()
        }
    )


def _parse_form(raw: bytes) -> Body:
    try:
        pairs = parse_qsl(
            raw.decode("utf-8"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=_FIELDS_MAX,
        )
    except UnicodeDecodeError:
        raise Refused(400, "The form is not valid UTF-8") from None
    except ValueError:
        raise Refused(400, "The form has too many fields") from None
    fields: dict[str, list[Any]] = {}
    for name, value in pairs:
        fields.setdefault(name, []).append(value)
    return Body(fields, is_form=True)
