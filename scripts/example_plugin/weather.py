"""A plugin that needs an API key: it registers the key, and reads it when it is needed.

Its page, /-/weather, says whether the key can be read and never shows it. The same
as JSON, for programs: /-/weather.json
"""

from datasette import Response, hookimpl

from datasette_secrets import Secret, SecretsError, get_secret

API_KEY = "WEATHER_API_KEY"

PAGE = """
{% extends "base.html" %}
{% block title %}Weather{% endblock %}
{% block content %}
<h1>Weather</h1>
{% if state == "readable" %}
  <p class="message-info">{{ name }} can be read: this plugin is ready to work.</p>
{% elif state == "not set" %}
  <p class="message-warning">{{ name }} is not set.</p>
{% else %}
  <p class="message-error">{{ error.message }}</p>
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
        )
    ]


@hookimpl
def register_routes():
    return [(r"^/-/weather$", page), (r"^/-/weather\.json$", page_json)]


@hookimpl
def menu_links(datasette):
    return [{"href": datasette.urls.path("/-/weather"), "label": "Weather"}]


async def page(datasette, request):
    template = datasette.get_jinja_environment(request).from_string(PAGE)
    may_set = await datasette.allowed(action="manage-secrets", actor=request.actor)
    report = await status(datasette, request.actor)
    context = {"name": API_KEY, "may_set": may_set, **report}
    return Response.html(await datasette.render_template(template, context, request))


async def page_json(datasette, request):
    return Response.json({"ok": True, **await status(datasette, request.actor)})


async def status(datasette, actor):
    """Whether the key can be read now, and if not, why."""
    actor_id = actor["id"] if actor else None
    try:
        api_key = await get_secret(datasette, API_KEY, actor_id)
    except SecretsError as error:
        return {"state": "error", "error": {"code": error.code, "message": str(error)}}
    # A real plugin would call its service with api_key here.
    return {"state": "not set" if api_key is None else "readable", "error": None}
