"""The page in a browser: an image is asked about, the answer streams in, what was refused is shown, a long answer can be stopped."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

import flamingo_export.serve
from flamingo_export.serve.app import create_app

from .conftest import Client, image_part, running, user

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

DRIVER = """
<script>
const wait = until => new Promise((good, bad) => { const end = Date.now() + 20000; (function look() {
  if (until()) good(); else if (Date.now() > end) bad(new Error("it did not come to that: " + until)); else setTimeout(look, 20); })(); });
(async () => {
  const found = {};
  try {
    await wait(() => $("model").options.length);
    found.models = [...$("model").options].map(o => o.value);
    $("go").click(); found.empty = $("error").textContent;
    const bytes = Uint8Array.from(atob(IMAGE.split(",")[1]), c => c.charCodeAt(0));
    await add([new File([bytes], "a.png", { type: "image/png" })]);
    found.alt = document.querySelector("#media img").alt;
    $("beams").value = 3; $("go").click();
    await wait(() => $("go").disabled === false && $("facts").textContent);
    found.answer = $("answer").textContent; found.facts = $("facts").textContent;
    found.seen = document.querySelectorAll("#media figure.seen").length;
    found.others = document.querySelectorAll("#others tbody tr").length;
    found.tokens = document.querySelectorAll("#token-table tbody tr").length;
    $("question").value = "a <image> b"; $("go").click();
    await wait(() => !$("error").hidden); found.refused = $("error").textContent;
    $("question").value = ""; $("beams").value = 1; $("go").click(); $("stop").click();
    await wait(() => !$("go").disabled); found.stopped = $("facts").textContent;
    found.width = document.documentElement.scrollWidth <= window.innerWidth;
  } catch (e) { found.failed = String(e); }
  await fetch("found", { method: "POST", body: JSON.stringify(found) });
})();
</script>
"""


@pytest.mark.parametrize("width", [375, 1200])
def test_a_visit(client: Client, tmp_path: Path, width: int) -> None:
    """The page with a script behind it that plays the visitor and reports what it saw."""
    page = (Path(flamingo_export.serve.__file__).parent / "page.html").read_text(encoding="utf-8")
    image = json.dumps(image_part()["image_url"]["url"])
    reports: queue.Queue[Any] = queue.Queue()

    async def played(_: Request) -> Response:
        return HTMLResponse(page.replace("</body>", f"<script>const IMAGE = {image};</script>{DRIVER}</body>"))

    async def reported(request: Request) -> Response:
        reports.put(await request.json())
        return Response(status_code=204)

    app = create_app(client.server)
    app.router.routes[:0] = [Route("/played", played), Route("/found", reported, methods=["POST"])]
    assert CHROMIUM
    with running(client.server, app) as visited:
        line = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--window-size={width},900",
            "--remote-debugging-port=0",
        ]
        line += [f"--user-data-dir={tmp_path}", f"http://127.0.0.1:{visited.port}/played"]
        with subprocess.Popen(line, stderr=subprocess.DEVNULL) as browser:
            try:
                found = reports.get(timeout=120)
            finally:
                browser.kill()
    assert "failed" not in found, found
    wanted = client.chat(messages=user(image_part()), beams=3)
    assert found["models"] == ["nano"]
    assert "Add an image" in found["empty"]
    assert found["alt"] == "a.png"
    assert found["answer"] == wanted.json["choices"][0]["message"]["content"]
    assert "image 1" in found["facts"]
    assert (found["seen"], found["others"]) == (1, 2)
    assert found["tokens"] == wanted.json["usage"]["completion_tokens"]
    assert "<image>" in found["refused"]
    assert found["stopped"] == "Stopped."
    assert found["width"], "the page is wider than the window"
