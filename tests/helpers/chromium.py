"""The system's Chromium, headless, for tests of pages. Needs Debian's packages `chromium` and `chromium-driver`; nothing is downloaded."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    PROGRAM is None or DRIVER is None,
    reason="no Chromium with chromedriver on this machine (Debian: chromium, chromium-driver)",
)

LOOK = """
const seen = {width: document.documentElement.scrollWidth, small: [], pale: [], silent: [], wide: []};
const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
const ground = element => {
  const layers = [];
  for (let e = element; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    const a = c.length > 3 ? c[3] : 1;
    if (a > 0) layers.push([c, a]);
    if (a === 1) break;
  }
  return layers.reduceRight((under, [c, a]) => under.map((u, i) => c[i] * a + u * (1 - a)), [255, 255, 255]);
};
const light = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
document.querySelectorAll("details").forEach(each => { each.open = true; });
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node; (node = walker.nextNode());) {
  const parent = node.parentElement, text = node.textContent.trim();
  if (!text || ["SCRIPT", "STYLE", "OPTION", "TITLE"].includes(parent.tagName.toUpperCase()) || !parent.getClientRects().length) continue;
  const style = getComputedStyle(parent), svg = parent.closest("svg");
  const scale = svg && parent.getScreenCTM ? parent.getScreenCTM().a : 1;
  const size = parseFloat(style.fontSize) * scale;
  if (size < 11) seen.small.push([text, size]);
  if (!svg) {
    const ratio = contrast(rgb(style.color).slice(0, 3), ground(parent));
    if (ratio < 4.5) seen.pale.push([text, Math.round(100 * ratio) / 100]);
  }
}
for (const each of document.querySelectorAll("img")) if (!each.alt) seen.silent.push(each.outerHTML.slice(0, 80));
for (const each of document.querySelectorAll("svg"))
  if (!each.closest("[role=img][aria-label]:not([aria-label='']), [aria-hidden=true]")) seen.silent.push(each.outerHTML.slice(0, 80));
for (const each of document.querySelectorAll("body *")) {
  const box = each.getBoundingClientRect();
  if (box.right > innerWidth + 1 && !each.closest(".scroll, .wide, .pictures, svg")) seen.wide.push(each.outerHTML.slice(0, 80));
}
seen.width = document.documentElement.scrollWidth;
return seen;
"""
"""What a page shows in this window: its width, texts under 11 pixels, texts with little contrast (WCAG's 4.5), pictures without words,
elements that reach out of the window."""


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """A browser session with a profile folder of its own (selenium's WebDriver)."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAM
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--hide-scrollbars",
    ]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}"]
    for flag in flags:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def window(driver: Any, width: int, scheme: str) -> None:
    """Makes the window so wide, in CSS pixels, and the preferred scheme `light` or `dark`."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})


def picture(driver: Any, path: Path) -> None:
    """Writes the window as a PNG file."""
    path.write_bytes(base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]))
