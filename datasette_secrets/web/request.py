"""A request: who asks, for which secret, and what was sent as JSON or in a form.

If a body cannot be read or parsed, `Refused` is raised without the frames that hold the
body. A `Body` is safe to hold, because its `repr` shows nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote

from datasette.utils import path_with_replaced_args, tilde_decode, tilde_encode
from datasette.utils.asgi import PayloadTooLarge, Request

from .. import listing, schema
from ..errors import InvalidSecret, without_frames
from ..instance import Instance, get_instance

if TYPE_CHECKING:
    from datasette.app import Datasette


LIST = "/-/secrets"

_FORM = "application/x-www-form-urlencoded"
_JSON = "application/json"
_FIELDS_MAX = 20_000


class Refused(Exception):
    """Answers the request with this status and this sentence."""

    def __init__(
        self, status: int, sentence: str, headers: dict[str, str] | None = None
    ) -> None:
        self.status = status
        self.headers = headers
        super().__init__(sentence)


class Body:
    """What was sent, by field. Neither `repr` nor `str` shows it.

    `is_form`: a web form sent it, so white space at the ends of a field is an accident.
    """

    __slots__ = ("_fields", "is_form")

    def __init__(
        self, fields: Mapping[str, list[Any]] | None = None, *, is_form: bool = False
    ) -> None:
        self._fields = dict(fields or {})
        self.is_form = is_form

    def __repr__(self) -> str:
        return "<Body>"

    def has_only(self, *known: str) -> bool:
        """Whether every field is one of these. The names of others may be anything."""
        return self._fields.keys() <= set(known)

    def has(self, name: str) -> bool:
        """Whether the field was sent, and not as null."""
        return self.first(name) is not None

    def first(self, name: str) -> Any:
        """A field that holds no secret, as it was sent; None without it."""
        return next(iter(self._fields.get(name, ())), None)

    def texts(self, name: str) -> set[str]:
        """Every value of a field that holds no secret, as text."""
        return set(map(str, self._fields.get(name, ())))

    def numbers(self, *names: str, as_text: bool = False) -> list[int]:
        """The version numbers in these fields. Raises InvalidSecret.

        `as_text`: JSON may hold their digits as text, as a form does.
        """
        numbers = []
        for name in names:
            for number in self._fields.get(name, ()):
                if number is None or number == "":
                    continue
                if isinstance(number, str) and (self.is_form or as_text):
                    number = whole_number(number)
                if type(number) is not int or not 0 <= number < schema.VERSION_MAX:
                    raise InvalidSecret(f"{name} must be a whole number")
                numbers.append(number)
        return numbers

    def number(self, name: str) -> int | None:
        """The version number in a field, None without one. Raises InvalidSecret."""
        return next(iter(self.numbers(name)), None)

    def flag(self, name: str) -> bool:
        """Whether this was asked for: a ticked box, or true. Raises InvalidSecret."""
        flag = self.first(name)
        if not self.is_form and flag is not None and not isinstance(flag, bool):
            raise InvalidSecret(f"{name} must be true or false")
        return bool(flag)

    def details(self) -> dict[str, Any]:
        """The note and the date that were sent, without what a form left as it was."""
        details = {}
        for name in ("note", "renew_by"):
            if self.has(name) and not self.is_untouched(name):
                text = self.first(name).strip() if self.is_form else self.first(name)
                details[name] = None if (name, text) == ("renew_by", "") else text
        return details

    def is_untouched(self, name: str) -> bool:
        """Whether a form sent what it showed in this field, which is one line."""
        shown = self.first(f"expected_{name}")
        return self.is_form and self.first(name) == (shown and shown.replace("\n", ""))

    def typed(self, name: str) -> str:
        """A field to show in the form again; empty where somebody typed the value into it."""
        text = str(self.first(name) or "")
        may_hold_it = self.has_value and not self.is_untouched(name)
        return "" if may_hold_it and self.take_value() in text else text

    @property
    def has_value(self) -> bool:
        """Whether there is a value to store: in a form, one that is not blank."""
        return self.has(self._value) and not (self.is_form and not self.take_value())

    def take_value(self) -> Any:
        """The value to store. Pass it on within the same expression; never name it."""
        return (
            self.first(self._value).strip() if self.is_form else self.first(self._value)
        )

    @property
    def _value(self) -> str:
        return "secret" if self.has("secret") else "value"


@dataclass
class Visit:
    """One request.

    `sent`, `error`, `status`: what was sent, and why it was refused if it was.
    """

    datasette: Datasette
    request: Request
    sent: Body = field(default_factory=Body)
    error: str = ""
    status: int = 200

    @property
    def instance(self) -> Instance:
        return get_instance(self.datasette)

    @property
    def method(self) -> str:
        return "GET" if self.request.method == "HEAD" else str(self.request.method)

    @property
    def media_type(self) -> str:
        """In lower case and without parameters; empty if unsaid."""
        header: str = self.request.headers.get("content-type") or ""
        return header.partition(";")[0].strip().lower()

    @property
    def wants_json(self) -> bool:
        headers = self.request.headers
        return (
            self.request.path.endswith(".json")
            or self.media_type == _JSON
            or _JSON in (headers.get("accept") or "")
            or (headers.get("authorization") or "").lower().startswith("bearer ")
        )

    @property
    def actor_id(self) -> str | None:
        actor_id = (self.request.actor or {}).get("id")
        return str(actor_id) if actor_id else None

    @property
    def name(self) -> str:
        """The secret's name: tilde-encoded as Datasette's links are, or percent-encoded."""
        return str(tilde_decode(unquote(self.request.url_vars["name"])))

    @property
    def list_url(self) -> str:
        return str(self.datasette.urls.path(LIST))

    @property
    def secret_url(self) -> str:
        return f"{self.list_url}/{tilde_encode(self.name)}"

    def argument(self, name: str) -> str:
        """An argument of the address, empty without it."""
        return self.request.args.get(name) or ""

    def page_url(self, url: str, after: str | None) -> str | None:
        """The address of another page: "" is the first one, and None is none."""
        if after is None:
            return None
        changed = {"_next": after or None}
        return str(path_with_replaced_args(self.request, changed, url))

    async def secret(self) -> listing.Listed:
        """The secret of this name. Raises Refused if there is none."""
        listed = await listing.find_secret(self.datasette, self.name)
        if listed is None:
            raise Refused(
                404, "No secret has this name: none is registered, and none is stored"
            )
        return listed


def whole_number(text: str) -> int | None:
    """The number that these ASCII digits are; None for anything else."""
    is_number = text.isascii() and text.isdigit() and len(text) < 19
    return int(text) if is_number else None


async def read(visit: Visit, *fields: str) -> Body:
    """What was sent. An empty body without a media type is an empty object.

    Raises Refused if it cannot be read, or is an object with another field than these.
    """
    sent = _parse(visit.media_type, await _read(visit.request))
    if not sent.is_form and not sent.has_only(*fields):
        known = ", ".join(fields) or "no keys"
        raise Refused(400, f"The object has an unknown key. It can have {known}")
    return sent


async def _read(request: Request) -> bytes:
    try:
        return await request.post_body()  # type: ignore[no-any-return]
    except PayloadTooLarge:
        raise Refused(413, "The body is larger than this server accepts") from None
    except Exception:  # the client went away, or spoke no HTTP: it cannot be told apart
        raise Refused(400, "The body could not be read") from None


@without_frames
def _parse(kind: str, raw: bytes) -> Body:
    if not raw and not kind:
        return Body()
    if kind not in (_JSON, _FORM):
        raise Refused(400, f"The body must be {_JSON} or {_FORM}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(400, "The body is not valid UTF-8") from None
    return _parse_json(text) if kind == _JSON else _parse_form(text)


def _parse_json(text: str) -> Body:
    try:
        sent = json.loads(text)
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


def _parse_form(text: str) -> Body:
    try:
        pairs = parse_qsl(
            text, keep_blank_values=True, errors="strict", max_num_fields=_FIELDS_MAX
        )
    except ValueError:
        sentence = "The form is not valid UTF-8, or has too many fields"
        raise Refused(400, sentence) from None
    fields: dict[str, list[Any]] = {}
    for name, value in pairs:  # browsers send CRLF, whatever was typed
        fields.setdefault(name, []).append(value.replace("\r\n", "\n"))
    return Body(fields, is_form=True)
