"""The status page as browsers get it. Imports starlette."""

from pathlib import Path

from starlette.responses import Response

FOLDER = Path(__file__).parent
ASSETS = {
    "app.js": "text/javascript",
    "charts.js": "text/javascript",
    "map.js": "text/javascript",
    "panel.js": "text/javascript",
    "words.js": "text/javascript",
    "style.css": "text/css",
}
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_file(name: str, kind: str) -> Response:
    """kind: its media type."""
    return Response((FOLDER / name).read_bytes(), media_type=kind, headers=PAGE_HEADERS)
