"""The page in a browser: an image is asked about, the answer streams in, what was refused is shown, a long answer can be stopped."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from typing import Any

import pytest
from chromium import browser, needs_chromium, window
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from flamingo_export.serve.app import create_app, page

from .conftest import Client, image_part, running, user

pytestmark = [pytest.mark.slow, needs_chromium]

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
    const holding = name => { const files = new DataTransfer(); files.items.add(new File([bytes], name, { type: "image/png" })); return files; };
    $("files").files = holding("a.png").files; $("files").dispatchEvent(new Event("change"));
    await wait(() => document.querySelectorAll("#media figure").length === 1);
    $("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: holding("b.png"), cancelable: true }));
    await wait(() => document.querySelectorAll("#media figure").length === 2);
    document.querySelectorAll("#media figure button")[1].click();
    found.alt = document.querySelector("#media img").alt;
    $("beams").value = 3; $("go").click();
    await wait(() => $("go").disabled === false && $("facts").textContent);
    found.answer = $("answer").textContent; found.facts = $("facts").textContent;
    found.seen = document.querySelectorAll("#media figure.seen").length;
    found.others = document.querySelectorAll("#others tbody tr").length;
    found.tokens = document.querySelectorAll("#token-table tbody tr").length;
    const looked = () => [...document.querySelectorAll("#looked-at figcaption, #token-table td:last-child")].map(each => each.textContent);
    found.looked = looked();
    $("add-shot").click();
    const input = document.querySelector("#shots input[type=file]");
    input.files = holding("shot.png").files; input.dispatchEvent(new Event("change"));
    await wait(() => document.querySelector("#shots figure"));
    const says = document.querySelectorAll("#shots .fields input")[1];
    says.value = "a purple square"; says.dispatchEvent(new Event("input"));
    const finished = () => !$("go").disabled && $("facts").textContent;
    $("go").click(); await wait(finished);
    found.shown = $("answer").textContent; found.lookedAfter = looked();
    document.querySelector("#media figure button").click(); $("question").value = "What colour is it?";
    $("go").click(); await wait(finished);
    found.lookedAlone = looked(); $("question").value = "";
    document.querySelector("#shots .fields button").click();
    $("files").files = holding("a.png").files; $("files").dispatchEvent(new Event("change"));
    await wait(() => document.querySelectorAll("#media figure").length === 1);
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
    text = page()
    image = json.dumps(image_part()["image_url"]["url"])
    reports: queue.Queue[Any] = queue.Queue()

    async def played(_: Request) -> Response:
        return HTMLResponse(text.replace("</body>", f"<script>const IMAGE = {image};</script>{DRIVER}</body>"))

    async def reported(request: Request) -> Response:
        reports.put(await request.json())
        return Response(status_code=204)

    app = create_app(client.server)
    app.router.routes[:0] = [Route("/played", played), Route("/found", reported, methods=["POST"])]
    with running(client.server, app) as visited, browser(tmp_path) as driver:
        window(driver, width, "light")
        driver.get(f"http://127.0.0.1:{visited.port}/played")
        found = reports.get(timeout=120)
    assert "failed" not in found, found
    wanted = client.chat(messages=user(image_part()), beams=3)
    assert found["models"] == ["nano"]
    assert "Add an image" in found["empty"]
    assert found["alt"] == "a.png"
    assert found["answer"] == wanted.json["choices"][0]["message"]["content"]
    assert "prompt tokens" in found["facts"]
    assert (found["seen"], found["others"]) == (1, 2)
    assert found["tokens"] == wanted.json["usage"]["completion_tokens"]
    assert found["looked"] == ["Image 1"] * (1 + found["tokens"])
    shot = {"image": image_part()["image_url"]["url"], "caption": "a purple square"}
    wanted = client.chat(messages=user(image_part()), shots=[shot], beams=3)
    assert found["shown"] == wanted.json["choices"][0]["message"]["content"]
    assert set(found["lookedAfter"]) == {"Image 1"}
    assert set(found["lookedAlone"]) == {"Example 1"}
    assert "<image>" in found["refused"]
    assert found["stopped"] == "Stopped."
    assert found["width"], "the page is wider than the window"
