"""An example plugin: it registers an API key with a check, and uses it.

Its page, /-/weather, says whether there is a key, and reads none. The same service as JSON,
/-/weather.json, uses the key. The service that it asks is a stand-in that runs beside it
and accepts every key that begins with "weather-".
"""

import functools
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
from datasette import Response, hookimpl

from datasette_secrets import (
    CheckResult,
    Secret,
    SecretsError,
    get_secret,
    secret_state,
)

API_KEY = "WEATHER_API_KEY"

PAGE = """
{% extends "base.html" %}
{% block title %}Weather{% endblock %}
{% block content %}
<h1>Weather</h1>
{% if state.is_set %}
  <p class="message-info">{{ name }} is set: this plugin is ready to work.</p>
{% elif state.state == "not-set" %}
  <p class="message-warning">{{ name }} is not set.</p>
{% else %}
  <p class="message-error">{{ name }} cannot be read: its state is {{ state.state }}.</p>
{% endif %}
{% if may_set %}
  <p><a href="{{ urls.path('/-/secrets/' ~ name) }}">Set {{ name }}</a></p>
{% endif %}
{% endblock %}
"""


@hookimpl
def register_secrets():
    return [
        Secret(
            API_KEY,
            description="The weather plugin asks for forecasts with it",
            obtain_url="https://weather.example.com/api-keys",
            obtain_label="Get a weather API key",
            check=check,
            looks_like="^weather-",
        )
    ]


@hookimpl
def register_routes():
    return [(r"^/-/weather$", page), (r"^/-/weather\.json$", page_json)]


@hookimpl
def menu_links(datasette):
    return [{"href": datasette.urls.path("/-/weather"), "label": "Weather"}]


async def check(api_key):
    status = await ask_service(api_key)
    if status == 200:
        return CheckResult("works", "The weather service accepts this key")
    if status == 401:
        return CheckResult("rejected", "The weather service does not accept this key")
    return CheckResult("unknown", f"The weather service answered with status {status}")


async def page(datasette, request):
    template = datasette.get_jinja_environment(request).from_string(PAGE)
    context = {
        "name": API_KEY,
        "state": await secret_state(datasette, API_KEY),
        "may_set": await datasette.allowed(
            action="manage-secrets", actor=request.actor
        ),
    }
    return Response.html(await datasette.render_template(template, context, request))


async def page_json(datasette, request):
    return Response.json({"ok": True, **await forecast(datasette, request.actor)})


async def forecast(datasette, actor):
    """What the service says to the key, and if there is no key, why."""
    actor_id = actor["id"] if actor else None
    try:
        api_key = await get_secret(datasette, API_KEY, actor_id)
    except SecretsError as error:
        return {"state": "error", "error": {"code": error.code, "message": str(error)}}
    if api_key is None:
        return {"state": "not set", "error": None}
    status = await ask_service(api_key)
    return {"state": "readable", "status": status, "error": None}


async def ask_service(api_key):
    # The service runs on this machine, so no proxy is asked.
    async with httpx2.AsyncClient(timeout=5, trust_env=False) as client:
        headers = {"Authorization": f"Bearer {api_key}"}
        response = await client.get(service_url() + "/forecast", headers=headers)
    return response.status_code


class Service(BaseHTTPRequestHandler):
    """Stands in for the weather service. A real plugin has none of this."""

    def do_GET(self):
        accepted = self.headers["Authorization"].startswith("Bearer weather-")
        self.send_response(200 if accepted else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@functools.cache
def service_url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"
